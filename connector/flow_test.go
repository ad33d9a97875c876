package connector

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// patience bounds waits that end at once when all is well.
const patience = 30 * time.Second

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("waited %v for: %s\n%s", patience, what, buf[:runtime.Stack(buf, true)])
		}
	}
}

// edge is a real listener with its sessions.
type edge struct {
	addr     string
	stop     func()
	renewals atomic.Int64

	mu       sync.Mutex
	sessions map[*tunnel.Session]struct{}
}

// freeAddr is an address where nothing listens, by UDP or TCP, but what the test has listen there.
func freeAddr(t testing.TB) string {
	t.Helper()
	addr, err := freeport.Addr("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return addr
}

func startEdge(t testing.TB, authority *mtls.Authority, id *mtls.Source, addr string) *edge {
	t.Helper()
	e := &edge{sessions: map[*tunnel.Session]struct{}{}}
	var ln *tunnel.Listener
	var err error
	eventually(t, "the port "+addr+" to be free", func() bool {
		ln, err = tunnel.Listen(tunnel.ListenConfig{
			Addr: addr, Identity: id, DrainTimeout: time.Millisecond,
			Admit:  func(context.Context, mtls.Identity, *x509.Certificate, tunnel.Registration) error { return nil },
			Handle: e.handle,
			Renew: func(_ context.Context, peer mtls.Identity, csr []byte) ([][]byte, error) {
				e.renewals.Add(1)
				return authority.IssueCSR(csr, peer, 0)
			},
		})
		return err == nil
	})
	e.run(t, ln)
	return e
}

func (e *edge) run(t testing.TB, ln *tunnel.Listener) {
	e.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ln.Serve(ctx) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the edge's listener: %v", err)
		}
	})
	t.Cleanup(e.stop)
}

func (e *edge) handle(ctx context.Context, s *tunnel.Session) {
	e.mu.Lock()
	e.sessions[s] = struct{}{}
	e.mu.Unlock()
	<-ctx.Done()
	e.mu.Lock()
	delete(e.sessions, s)
	e.mu.Unlock()
}

// all returns the sessions that take flows.
func (e *edge) all() (list []*tunnel.Session) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for s := range e.sessions {
		if !s.Draining() && s.Err() == nil {
			list = append(list, s)
		}
	}
	return list
}

func (e *edge) count() int { return len(e.all()) }

func (e *edge) countMain() (n int) {
	for _, s := range e.all() {
		if s.Registration().Role == tunnel.RoleMain {
			n++
		}
	}
	return n
}

func (e *edge) session(t testing.TB) *tunnel.Session {
	t.Helper()
	var s *tunnel.Session
	eventually(t, "a session", func() bool {
		for _, s = range e.all() {
			return true
		}
		return false
	})
	return s
}

func (e *edge) open(t testing.TB, to string) (tunnel.Conn, error) {
	t.Helper()
	host, port, err := net.SplitHostPort(to)
	if err != nil {
		t.Fatal(err)
	}
	var n uint16
	fmt.Sscan(port, &n) //nolint:errcheck // a port of ours
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return e.session(t).Open(ctx, tunnel.Flow{Kind: tunnel.KindTCP, VNet: "default", Host: host, Port: n})
}

// startConnector runs a connector and returns how to stop it, which waits for Run.
func startConnector(t testing.TB, cfg Config) (c *Connector, stop func()) {
	t.Helper()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c, runConnector(t, c)
}

// runConnector runs c and returns how to stop it.
func runConnector(t testing.TB, c *Connector) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// echoServer sends back what it gets, and its end after it.
func echoServer(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			context.AfterFunc(ctx, func() { c.Close() })
			wg.Go(func() {
				defer c.Close()
				if _, err := io.Copy(c, c); err == nil {
					c.(*net.TCPConn).CloseWrite()
					io.Copy(io.Discard, c) //nolint:errcheck // only to wait for the peer
				}
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		cancel()
		wg.Wait()
	})
	return ln.Addr().String()
}

