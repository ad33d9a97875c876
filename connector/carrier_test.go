package connector

import (
	"context"
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A gate is a UDP port that swallows what comes until it is opened; then it passes packets on to an edge and back.
type gate struct {
	conn *net.UDPConn
	wg   sync.WaitGroup

	mu      sync.Mutex
	to      netip.AddrPort // not valid while the gate is shut
	clients map[netip.AddrPort]*net.UDPConn
}

func newGate(t testing.TB, at netip.AddrPort) *gate {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{conn: conn, clients: map[netip.AddrPort]*net.UDPConn{}}
	g.wg.Go(g.in)
	t.Cleanup(func() {
		conn.Close()
		g.mu.Lock()
		for _, c := range g.clients {
			c.Close()
		}
		g.mu.Unlock()
		g.wg.Wait()
	})
	return g
}

func (g *gate) open(to netip.AddrPort) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.to = to
}

func (g *gate) in() {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := g.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		g.mu.Lock()
		out := g.clients[from]
		if out == nil && g.to.IsValid() {
			if out, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(g.to)); err == nil {
				g.clients[from] = out
				g.wg.Go(func() { g.back(out, from) })
			}
		}
		g.mu.Unlock()
		if out != nil {
			out.Write(buf[:n]) //nolint:errcheck // packets may be lost
		}
	}
}

func (g *gate) back(out *net.UDPConn, to netip.AddrPort) {
	buf := make([]byte, 64<<10)
	for {
		n, err := out.Read(buf)
		if err != nil {
			return
		}
		g.conn.WriteToUDPAddrPort(buf[:n], to) //nolint:errcheck // packets may be lost
	}
}

func over(c *Connector, carrier string) bool {
	list := c.Status().Sessions
	return len(list) > 0 && !slices.ContainsFunc(list, func(s SessionStatus) bool { return s.State != StateConnected || s.Carrier != carrier })
}

// TestUDPBlocked has an edge whose UDP port swallows everything: the sessions come up over TCP and carry flows; when UDP
// works they move to QUIC, and the flow that is open goes on.
func TestUDPBlocked(t *testing.T) {
	_, edgeID, connID := identities(t)
	addr := freeAddr(t)
	blocked := newGate(t, netip.MustParseAddrPort(addr))
	e := startEdgeWith(t, tunnel.ListenConfig{Addr: "127.0.0.1:0", TCPAddr: addr, Identity: edgeID})
	c, err := New(Config{Identity: connID, Edges: []string{addr}, Allow: loopbackOnly(t)})
	if err != nil {
		t.Fatal(err)
	}
	c.quicFirst = 50 * time.Millisecond
	runConnector(t, c)
	eventually(t, "all sessions over TCP", func() bool { return over(c, CarrierTCP) })
	conn, err := e.open(t, echoServer(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	echo(t, conn)

	blocked.open(netip.MustParseAddrPort(e.addr))
	eventually(t, "all sessions over QUIC", func() bool { return over(c, CarrierQUIC) })
	echo(t, conn)
}

// TestToldByEdges has real edges tell of each other, and ask for bulk sessions.
func TestToldByEdges(t *testing.T) {
	authority, edgeID, connID := identities(t)
	a, b := startEdge(t, authority, edgeID, "127.0.0.1:0"), startEdge(t, authority, edgeID, "127.0.0.1:0")
	c, _ := startConnector(t, Config{Identity: connID, Edges: []string{a.addr}, Allow: loopbackOnly(t), Bulk: 1})
	eventually(t, "four sessions", func() bool { return a.count() == SessionsPerEdge && allUp(c) })
	conn, err := a.open(t, echoServer(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	a.session(t).TellEdges([]string{a.addr, b.addr})
	eventually(t, "two sessions to each edge", func() bool {
		return a.countMain() == 2 && b.countMain() == 2 && allUp(c) && len(c.Status().Sessions) == 4
	})
	echo(t, conn) // on a session that was replaced
	for _, s := range b.all() {
		if reg := s.Registration(); reg.Connections != 2 || reg.Role != tunnel.RoleMain {
			t.Errorf("registration %+v, want one of two connections", reg)
		}
	}

	b.session(t).AskBulk(3)
	eventually(t, "a bulk session", func() bool {
		return slices.ContainsFunc(b.all(), func(s *tunnel.Session) bool {
			return s.Registration().Role == tunnel.RoleBulk && s.Carrier() == tunnel.CarrierTCP
		})
	})
	if n := len(b.all()); n != 3 {
		t.Errorf("%d sessions at the second edge, want two main ones and one for bulk", n)
	}
}

// TestOtherInstallation dials an edge of another authority: it is told as such, over both carriers.
func TestOtherInstallation(t *testing.T) {
	_, edgeID, _ := identities(t)
	_, _, connID := identities(t)
	e := startEdgeWith(t, tunnel.ListenConfig{Addr: "127.0.0.1:0", Identity: edgeID})
	c, _ := startConnector(t, Config{Identity: connID, Edges: []string{e.addr}})
	eventually(t, "the remedy", func() bool {
		list := c.Status().Sessions
		return len(list) > 0 && list[0].Remedy != ""
	})
	if s := c.Status().Sessions[0]; !strings.Contains(s.Remedy, "another installation") {
		t.Errorf("got %+v, want a remedy that names the other installation", s)
	}
}

// startEdgeWith is startEdge for a configuration of the test's own.
func startEdgeWith(t testing.TB, cfg tunnel.ListenConfig) *edge {
	t.Helper()
	e := &edge{sessions: map[*tunnel.Session]struct{}{}}
	cfg.DrainTimeout = time.Millisecond
	cfg.Admit = func(context.Context, mtls.Identity, *x509.Certificate, tunnel.Registration) error { return nil }
	cfg.Handle = e.handle
	ln, err := tunnel.Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	e.run(t, ln)
	return e
}
