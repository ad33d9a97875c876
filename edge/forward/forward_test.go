package forward

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pires/go-proxyproto"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// direct reaches addresses without a tunnel.
type direct struct {
	hold  chan struct{} // if not nil, dials wait for it
	dials atomic.Int64
	wrote atomic.Int64 // packets

	expected []control.Query // bulk flows
}

func (d *direct) Dial(ctx context.Context, q control.Query) (net.Conn, error) {
	d.dials.Add(1)
	return new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(q.Host, strconv.Itoa(int(q.Port))))
}

func (d *direct) DialPacket(ctx context.Context, q control.Query) (tunnel.PacketConn, error) {
	d.dials.Add(1)
	if d.hold != nil {
		select {
		case <-d.hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	c, err := new(net.Dialer).DialContext(ctx, "udp", net.JoinHostPort(q.Host, strconv.Itoa(int(q.Port))))
	if err != nil {
		return nil, err
	}
	return flow{c.(*net.UDPConn), &d.wrote}, nil
}

// flow is a socket as a flow of packets.
type flow struct {
	*net.UDPConn
	wrote *atomic.Int64
}

func (f flow) ReadPacket(p []byte) (int, error) {
	n, err := f.Read(p)
	if errors.Is(err, syscall.ECONNREFUSED) {
		err = &tunnel.UnreachableError{Code: tunnel.UnreachablePort}
	}
	return n, err
}

func (f flow) WritePacket(p []byte) error {
	f.wrote.Add(1)
	if _, err := f.Write(p); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return nil
}

func (flow) Unreachable(byte) {}

type fixture struct {
	*Forwarder
	dialer *direct
	reg    *prometheus.Registry
}

// start serves ports until the test ends.
func start(t *testing.T, d *direct, ports ...spec.PortConfig) *fixture {
	t.Helper()
	reg := prometheus.NewRegistry()
	f, err := New(Config{Dialer: d, Registry: reg})
	must(t, err)
	must(t, f.Set(ports))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx, 10*time.Millisecond) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
		f.Close()
	})
	x := &fixture{f, d, reg}
	for _, p := range ports {
		x.addr(t, p.Name)
	}
	return x
}

func (x *fixture) addr(t *testing.T, name string) string {
	t.Helper()
	eventually(t, "port "+name+" is open", func() bool { return x.Addr(name) != nil })
	return x.Addr(name).String()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func portAt(name, protocol, addr string) spec.PortConfig {
	ap := netip.MustParseAddrPort(addr)
	return spec.PortConfig{Name: name, Protocol: protocol, Listen: "127.0.0.1:0", Host: ap.Addr().String(), Port: ap.Port(), Allow: []string{"127.0.0.0/8"}}
}

// ExpectBulk remembers what it is told.
func (d *direct) ExpectBulk(qs []control.Query) { d.expected = qs }

// The dialer is told where TCP ports lead to.
func TestExpectedDestinations(t *testing.T) {
	d := &direct{}
	f, err := New(Config{Dialer: d})
	must(t, err)
	allow := []string{"127.0.0.0/8"}
	must(t, f.Set([]spec.PortConfig{
		{Name: "a", Protocol: "tcp", Listen: "127.0.0.1:22", VNet: "v", Host: "10.0.0.1", Port: 2222, Allow: allow},
		{Name: "b", Protocol: "udp", Listen: "127.0.0.1:53", Host: "10.0.0.1", Port: 53, Allow: allow},
		{Name: "c", Protocol: "tcp", Listen: "127.0.0.1:25", Tunnel: "t", Service: "mail", Allow: allow},
		{Name: "d", Protocol: "tcp", Listen: "127.0.0.1:80", Pool: "p", Allow: allow},
	}))
	want := []control.Query{{VNet: "v", Host: "10.0.0.1", Port: 2222}, {Tunnel: "t", Service: "tcp", Host: "mail", Port: 25}}
	if !slices.Equal(d.expected, want) {
		t.Errorf("got %+v, want %+v", d.expected, want)
	}
}

// echoUDP answers each packet with itself, after what prefix makes of it.
func echoUDP(t *testing.T, answer func(b []byte) []byte) string {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(answer(bytes.Clone(buf[:n])), from)
		}
	})
	t.Cleanup(func() { _ = c.Close(); wg.Wait() })
	return c.LocalAddr().String()
}

