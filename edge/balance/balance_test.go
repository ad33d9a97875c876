package balance

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errDown = errors.New("nothing is there")

// A site is what lies behind the tunnel: places that are up, down or silent.
type site struct {
	mu     sync.Mutex
	down   map[string]bool // by host
	silent map[string]bool
	dials  map[string]int
	serve  func(net.Conn) // what a place does with a connection; nil closes it
	delay  map[string]time.Duration
}

func newSite() *site {
	return &site{down: map[string]bool{}, silent: map[string]bool{}, dials: map[string]int{}, delay: map[string]time.Duration{}}
}

func (s *site) set(host string, down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down[host] = down
}

func (s *site) dialled(host string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dials[host]
}

func (s *site) reach(ctx context.Context, q control.Query) error {
	s.mu.Lock()
	s.dials[q.Host]++
	down, silent, delay := s.down[q.Host], s.silent[q.Host], s.delay[q.Host]
	s.mu.Unlock()
	if silent {
		<-ctx.Done()
		return ctx.Err()
	}
	time.Sleep(delay)
	if down {
		return errDown
	}
	return nil
}

func (s *site) Dial(ctx context.Context, q control.Query) (net.Conn, error) {
	if err := s.reach(ctx, q); err != nil {
		return nil, err
	}
	a, b := net.Pipe()
	if s.serve != nil {
		go s.serve(b)
	} else {
		_ = b.Close()
	}
	return a, nil
}

func (s *site) Echo(ctx context.Context, q control.Query, _ tunnel.EchoRequest) (tunnel.EchoReply, error) {
	if err := s.reach(ctx, q); err != nil {
		return tunnel.EchoReply{}, err
	}
	return tunnel.EchoReply{Type: tunnel.EchoReplied, RTT: 3 * time.Millisecond}, nil
}

func weight(w float64) *float64 { return &w }

// poolOf returns a pool with endpoints a, b, … of the given weights.
func poolOf(name string, weights ...float64) spec.PoolConfig {
	p := spec.PoolConfig{Name: name}
	for i, w := range weights {
		p.Endpoints = append(p.Endpoints, spec.Endpoint{Name: string(rune('a' + i)), Host: fmt.Sprintf("%s-%c", name, 'a'+i), Port: 80, Weight: weight(w)})
	}
	return p
}

func newBalancer(t *testing.T, s *site, pools ...spec.PoolConfig) *Balancer {
	t.Helper()
	b, err := New(Config{Dialer: s, Key: make([]byte, keySize)})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Set(pools); err != nil {
		t.Fatal(err)
	}
	return b
}

func visitor(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}) }

// pick picks and keeps the lease.
func pick(t *testing.T, b *Balancer, pool string, v Visit) *Lease {
	t.Helper()
	l, err := b.Pick(t.Context(), pool, v)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestSharesFollowTheWeights(t *testing.T) {
	for _, steering := range []string{"", spec.SteerRandom, spec.SteerRoundRobin, spec.SteerHash, spec.SteerLeastRequests, spec.SteerLeastConnections} {
		t.Run(steering, func(t *testing.T) {
			cfg := poolOf("p", 1, 0.5, 0.25, 0)
			cfg.Steering = steering
			b := newBalancer(t, newSite(), cfg)
			const n = 7000
			got := map[string]int{}
			for i := range n {
				l := pick(t, b, "p", Visit{IP: visitor(i)})
				if steering == spec.SteerLeastConnections {
					l.Open()
				}
				got[l.Endpoint().Name]++ // the leases stay open, so that the least loaded follows the weights too
			}
			for name, want := range map[string]float64{"a": 4. / 7, "b": 2. / 7, "c": 1. / 7, "d": 0} {
				if share := float64(got[name]) / n; math.Abs(share-want) > 0.03 {
					t.Errorf("%s has a share of %.3f, want %.3f", name, share, want)
				}
			}
		})
	}
}

func TestRoundRobinIsEven(t *testing.T) {
	cfg := poolOf("p", 1, 0.5)
	cfg.Steering = spec.SteerRoundRobin
	b := newBalancer(t, newSite(), cfg)
	var got string
	for range 6 {
		got += pick(t, b, "p", Visit{}).Endpoint().Name
	}
	if got != "abaaba" {
		t.Errorf("turns %s, want abaaba", got)
	}
}

func TestHashMovesFewVisitors(t *testing.T) {
	cfg := poolOf("p", 1, 1, 1, 1)
	cfg.Steering = spec.SteerHash
	b := newBalancer(t, newSite(), cfg)
	const n = 4000
	before := make([]string, n)
	for i := range n {
		before[i] = pick(t, b, "p", Visit{IP: visitor(i)}).Endpoint().Name
	}
	cfg.Endpoints[2].Disabled = true
	if err := b.Set([]spec.PoolConfig{cfg}); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		after := pick(t, b, "p", Visit{IP: visitor(i)}).Endpoint().Name
		if before[i] != "c" && after != before[i] {
			t.Fatalf("visitor %d moved from %s to %s, though only c went", i, before[i], after)
		}
		if after == "c" {
			t.Fatal("a visitor was sent to a disabled endpoint")
		}
	}
	a, b6 := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::ffff:2")
	if pointOf(a) != pointOf(b6) {
		t.Error("two addresses of one /64 are two visitors")
	}
}

