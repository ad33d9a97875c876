//go:build netns && upgrade

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

// minor0 is the last commit whose connectors and edges speak minor version 0 of the tunnel's protocol. Its programs are built
// from the history.
const minor0 = "c22663687c7bc55097f70958fb237c2e5b454f87"

// oldTree unpacks the tree of that commit.
func oldTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	archive := filepath.Join(dir, "tree.tar")
	git := exec.Command("git", "archive", "-o", archive, minor0)
	git.Dir = ".." // elsewhere it takes a part of the tree
	if out, err := git.CombinedOutput(); err != nil {
		t.Fatalf("the history has no commit %s, whose programs this test needs; a shallow clone gets it with git fetch --unshallow: %v\n%s", minor0, err, out)
	}
	if out, err := exec.Command("tar", "-xf", archive, "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	return dir
}

// A mixture is a directory of programs, each of which is the old or the new one. Commands of an edge are always the new one's.
type mixture struct {
	dir string
	old string // directory of the old programs
}

func newMixture(t *testing.T) *mixture {
	t.Helper()
	tree := oldTree(t)
	f := &mixture{dir: t.TempDir(), old: filepath.Join(tree, "bin")}
	for _, prog := range []string{"keyserver", "connector", "edge"} {
		cmd := exec.Command("go", "build", "-race", "-buildvcs=false", "-o", filepath.Join(f.old, "keyhaven-"+prog), "./cmd/"+prog)
		cmd.Dir = tree
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s of %s: %v\n%s", prog, minor0, err, out)
		}
	}
	must(t, os.Symlink(filepath.Join(bin, "keyhaven-demo"), filepath.Join(f.dir, "keyhaven-demo")))
	return f
}

// put makes a program the old or the new one, from its next start on.
func (f *mixture) put(t *testing.T, prog string, old bool) {
	t.Helper()
	from := bin
	if old {
		from = f.old
	}
	script := fmt.Sprintf("#!/bin/sh\ncase \"$1\" in run) exec %s/%s \"$@\" ;; *) exec %s/%s \"$@\" ;; esac\n", from, prog, bin, prog)
	next := filepath.Join(f.dir, prog+".next")
	must(t, os.WriteFile(next, []byte(script), 0o755))
	must(t, os.Rename(next, filepath.Join(f.dir, prog)))
}

const (
	theKeyServer, theConnector, theEdge = "keyhaven-keyserver", "keyhaven-connector", "keyhaven-edge"
)