func visitorUDP(t *testing.T, addr string) *net.UDPConn {
	t.Helper()
	c, err := net.Dial("udp", addr)
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	return c.(*net.UDPConn)
}

func exchange(t *testing.T, c *net.UDPConn, text string) string {
	t.Helper()
	_, err := c.Write([]byte(text))
	must(t, err)
	buf := make([]byte, 65536)
	n, err := c.Read(buf)
	must(t, err)
	return string(buf[:n])
}

func TestUDPSessions(t *testing.T) {
	same := func(b []byte) []byte { return b }
	x := start(t, new(direct), portAt("p", "udp", echoUDP(t, same)))
	a, b := visitorUDP(t, x.addr(t, "p")), visitorUDP(t, x.addr(t, "p"))
	for _, text := range []string{"one", "", strings.Repeat("x", 9000), "two"} {
		if got := exchange(t, a, text); got != text {
			t.Errorf("got %d bytes, want %d", len(got), len(text))
		}
		if got := exchange(t, b, text+"b"); got != text+"b" {
			t.Errorf("the other visitor got %d bytes", len(got))
		}
	}
	if n := x.dialer.dials.Load(); n != 2 {
		t.Errorf("%d sessions for two visitors", n)
	}
	must(t, x.Set(nil)) // the port is taken away
	eventually(t, "no session is left", func() bool { return testutil.ToFloat64(x.metrics.open.WithLabelValues("p")) == 0 })
}

