package edge

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/tunnel"
)

// endpointAt is an endpoint at the address of a URL or a listener.
func endpointAt(t testing.TB, name, at string) spec.Endpoint {
	t.Helper()
	ap, err := netip.ParseAddrPort(strings.TrimPrefix(strings.TrimPrefix(at, "http://"), "https://"))
	must(t, err)
	return spec.Endpoint{Name: name, VNet: "v-" + name, Host: ap.Addr().String(), Port: ap.Port()}
}

// named is an origin that says its name, reads what it is sent, and counts requests in flight.
func named(t testing.TB, name string) string {
	return origin(t, func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if d, err := time.ParseDuration(r.URL.Query().Get("wait")); err == nil {
			time.Sleep(d)
		}
		fmt.Fprint(rw, name)
	})
}

// deadAddr is an address where nothing listens, by UDP or TCP, but what the test has listen there.
func deadAddr(t testing.TB) string {
	t.Helper()
	addr, err := freeport.Addr("127.0.0.1")
	must(t, err)
	return addr
}

// pooled gives w a zone for a.test whose origin is the pool p.
func (w *world) pooled(p spec.PoolConfig) {
	w.t.Helper()
	p.Name = "p"
	w.addZone("a", "p256", "", "a.test").Origins = []zone.Origin{{Pool: "p"}}
	w.cfg.Pools = []spec.PoolConfig{p}
}

