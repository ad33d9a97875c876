//go:build netns

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

// Balancing and configurations are tried over two edges and two sites, whose origins have the same address in two networks.
// Both zones are in the store.
//
//	          ┌── edge1 203.0.113.1 ──┬── connectors a, a2 ─── 10.20.0.20 origin "a"
//	visitor ──┤                       │
//	          └── edge2 203.0.113.9 ──┴── connector b, network "branch" ─── 10.20.0.20 origin "b"
const (
	poolHost   = "pool.keyhaven.test"
	socketHost = "socket.keyhaven.test"
)

func TestPoolsAndConfigurations(t *testing.T) {
	w := twoSites(t)
	t.Run("configurations", w.configurations)
	t.Run("pools", w.pools)
	t.Run("fleet", w.fleet)
}

type twoByTwo struct{ *world }

func twoSites(t *testing.T) *twoByTwo {
	t.Helper()
	w := &twoByTwo{hosts(t)}
	second := netip.MustParsePrefix("203.0.113.9/32")
	must(t, w.edge.AddAddr("lo", second))
	must(t, w.visitor.Route(second, netip.MustParseAddr("203.0.113.1")))
	a, b := w.siteA(), w.siteB()
	a.Replicas = []lab.ConnectorPlan{{Name: "a2", Ops: "127.0.0.1:9603"}}
	dir := t.TempDir()
	plan := lab.Plan{Dir: dir, Bin: bin, Tools: filepath.Join(bin, "keyhaven-demo"), Sites: []lab.SitePlan{a, b},
		Zones:     []lab.ZonePlan{{Host: poolHost, KeyType: "p256"}, {Host: socketHost, KeyType: "p256"}},
		Edge:      lab.EdgePlan{NS: w.edge, Tunnel: edgeTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"},
		MoreEdges: []lab.EdgePlan{{NS: w.edge, Tunnel: "203.0.113.9:7844", Visitors: "203.0.113.9:443", Ops: "127.0.0.1:9604"}},
		Etcd:      lab.EtcdPlan{NS: w.edge, Client: "127.0.0.1:2379", Peer: "127.0.0.1:2380"},
		Adapt: func(file string, cfg map[string]any) {
			switch {
			case strings.HasPrefix(file, "edge"):
				delete(cfg["visitors"].(obj), "zones")
			case strings.HasPrefix(file, "connector-a"):
				cfg["allow"] = append(cfg["allow"].([]obj), obj{"to": "10.20.0.20/32", "ports": []int{8091}})
				cfg["ingress"] = []obj{{"hostname": socketHost, "path": "^/ws", "service": "http://" + socketOrigin}, {"service": "http_status:404"}}
			case strings.HasPrefix(file, "connector-pi"):
				cfg["control"] = controlSocket(dir, strings.TrimSuffix(file, ".yaml"))
			}
		}}
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
	w.admin(t, "pool", "create", "web", "--endpoint", origin+",name=a", "--endpoint", "branch/"+origin+",name=b", "--monitor", "http", "--monitor-interval", "1s")
	w.admin(t, "zone", "add", "pool", "--hostname", poolHost, "--certificate", w.Chain(poolHost), "--key-server", "hsm", "--pool", "web")
	w.admin(t, "zone", "add", "socket", "--hostname", socketHost, "--certificate", w.Chain(socketHost), "--key-server", "hsm", "--tunnel", "a")
	return w
}

// page asks one edge, as a visitor with curl, and returns what it got.
func (w *twoByTwo) page(ctx context.Context, edge int, host, path string, args ...string) (string, error) {
	addr := []string{"203.0.113.1", "203.0.113.9"}[edge]
	return w.curl(ctx, host, path, append([]string{"--resolve", host + ":443:" + addr}, args...)...)
}

// origin asks one edge for the pool's page and returns whose it is.
func (w *twoByTwo) origin(ctx context.Context, edge int, args ...string) (string, error) {
	out, err := w.page(ctx, edge, poolHost, "/", append([]string{"-f"}, args...)...)
	if err != nil {
		return "", err
	}
	for _, name := range []string{"a", "b"} {
		if strings.Contains(out, fmt.Sprintf("private origin %q", name)) {
			return name, nil
		}
	}
	return "", fmt.Errorf("got %q", out)
}

// An answer is a page that came.
type answer struct {
	began, took time.Duration
	edge        int
	from        string
}

// visitors ask both edges, over and over.
type visitors struct {
	start time.Time
	mu    sync.Mutex
	all   []answer
	fails []string
}

// visit has visitors come until stop is called.
func (w *twoByTwo) visit(t *testing.T) (v *visitors, stop func()) {
	v = &visitors{start: time.Now()}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for edge := range 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				began := time.Since(v.start)
				from, err := w.origin(t.Context(), edge)
				v.mu.Lock()
				if err != nil {
					v.fails = append(v.fails, fmt.Sprintf("%.2f s, edge %d: %v", began.Seconds(), edge, err))
				}
				v.all = append(v.all, answer{began, time.Since(v.start) - began, edge, from})
				v.mu.Unlock()
			}
		})
	}
	return v, func() { cancel(); wg.Wait() }
}