func TestUDPWithProxyProtocol(t *testing.T) {
	addr := echoUDP(t, func(b []byte) []byte {
		h, rest, err := proxyproto.ParseUDPDatagram(b)
		if err != nil {
			return []byte(err.Error())
		}
		return fmt.Appendf(nil, "%s %s", h.SourceAddr, rest)
	})
	p := portAt("p", "udp", addr)
	p.ProxyProtocol = "v2"
	x := start(t, new(direct), p)
	c := visitorUDP(t, x.addr(t, "p"))
	for _, text := range []string{"first", "second"} {
		if got, want := exchange(t, c, text), c.LocalAddr().String()+" "+text; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// Packets that come while the service is being reached wait, up to a bound.
func TestUDPEarlyPackets(t *testing.T) {
	d := &direct{hold: make(chan struct{})}
	x := start(t, d, portAt("p", "udp", echoUDP(t, func(b []byte) []byte { return b })))
	c := visitorUDP(t, x.addr(t, "p"))
	refused := func() float64 {
		return testutil.ToFloat64(x.metrics.refused.WithLabelValues("p", refusedEarly))
	}
	for i := range maxEarly + 10 {
		_, err := c.Write([]byte("x"))
		must(t, err)
		if i%64 == 0 { // the system's queue is short
			time.Sleep(time.Millisecond)
		}
	}
	eventually(t, "ten are dropped", func() bool { return refused() == 10 })
	close(d.hold)
	eventually(t, "the others are passed on", func() bool { return d.wrote.Load() == maxEarly })
}

func TestUDPUnreachableEndsTheSession(t *testing.T) {
	addr, err := freeport.Addr("127.0.0.1")
	must(t, err)
	x := start(t, new(direct), portAt("p", "udp", addr))
	c := visitorUDP(t, x.addr(t, "p"))
	for i := range 2 { // the next packet begins a session anew
		eventually(t, "the session ended as unreachable", func() bool {
			_, _ = c.Write([]byte("x"))
			return testutil.ToFloat64(x.metrics.failures.WithLabelValues("p", "unreachable")) > float64(i)
		})
	}
}

func TestUDPIdleSessionsEnd(t *testing.T) {
	p := portAt("p", "udp", echoUDP(t, func(b []byte) []byte { return b }))
	p.IdleTimeout = spec.Duration(time.Second)
	x := start(t, new(direct), p)
	c := visitorUDP(t, x.addr(t, "p"))
	exchange(t, c, "x")
	eventually(t, "the session ended", func() bool { return testutil.ToFloat64(x.metrics.open.WithLabelValues("p")) == 0 })
	exchange(t, c, "y") // and begins anew
}

func TestLimits(t *testing.T) {
	p := portAt("p", "udp", echoUDP(t, func(b []byte) []byte { return b }))
	p.MaxConnections = 3
	q := portAt("q", "udp", echoUDP(t, func(b []byte) []byte { return b }))
	q.MaxConnections = 1000
	forbidden := portAt("r", "udp", "127.0.0.1:9")
	forbidden.Allow = []string{"192.0.2.0/24"}
	empty := portAt("s", "udp", "127.0.0.1:9")
	empty.Allow = nil
	x := start(t, new(direct), p, q, forbidden, empty)
	refusals := func(port, reason string) float64 {
		return testutil.ToFloat64(x.metrics.refused.WithLabelValues(port, reason))
	}
	for range 3 {
		exchange(t, visitorUDP(t, x.addr(t, "p")), "x")
	}
	for range 100 {
		exchange(t, visitorUDP(t, x.addr(t, "q")), "x")
	}
	for port, reason := range map[string]string{"p": refusedLimit, "q": refusedSource, "r": refusedForbidden, "s": refusedForbidden} {
		_, err := visitorUDP(t, x.addr(t, port)).Write([]byte("x"))
		must(t, err)
		eventually(t, port+" refuses", func() bool { return refusals(port, reason) > 0 })
	}
}

// A TCP connection that carries nothing ends; each direction ends by itself.
func TestTCP(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				line, _ := bufio.NewReader(c).ReadString('\n')
				_, _ = io.WriteString(c, "early "+line)
				_ = c.(*net.TCPConn).CloseWrite() // and still reads
				n, _ := io.Copy(io.Discard, c)
				_ = n
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	p := portAt("p", "tcp", ln.Addr().String())
	p.IdleTimeout = spec.Duration(time.Second)
	x := start(t, new(direct), p)
	c, err := net.Dial("tcp", x.addr(t, "p"))
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err = io.WriteString(c, "hello\n")
	must(t, err)
	if b, err := io.ReadAll(c); err != nil || string(b) != "early hello\n" {
		t.Errorf("got %q, %v", b, err)
	}
	if _, err := io.WriteString(c, "more"); err != nil {
		t.Errorf("the direction to the service ended with the other: %v", err)
	}
	eventually(t, "the idle connection is cut", func() bool { return testutil.ToFloat64(x.metrics.open.WithLabelValues("p")) == 0 })
}

func TestSetNamesWhatIsWrong(t *testing.T) {
	f, err := New(Config{Dialer: new(direct)})
	must(t, err)
	good := portAt("good", "tcp", "127.0.0.1:9")
	bad := portAt("bad", "tcp", "127.0.0.1:9")
	bad.Listen = "nowhere"
	err = f.Set([]spec.PortConfig{good, bad, good})
	if err == nil || !strings.Contains(err.Error(), `"bad"`) || !strings.Contains(err.Error(), "names two ports") {
		t.Errorf("got %v", err)
	}
	if len(f.configs) != 1 {
		t.Errorf("%d ports are taken, want the good one", len(f.configs))
	}
}

func TestWatchIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var last atomic.Int64
		cut := make(chan time.Duration, 1)
		began := time.Now()
		stop := watchIdle(time.Minute, &last, func() { cut <- time.Since(began) })
		time.Sleep(50 * time.Second)
		last.Store(int64(time.Since(epoch)))
		if d := <-cut; d != 110*time.Second {
			t.Errorf("cut after %v, want a minute after the last use", d)
		}
		stop()
		stop = watchIdle(time.Minute, &last, func() { t.Error("cut after the end") })
		stop()
		time.Sleep(time.Hour)
	})
}