func TestLeastRequestsFollowsWhatIsOutstanding(t *testing.T) {
	cfg := poolOf("p", 1, 1)
	cfg.Steering = spec.SteerLeastRequests
	b := newBalancer(t, newSite(), cfg)
	first := pick(t, b, "p", Visit{})
	second := pick(t, b, "p", Visit{})
	if first.Endpoint().Name == second.Endpoint().Name {
		t.Fatal("two requests at one endpoint, none at the other")
	}
	first.Done(OK)
	first.Done(OK) // counts once
	if third := pick(t, b, "p", Visit{}); third.Endpoint().Name != first.Endpoint().Name {
		t.Errorf("got %s, want the idle %s", third.Endpoint().Name, first.Endpoint().Name)
	}
	if got := b.Health()[0].Endpoints; got[0].Requests+got[1].Requests != 2 {
		t.Errorf("outstanding: %+v", got)
	}
}

func TestTriedEndpointsAreNotPickedAgain(t *testing.T) {
	b := newBalancer(t, newSite(), poolOf("p", 1, 1))
	for range 50 {
		l := pick(t, b, "p", Visit{})
		again := pick(t, b, "p", Visit{Tried: []*Lease{l}})
		if again.Endpoint().Name == l.Endpoint().Name {
			t.Fatal("picked the endpoint that failed")
		}
		if _, err := b.Pick(t.Context(), "p", Visit{Tried: []*Lease{l, again}}); !errors.Is(err, ErrNoEndpoint) {
			t.Fatalf("got %v, want ErrNoEndpoint", err)
		}
		l.Done(Failed)
		again.Done(OK)
	}
	if _, err := b.Pick(t.Context(), "nowhere", Visit{}); !errors.Is(err, ErrNoPool) {
		t.Errorf("got %v, want ErrNoPool", err)
	}
	if h := b.Health()[0]; h.Retries != 50 || h.Endpoints[0].Failures+h.Endpoints[1].Failures != 50 {
		t.Errorf("got %+v", h)
	}
}

// A changed weight, and a disabled endpoint, count for the next pick; what is outstanding outlives the change.
func TestSetIsLive(t *testing.T) {
	cfg := poolOf("p", 1, 1)
	b := newBalancer(t, newSite(), cfg)
	l := pick(t, b, "p", Visit{})
	for range 100 {
		for i := range cfg.Endpoints {
			cfg.Endpoints[i].Disabled = i == 0
		}
		if err := b.Set([]spec.PoolConfig{cfg}); err != nil {
			t.Fatal(err)
		}
		if got := pick(t, b, "p", Visit{}).Endpoint().Name; got != "b" {
			t.Fatalf("got %s, which is disabled", got)
		}
	}
	var outstanding int64
	for _, e := range b.Health()[0].Endpoints {
		outstanding += e.Requests
	}
	if outstanding != 101 {
		t.Errorf("%d requests outstanding, want 101", outstanding)
	}
	l.Done(OK)
	bad := cfg
	bad.Steering = "magic"
	if err := b.Set([]spec.PoolConfig{bad}); err == nil || !b.Has("p") {
		t.Errorf("a bad configuration was taken: %v", err)
	}
}

func TestSameAddressOncePerNetwork(t *testing.T) {
	cfg := spec.PoolConfig{Name: "p", Steering: spec.SteerRoundRobin, Endpoints: []spec.Endpoint{{VNet: "one", Host: "10.0.0.1", Port: 80}, {VNet: "two", Host: "10.0.0.1", Port: 80}}}
	b := newBalancer(t, newSite(), cfg)
	x, y := pick(t, b, "p", Visit{}), pick(t, b, "p", Visit{})
	if x.Endpoint().VNet == y.Endpoint().VNet || x.Key() == y.Key() {
		t.Errorf("got %v twice", x.Key())
	}
	cfg.Endpoints[1].VNet = "one"
	if err := b.Set([]spec.PoolConfig{cfg}); err == nil {
		t.Error("one address twice in one network was taken")
	}
}