func loopbackOnly(t testing.TB) *Allow {
	return mustAllow(t, Rule{To: "127.0.0.1", Ports: []Ports{AllPorts}})
}

// sessionsOf and reconnectsOf sum a metric of an edge over its other labels.
func (m *metrics) sessionsOf(edge string) (n float64) {
	for _, carrier := range []string{CarrierQUIC, CarrierTCP} {
		n += testutil.ToFloat64(m.sessions.WithLabelValues(edge, carrier, RoleMain))
	}
	return n
}

func (m *metrics) reconnectsOf(edge string) (n float64) {
	for _, why := range reasons {
		n += testutil.ToFloat64(m.reconnects.WithLabelValues(edge, why))
	}
	return n
}

func allUp(c *Connector) bool {
	list := c.Status().Sessions
	return len(list) > 0 && !slices.ContainsFunc(list, func(s SessionStatus) bool { return s.State != StateConnected })
}

func TestFlows(t *testing.T) {
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, freeAddr(t))
	reg := prometheus.NewRegistry()
	resolver := names{"echo.example": {"127.0.0.1"}, "metadata.example": {"169.254.169.254"}}
	c, _ := startConnector(t, Config{Identity: connID, Edges: []string{e.addr}, Resolver: resolver, Registerer: reg, Limits: Limits{MaxFlows: 2},
		Allow: mustAllow(t, Rule{To: "127.0.0.1", Ports: []Ports{AllPorts}}, Rule{To: "*.example", Ports: []Ports{AllPorts}})})
	origin := echoServer(t)
	_, port, _ := net.SplitHostPort(origin)

	// Half-close: the last byte comes back after our end was sent.
	data := make([]byte, 1<<20)
	rand.Read(data)
	for _, to := range []string{origin, "echo.example:" + port, "ECHO.Example.:" + port} {
		conn, err := e.open(t, to)
		if err != nil {
			t.Fatalf("open %s: %v", to, err)
		}
		go func() {
			if _, err := conn.Write(data); err != nil {
				t.Errorf("write: %v", err)
			}
			conn.CloseWrite()
		}()
		got, err := io.ReadAll(conn)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("echo through %s: %d bytes, %v, want the %d sent", to, len(got), err, len(data))
		}
		conn.Close()
	}
	eventually(t, "the flows to end", func() bool { return c.flows.len() == 0 })

	// Errors, each with its own result.
	shut := closedPort(t)
	for _, tt := range []struct {
		to   string
		want error
	}{
		{fmt.Sprintf("127.0.0.1:%d", shut), tunnel.ErrRefused},
		{"127.0.0.2:" + port, tunnel.ErrDenied},
		{"169.254.169.254:80", tunnel.ErrDenied},
		{"metadata.example:80", tunnel.ErrDenied},
		{"[fe80::1]:80", tunnel.ErrDenied},
		{"missing.example:80", tunnel.ErrNameNotFound},
		{"2130706433:80", tunnel.ErrDenied}, // 127.0.0.1 in one number
	} {
		if conn, err := e.open(t, tt.to); !errors.Is(err, tt.want) {
			t.Errorf("open %s: got %v, %v, want %v", tt.to, conn, err, tt.want)
		}
	}

	// The limit counts over all sessions.
	var held []tunnel.Conn
	for range 2 {
		conn, err := e.open(t, origin)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, conn)
	}
	if _, err := e.open(t, origin); !errors.Is(err, tunnel.ErrLimit) {
		t.Errorf("a third flow: got %v, want ErrLimit", err)
	}
	c.SetLimits(Limits{MaxFlows: 3})
	conn, err := e.open(t, origin)
	if err != nil {
		t.Errorf("a third flow after the limit was raised: %v", err)
	} else {
		held = append(held, conn)
	}
	for _, conn := range held {
		conn.Close()
	}
	eventually(t, "the flows to end", func() bool { return c.flows.len() == 0 })

	eventually(t, "four sessions", func() bool { return allUp(c) })
	m := c.metrics
	for name, got := range map[string][2]float64{
		"sessions":   {m.sessionsOf(e.addr), 4},
		"ok":         {testutil.ToFloat64(m.results.WithLabelValues("ok")), 6},
		"denied":     {testutil.ToFloat64(m.results.WithLabelValues("denied")), 5},
		"refused":    {testutil.ToFloat64(m.results.WithLabelValues("refused")), 1},
		"not found":  {testutil.ToFloat64(m.results.WithLabelValues("name_not_found")), 1},
		"limit":      {testutil.ToFloat64(m.results.WithLabelValues("limit")), 1},
		"bytes out":  {testutil.ToFloat64(m.toOrigin), 3 << 20},
		"bytes back": {testutil.ToFloat64(m.fromOrigin), 3 << 20},
	} {
		if got[0] != got[1] {
			t.Errorf("metric %s: got %v, want %v", name, got[0], got[1])
		}
	}
	if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
		t.Errorf("metrics: %v %v", problems, err)
	}
}