// ask returns the status and body of an answer.
func ask(c *http.Client, method, path, body string) (int, string, error) {
	var r io.Reader
	if body != "" {
		r = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, "https://a.test"+path, r)
	if err != nil {
		return 0, "", err
	}
	res, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

func share(weight float64) *float64 { return &weight }

func TestPoolSharesRequestsByWeight(t *testing.T) {
	w := newWorld(t)
	x, y := endpointAt(t, "x", named(t, "x")), endpointAt(t, "y", named(t, "y"))
	y.Weight = share(0.25)
	w.pooled(spec.PoolConfig{Endpoints: []spec.Endpoint{x, y}, Steering: spec.SteerRoundRobin})
	w.start()
	got := map[string]int{}
	for i := range 60 {
		status, body, err := ask(w.client(versions[i%3]), "GET", "/", "")
		if err != nil || status != 200 {
			t.Fatal(status, err)
		}
		got[body]++
	}
	if got["x"] != 48 || got["y"] != 12 {
		t.Errorf("got %v, want 48 and 12", got)
	}
	if w.loop.dials["v-x/"+x.Addr()] == 0 || w.loop.dials["v-y/"+y.Addr()] == 0 {
		t.Errorf("dialled %v, want each endpoint in its own network", w.loop.dials)
	}
	for _, e := range w.server.Pools()[0].Endpoints {
		if e.Requests != 0 {
			t.Errorf("%s has %d requests outstanding after all have ended", e.Name, e.Requests)
		}
	}
}

// Weights, drains, and endpoints that come and go while requests are under way, cost none of them.
func TestPoolChangesCostNoRequest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ends := []spec.Endpoint{endpointAt(t, "x", named(t, "x")), endpointAt(t, "y", named(t, "y")), endpointAt(t, "z", named(t, "z"))}
	w.addZone("a", "p256", "", "a.test").Origins = []zone.Origin{{Pool: "p"}}
	w.start()
	publish := func(change func(e []spec.Endpoint)) {
		t.Helper()
		e := slices.Clone(ends)
		change(e)
		must(t, w.server.Publish([]spec.PoolConfig{{Name: "p", Endpoints: e, Steering: spec.SteerLeastRequests}}, nil, nil))
	}
	publish(func([]spec.Endpoint) {})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var served atomic.Int64
	for i := range 8 {
		c := w.client(versions[i%3])
		wg.Go(func() {
			for n := 0; ; n++ {
				method, body := "GET", ""
				if n%2 == 1 {
					method, body = "POST", "a body"
				}
				if status, _, err := ask(c, method, "/?wait=3ms", body); err != nil || status != 200 {
					t.Errorf("%s: %d, %v", method, status, err)
					return
				}
				served.Add(1)
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	visitor := w.client("2")
	for i := 0; (i < 30 || served.Load() < 100) && !t.Failed(); i++ {
		out := i % 3
		publish(func(e []spec.Endpoint) {
			switch i % 2 {
			case 0:
				e[out].Disabled = true
			default:
				e[out].Drain = true
			}
			e[(out+1)%3].Weight = share(0.1)
		})
		for range 3 { // in force for the very next request
			if _, body, err := ask(visitor, "GET", "/", ""); err != nil || body == ends[out].Name {
				t.Errorf("after %s was taken out: %q, %v", ends[out].Name, body, err)
			}
		}
	}
	publish(func(e []spec.Endpoint) {})
	close(stop)
	wg.Wait()
}

// What cannot have been processed is sent to another endpoint, whatever its method; the rest only where that does no harm.
func TestRetryOnAnotherEndpoint(t *testing.T) {
	var posts atomic.Int64
	breaking := origin(t, func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.Method == "POST" {
			posts.Add(1)
		}
		panic(http.ErrAbortHandler) // after the request, before any response
	})
	for _, tt := range []struct {
		name, bad    string
		method, body string
		fails        bool
	}{
		{"refused GET", deadAddr(t), "GET", "", false},
		{"refused POST", deadAddr(t), "POST", "a body", false},
		{"broken GET", breaking, "GET", "", false},
		{"broken DELETE", breaking, "DELETE", "", false},
		{"broken POST", breaking, "POST", "a body", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.pooled(spec.PoolConfig{Endpoints: []spec.Endpoint{endpointAt(t, "bad", tt.bad), endpointAt(t, "good", named(t, "good"))}, Steering: spec.SteerRoundRobin})
			w.start()
			failed := 0
			for range 6 {
				status, body, err := ask(w.client("1.1"), tt.method, "/", tt.body)
				must(t, err)
				if status != 200 || body != "good" {
					failed++
				}
			}
			if (failed > 0) != tt.fails {
				t.Errorf("%d of 6 failed", failed)
			}
			h := w.server.Pools()[0]
			if (h.Retries > 0) == tt.fails || h.Endpoints[0].Failures == 0 {
				t.Errorf("%+v", h)
			}
		})
	}
	if n := posts.Load(); n != 3 {
		t.Errorf("3 requests with a body reached the origin %d times", n)
	}
}

func TestPoolWithNothingUp(t *testing.T) {
	w := newWorld(t)
	e := endpointAt(t, "x", named(t, "x"))
	e.Disabled = true
	w.pooled(spec.PoolConfig{Endpoints: []spec.Endpoint{e}})
	w.start()
	status, body, err := ask(w.client("2"), "GET", "/", "")
	if err != nil || status != http.StatusServiceUnavailable || strings.Contains(body, "127.0.0.1") {
		t.Errorf("%d %q %v", status, body, err)
	}
}

func TestCookieAffinityOverHTTP(t *testing.T) {
	w := newWorld(t)
	var ends []spec.Endpoint
	for i := range 4 {
		ends = append(ends, endpointAt(t, strconv.Itoa(i), named(t, strconv.Itoa(i))))
	}
	w.pooled(spec.PoolConfig{Endpoints: ends, Affinity: &spec.Affinity{Type: spec.AffinityCookie}})
	w.start()
	seen := map[string]bool{}
	for i := range 24 {
		jar, err := cookiejar.New(nil)
		must(t, err)
		c := w.client(versions[i%3])
		c.Jar = jar
		_, first, err := ask(c, "GET", "/", "")
		must(t, err)
		seen[first] = true
		for range 3 {
			if _, body, err := ask(c, "GET", "/x", ""); err != nil || body != first {
				t.Errorf("moved from %s to %q, %v", first, body, err)
			}
		}
		cookies := jar.Cookies(&url.URL{Scheme: "https", Host: "a.test", Path: "/"})
		if len(cookies) != 1 {
			t.Fatalf("cookies %v", cookies)
		}
		raw, err := base64.RawURLEncoding.DecodeString(cookies[0].Value)
		must(t, err)
		if strings.Contains(cookies[0].Value+string(raw), "127.0.0.1") {
			t.Errorf("the cookie tells of the inside: %s, which is %q", cookies[0].Value, raw)
		}
	}
	if len(seen) < 2 {
		t.Errorf("24 visitors all went to %v", seen)
	}
}

func TestMonitorTakesOutAndBringsBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var ill atomic.Bool
	x := origin(t, func(rw http.ResponseWriter, r *http.Request) {
		if ill.Load() && r.URL.Path == "/healthz" {
			rw.WriteHeader(500)
		}
		fmt.Fprint(rw, "x")
	})
	w.pooled(spec.PoolConfig{Endpoints: []spec.Endpoint{endpointAt(t, "x", x), endpointAt(t, "y", named(t, "y"))}, Steering: spec.SteerRoundRobin,
		Monitor: &spec.Monitor{Type: "http", Path: "/healthz", Interval: spec.Duration(time.Second), Timeout: spec.Duration(time.Second)}})
	w.start()
	c := w.client("2")
	if status, _, err := ask(c, "GET", "/", ""); err != nil || status != 200 {
		t.Errorf("the first visitor: %d, %v", status, err)
	}
	both := func() bool {
		_, a, _ := ask(c, "GET", "/", "")
		_, b, _ := ask(c, "GET", "/", "")
		return a != b
	}
	eventually(t, "both are up", both)
	ill.Store(true)
	eventually(t, "x is down", func() bool { return w.server.Pools()[0].Endpoints[0].State == "down" })
	for range 20 {
		if _, body, err := ask(c, "GET", "/", ""); body != "y" {
			t.Errorf("got %q, %v", body, err)
		}
	}
	ill.Store(false)
	eventually(t, "x is back", both)
}

// A proxyOrigin answers with the addresses that a real parser of the PROXY protocol finds, and the number of the connection.
func proxyOrigin(t *testing.T) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var conns atomic.Int64
	type number struct{}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(rw, "%s %d", r.RemoteAddr, r.Context().Value(number{}))
		}),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, number{}, conns.Add(1))
		},
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		_ = srv.Serve(&proxyproto.Listener{Listener: ln, ReadHeaderTimeout: 10 * time.Second,
			ConnPolicy: func(proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) { return proxyproto.REQUIRE, nil }})
	})
	t.Cleanup(func() { _ = srv.Close(); serving.Wait() })
	return ln.Addr().String()
}

