package connector

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

// udpOrigin sends back what it gets, and remembers from which ports that came.
type udpOrigin struct {
	addr netip.AddrPort

	mu    sync.Mutex
	ports []uint16
}

func startUDP(t testing.TB, listen string) *udpOrigin {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(listen)))
	if err != nil {
		t.Fatal(err)
	}
	o := &udpOrigin{addr: c.LocalAddr().(*net.UDPAddr).AddrPort()}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			o.mu.Lock()
			o.ports = append(o.ports, from.Port())
			o.mu.Unlock()
			c.WriteToUDPAddrPort(buf[:n], from) //nolint:errcheck // as lossy as UDP
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return o
}

// sources are the different ports that packets came from.
func (o *udpOrigin) sources() []uint16 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Compact(slices.Sorted(slices.Values(o.ports)))
}

func (o *udpOrigin) flow(id byte) tunnel.Flow {
	return tunnel.Flow{Kind: tunnel.KindUDP, VNet: "default", Host: o.addr.Addr().String(), Port: o.addr.Port(), ID: [16]byte{id}}
}

func openPackets(t testing.TB, s *tunnel.Session, f tunnel.Flow) tunnel.PacketConn {
	t.Helper()
	c, err := tryPackets(t, s, f)
	if err != nil {
		t.Fatalf("OpenPacket: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func tryPackets(t testing.TB, s *tunnel.Session, f tunnel.Flow) (tunnel.PacketConn, error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return s.OpenPacket(ctx, f)
}

// ask sends a packet until it comes back.
func ask(t testing.TB, c tunnel.PacketConn, b []byte) {
	t.Helper()
	for range 10 {
		if err := c.WritePacket(b); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(2 * time.Second))
		got, err := tunnel.ReceivePacket(c)
		switch {
		case err == nil:
			if !bytes.Equal(got, b) {
				t.Errorf("packet of %d bytes came back as one of %d", len(b), len(got))
			}
			return
		case !errors.Is(err, os.ErrDeadlineExceeded):
			t.Fatal(err)
		}
	}
	t.Fatal("no answer")
}

// udpSite is an edge and a connector that may reach the loopback addresses.
func udpSite(t *testing.T, cfg Config) (*edge, *Connector) {
	t.Helper()
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, "127.0.0.1:0")
	cfg.Identity, cfg.Edges = connID, []string{e.addr}
	if cfg.Allow == nil {
		cfg.Allow = mustAllow(t, Rule{To: "127.0.0.0/8", Ports: []Ports{AllPorts}}, Rule{To: "::1", Ports: []Ports{AllPorts}})
	}
	c, _ := startConnector(t, cfg)
	return e, c
}

func TestUDP(t *testing.T) {
	reg := prometheus.NewRegistry()
	e, c := udpSite(t, Config{Registerer: reg})
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0"} {
		o := startUDP(t, listen)
		f := openPackets(t, e.session(t), o.flow(0))
		for _, n := range []int{0, 1, 1200, 1472, 9000, tunnel.MaxPacket} {
			ask(t, f, bytes.Repeat([]byte{7}, n))
		}
		if got := o.sources(); len(got) != 1 {
			t.Errorf("%s: packets came from ports %v, want one", listen, got)
		}
		f.Close()
	}
	eventually(t, "no flow is left", func() bool { return c.flows.len() == 0 })
	if got := testutil.ToFloat64(c.metrics.udp.outPackets); got < 12 {
		t.Errorf("%v packets counted, want at least 12", got)
	}
}

func TestUDPRefused(t *testing.T) {
	e, c := udpSite(t, Config{})
	nobody := startUDP(t, "127.0.0.1:0").flow(0)
	l, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	nobody.Port = l.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	l.Close()
	f := openPackets(t, e.session(t), nobody)
	f.WritePacket([]byte("anybody there?"))
	f.SetReadDeadline(time.Now().Add(patience))
	_, err = tunnel.ReceivePacket(f)
	if u, ok := errors.AsType[*tunnel.UnreachableError](err); !ok || u.Code != tunnel.UnreachablePort {
		t.Errorf("got %v, want port unreachable", err)
	}
	f.WritePacket([]byte("and now?")) // the flow goes on
	if _, err = tunnel.ReceivePacket(f); errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
		t.Errorf("got %v, want port unreachable again", err)
	}

	denied := nobody
	denied.Host = "192.0.2.1"
	if _, err := tryPackets(t, e.session(t), denied); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("outside of the allow-list: got %v, want ErrDenied", err)
	}
	denied = nobody
	denied.Host = ResolverHost
	if _, err := tryPackets(t, e.session(t), denied); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("resolver without dns.serve: got %v, want ErrDenied", err)
	}
	c.SetAllow(nil)
	f.SetReadDeadline(time.Now().Add(patience))
	if _, err := tunnel.ReceivePacket(f); err != io.EOF {
		t.Errorf("after the allow-list was emptied: got %v, want io.EOF", err)
	}
}

