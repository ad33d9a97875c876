package control

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// packetSite answers flows of packets with who answers and what came, and remembers the flows.
type packetSite struct {
	mu  sync.Mutex
	ids [][16]byte
}

func (s *packetSite) serve(who string) func(context.Context, *tunnel.Incoming) {
	return func(_ context.Context, in *tunnel.Incoming) {
		f := in.Flow()
		if f.Kind == tunnel.KindTCP {
			conn, err := in.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			io.WriteString(conn, f.Host) //nolint:errcheck // the edge sees what comes of it
			return
		}
		s.mu.Lock()
		s.ids = append(s.ids, f.ID)
		s.mu.Unlock()
		conn, err := in.AcceptPacket()
		if err != nil {
			return
		}
		defer conn.Close()
		for {
			b, err := tunnel.ReceivePacket(conn)
			if err != nil {
				return
			}
			if r, err := tunnel.ParseEchoRequest(b); err == nil && f.Kind == tunnel.KindICMP {
				conn.WritePacket(tunnel.AppendEchoReply(nil, tunnel.EchoReply{Seq: r.Seq, Type: tunnel.EchoReplied, From: netip.MustParseAddr("10.0.0.7"), Payload: r.Payload})) //nolint:errcheck // lossy
				continue
			}
			switch string(b) {
			case "bye":
				return
			case "refuse":
				conn.Unreachable(tunnel.UnreachablePort)
			default:
				conn.WritePacket([]byte(who + " " + f.Host + " " + string(b))) //nolint:errcheck // lossy
			}
		}
	}
}