// TestNothingPermitted holds the rule that no list permits nothing.
func TestNothingPermitted(t *testing.T) {
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, freeAddr(t))
	startConnector(t, Config{Identity: connID, Edges: []string{e.addr}})
	if conn, err := e.open(t, echoServer(t)); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("got %v, %v, want ErrDenied", conn, err)
	}
}

// TestSetAllow narrows the list while flows are open.
func TestSetAllow(t *testing.T) {
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, freeAddr(t))
	stays, goes := echoServer(t), echoServer(t)
	c, _ := startConnector(t, Config{Identity: connID, Edges: []string{e.addr}, Allow: loopbackOnly(t)})
	open := map[string]tunnel.Conn{}
	for _, to := range []string{stays, goes} {
		conn, err := e.open(t, to)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		echo(t, conn)
		open[to] = conn
	}
	stay := netip.MustParseAddrPort(stays)
	if got := c.SetAllow(mustAllow(t, Rule{To: "127.0.0.1", Ports: []Ports{{stay.Port(), stay.Port()}}})); got != 1 {
		t.Errorf("SetAllow cut %d flows, want 1", got)
	}
	if n, err := open[goes].Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the flow that is no longer permitted: read %d, %v, want it cut", n, err)
	}
	echo(t, open[stays])
	if _, err := e.open(t, goes); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("a new flow: got %v, want ErrDenied", err)
	}
	eventually(t, "the cut flow to end", func() bool { return c.flows.len() == 1 })
	if got := c.SetAllow(nil); got != 1 {
		t.Errorf("SetAllow(nil) cut %d flows, want 1", got)
	}
	eventually(t, "all flows to end", func() bool { return c.flows.len() == 0 })
	c.SetAllow(loopbackOnly(t))
	conn, err := e.open(t, goes)
	if err != nil {
		t.Fatalf("after the list was widened again: %v", err)
	}
	conn.Close()
}

// echo sends a line and wants it back.
func echo(t testing.TB, conn net.Conn) {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 6)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello\n" {
		t.Fatalf("echo: got %q, %v", got, err)
	}
}

// TestHeals stops and starts the edge's listener twice: all four sessions must come back, and the flows with them.
func TestHeals(t *testing.T) {
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, freeAddr(t))
	origin := echoServer(t)
	c, _ := startConnector(t, Config{Identity: connID, Edges: []string{e.addr}, Allow: loopbackOnly(t)})
	for round := range 3 {
		eventually(t, "four sessions at the edge", func() bool { return e.count() == SessionsPerEdge && allUp(c) })
		conn, err := e.open(t, origin)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		echo(t, conn)
		if err := c.Ready(t.Context()); err != nil {
			t.Errorf("round %d: Ready: %v", round, err)
		}
		if round == 2 {
			conn.Close()
			break
		}
		e.stop() // with the flow open
		eventually(t, "the loss to show", func() bool { return c.Ready(t.Context()) != nil })
		conn.Close()
		e = startEdge(t, authority, edgeID, e.addr)
	}
	if got := c.metrics.reconnectsOf(e.addr); got < 2*SessionsPerEdge {
		t.Errorf("reconnects: got %v, want %d at least", got, 2*SessionsPerEdge)
	}
}