func TestUDPIdle(t *testing.T) {
	e, c := udpSite(t, Config{UDPIdle: 50 * time.Millisecond})
	f := openPackets(t, e.session(t), startUDP(t, "127.0.0.1:0").flow(1))
	ask(t, f, []byte("hello"))
	f.SetReadDeadline(time.Now().Add(patience))
	if _, err := tunnel.ReceivePacket(f); err != io.EOF {
		t.Errorf("got %v, want io.EOF", err)
	}
	eventually(t, "no flow is left", func() bool { return c.flows.len() == 0 })
	c.udp.mu.Lock()
	defer c.udp.mu.Unlock()
	if len(c.udp.sockets) != 0 {
		t.Errorf("%d sockets left, want none", len(c.udp.sockets))
	}
}

func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		ctx, cut := context.WithCancelCause(t.Context())
		i := newIdle(time.Minute, cut)
		defer i.stop()
		for range 3 {
			time.Sleep(50 * time.Second)
			i.touch()
		}
		<-ctx.Done()
		if d := time.Since(began); d != 210*time.Second || context.Cause(ctx) != errIdle {
			t.Errorf("ended after %v with %v, want 3m30s and errIdle", d, context.Cause(ctx))
		}
	})
}

func TestUDPMigration(t *testing.T) {
	e, c := udpSite(t, Config{})
	eventually(t, "four sessions", func() bool { return e.count() == 4 })
	o := startUDP(t, "127.0.0.1:0")
	first := e.session(t)
	f := openPackets(t, first, o.flow(7))
	ask(t, f, []byte("one"))
	first.Close(tunnel.CloseShutdown)
	if _, err := tunnel.ReceivePacket(f); !errors.Is(err, tunnel.ErrSessionLost) {
		t.Errorf("got %v, want ErrSessionLost", err)
	}
	eventually(t, "another session", func() bool { return e.session(t) != first })
	second := openPackets(t, e.session(t), o.flow(7))
	ask(t, second, []byte("two"))

	// The newer one takes the association from one that lives, too.
	third := openPackets(t, e.session(t), o.flow(7))
	second.SetReadDeadline(time.Now().Add(patience))
	if _, err := tunnel.ReceivePacket(second); err != io.EOF {
		t.Errorf("the older flow: got %v, want io.EOF", err)
	}
	ask(t, third, []byte("three"))
	if got := o.sources(); len(got) != 1 {
		t.Errorf("packets came from ports %v, want one", got)
	}
	// Another name is another association; so is one without.
	ask(t, openPackets(t, e.session(t), o.flow(8)), []byte("four"))
	ask(t, openPackets(t, e.session(t), o.flow(0)), []byte("five"))
	if got := o.sources(); len(got) != 3 {
		t.Errorf("packets came from ports %v, want three", got)
	}
	third.Close()
	eventually(t, "the association is forgotten", func() bool {
		c.udp.mu.Lock()
		defer c.udp.mu.Unlock()
		return len(c.udp.sockets) == 1
	})
}

// The name of an association is worth nothing in another virtual network, nor for another destination: nobody gets at a socket
// by it that is not its own, whose answers are another's.
func TestUDPAssociationsStayInTheirNetwork(t *testing.T) {
	rules := []Rule{{VNet: "default", To: "127.0.0.0/8", Ports: []Ports{AllPorts}}, {VNet: "other", To: "127.0.0.0/8", Ports: []Ports{AllPorts}}}
	e, _ := udpSite(t, Config{Allow: mustAllow(t, rules...)})
	o, p := startUDP(t, "127.0.0.1:0"), startUDP(t, "127.0.0.1:0")
	mine := openPackets(t, e.session(t), o.flow(7))
	ask(t, mine, []byte("mine"))
	foreign := o.flow(7)
	foreign.VNet = "other"
	ask(t, openPackets(t, e.session(t), foreign), []byte("theirs"))
	ask(t, openPackets(t, e.session(t), p.flow(7)), []byte("elsewhere"))
	ask(t, mine, []byte("still mine"))
	if got := o.sources(); len(got) != 2 {
		t.Errorf("two networks came from ports %v, want two", got)
	}
	if got := p.sources(); len(got) != 1 || slices.Contains(o.sources(), got[0]) {
		t.Errorf("another destination was asked from ports %v, want one of its own", got)
	}
	denied := o.flow(7)
	denied.VNet = "third"
	if _, err := tryPackets(t, e.session(t), denied); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("a network without rules: got %v, want ErrDenied", err)
	}
}