// settled waits until the last dozen answers of both edges are all of those origins, and each of them is there.
func (v *visitors) settled(t *testing.T, what string, since time.Duration, want ...string) {
	t.Helper()
	eventually(t, what, func(context.Context) error {
		v.mu.Lock()
		defer v.mu.Unlock()
		for edge := range 2 {
			n, seen := 0, map[string]bool{}
			for i := len(v.all) - 1; i >= 0 && n < 12 && v.all[i].began > since; i-- {
				if v.all[i].edge == edge {
					n++
					seen[v.all[i].from] = true
				}
			}
			good := n == 12 && len(seen) == len(want)
			for _, o := range want {
				good = good && seen[o]
			}
			if !good {
				return fmt.Errorf("edge %d: the last %d answers are of %v, want %v", edge, n, seen, want)
			}
		}
		return nil
	})
	latest := [2]time.Duration{}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, a := range v.all {
		if a.began > since && len(want) == 1 && a.from != want[0] {
			latest[a.edge] = a.began - since
		}
	}
	if len(want) == 1 {
		t.Logf("%s: the last request that went elsewhere began %.0f ms (edge1) and %.0f ms (edge2) after the command; 0 is none", what,
			float64(latest[0].Microseconds())/1000, float64(latest[1].Microseconds())/1000)
	}
}

// pools changes weights, disables and drains endpoints while visitors come to both edges, and kills an origin.
func (w *twoByTwo) pools(t *testing.T) {
	v, stop := w.visit(t)
	defer stop()
	v.settled(t, "both endpoints serve", 0, "a", "b")
	v.mu.Lock()
	v.fails = nil // from before the zone was on both edges
	v.mu.Unlock()
	for i, step := range []struct {
		args []string
		want []string
	}{
		{[]string{"weight", "web", "b", "0"}, []string{"a"}},
		{[]string{"weight", "web", "b", "1"}, []string{"a", "b"}},
		{[]string{"disable", "web", "a"}, []string{"b"}},
		{[]string{"enable", "web", "a"}, []string{"a", "b"}},
		{[]string{"drain", "web", "b"}, []string{"a"}},
		{[]string{"enable", "web", "b"}, []string{"a", "b"}},
	} {
		_, err := w.EdgeAt(t.Context(), i%2, append([]string{"pool", "endpoint"}, step.args...)...)
		must(t, err)
		v.settled(t, strings.Join(step.args, " "), time.Since(v.start), step.want...)
	}
	since := time.Since(v.start)
	must(t, w.Sites[1].Origin.Kill())
	v.settled(t, "origin b killed", since, "a")
	for edge := range 2 {
		eventually(t, "the monitor says so", func(ctx context.Context) error {
			out, err := w.EdgeAt(ctx, edge, "pool", "info", "web")
			if err == nil && !strings.Contains(out, "down") {
				err = fmt.Errorf("edge %d: got\n%s", edge, out)
			}
			return err
		})
	}
	since = time.Since(v.start)
	must(t, w.Sites[1].Origin.Start())
	v.settled(t, "origin b is back", since, "a", "b")
	stop()
	v.mu.Lock()
	if len(v.fails) > 0 {
		t.Errorf("%d of %d requests failed:\n%s", len(v.fails), len(v.all), strings.Join(v.fails, "\n"))
	}
	t.Logf("%d requests, none may fail", len(v.all))
	v.mu.Unlock()
	w.affinity(t)
	w.safeRetry(t)
}