// run runs the monitors within the bubble until the returned function is called.
func run(b *Balancer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = b.Run(ctx) }()
	return func() { cancel(); <-done }
}

func state(b *Balancer, pool, endpoint int) string { return b.Health()[pool].Endpoints[endpoint].State }

func TestMonitorThresholds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite()
		cfg := poolOf("p", 1, 1)
		cfg.Monitor = &spec.Monitor{Type: "tcp", Interval: spec.Duration(10 * time.Second), Up: 2, Down: 3, Retries: 1}
		b := newBalancer(t, s, cfg)
		s.set("p-b", true)
		if got := state(b, 0, 0); got != "unknown" {
			t.Errorf("before the first probe: %s", got)
		}
		defer run(b)()
		synctest.Wait()
		if state(b, 0, 0) != "up" || state(b, 0, 1) != "down" {
			t.Fatalf("after the first probe: %+v", b.Health())
		}
		if got := s.dialled("p-b"); got != 2 {
			t.Errorf("%d dials, want one and a retry at once", got)
		}
		for range 100 {
			if l := pick(t, b, "p", Visit{}); l.Endpoint().Name != "a" {
				t.Fatal("picked an endpoint that is down")
			}
		}
		s.set("p-a", true)
		for i, want := range []string{"up", "up", "down"} { // Down: 3
			time.Sleep(11 * time.Second)
			if got := state(b, 0, 0); got != want {
				t.Errorf("%d failures in a row: %s, want %s", i+1, got, want)
			}
		}
		if _, err := b.Pick(t.Context(), "p", Visit{}); !errors.Is(err, ErrNoEndpoint) {
			t.Errorf("everything is down, got %v", err)
		}
		s.set("p-a", false)
		for i, want := range []string{"down", "up"} { // Up: 2
			time.Sleep(11 * time.Second)
			if got := state(b, 0, 0); got != want {
				t.Errorf("%d successes in a row: %s, want %s", i+1, got, want)
			}
		}
		// Without the monitor nothing is steered by health, and nothing probes.
		cfg.Monitor = nil
		if err := b.Set([]spec.PoolConfig{cfg}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		dials := s.dialled("p-a")
		time.Sleep(time.Minute)
		if got := s.dialled("p-a"); got != dials {
			t.Errorf("%d probes after the monitor was removed", got-dials)
		}
		if state(b, 0, 1) != "unmonitored" {
			t.Errorf("got %s", state(b, 0, 1))
		}
	})
}

func TestFirstVisitorWaitsForTheFirstResult(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite()
		cfg := poolOf("p", 1, 1)
		cfg.Monitor = &spec.Monitor{Type: "icmp"}
		s.delay["p-a"] = 700 * time.Millisecond
		s.silent["p-b"] = true
		b := newBalancer(t, s, cfg)
		defer run(b)()
		began := time.Now()
		if l := pick(t, b, "p", Visit{}); l.Endpoint().Name != "a" || time.Since(began) != 700*time.Millisecond {
			t.Errorf("got %s after %v", l.Endpoint().Name, time.Since(began))
		}
		s.mu.Lock()
		s.silent["q-a"] = true
		s.mu.Unlock()
		q := poolOf("q", 1)
		q.Monitor = cfg.Monitor
		if err := b.Set([]spec.PoolConfig{cfg, q}); err != nil {
			t.Fatal(err)
		}
		began = time.Now()
		if _, err := b.Pick(t.Context(), "q", Visit{}); !errors.Is(err, ErrNoEndpoint) || time.Since(began) > 5*time.Second {
			t.Errorf("got %v after %v", err, time.Since(began))
		}
	})
}

func TestHTTPMonitor(t *testing.T) {
	hosts := map[string]bool{}
	var mu sync.Mutex
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		hosts[r.Host+" "+r.Header.Get("X-Probe")] = true
		mu.Unlock()
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "http://elsewhere.test/ok", http.StatusFound)
		case "/ok":
			fmt.Fprint(w, "all is well")
		default:
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer srv.Close()
	for _, tt := range []struct {
		name string
		m    spec.Monitor
		good bool
	}{
		{"path", spec.Monitor{Path: "/ok"}, true},
		{"status", spec.Monitor{Path: "/broken"}, false},
		{"expected status", spec.Monitor{Path: "/broken", Expect: "200, 500-503"}, true},
		{"body", spec.Monitor{Path: "/ok", Body: "is well"}, true},
		{"other body", spec.Monitor{Path: "/ok", Body: "is bad"}, false},
		{"redirect is an answer", spec.Monitor{Path: "/moved"}, true},
		{"redirect is not followed", spec.Monitor{Path: "/moved", Expect: "200"}, false},
		{"redirect is followed, to the endpoint", spec.Monitor{Path: "/moved", Expect: "200", FollowRedirects: true}, true},
		{"no TLS there", spec.Monitor{Type: "https", Path: "/ok"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.m.Type == "" {
				tt.m.Type = "http"
			}
			tt.m.Headers, tt.m.HostHeader = map[string]string{"X-Probe": "1"}, "probe.test"
			p := newProber(realDialer{srv.Listener.Addr().String()}, &spec.Endpoint{Host: "x", Port: 80}, &tt.m)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if _, err := p.probe(ctx); (err == nil) != tt.good {
				t.Errorf("got %v, want good: %v", err, tt.good)
			}
		})
	}
	if !hosts["probe.test 1"] || !hosts["elsewhere.test 1"] {
		t.Errorf("asked as %v", hosts)
	}
}