// Each connection of a visitor has connections of its own to the origin, which begin with the visitor's address.
func TestProxyProtocolToOrigins(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"v1", "v2"} {
		w := newWorld(t)
		addr := proxyOrigin(t)
		w.addZone("a", "p256", "http://"+addr, "a.test").Origins[0].ProxyProtocol = version
		w.addZone("b", "p256", "", "b.test").Origins = []zone.Origin{{Pool: "p"}}
		w.cfg.Pools = []spec.PoolConfig{{Name: "p", ProxyProtocol: version, Endpoints: []spec.Endpoint{endpointAt(t, "x", addr)}}}
		w.start()
		for _, host := range []string{"a.test", "b.test"} {
			used := map[string]bool{}
			for _, v := range versions {
				for range 2 { // two visitors
					c := w.client(v)
					get := func() string {
						res, err := c.Get("https://" + host + "/")
						must(t, err)
						defer res.Body.Close()
						b, err := io.ReadAll(res.Body)
						must(t, err)
						return string(b)
					}
					first := get()
					if !strings.HasPrefix(first, "127.0.0.1:") {
						t.Fatalf("%s %s HTTP/%s: the origin sees %q", version, host, v, first)
					}
					if again := get(); again != first {
						t.Errorf("%s %s HTTP/%s: %q and then %q on one connection", version, host, v, first, again)
					}
					if used[first] {
						t.Errorf("%s %s HTTP/%s: two visitors share %q", version, host, v, first)
					}
					used[first] = true
				}
			}
		}
		w.stop()
	}
}

