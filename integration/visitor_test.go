//go:build netns

package integration

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

const plain = "www.keyhaven.test"

var onePlainZone = []lab.ZonePlan{{Host: plain, KeyType: "p256"}}

// Each key type, in both versions, with both clients. The key server's records must show one signature for each.
func TestHandshakes(t *testing.T) {
	types := []string{"p256", "p384", "p521", "rsa2048", "rsa3072", "rsa4096", "ed25519"}
	var zones []lab.ZonePlan
	for _, kt := range types {
		zones = append(zones, lab.ZonePlan{Host: kt + ".keyhaven.test", KeyType: kt})
	}
	w := up(t, zones, (*world).siteA)
	for _, z := range zones {
		for _, v := range []struct{ name, curl, openssl string }{{"TLS 1.2", "--tls-max 1.2", "-tls1_2"}, {"TLS 1.3", "--tlsv1.3", "-tls1_3"}} {
			t.Run(z.KeyType+", "+v.name, func(t *testing.T) {
				before := w.signatures(z.Host)
				out, err := w.curl(t.Context(), z.Host, "/", strings.Fields(v.curl)...)
				if err != nil || !strings.Contains(out, `private origin "a"`) {
					t.Errorf("curl: got %q, %v", out, err)
				}
				out, err = w.sClient(t.Context(), z.Host, v.openssl)
				if err != nil || !strings.Contains(out, `private origin "a"`) || !strings.Contains(out, "Verify return code: 0") {
					t.Errorf("openssl s_client: %v\n%s", err, out)
				}
				eventually(t, "records", func(context.Context) error {
					if n := w.signatures(z.Host) - before; n != 2 {
						return fmt.Errorf("got %d signatures, want 2", n)
					}
					return nil
				})
			})
		}
	}
}

// A client without ECDHE: the token decrypts, if zone, client and key allow it.
func TestRSAKeyExchange(t *testing.T) {
	zones := []lab.ZonePlan{{Host: "old.keyhaven.test", KeyType: "rsa2048", Decrypt: true}, {Host: "rsa.keyhaven.test", KeyType: "rsa2048"}}
	w := up(t, zones, (*world).siteA)
	out, err := w.sClient(t.Context(), "old.keyhaven.test", "-tls1_2", "-cipher", "AES128-GCM-SHA256")
	if err != nil || !strings.Contains(out, "Cipher is AES128-GCM-SHA256") || !strings.Contains(out, `private origin "a"`) {
		t.Errorf("allowed zone: %v\n%s", err, out)
	}
	out, err = w.sClient(t.Context(), "rsa.keyhaven.test", "-tls1_2", "-cipher", "AES128-GCM-SHA256")
	if err == nil || !strings.Contains(out, "handshake failure") {
		t.Errorf("other zone: got %v, want a handshake failure\n%s", err, out)
	}
}

// The edge's namespace has routes to the site, and yet nothing there answers; through the tunnel it does.
func TestSiteIsOutOfReach(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	must(t, w.edge.Route(netip.MustParsePrefix("10.20.0.0/24"), netip.MustParseAddr("198.51.100.2")))
	for _, addr := range []string{keyServer, origin, "10.20.0.10:22", "10.20.0.20:9"} {
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		c, err := w.edge.Dial(ctx, addr)
		cancel()
		if err == nil {
			c.Close()
			t.Errorf("%s answers the edge without the tunnel", addr)
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s refuses, so packets reach it", addr)
		}
	}
	for _, addr := range []string{keyServer, origin} {
		c, err := w.sites[0].Dial(t.Context(), addr)
		if err != nil {
			t.Fatalf("%s does not answer inside the site: the test proves nothing: %v", addr, err)
		}
		c.Close()
	}
	if out, err := w.curl(t.Context(), plain, "/"); err != nil {
		t.Errorf("through the tunnel: %q, %v", out, err)
	}
	// Without its tunnel the edge has no way at all.
	must(t, w.Sites[0].Connector.Stop())
	if out, err := w.curl(t.Context(), plain, "/", "-f"); err == nil {
		t.Errorf("a page came without a tunnel: %q", out)
	}
}