// TestDrain ends the connector with a flow open: the flow finishes, new ones go elsewhere, and Run returns when it has.
func TestDrain(t *testing.T) {
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, freeAddr(t))
	origin := echoServer(t)
	c, stop := startConnector(t, Config{Identity: connID, Edges: []string{e.addr}, Allow: loopbackOnly(t), DrainTimeout: 2 * patience})
	eventually(t, "four sessions", func() bool { return e.count() == SessionsPerEdge && allUp(c) })
	s := e.session(t)
	conn, err := s.Open(t.Context(), tunnel.Flow{Kind: tunnel.KindTCP, VNet: "default", Host: "127.0.0.1", Port: netip.MustParseAddrPort(origin).Port()})
	if err != nil {
		t.Fatal(err)
	}
	echo(t, conn)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		stop()
	}()
	eventually(t, "the edge to hear of the drain", s.Draining)
	if err := c.Ready(t.Context()); err == nil {
		t.Error("ready while draining")
	}
	if _, err := s.Open(t.Context(), tunnel.Flow{Kind: tunnel.KindTCP, VNet: "default", Host: "127.0.0.1", Port: 1}); !errors.Is(err, tunnel.ErrDraining) {
		t.Errorf("a new flow: got %v, want ErrDraining", err)
	}
	echo(t, conn)
	select {
	case <-stopped:
		t.Fatal("Run returned with a flow open")
	default:
	}
	conn.CloseWrite()
	if _, err := io.ReadAll(conn); err != nil {
		t.Errorf("the flow's end: %v", err)
	}
	conn.Close()
	select {
	case <-stopped:
	case <-time.After(patience):
		t.Fatal("Run did not return after the last flow")
	}
}

// TestRenew has the connector ask for a certificate over its session.
func TestRenew(t *testing.T) {
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, freeAddr(t))
	c, _ := startConnector(t, Config{Identity: connID, Edges: []string{e.addr}})
	before := connID.Leaf().SerialNumber
	if err := connID.Renew(t.Context(), c.renew); err == nil && e.count() == 0 {
		t.Error("a renewal without a session succeeded")
	}
	eventually(t, "a session", func() bool { return c.Ready(t.Context()) == nil })
	if err := connID.Renew(t.Context(), c.renew); err != nil {
		t.Fatal(err)
	}
	if connID.Leaf().SerialNumber.Cmp(before) == 0 || e.renewals.Load() == 0 {
		t.Error("the certificate is the old one")
	}
}

// TestLogsQuiet denies many flows in a row: an edge must not be able to fill the log.
func TestLogsQuiet(t *testing.T) {
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, freeAddr(t))
	var mu sync.Mutex
	var log bytes.Buffer
	w := writerFunc(func(b []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return log.Write(b)
	})
	start := time.Now()
	_, stop := startConnector(t, Config{Identity: connID, Edges: []string{e.addr}, Logger: slog.New(slog.NewTextHandler(w, nil))})
	const flows = 200
	for range flows {
		if _, err := e.open(t, "10.0.0.1:80"); !errors.Is(err, tunnel.ErrDenied) {
			t.Fatalf("got %v, want ErrDenied", err)
		}
	}
	stop()
	most := int(time.Since(start)/time.Second) + 1
	if n := strings.Count(log.String(), "flow refused"); n < 1 || n > most {
		t.Errorf("%d denied flows gave %d lines, want 1 to %d", flows, n, most)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
