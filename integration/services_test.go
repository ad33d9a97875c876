//go:build netns

package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"aead.dev/minisign"

	"github.com/keyhaven/keyhaven/appliance/camera"
	"github.com/keyhaven/keyhaven/internal/lab"
)

// What a small site publishes: a camera, packets, and bytes with a bandwidth; and how it is installed.
const (
	camHost = "cam.keyhaven.test"
	getHost = "get.keyhaven.test"
)

func TestSiteServices(t *testing.T) {
	w := hosts(t)
	a := w.siteA()
	var err error
	w.Lab, err = lab.New(t.Context(), lab.Plan{Dir: t.TempDir(), Bin: bin, Tools: filepath.Join(bin, "keyhaven-demo"), Sites: []lab.SitePlan{a},
		Zones: []lab.ZonePlan{{Host: plain, KeyType: "p256"}, {Host: camHost, KeyType: "p256"}, {Host: getHost, KeyType: "p256"}},
		Edge:  lab.EdgePlan{NS: w.edge, Tunnel: edgeTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"}})
	must(t, err)
	t.Cleanup(func() {
		check(t, w.Stop())
		w.searchLogs(t)
		if t.Failed() {
			t.Log(w.Logs())
		}
	})
	site, key := w.installSite(t)
	cfg := w.EdgeConfig()
	for _, z := range cfg["visitors"].(obj)["zones"].([]obj) {
		switch z["hosts"].([]string)[0] {
		case camHost:
			z["origins"] = []obj{{"tunnel": "a"}}
		case getHost:
			z["origins"] = []obj{{"install": site, "install_keys": []string{key}}}
		}
	}
	must(t, w.WriteYAML("edge.yaml", cfg))
	cam := camera.Rule(camHost, "400kB/s")
	must(t, w.WriteYAML("connector-a.yaml", obj{"identity": obj{"dir": w.Path("connector-a")}, "edges": []string{edgeTunnel}, "ops": obj{"listen": "127.0.0.1:9601"},
		"allow": []obj{{"to": "10.20.0.0/16", "ports": []any{"*"}}}, "ingress": []obj{
			{"hostname": cam.Hostname, "path": cam.Path, "service": cam.Service, "bandwidth": cam.Bandwidth},
			{"hostname": "coap.test", "service": "udp://127.0.0.1:5683"},
			{"hostname": "slow.test", "service": "tcp://127.0.0.1:7000", "bandwidth": "200kB/s"},
			{"hostname": "fast.test", "service": "tcp://127.0.0.1:7000"},
			{"service": "http_status:404"}}}))
	must(t, w.Start(t.Context()))
	t.Run("packets", w.ingressPackets)
	t.Run("bandwidth", w.bandwidth)
	t.Run("camera", w.camera)
	t.Run("install.sh", w.installScript)
}

// ingressPackets are packets to a service of the connector's own host, by its rule.
func (w *world) ingressPackets(t *testing.T) {
	arrivals := echoUDP(t, w.sites[0], "127.0.0.1:5683", "coap ")
	const addr = "203.0.113.1:5683"
	w.port(t, "coap", "--protocol", "udp", "--listen", addr, "--tunnel", "a", "--service", "coap.test", "--allow", "203.0.113.2/32", "--idle-timeout", "5s")
	for _, size := range []int{0, 100, 1_400, 30_000} {
		eventually(t, fmt.Sprint(size, " bytes"), func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			return w.packetThere(ctx, addr, bytes.Repeat([]byte{'p'}, size), "coap ")
		})
	}
	for _, from := range arrivals() {
		if !strings.HasPrefix(from.source, "127.0.0.1:") {
			t.Errorf("a packet came from %s", from.source)
		}
	}
	// A rule that carries no packets refuses them, and the port says so.
	w.port(t, "wrong", "--protocol", "udp", "--listen", "203.0.113.1:5684", "--tunnel", "a", "--service", "fast.test", "--allow", "203.0.113.2/32")
	c, err := w.dialUDP("203.0.113.1:5684")
	must(t, err)
	defer c.Close()
	eventually(t, "the port counts a failure", func(context.Context) error {
		must2(t)(c.Write([]byte("hello")))
		m := w.metric(t, "keyhaven_edge_port_failures_total")
		for line := range strings.Lines(m) {
			if strings.Contains(line, `"wrong"`) && !strings.HasSuffix(strings.TrimSpace(line), " 0") {
				return nil
			}
		}
		return fmt.Errorf("got %q", m)
	})
}

// bandwidth has a limited port and one without carry the same.
func (w *world) bandwidth(t *testing.T) {
	const size = 1_000_000
	var ln net.Listener
	must(t, w.sites[0].Do(func() (err error) {
		ln, err = net.Listen("tcp", "127.0.0.1:7000")
		return err
	}))
	body := bytes.Repeat([]byte{'b'}, size)
	serveTCP(t, ln, func(c net.Conn) { c.Write(body) })
	took := map[string]time.Duration{}
	for i, name := range []string{"fast", "slow"} {
		addr := fmt.Sprint("203.0.113.1:700", i)
		w.port(t, name, "--listen", addr, "--tunnel", "a", "--service", name+".test", "--allow", "203.0.113.2/32")
		eventually(t, "the port is open", func(ctx context.Context) error {
			c, err := w.visitor.Dial(ctx, addr)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(time.Minute))
			began := time.Now()
			got, err := io.ReadAll(c)
			took[name] = time.Since(began)
			if err != nil || len(got) != size {
				return fmt.Errorf("%d bytes, %v", len(got), err)
			}
			return nil
		})
	}
	t.Logf("%d bytes: %v without a bandwidth, %v with 200kB/s", size, took["fast"], took["slow"])
	if took["slow"] < 4*time.Second { // at the least, with what may pass at once
		t.Errorf("%d bytes in %v at 200kB/s", size, took["slow"])
	}
}

// camera is a real streamer, without a camera, behind its rule.
func (w *world) camera(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "index.html"), camera.Page(), 0o644))
	args, err := camera.Settings{}.Args("/dev/video63")
	must(t, err)
	for i, a := range args {
		if strings.HasPrefix(a, "--static=") {
			args[i] = "--static=" + dir
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cmd := w.sites[0].Command(ctx, "ustreamer", args...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
	})
	eventually(t, "a picture", func(ctx context.Context) error {
		out, err := w.curl(ctx, camHost, "/snapshot", "-f")
		if err == nil && (!strings.HasPrefix(out, "\xff\xd8\xff") || !strings.HasSuffix(out, "\xff\xd9")) {
			err = fmt.Errorf("%d bytes that are no JPEG", len(out))
		}
		return err
	})
	for path, want := range map[string]string{"/": "<img id=\"picture\" src=\"/stream\"", "/state": "404", "/?action=command": "<img id"} {
		out, err := w.curl(t.Context(), camHost, path)
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("%s: got %v, %s; want %q", path, err, out, want)
		}
	}
	if n := w.frames(t, 1); n < 1 {
		t.Errorf("%d pictures of the stream", n) // one that stands still is sent once in half a minute
	}
}