// An installation of the previous minor version becomes one of the present under load: every program beside every other of the
// other version, old ones beside new ones of their kind, and back. No request fails but while the only edge is replaced, and the
// new edge knows what the old one kept.
//
//	visitor ── edge 203.0.113.1 ── connectors a and a2 in site a, key servers ks1 and ks2
func TestUpgrade(t *testing.T) {
	f := newMixture(t)
	for _, prog := range []string{theKeyServer, theConnector, theEdge} {
		f.put(t, prog, true)
	}
	w := hosts(t)
	must(t, w.sites[0].AddAddr("lo", netip.MustParsePrefix("10.20.0.11/32")))
	site := w.siteA()
	site.Replicas = []lab.ConnectorPlan{{Name: "a2", Ops: "127.0.0.1:9603"}}
	w.plan(t, lab.Plan{Dir: t.TempDir(), Bin: f.dir, Tools: filepath.Join(f.dir, "keyhaven-demo"), Zones: onePlainZone, Sites: []lab.SitePlan{site},
		// The old edge gives an origin's connection new requests while its session drains, until it happens to be idle at the
		// right moment.
		Adapt: func(file string, cfg map[string]any) {
			if strings.HasPrefix(file, "connector-") {
				cfg["drain"] = map[string]any{"grace": "100s"}
			}
		},
		Edge:       lab.EdgePlan{NS: w.edge, Tunnel: edgeTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"},
		KeyServers: []lab.KeyServerPlan{{Name: "ks2", Listen: "10.20.0.11:2407", Ops: "127.0.0.1:9612"}}})
	records := w.records(t)
	l := w.visitAll(t, edgeVisitors)
	l.during(t, "all programs are old", func() {})
	w.mustSay(t, "old")

	keyServers := func() {
		for _, k := range w.KeyServers {
			must(t, w.RestartKeyServer(t.Context(), k, false))
			w.mustBeConnected(t, k)
		}
	}
	connectors := func() {
		for _, c := range w.Sites[0].Connectors {
			must(t, w.Restart(t.Context(), c, false))
			w.mustBeHealthy(t)
		}
	}
	edge := func() {
		must(t, w.RestartEdge(t.Context(), 0, false))
		w.mustBeHealthy(t)
	}
	for _, step := range []struct {
		name, prog string
		old        bool
		restart    func()
	}{
		{"new key servers, old edge", theKeyServer, false, keyServers},
		{"new connectors, old edge", theConnector, false, connectors},
		{"old connectors again", theConnector, true, connectors},
		{"new edge, old connectors", theEdge, false, edge},
		{"old key servers, new edge", theKeyServer, true, keyServers},
		{"new connectors, new edge", theConnector, false, connectors},
		{"new key servers, new edge", theKeyServer, false, keyServers},
	} {
		f.put(t, step.prog, step.old)
		l.during(t, step.name, step.restart)
		if now := w.records(t); now != records {
			t.Errorf("after %s the records are\n%s\nbefore they were\n%s", step.name, now, records)
		}
		if step.name == "new edge, old connectors" {
			w.refusesClearly(t)
		}
	}
	w.mustSay(t, "devel")
	// With one edge there is a gap: the old one cuts what it is about to let in, and the new one has no way to a key server
	// until connectors have come back.
	for _, text := range []string{"EOF", "connection reset by peer", "tls: internal error", "502 Bad Gateway: The tunnel to the site is down"} {
		l.forgive(t, "new edge, old connectors:", text)
	}
	l.end(t)
}

// plan makes and starts an installation, which ends with the test.
func (w *world) plan(t *testing.T, p lab.Plan) {
	t.Helper()
	var err error
	w.Lab, err = lab.New(t.Context(), p)
	must(t, err)
	t.Cleanup(func() {
		check(t, w.Stop())
		w.searchLogs(t)
		if t.Failed() {
			t.Log(w.Logs())
		}
	})
	must(t, w.Start(t.Context()))
}

// records is what the edge keeps, as its lists show it.
func (w *world) records(t *testing.T) string {
	t.Helper()
	var all []string
	for _, list := range []struct {
		args   []string
		fields []string
	}{
		{[]string{"vnet", "list"}, []string{"id", "name", "created"}}, {[]string{"tunnel", "list"}, []string{"id", "name", "created"}},
		{[]string{"route", "list"}, []string{"id", "prefix", "vnet", "tunnel"}}, {[]string{"connector", "list"}, []string{"id", "name", "tunnel", "created"}},
	} {
		out, err := w.Edge(t.Context(), append(list.args, "--output", "json")...)
		must(t, err)
		var records []map[string]any
		must(t, json.Unmarshal([]byte(out), &records))
		if len(records) == 0 {
			t.Fatalf("%v shows nothing: the test proves nothing", list.args)
		}
		for _, r := range records {
			line := list.args[0]
			for _, f := range list.fields {
				line += fmt.Sprintf(" %s=%v", f, r[f])
			}
			all = append(all, line)
		}
	}
	slices.Sort(all)
	return strings.Join(all, "\n")
}

// mustBeHealthy waits until the tunnel has all connections of both connectors.
func (w *world) mustBeHealthy(t *testing.T) {
	t.Helper()
	eventually(t, "the tunnel is healthy", func(ctx context.Context) error {
		out, err := w.Edge(ctx, "tunnel", "list", "--output", "json")
		if err != nil {
			return err
		}
		if !strings.Contains(out, `"status": "healthy"`) && !strings.Contains(out, `"status":"healthy"`) {
			return fmt.Errorf("got %s", out)
		}
		return nil
	})
}

// mustBeConnected waits until edges have come back to a key server, as whoever restarts several must.
func (w *world) mustBeConnected(t *testing.T, k *lab.KeyServer) {
	t.Helper()
	began := time.Now()
	eventually(t, k.Name+" has connections", func(ctx context.Context) error {
		out, err := w.sites[0].Command(ctx, "curl", "-sS", "-m", "5", "http://"+k.Ops+"/metrics").Output()
		if err == nil && !regexp.MustCompile(`(?m)^keyhaven_keyserver_connections [1-9]`).Match(out) {
			err = errors.New("none yet")
		}
		return err
	})
	t.Logf("%s: connected again %.1f s after it was ready", k.Name, time.Since(began).Seconds())
}

// refusesClearly asks for what old connectors do not know.
func (w *world) refusesClearly(t *testing.T) {
	t.Helper()
	out, err := w.Edge(t.Context(), "ping", "10.20.0.20", "--count", "1")
	if text := fmt.Sprint(out, err); err == nil || !strings.Contains(text, "support") {
		t.Errorf("ping through an old connector: %s; want that it is not supported", text)
	}
}

// mustSay is about which programs run: that of the connectors tells its version to the edge.
func (w *world) mustSay(t *testing.T, want string) {
	t.Helper()
	for _, c := range w.Sites[0].Connectors {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.Proc.PID()))
		must(t, err)
		if old := strings.HasPrefix(exe, bin); old == (want == "old") {
			t.Errorf("connector %s runs %s", c.Name, exe)
		}
	}
}