// A load balancer in front of the edge names the visitor; nobody else can.
func TestProxyProtocolFromLoadBalancers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, from, header string
		want               string // the visitor that the origin is told of; "" if the connection ends
	}{
		{"trusted", "127.0.0.0/8", "PROXY TCP4 192.0.2.7 198.51.100.1 1234 443\r\n", "192.0.2.7"},
		{"trusted without a header", "127.0.0.0/8", "", ""},
		{"not trusted", "192.0.2.0/24", "PROXY TCP4 192.0.2.7 198.51.100.1 1234 443\r\n", ""},
		{"not trusted, without a header", "192.0.2.0/24", "", "127.0.0.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.Header.Get("X-Forwarded-For")) }), "a.test")
			w.cfg.Listen.ProxyProtocolFrom = []string{tt.from}
			w.cfg.Listen.Redirect = []string{"127.0.0.1:0"}
			w.cfg.Limits.HandshakeTimeout = 2 * time.Second
			w.start()
			tr := &http.Transport{TLSClientConfig: w.tlsConfig("a.test"), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				c, err := new(net.Dialer).DialContext(ctx, "tcp", w.addr())
				if err == nil {
					_, err = io.WriteString(c, tt.header)
				}
				return c, err
			}}
			defer tr.CloseIdleConnections()
			_, body, err := ask(&http.Client{Transport: tr}, "GET", "/", "")
			if body != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %q, %v", body, err)
			}
			if tt.want == "" {
				return
			}
			c, err := net.Dial("tcp", w.server.RedirectAddrs()[0].String())
			must(t, err)
			defer c.Close()
			if res, _ := roundTrip(t, c, tt.header+"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"); res.StatusCode != 308 {
				t.Errorf("redirect: %d", res.StatusCode)
			}
		})
	}
}

// suspectConn lies on a session that seems dead.
type suspectConn struct {
	*net.TCPConn
	suspect bool
}

func (c suspectConn) Suspect() bool { return c.suspect }

// A killed connector costs a request that may be repeated about a second, and others nothing but their own failure.
func TestRequestsLeaveDeadSessions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	hole, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var held []net.Conn
	var holding sync.WaitGroup
	holding.Go(func() {
		for {
			c, err := hole.Accept()
			if err != nil {
				return
			}
			held = append(held, c)
		}
	})
	t.Cleanup(func() {
		_ = hole.Close()
		holding.Wait()
		for _, c := range held {
			_ = c.Close()
		}
	})
	w.addZone("a", "p256", named(t, "alive"), "a.test")
	var dead atomic.Bool
	var dials atomic.Int64
	w.loop.wrap = func(q control.Query, c net.Conn) net.Conn {
		if q.VNet == "vault" || !dead.Load() {
			return suspectConn{c.(*net.TCPConn), false}
		}
		if dials.Add(1) > 4 { // by now the dialer knows better
			return suspectConn{c.(*net.TCPConn), false}
		}
		_ = c.Close()
		d, err := net.Dial("tcp", hole.Addr().String())
		must(t, err)
		return suspectConn{d.(*net.TCPConn), true}
	}
	w.start()
	dead.Store(true)
	var wg sync.WaitGroup
	for i := range 4 {
		c := w.client(versions[i%3])
		wg.Go(func() {
			began := time.Now()
			status, body, err := ask(c, "GET", "/", "")
			if err != nil || status != 200 || body != "alive" {
				t.Errorf("%d %q %v", status, body, err)
			}
			if d := time.Since(began); d < headerPatienceOfProxy {
				t.Errorf("answered after %v: the dead session was not used", d)
			}
		})
	}
	wg.Wait()
}