// frames reads pictures of the stream as a visitor.
func (w *world) frames(t *testing.T, want int) (n int) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := w.visitor.Command(ctx, "curl", "-sSN", "--cacert", w.Roots(), "--resolve", camHost+":443:203.0.113.1", "-i", "--raw", "--http1.1", "https://"+camHost+"/stream")
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { cancel(); cmd.Wait() }()
	res, err := http.ReadResponse(bufio.NewReader(out), nil)
	must(t, err)
	if kind := res.Header.Get("Content-Type"); !strings.HasPrefix(kind, "multipart/x-mixed-replace") || res.Header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("header %v", res.Header)
	}
	for r := multipart.NewReader(res.Body, "boundarydonotcross"); n < want; n++ {
		p, err := r.NextPart()
		if err != nil {
			t.Error(err)
			return n
		}
		if b, err := io.ReadAll(p); err != nil || !bytes.HasPrefix(b, []byte("\xff\xd8\xff")) {
			t.Errorf("picture %d: %d bytes, %v", n, len(b), err)
		}
	}
	return n
}

// installSite signs a directory with the connector of this test.
func (w *world) installSite(t *testing.T) (dir, key string) {
	t.Helper()
	dir = t.TempDir()
	public, secret, err := minisign.GenerateKey(rand.Reader)
	must(t, err)
	program, err := os.ReadFile(filepath.Join(bin, "keyhaven-connector"))
	must(t, err)
	unit, err := os.ReadFile("../packaging/systemd/keyhaven-connector.service")
	must(t, err)
	var sums bytes.Buffer
	must(t, os.Mkdir(filepath.Join(dir, "bin"), 0o755))
	for name, b := range map[string][]byte{"keyhaven-connector-linux-amd64": program, "keyhaven-connector-linux-arm64": program, "keyhaven-connector.service": unit, "connector.yaml": []byte("allow: []\n")} {
		must(t, os.WriteFile(filepath.Join(dir, "bin", name), b, 0o644))
		fmt.Fprintf(&sums, "%x  bin/%s\n", sha256.Sum256(b), name)
	}
	must(t, os.WriteFile(filepath.Join(dir, "SHA256SUMS"), sums.Bytes(), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "SHA256SUMS.minisig"), minisign.Sign(secret, sums.Bytes()), 0o644))
	return dir, public.String()
}

// installScript has another host become a connector: curl, sh, and a join token.
func (w *world) installScript(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	w.admin(t, "tunnel", "token", "create", "a", "--out", token)
	home, root := t.TempDir(), filepath.Join(t.TempDir(), "root")
	must(t, os.WriteFile(filepath.Join(home, ".curlrc"), fmt.Appendf(nil, "cacert = %q\nresolve = \"%s:443:203.0.113.1\"\n", w.Roots(), getHost), 0o644))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := w.sites[1].Command(ctx, "sh", "-c", "curl -fsSL https://"+getHost+"/install.sh | sh -s -- --root "+root+" --token-file "+token)
	cmd.Env = append(os.Environ(), "CURL_HOME="+home, "TMPDIR="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"usr/local/bin/keyhaven-connector", "etc/systemd/system/keyhaven-connector.service", "etc/keyhaven/connector.yaml", "var/lib/keyhaven-connector/cert.pem"} {
		if _, err := os.Stat(filepath.Join(root, name)); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	must(t, os.WriteFile(filepath.Join(root, "connector.yaml"), []byte("identity: {dir: "+root+"/var/lib/keyhaven-connector}\nallow: []\n"), 0o644))
	runs, stop := context.WithCancel(t.Context())
	defer stop()
	run := w.sites[1].Command(runs, filepath.Join(root, "usr/local/bin/keyhaven-connector"), "run", "--config", filepath.Join(root, "connector.yaml"))
	must(t, run.Start())
	defer run.Wait()
	defer stop()
	eventually(t, "the tunnel has another connector", func(context.Context) error {
		var list []struct{ Status string }
		out := w.admin(t, "connector", "list", "--output", "json")
		if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 2 || list[0].Status != "healthy" || list[1].Status != "healthy" {
			return fmt.Errorf("got %v, %s", err, out)
		}
		return nil
	})
}
