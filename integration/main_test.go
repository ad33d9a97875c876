//go:build netns

package integration

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// Every test runs over these hosts. Each site is closed to what comes in by its link, and dials out by it.
//
//	visitor 203.0.113.2 ─── 203.0.113.1  edge  198.51.100.1 ─── 198.51.100.2 site a: 10.20.0.10 key server, 10.20.0.20 origin
//	                                           198.51.100.5 ─── 198.51.100.6 site b: 10.20.0.20 origin
const (
	edgeVisitors = "203.0.113.1:443"
	edgeTunnel   = "198.51.100.1:7844"
	keyServer    = "10.20.0.10:2407"
	origin       = "10.20.0.20:8080"
)

// bin holds the programs, built with the race detector.
var bin string

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "keyhaven-integration-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	bin = filepath.Join(dir, "race")
	if err := build(bin, "-race"); err != nil {
		return 0, err
	}
	// Programs with the race detector wait a second at their end unless told not to.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		return 0, err
	}
	testnet.Sweep("khit")
	return m.Run(), nil
}

// plainBin builds the programs once more, as users run them.
var plainBin = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(filepath.Dir(bin), "plain")
	return dir, build(dir)
})

// plainPrograms holds the programs without the race detector, for tests of time and memory.
func plainPrograms(t *testing.T) string {
	t.Helper()
	dir, err := plainBin()
	must(t, err)
	return dir
}

// build compiles the programs into dir.
func build(dir string, flags ...string) error {
	for _, prog := range []string{"cmd/keyserver", "cmd/connector", "cmd/edge", "demo", "integration/swarm"} {
		out := filepath.Join(dir, "keyhaven-"+filepath.Base(prog))
		args := append(append([]string{"build"}, flags...), "-o", out, "../"+prog)
		if msg, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", prog, err, msg)
		}
	}
	return nil
}

// A world is an installation and the hosts that it runs on.
type world struct {
	*lab.Lab
	net           *testnet.Net
	edge, visitor *testnet.Namespace
	sites         []*testnet.Namespace
	edgeDev       string // the edge's interface to site a
}

// hosts makes the namespaces of the drawing.
func hosts(t *testing.T) *world {
	t.Helper()
	n, err := testnet.New("khit")
	must(t, err)
	t.Cleanup(func() { check(t, n.Close()) })
	w := &world{net: n}
	for _, h := range []struct {
		name string
		to   **testnet.Namespace
	}{{"edge", &w.edge}, {"visitor", &w.visitor}} {
		*h.to, err = n.Namespace(h.name)
		must(t, err)
	}
	_, _, err = n.Link(w.visitor, w.edge, netip.MustParsePrefix("203.0.113.2/30"), netip.MustParsePrefix("203.0.113.1/30"))
	must(t, err)
	for i, name := range []string{"sitea", "siteb"} {
		s, err := n.Namespace(name)
		must(t, err)
		inner := netip.MustParsePrefix(fmt.Sprintf("198.51.100.%d/30", 2+4*i))
		outer := netip.MustParsePrefix(fmt.Sprintf("198.51.100.%d/30", 1+4*i))
		dev, edgeDev, err := n.Link(s, w.edge, inner, outer)
		must(t, err)
		if i == 0 {
			w.edgeDev = edgeDev
		}
		must(t, s.IP("route", "add", "default", "via", outer.Addr().String()))
		for _, a := range []string{"10.20.0.10/32", "10.20.0.20/32"} {
			must(t, s.AddAddr("lo", netip.MustParsePrefix(a)))
		}
		must(t, s.OutwardOnly(dev, inner.Addr()))
		w.sites = append(w.sites, s)
	}
	return w
}

// siteA and siteB plan the two sites.
func (w *world) siteA() lab.SitePlan {
	return lab.SitePlan{Name: "a", NS: w.sites[0], KeyServer: keyServer, Origin: origin, Ops: "127.0.0.1:9601", KeyServerOps: "127.0.0.1:9602",
		Routes: []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}}
}

func (w *world) siteB() lab.SitePlan {
	return lab.SitePlan{Name: "b", NS: w.sites[1], VNet: "branch", Origin: origin, Ops: "127.0.0.1:9601",
		Routes: []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}}
}

// up makes and starts an installation, which ends with the test. Its logs are searched for races and secrets.
func up(t *testing.T, zones []lab.ZonePlan, sites ...func(*world) lab.SitePlan) *world {
	t.Helper()
	return upWith(t, bin, zones, sites...)
}

// upWith is up with the programs in a given directory.
func upWith(t *testing.T, bin string, zones []lab.ZonePlan, sites ...func(*world) lab.SitePlan) *world {
	t.Helper()
	w := hosts(t)
	plan := lab.Plan{Dir: t.TempDir(), Bin: bin, Tools: filepath.Join(bin, "keyhaven-demo"), Zones: zones,
		Edge: lab.EdgePlan{NS: w.edge, Tunnel: edgeTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"}}
	for _, s := range sites {
		plan.Sites = append(plan.Sites, s(w))
	}
	var err error
	w.Lab, err = lab.New(t.Context(), plan)
	must(t, err)
	t.Cleanup(func() {
		check(t, w.Stop())
		w.searchLogs(t)
		if t.Failed() {
			t.Log(w.Logs())
		}
	})
	must(t, w.Start(t.Context()))
	return w
}

func (w *world) searchLogs(t *testing.T) {
	t.Helper()
	logs := w.Logs()
	if strings.Contains(logs, "DATA RACE") {
		t.Error("a program reports a data race")
	}
	if strings.Contains(logs, "panic:") {
		t.Error("a program panicked")
	}
	if strings.Contains(logs, w.Token.PIN) {
		t.Error("the token's PIN is in a log")
	}
}

// curl fetches as a visitor and returns what it printed.
func (w *world) curl(ctx context.Context, host, path string, args ...string) (string, error) {
	args = append([]string{"-sS", "-m", "15", "--cacert", w.Roots(), "--resolve", host + ":443:203.0.113.1"}, args...)
	var out, errs bytes.Buffer
	cmd := w.visitor.Command(ctx, "curl", append(args, "https://"+host+path)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("curl %s%s: %w: %s", host, path, err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// sClient connects as a visitor with openssl and asks for /.
func (w *world) sClient(ctx context.Context, host string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	args = append([]string{"s_client", "-connect", edgeVisitors, "-servername", host, "-CAfile", w.Roots(), "-verify_return_error", "-ign_eof"}, args...)
	cmd := w.visitor.Command(ctx, "openssl", args...)
	cmd.Stdin = strings.NewReader("GET / HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// signatures counts the key server's good signatures for a name.
func (w *world) signatures(host string) int {
	n := 0
	for line := range strings.Lines(w.KeyServer.Log()) {
		if strings.Contains(line, `"msg":"operation"`) && strings.Contains(line, `"sni":"`+host+`"`) && strings.Contains(line, `"result":"ok"`) {
			n++
		}
	}
	return n
}

// eventually polls for up to a minute.
func eventually(t *testing.T, what string, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := lab.Eventually(ctx, f); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}