// affinity keeps a visitor at one endpoint, at both edges, while it drains, until it is disabled.
func (w *twoByTwo) affinity(t *testing.T) {
	w.admin(t, "pool", "set", "web", "--affinity", "cookie")
	defer w.admin(t, "pool", "set", "web", "--affinity", "none")
	jar := w.Path("cookies")
	var home string
	for edge := range 2 {
		eventually(t, "a cookie", func(ctx context.Context) error {
			out, err := w.page(ctx, edge, poolHost, "/", "-f", "-o", "/dev/null", "-D", "-")
			if err == nil && !strings.Contains(strings.ToLower(out), "set-cookie:") {
				err = errors.New("none yet")
			}
			return err
		})
	}
	home, err := w.origin(t.Context(), 0, "-c", jar)
	must(t, err)
	stays := func(when string) {
		t.Helper()
		for i := range 12 {
			if got, err := w.origin(t.Context(), i%2, "-b", jar); err != nil || got != home {
				t.Errorf("%s: edge %d: got %q, %v; want %q", when, i%2, got, err, home)
			}
		}
	}
	stays("with the cookie")
	w.admin(t, "pool", "endpoint", "drain", "web", home)
	stays("while the endpoint drains")
	w.admin(t, "pool", "endpoint", "disable", "web", home)
	for edge := range 2 {
		eventually(t, "the visitor moves", func(ctx context.Context) error {
			got, err := w.origin(ctx, edge, "-b", jar)
			if err == nil && got == home {
				err = fmt.Errorf("edge %d: still %q", edge, got)
			}
			return err
		})
	}
	w.admin(t, "pool", "endpoint", "enable", "web", home)
}

// safeRetry has one endpoint of two that refuses connections, and no monitor to say so: no request fails by it, not even one
// that may not be repeated, since nothing of it has left.
func (w *twoByTwo) safeRetry(t *testing.T) {
	w.admin(t, "pool", "create", "half", "--endpoint", origin+",name=good", "--endpoint", "10.20.0.20:8091,name=closed", "--steering", "round_robin")
	w.admin(t, "zone", "set", "pool", "--pool", "half")
	type endpoint struct {
		Name     string
		Failures uint64
	}
	eventually(t, "the zone leads there", func(ctx context.Context) error {
		for edge := range 2 {
			out, err := w.EdgeAt(ctx, edge, "pool", "info", "half", "--output", "json")
			if err != nil {
				return err
			}
			var v struct {
				Health struct{ Endpoints []endpoint }
			}
			if err := json.Unmarshal([]byte(out), &v); err != nil {
				return err
			}
			if _, err := w.origin(ctx, edge); err != nil {
				t.Errorf("edge %d: GET: %v", edge, err)
			}
			tried := slices.ContainsFunc(v.Health.Endpoints, func(e endpoint) bool { return e.Name == "closed" && e.Failures > 0 })
			if !tried {
				return fmt.Errorf("edge %d: the closed port was not tried yet:\n%s", edge, out)
			}
		}
		return nil
	})
	for i := range 12 {
		if out, err := w.page(t.Context(), i%2, poolHost, "/upload", "-f", "-d", "hello"); err != nil || !strings.HasPrefix(out, "5 ") {
			t.Errorf("POST %d: got %q, %v", i, out, err)
		}
	}
}