// realDialer reaches one address, whatever is asked for.
type realDialer struct{ addr string }

func (d realDialer) Dial(ctx context.Context, _ control.Query) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", d.addr)
}

func (realDialer) Echo(context.Context, control.Query, tunnel.EchoRequest) (tunnel.EchoReply, error) {
	return tunnel.EchoReply{}, errDown
}

func TestMinimumAndFallback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite()
		monitor := &spec.Monitor{Type: "tcp", Interval: spec.Duration(5 * time.Second)}
		p, q := poolOf("p", 1, 1, 1), poolOf("q", 1)
		p.Monitor, q.Monitor, p.Minimum, p.Next = monitor, monitor, 2, "q"
		b := newBalancer(t, s, p, q)
		defer run(b)()
		at := func(want string) {
			t.Helper()
			time.Sleep(6 * time.Second)
			for range 30 {
				if got := pick(t, b, "p", Visit{}).Key().Pool; got != want {
					t.Fatalf("served by %s, want %s", got, want)
				}
			}
		}
		at("p")
		s.set("p-a", true)
		at("p")
		s.set("p-b", true) // one of three is left, and two are the minimum
		at("q")
		s.set("q-a", true) // nobody is healthy: what is up serves
		at("p")
		s.set("p-c", true) // nothing is up: the last pool serves all the same
		at("q")
		s.set("p-a", false)
		s.set("p-b", false)
		at("p")
	})
}

func TestPoolSteering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite()
		s.delay["p-a"], s.delay["q-a"] = 80*time.Millisecond, 20*time.Millisecond
		monitor := &spec.Monitor{Type: "tcp", Interval: spec.Duration(5 * time.Second)}
		p, q := poolOf("p", 1), poolOf("q", 1)
		p.Monitor, q.Monitor = monitor, monitor
		all := []spec.PoolConfig{p, q}
		for _, steering := range []string{"", spec.SteerLatency, spec.SteerRandom, spec.SteerLeastRequests} {
			all = append(all, spec.PoolConfig{Name: "over" + strconv.Itoa(len(all)), Members: []string{"p", "q"}, PoolSteering: steering})
		}
		b := newBalancer(t, s, all...)
		defer run(b)()
		time.Sleep(time.Second)
		shares := func(name string) (p, q int) {
			for range 200 {
				l := pick(t, b, name, Visit{})
				if l.Key().Pool == "p" {
					p++
				} else {
					q++
				}
			}
			return p, q
		}
		if p, q := shares("over2"); q != 0 {
			t.Errorf("fail-over order: %d, %d", p, q)
		}
		if p, q := shares("over3"); p != 0 {
			t.Errorf("latency: %d, %d", p, q)
		}
		if p, q := shares("over4"); p < 50 || q < 50 {
			t.Errorf("random: %d, %d", p, q)
		}
		if p, q := shares("over5"); p < 50 || q < 50 {
			t.Errorf("least requests: %d, %d", p, q)
		}
		s.set("p-a", true)
		time.Sleep(6 * time.Second)
		for _, name := range []string{"over2", "over4"} {
			if p, _ := shares(name); p != 0 {
				t.Errorf("%s: %d requests to the pool that is down", name, p)
			}
		}
	})
}

func TestPlacesForKeyServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite()
		p := poolOf("p", 1, 1, 1, 1)
		p.Monitor = &spec.Monitor{Type: "tcp"}
		p.Endpoints[1].Drain, p.Endpoints[2].Disabled = true, true
		s.set("p-a", true)
		b := newBalancer(t, s, p)
		defer run(b)()
		synctest.Wait()
		got := ""
		for _, x := range b.Places("p") {
			got += x.Name
		}
		if got != "dba" {
			t.Errorf("got %s, want d, the draining b, and a, which is down", got)
		}
	})
}