// Two edges, two connectors and two key servers are restarted one after the other. A visitor who tries the other edge when one
// refuses sees nothing of it.
//
//	visitor ──┬── edge1 203.0.113.1 ──┬── connectors a and a2 in site a, key servers ks1 and ks2
//	          └── edge2 203.0.113.9 ──┘
func TestRollingRestart(t *testing.T) {
	w := hosts(t)
	second := netip.MustParsePrefix("203.0.113.9/32")
	must(t, w.edge.AddAddr("lo", second))
	must(t, w.visitor.Route(second, netip.MustParseAddr("203.0.113.1")))
	must(t, w.sites[0].AddAddr("lo", netip.MustParsePrefix("10.20.0.11/32")))
	site := w.siteA()
	site.Replicas = []lab.ConnectorPlan{{Name: "a2", Ops: "127.0.0.1:9603"}}
	w.plan(t, lab.Plan{Dir: t.TempDir(), Bin: bin, Tools: filepath.Join(bin, "keyhaven-demo"), Zones: onePlainZone, Sites: []lab.SitePlan{site},
		Edge:       lab.EdgePlan{NS: w.edge, Tunnel: edgeTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"},
		MoreEdges:  []lab.EdgePlan{{NS: w.edge, Tunnel: "203.0.113.9:7844", Visitors: "203.0.113.9:443", Ops: "127.0.0.1:9604"}},
		Etcd:       lab.EtcdPlan{NS: w.edge, Client: "127.0.0.1:2379", Peer: "127.0.0.1:2380"},
		KeyServers: []lab.KeyServerPlan{{Name: "ks2", Listen: "10.20.0.11:2407", Ops: "127.0.0.1:9612"}}})
	l := w.visitAll(t, edgeVisitors, "203.0.113.9:443")
	for i, e := range w.Edges {
		l.during(t, "restart of "+e.Name, func() {
			must(t, w.RestartEdge(t.Context(), i, false))
			w.mustBeHealthy(t)
		})
	}
	for _, c := range w.Sites[0].Connectors {
		l.during(t, "restart of connector "+c.Name, func() {
			must(t, w.Restart(t.Context(), c, false))
			w.mustBeHealthy(t)
		})
	}
	for _, k := range w.KeyServers {
		l.during(t, "restart of key server "+k.Name, func() {
			must(t, w.RestartKeyServer(t.Context(), k, false))
			w.mustBeConnected(t, k)
		})
	}
	l.end(t)
}

// The examples of the old version are good for the present programs: their own tests, run over the old tree's examples.
func TestOldConfigurations(t *testing.T) {
	tree := oldTree(t)
	for _, prog := range []string{"keyserver", "connector", "edge"} {
		test := filepath.Join(t.TempDir(), prog+".test")
		if out, err := exec.Command("go", "test", "-c", "-o", test, "../cmd/"+prog).CombinedOutput(); err != nil {
			t.Fatalf("build the tests of %s: %v\n%s", prog, err, out)
		}
		cmd := exec.CommandContext(t.Context(), test, "-test.run", "^TestExamples$", "-test.v")
		cmd.Dir = filepath.Join(tree, "cmd", prog)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestExamples") {
			t.Errorf("%s: %v\n%s", prog, err, out)
		}
	}
}