// converse sends text until an answer comes.
func converse(t *testing.T, c tunnel.PacketConn, text string) string {
	t.Helper()
	for range 10 {
		must(t, c.WritePacket([]byte(text)))
		must(t, c.SetReadDeadline(time.Now().Add(2*time.Second)))
		b, err := tunnel.ReceivePacket(c)
		if err == nil {
			return string(b)
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
	t.Fatal("no answer")
	return ""
}

func packetBed(t *testing.T) (*edge, *packetSite, tunnel.PacketConn, []*link) {
	t.Helper()
	e := newBed(t).edge()
	_, err := e.AddTunnel(t.Context(), "site", "")
	must(t, err)
	_, err = e.AddRoute(t.Context(), RouteSpec{Prefix: "10.0.0.0/8", Tunnel: "site"})
	must(t, err)
	_, err = e.AddRoute(t.Context(), RouteSpec{Host: "*.site.internal", Tunnel: "site"})
	must(t, err)
	s := &packetSite{}
	a, b := e.enrol("site", "a"), e.enrol("site", "b")
	links := []*link{e.link(a, "process-a", 0, s.serve("a0")), e.link(a, "process-a", 1, s.serve("a1")), e.link(b, "process-b", 0, s.serve("b0"))}
	c, err := e.DialPacket(t.Context(), Query{Host: "10.0.0.7", Port: 53, Connector: "a"})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return e, s, c, links
}

// A UDP flow that QUIC has too little room for moves to TCP, for which a session is asked if there is none.
func TestPacketFlowNeedsRoom(t *testing.T) {
	e, s, _, _ := packetBed(t)
	k := &client{e: e, src: e.enrol("site", "c")}
	k.link(0, tunnel.RoleMain, tunnel.CarrierQUIC, e.addr, s.serve("quic"))
	c, err := e.DialPacket(t.Context(), Query{Host: "10.0.0.7", Port: 53, Connector: "c"})
	must(t, err)
	defer c.Close()
	carrier := func() string {
		for _, f := range e.Flows() {
			if f.Connector == "c" {
				return f.Carrier
			}
		}
		return ""
	}
	if got := carrier(); got != "quic" {
		t.Fatalf("the flow begins over %q, want quic", got)
	}
	packet := make([]byte, 1000)
	flood := func() {
		for range 1000 {
			must(t, c.WritePacket(packet))
		}
	}
	eventually(t, "a session over TCP is asked for", func() bool { flood(); return k.bulk.Load() > 0 })
	k.link(8, tunnel.RoleBulk, tunnel.CarrierTCP, e.addr, s.serve("tcp"))
	eventually(t, "the flow is over TCP", func() bool { flood(); return carrier() == "tcp" })
	if got := converse(t, c, "hello"); got[:4] != "tcp " {
		t.Errorf("got %q, want the answer over TCP", got)
	}
}

func TestPacketFlow(t *testing.T) {
	e, _, c, _ := packetBed(t)
	converse(t, c, "hello")
	if fs := e.Flows(); len(fs) != 1 || fs[0].Kind != "udp" || fs[0].BytesOut == 0 || fs[0].BytesIn == 0 {
		t.Errorf("got flows %+v, want one of UDP with bytes", fs)
	}
	must(t, c.WritePacket([]byte("refuse")))
	must(t, c.SetReadDeadline(time.Now().Add(patience)))
	_, err := tunnel.ReceivePacket(c)
	if u, ok := errors.AsType[*tunnel.UnreachableError](err); !ok || u.Code != tunnel.UnreachablePort {
		t.Errorf("got %v, want port unreachable", err)
	}
	must(t, c.WritePacket([]byte("bye")))
	must(t, c.SetReadDeadline(time.Now().Add(patience)))
	if _, err := tunnel.ReceivePacket(c); err != io.EOF {
		t.Errorf("after the site's end: got %v, want io.EOF", err)
	}
	must(t, c.Close())
	must(t, c.Close())
	eventually(t, "no flow is left", func() bool { return len(e.Flows()) == 0 })
	if _, err := e.DialPacket(t.Context(), Query{Host: "192.0.2.1", Port: 53}); !errors.Is(err, ErrNoRoute) {
		t.Errorf("no route: got %v, want ErrNoRoute", err)
	}
}

func TestPacketFlowMoves(t *testing.T) {
	e, s, c, links := packetBed(t)
	first := converse(t, c, "one")[:2]
	i := int(first[1] - '0')
	links[i].cut()
	if got, want := converse(t, c, "two")[:2], "a"+string('1'-rune(i)); got != want {
		t.Errorf("after the session's end %q answers, want %q", got, want)
	}
	s.mu.Lock()
	if len(s.ids) != 2 || s.ids[0] != s.ids[1] || s.ids[0] == [16]byte{} {
		t.Errorf("got flow ids %x, want the same twice", s.ids)
	}
	s.mu.Unlock()
	if fs := e.Flows(); len(fs) != 1 {
		t.Errorf("got flows %+v, want one", fs)
	}
	// Nothing is left of the connector: the flow ends, once it has looked for long enough.
	e.packets.moveTime.Store(int64(300 * time.Millisecond))
	links[1-i].cut()
	must(t, c.WritePacket([]byte("three")))
	must(t, c.SetReadDeadline(time.Now().Add(patience)))
	if _, err := tunnel.ReceivePacket(c); !errors.Is(err, tunnel.ErrSessionLost) {
		t.Errorf("got %v, want ErrSessionLost", err)
	}
}

func TestPacketFlowLeavesDrain(t *testing.T) {
	e, _, c, links := packetBed(t)
	i := int(converse(t, c, "one")[1] - '0')
	done := make(chan error, 1)
	go func() { done <- links[i].Drain(context.Background()) }()
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(patience):
		t.Fatal("a UDP flow holds up the drain")
	}
	converse(t, c, "two")
	_, err := e.AddTunnel(t.Context(), "other", "")
	must(t, err)
	_, err = e.AddRoute(t.Context(), RouteSpec{Prefix: "10.0.0.7/32", Tunnel: "other"})
	must(t, err)
	select {
	case <-c.(tunnel.Drainer).Draining():
	case <-time.After(patience):
		t.Fatal("the flow is not asked to leave")
	}
	converse(t, c, "three")
}

func TestEchoAndResolver(t *testing.T) {
	e, _, _, _ := packetBed(t)
	r, err := e.Echo(t.Context(), Query{Host: "10.0.0.7", Port: 99}, tunnel.EchoRequest{Seq: 3, Payload: []byte("ping"), Timeout: patience})
	if err != nil || r.Seq != 3 || string(r.Payload) != "ping" || r.Type != tunnel.EchoReplied {
		t.Errorf("Echo: got %+v, %v", r, err)
	}
	c, err := e.DialPacket(t.Context(), Query{Host: "db.site.internal", Resolver: true, Connector: "b"})
	must(t, err)
	defer c.Close()
	if got := converse(t, c, "query"); got != "b0 _dns query" {
		t.Errorf("got %q, want the name server's answer", got)
	}
	conn, err := e.Dial(t.Context(), Query{Tunnel: "site", Resolver: true})
	must(t, err)
	defer conn.Close()
	if b, err := io.ReadAll(conn); err != nil || string(b) != "_dns" {
		t.Errorf("got %q, %v, want the name server's answer", b, err)
	}
}

// The connection under a UDP flow falls silent: packets go over another one long before the session counts as lost.
func TestPacketFlowLeavesSilence(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	s := &packetSite{}
	k := &client{e: e, src: e.enrol("plant", "p1")}
	hole := newRelay(t, e.addr)
	lost := k.link(0, tunnel.RoleMain, tunnel.CarrierQUIC, hole.addr, s.serve("p0"))
	c, err := e.DialPacket(t.Context(), Query{Host: "10.1.2.3", Port: 53})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	if got := converse(t, c, "one"); got[:2] != "p0" {
		t.Fatalf("got %q, want an answer over the only session", got)
	}
	k.link(1, tunnel.RoleMain, tunnel.CarrierQUIC, e.addr, s.serve("p1"))
	hole.swallow.Store(true)
	if got := converse(t, c, "two"); got[:2] != "p1" {
		t.Errorf("got %q, want an answer over the other session", got)
	}
	if lost.Err() != nil {
		t.Errorf("the silent session has ended: %v; the test proves nothing", lost.Err())
	}
	if fs := e.Flows(); len(fs) != 1 {
		t.Errorf("got flows %+v, want one", fs)
	}
}