// headerPatienceOfProxy is how long the proxy waits at least before it doubts a session.
const headerPatienceOfProxy = time.Second

// Large bodies go over sessions for bulk, and everything else over those for requests.
func TestClassesOfRequests(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	var classes []tunnel.FlowClass
	w.loop.wrap = func(q control.Query, c net.Conn) net.Conn {
		mu.Lock()
		defer mu.Unlock()
		if q.VNet != "vault" {
			classes = append(classes, q.Class)
		}
		return c
	}
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/large" {
			_, _ = rw.Write(make([]byte, 3<<20))
		}
	}), "a.test")
	w.start()
	c := w.client("2")
	last := func() tunnel.FlowClass {
		mu.Lock()
		defer mu.Unlock()
		return classes[len(classes)-1]
	}
	for _, tt := range []struct {
		method, path string
		body         int
		want         tunnel.FlowClass
	}{
		{"POST", "/", 1000, tunnel.ClassInteractive},
		{"POST", "/", 1 << 20, tunnel.ClassBulk},
	} {
		if status, _, err := ask(c, tt.method, tt.path, strings.Repeat("x", tt.body)); err != nil || status != 200 || last() != tt.want {
			t.Errorf("%s of %d bytes: %d, %v, class %v, want %v", tt.method, tt.body, status, err, last(), tt.want)
		}
	}
	for range 3 {
		_, _, err := ask(c, "GET", "/large", "")
		must(t, err)
	}
	w.server.now.Load().proxy.CloseIdle()
	if _, _, err := ask(c, "GET", "/", ""); err != nil || last() != tunnel.ClassBulk {
		t.Errorf("an origin of large responses: %v, class %v", err, last())
	}
}

// The ingress of a tunnel is asked for the host that the visitor asked for.
func TestOriginByTunnel(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", "", "a.test", "*.w.test").Origins = []zone.Origin{{Tunnel: "site1"}}
	w.loop.ingress["site1"] = strings.TrimPrefix(origin(t, func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.Host) }), "http://")
	w.start()
	for _, host := range []string{"a.test", "x.w.test"} {
		res, err := w.client("2").Get("https://" + host + "/")
		must(t, err)
		b, err := io.ReadAll(res.Body)
		must(t, err)
		_ = res.Body.Close()
		w.loop.mu.Lock()
		q := w.loop.asked[len(w.loop.asked)-1]
		w.loop.mu.Unlock()
		if string(b) != host || q.Host != host || q.Port != 443 || q.Tunnel != "site1" || q.Service != "http" {
			t.Errorf("%s: %q, asked %+v", host, b, q)
		}
	}
}

// A WebSocket counts as a request until its end.
func TestWebSocketThroughAPool(t *testing.T) {
	w := newWorld(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(c)
			if _, err := http.ReadRequest(r); err == nil {
				_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				_, _ = io.Copy(c, r)
			}
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = ln.Close(); serving.Wait() })
	w.pooled(spec.PoolConfig{Endpoints: []spec.Endpoint{endpointAt(t, "x", ln.Addr().String())}})
	w.start()
	c := w.raw("a.test")
	_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	must(t, err)
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, nil)
	must(t, err)
	if res.StatusCode != 101 {
		t.Fatal(res.StatusCode)
	}
	_, err = io.WriteString(c, "ping")
	must(t, err)
	if b, err := r.Peek(4); err != nil || string(b) != "ping" {
		t.Errorf("got %q, %v", b, err)
	}
	outstanding := func() int64 { return w.server.Pools()[0].Endpoints[0].Requests }
	if outstanding() != 1 {
		t.Errorf("%d outstanding while the WebSocket is open", outstanding())
	}
	_ = c.Close()
	eventually(t, "nothing is outstanding", func() bool { return outstanding() == 0 })
}