// listenBoth listens on one port by UDP and TCP.
func listenBoth(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	addr := freeAddr(t)
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return udp, tcp
}

// startDNS answers A questions for one name, over UDP and TCP, and returns its address.
func startDNS(t testing.TB, name, addr string) netip.AddrPort {
	t.Helper()
	udp, tcp := listenBoth(t)
	handler := mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		r := new(mdns.Msg).SetReply(q)
		switch {
		case q.Question[0].Name != name+".":
			r.Rcode = mdns.RcodeNameError
		case q.Question[0].Qtype == mdns.TypeA:
			r.Answer = append(r.Answer, &mdns.A{Hdr: mdns.RR_Header{Name: name + ".", Rrtype: mdns.TypeA, Class: mdns.ClassINET, Ttl: 60}, A: net.ParseIP(addr)})
		}
		w.WriteMsg(r) //nolint:errcheck // the asker asks again
	})
	var wg sync.WaitGroup
	var stops []func() error
	for _, s := range []*mdns.Server{{PacketConn: udp, Handler: handler}, {Listener: tcp, Handler: handler}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		wg.Go(func() { s.ActivateAndServe() }) //nolint:errcheck // ends with Shutdown
		<-started
		stops = append(stops, s.Shutdown)
	}
	t.Cleanup(func() {
		for _, stop := range stops {
			stop() //nolint:errcheck // it runs
		}
		wg.Wait()
	})
	return netip.MustParseAddrPort(udp.LocalAddr().String())
}

func TestResolvers(t *testing.T) {
	a, b := startDNS(t, "db.internal", "127.0.0.1"), startDNS(t, "db.internal", "127.0.0.2")
	o := startUDP(t, "127.0.0.1:0")
	port := o.addr.Port()
	other, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2), Port: int(port)})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	e, _ := udpSite(t, Config{Resolvers: map[vnet.ID][]netip.AddrPort{"a": {a}, "b": {b}}, ServeDNS: true})

	ask(t, openPackets(t, e.session(t), tunnel.Flow{Kind: tunnel.KindUDP, VNet: "a", Host: "db.internal", Port: port}), []byte("a"))
	openPackets(t, e.session(t), tunnel.Flow{Kind: tunnel.KindUDP, VNet: "b", Host: "db.internal", Port: port}).WritePacket([]byte("b"))
	buf := make([]byte, 10)
	other.SetReadDeadline(time.Now().Add(patience))
	if n, err := other.Read(buf); err != nil || string(buf[:n]) != "b" {
		t.Errorf("network b: got %q, %v", buf[:n], err)
	}
	if _, err := tryPackets(t, e.session(t), tunnel.Flow{Kind: tunnel.KindUDP, VNet: "a", Host: "other.internal", Port: port}); !errors.Is(err, tunnel.ErrNameNotFound) {
		t.Errorf("unknown name: got %v, want ErrNameNotFound", err)
	}

	// The servers themselves.
	m := new(mdns.Msg).SetQuestion("db.internal.", mdns.TypeA)
	packed, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	f := openPackets(t, e.session(t), tunnel.Flow{Kind: tunnel.KindUDP, VNet: "b", Host: ResolverHost, Port: 53})
	if err := f.WritePacket(packed); err != nil {
		t.Fatal(err)
	}
	f.SetReadDeadline(time.Now().Add(patience))
	got, err := tunnel.ReceivePacket(f)
	if err != nil || m.Unpack(got) != nil || len(m.Answer) != 1 || m.Answer[0].(*mdns.A).A.String() != "127.0.0.2" {
		t.Errorf("over UDP: got %v, %v", m, err)
	}
	s, err := e.session(t).Open(t.Context(), tunnel.Flow{VNet: "a", Host: ResolverHost, Port: 53})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c := &mdns.Conn{Conn: s}
	if err := c.WriteMsg(new(mdns.Msg).SetQuestion("db.internal.", mdns.TypeA)); err != nil {
		t.Fatal(err)
	}
	if m, err = c.ReadMsg(); err != nil || len(m.Answer) != 1 || m.Answer[0].(*mdns.A).A.String() != "127.0.0.1" {
		t.Errorf("over TCP: got %v, %v", m, err)
	}
	if _, err := tryPackets(t, e.session(t), tunnel.Flow{Kind: tunnel.KindUDP, VNet: "a", Host: ResolverHost, Port: 22}); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("another port: got %v, want ErrDenied", err)
	}
}

func TestHostNameServers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("# a comment\nsearch example.com\nnameserver 192.0.2.1\nnameserver\nnameserver x\noptions ndots:5\n nameserver 2001:db8::1 # last\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("[2001:db8::1]:53")}
	if got := hostNameServers(path); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := hostNameServers(path + ".not"); got != nil {
		t.Errorf("no file: got %v, want nothing", got)
	}
}