// The same private address in two virtual networks is two origins, at the same time.
func TestOverlappingNetworks(t *testing.T) {
	zones := []lab.ZonePlan{{Host: "a.keyhaven.test", KeyType: "p256", Site: 0}, {Host: "b.keyhaven.test", KeyType: "p256", Site: 1}}
	w := up(t, zones, (*world).siteA, (*world).siteB)
	const rounds = 20
	errs := make(chan error, 2*rounds)
	for i, name := range []string{"a", "b"} {
		go func() {
			for range rounds {
				out, err := w.curl(t.Context(), name+".keyhaven.test", "/")
				if err == nil && !strings.Contains(out, fmt.Sprintf("private origin %q", name)) {
					err = fmt.Errorf("zone %s (%d) got %q", name, i, out)
				}
				errs <- err
			}
		}()
	}
	for range 2 * rounds {
		check(t, <-errs)
	}
	out, err := w.Edge(t.Context(), "route", "get", "10.20.0.20", "--output", "json")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"a"`, `"b"`, `"branch"`} {
		if !strings.Contains(out, want) {
			t.Errorf("route get 10.20.0.20 does not name %s:\n%s", want, out)
		}
	}
	// The same prefix twice in one network is refused, with the other route's name.
	_, err = w.Edge(t.Context(), "route", "add", "10.20.0.0/24", "--tunnel", "b")
	if err == nil || !strings.Contains(err.Error(), "10.20.0.0/24") {
		t.Errorf("duplicate route: got %v", err)
	}
}

// A visitor's forged forwarding headers do not arrive; the true ones do.
func TestForwardingHeaders(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	out, err := w.curl(t.Context(), plain, "/request", "-H", "X-Forwarded-For: 192.0.2.66", "-H", "Forwarded: for=192.0.2.66", "-H", "x_forwarded_for: 192.0.2.66", "-H", "X-Real-IP: 192.0.2.66")
	must(t, err)
	if strings.Contains(out, "192.0.2.66") {
		t.Errorf("a forged address arrives: %s", out)
	}
	var got struct{ Header http.Header }
	must(t, json.Unmarshal([]byte(out), &got))
	if xff := got.Header.Get("X-Forwarded-For"); xff != "203.0.113.2" {
		t.Errorf("X-Forwarded-For: got %q, want the visitor's address", xff)
	}
}

// One gigabyte each way, through the edge and the tunnel, with memory that does not grow with it. The programs are those
// that users run: with the race detector they would take minutes, and more memory.
func TestGigabyte(t *testing.T) {
	w := upWith(t, plainPrograms(t), onePlainZone, (*world).siteA)
	const size = 1 << 30
	out, err := w.curl(t.Context(), plain, "/download?n="+strconv.Itoa(size), "-m", "300", "-o", "/dev/null", "-w", "%{size_download}")
	if err != nil || out != strconv.Itoa(size) {
		t.Errorf("download: got %q, %v", out, err)
	}
	file := w.Path("gigabyte")
	f, err := os.Create(file)
	must(t, err)
	sum, block := sha256.New(), make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(block)
	for i := range uint64(size / len(block)) {
		binary.BigEndian.PutUint64(block, i)
		must2(t)(io.MultiWriter(f, sum).Write(block))
	}
	must(t, f.Close())
	out, err = w.curl(t.Context(), plain, "/upload", "-m", "300", "-T", file)
	if want := fmt.Sprintf("%d %x\n", size, sum.Sum(nil)); err != nil || out != want {
		t.Errorf("upload: got %q, %v; want %q", out, err, want)
	}
	for name, pid := range map[string]int{"edge": w.EdgeProc.PID(), "connector": w.Sites[0].Connector.PID()} {
		kib := peakMemory(t, pid)
		t.Logf("%s: peak resident set %d MiB", name, kib>>10)
		if kib > 200<<10 {
			t.Errorf("%s: peak resident set is %d MiB for bodies of 1 GiB", name, kib>>10)
		}
	}
}

func peakMemory(t *testing.T, pid int) (kib int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err = strconv.Atoi(strings.Fields(v)[0])
			must(t, err)
			return kib
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

// A returning visitor costs no signature, after a restart of the edge too, and a ticket of one name is worth nothing at
// another.
func TestResumption(t *testing.T) {
	zones := []lab.ZonePlan{{Host: plain, KeyType: "p256"}, {Host: "other.keyhaven.test", KeyType: "p256"}}
	w := up(t, zones, (*world).siteA)
	for _, v := range []string{"-tls1_2", "-tls1_3"} {
		session := w.Path("session" + v)
		if out, err := w.sClient(t.Context(), plain, v, "-sess_out", session); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		before := w.signatures(plain)
		must(t, w.EdgeProc.Stop())
		must(t, w.EdgeProc.Start())
		must(t, w.AwaitEdge(t.Context()))
		// The key server is gone: a resumed handshake does not miss it.
		must(t, w.KeyServer.Stop())
		eventually(t, v+" resumes without the key server", func(ctx context.Context) error {
			out, err := w.sClient(ctx, plain, v, "-sess_in", session)
			if err != nil || !strings.Contains(out, "Reused, ") || !strings.Contains(out, `private origin "a"`) {
				return fmt.Errorf("%w\n%s", errors.Join(err, errors.New("not resumed, or no page")), out)
			}
			return nil
		})
		if n := w.signatures(plain); n != before {
			t.Errorf("%s: %d signatures for a resumed visitor, want none", v, n-before)
		}
		must(t, w.KeyServer.Start())
		eventually(t, v+" at another name", func(ctx context.Context) error {
			out, err := w.sClient(ctx, "other.keyhaven.test", v, "-sess_in", session)
			if strings.Contains(out, "Reused, ") {
				t.Fatalf("%s: the ticket resumed at another name", v)
			}
			return err
		})
	}
}

// A host with several addresses answers QUIC from the one that was dialled.
func TestSeveralAddresses(t *testing.T) {
	w := hosts(t)
	must(t, w.edge.AddAddr(w.edgeDev, netip.MustParsePrefix("198.51.100.17/32")))
	second := "198.51.100.17:7844"
	plan := lab.Plan{Dir: t.TempDir(), Bin: bin, Tools: bin + "/keyhaven-demo", Zones: onePlainZone, Sites: []lab.SitePlan{w.siteA()},
		Edge: lab.EdgePlan{NS: w.edge, Tunnel: second, Listen: "0.0.0.0:7844", Visitors: edgeVisitors, Ops: "127.0.0.1:9600"}}
	var err error
	w.Lab, err = lab.New(t.Context(), plan)
	must(t, err)
	t.Cleanup(func() { check(t, w.Stop()) })
	must(t, w.Start(t.Context()))
	if out, err := w.curl(t.Context(), plain, "/"); err != nil {
		t.Errorf("got %q, %v", out, err)
	}
}
