package control

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMeasuredCarrier(t *testing.T) {
	s := newBulk("", newRegistry())
	state := s.stateLocked("c")
	const tcp, quic = tunnel.CarrierTCP, tunnel.CarrierQUIC
	for i, step := range []struct {
		carrier tunnel.Carrier
		rate    float64
		want    tunnel.Carrier
	}{
		{quic, 1000, tcp}, // TCP was not measured yet: it stays
		{tcp, 900, tcp},   // QUIC is better, but by less than a quarter
		{tcp, 600, tcp},   // 810 on average
		{tcp, 500, quic},  // 717: QUIC is better by far
		{tcp, 1000, quic}, // better again, but not by far
		{tcp, 5000, tcp},
		{quic, 100, tcp},
	} {
		state.observe(step.carrier, step.rate)
		if got := s.choose("c", exploreFar); got != step.want {
			t.Errorf("step %d: %s, want %s at %v", i, got, step.want, state.rate)
		}
	}
	if got := s.choose("never seen", exploreFar); got != tcp {
		t.Errorf("without a measurement: %s, want tcp", got)
	}
}

// A client is a connector's process with sessions of any role and carrier.
type client struct {
	e    *edge
	src  *mtls.Source
	bulk atomic.Int32 // what the edge asked for last
}

func (k *client) link(index int, role tunnel.Role, carrier tunnel.Carrier, addr string, handle func(context.Context, *tunnel.Incoming)) *link {
	k.e.b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	before := k.e.reg.sessions()
	c, err := tunnel.Dial(ctx, tunnel.DialConfig{Addr: addr, Identity: k.src, Handle: handle, Carrier: carrier,
		OnBulk:       func(n int) { k.bulk.Store(int32(n)) },
		Registration: tunnel.Registration{Instance: "i-" + k.src.Identity().Name, Index: index, Role: role}})
	must(k.e.b.t, err)
	run, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); c.Run(run) }() //nolint:errcheck // however it ends
	l := &link{c, sync.OnceFunc(func() { stop(); <-done })}
	k.e.b.t.Cleanup(l.cut)
	eventually(k.e.b.t, "the session is registered", func() bool { return k.e.reg.sessions() > before })
	return l
}

// Bulk flows ask for sessions of their own and take them, one each, and share them where there are too few; others never do.
func TestBulkSessions(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	k := &client{e: e, src: e.enrol("plant", "p1")}
	k.link(0, tunnel.RoleMain, tunnel.CarrierQUIC, e.addr, saying("quic"))
	open := func(class tunnel.FlowClass, carrier tunnel.Carrier) (net.Conn, string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		conn, err := e.Dial(ctx, Query{Host: "10.1.2.3", Port: 443, Class: class, Carrier: carrier})
		must(t, err)
		t.Cleanup(func() { conn.Close() })
		line := make([]byte, 64)
		n, err := conn.Read(line)
		must(t, err)
		return conn, strings.Fields(string(line[:n]))[0]
	}
	first, who := open(tunnel.ClassBulk, tunnel.CarrierTCP)
	if who != "quic" {
		t.Errorf("the first bulk flow went over %s; there was only quic", who)
	}
	eventually(t, "bulk sessions are asked for, spare ones too", func() bool { return k.bulk.Load() == 1+bulkSpare })
	k.link(8, tunnel.RoleBulk, tunnel.CarrierTCP, e.addr, saying("bulk1"))
	k.link(9, tunnel.RoleBulk, tunnel.CarrierTCP, e.addr, saying("bulk2"))
	var got []string
	for range 2 {
		_, who := open(tunnel.ClassBulk, tunnel.CarrierTCP)
		got = append(got, who)
	}
	if got[0] == got[1] || !strings.HasPrefix(got[0], "bulk") || !strings.HasPrefix(got[1], "bulk") {
		t.Errorf("two bulk flows went over %v, want a bulk session each", got)
	}
	eventually(t, "more are asked for", func() bool { return k.bulk.Load() == 3+bulkSpare })
	if _, who := open(tunnel.ClassBulk, tunnel.CarrierTCP); !strings.HasPrefix(who, "bulk") {
		t.Errorf("the third bulk flow over TCP went over %s, want a bulk session though each has one", who)
	}
	if _, who := open(tunnel.ClassBulk, tunnel.CarrierQUIC); who != "quic" {
		t.Errorf("a bulk flow over QUIC went over %s", who)
	}
	for _, c := range []tunnel.FlowClass{tunnel.ClassAuto, tunnel.ClassInteractive} {
		if _, who := open(c, ""); who != "quic" {
			t.Errorf("a flow of class %d went over %s", c, who)
		}
	}
	if n := testutil.ToFloat64(e.opened.WithLabelValues("local", "tcp", "bulk")); n != 3 {
		t.Errorf("%v flows are counted on bulk sessions, want 3", n)
	}
	roles := map[string]int{}
	for _, v := range e.Flows() {
		roles[v.Carrier+" "+v.Role]++
	}
	if roles["quic main"] != 4 || roles["tcp bulk"] != 3 {
		t.Errorf("flows are shown as %v, want 4 on quic main and 3 on tcp bulk", roles)
	}
	// Bulk sessions are no part of a connector's health.
	if d, _ := e.Tunnel("plant"); d.Sessions != 1 {
		t.Errorf("%d sessions count, want the main one", d.Sessions)
	}
	first.Close()
	e.bulk.rest(time.Now().Add(2*bulkRest), nil)
	eventually(t, "what is not needed is given back", func() bool { return k.bulk.Load() == 3 }) // as many as there are such flows
	for _, f := range e.flowsOpen() {
		f.forget()
	}
	e.bulk.rest(time.Now().Add(4*bulkRest), nil)
	eventually(t, "all is given back", func() bool { return k.bulk.Load() == 0 })
}

// Where bulk flows are expected there are sessions for them before the first, and after the last.
func TestExpectedBulkSessions(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	k := &client{e: e, src: e.enrol("plant", "p1")}
	k.link(0, tunnel.RoleMain, tunnel.CarrierQUIC, e.addr, saying("quic"))
	e.ExpectBulk([]Query{{Host: "no.such.host", Port: 443}, {Host: "10.1.2.3", Port: 443}})
	eventually(t, "spare sessions are asked for", func() bool { e.tendBulk(time.Now()); return k.bulk.Load() == bulkSpare })
	e.tendBulk(time.Now().Add(2 * bulkRest))
	e.bulk.mu.Lock()
	asked := e.bulk.by["p1"].asked
	e.bulk.mu.Unlock()
	if asked != bulkSpare {
		t.Errorf("after a while %d sessions are asked for, want the spare ones", asked)
	}
	e.ExpectBulk(nil)
	e.tendBulk(time.Now().Add(4 * bulkRest))
	eventually(t, "they are given back", func() bool { return k.bulk.Load() == 0 })
	// A connector that kept them through the edge's restart learns that they are not wanted.
	k.bulk.Store(-1)
	k.link(8, tunnel.RoleBulk, tunnel.CarrierTCP, e.addr, saying("bulk"))
	eventually(t, "no session is wanted", func() bool { return k.bulk.Load() == 0 })
}

func (e *edge) flowsOpen() (list []*record) {
	e.flows.mu.Lock()
	defer e.flows.mu.Unlock()
	for r := range e.flows.open {
		list = append(list, r)
	}
	return list
}

// Flows count their bytes, and large ones are measured.
func TestBytesAreCounted(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	k := &client{e: e, src: e.enrol("plant", "p1")}
	k.link(0, tunnel.RoleMain, tunnel.CarrierQUIC, e.addr, echoing("p1"))
	conn, err := e.open("", "10.1.2.3")
	must(t, err)
	const size = 2 << 20
	go func() {
		conn.Write(bytes.Repeat([]byte("x"), size)) //nolint:errcheck // the reader sees it
		conn.(tunnel.Conn).CloseWrite()             //nolint:errcheck // likewise
	}()
	n, err := io.Copy(io.Discard, conn)
	if err != nil || n != size+3 {
		t.Fatalf("echo of %d bytes, %v", n, err)
	}
	if v := e.Flows()[0]; v.BytesIn != size+3 || v.BytesOut != size || v.Connector != "p1" {
		t.Errorf("the flow is shown as %+v", v)
	}
	conn.Close()
	e.bulk.mu.Lock()
	defer e.bulk.mu.Unlock()
	if s := e.bulk.by["p1"]; s == nil || s.rate[tunnel.CarrierQUIC] <= 0 {
		t.Errorf("the throughput was not taken into account: %+v", s)
	}
}

// Limits hold per network and tunnel, can be lowered while flows are open, and are told from other failures.
func TestFlowLimits(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	e.link(e.enrol("plant", "p1"), "i1", 0, saying("p1"))
	set := func(n int) {
		t.Helper()
		_, err := e.SetVNet(t.Context(), "default", VNetChange{MaxFlows: &n})
		must(t, err)
	}
	set(2)
	var conns []net.Conn
	for range 2 {
		c, err := e.open("", "10.1.2.3")
		must(t, err)
		conns = append(conns, c)
	}
	_, err := e.open("", "10.1.2.3")
	wantErr(t, err, ErrLimit, "default", "2 flows")
	if !isLimit(err) {
		t.Errorf("%v is no *tunnel.FlowError of ResultLimit", err)
	}
	set(1) // below what is open
	conns[0].Close()
	_, err = e.open("", "10.1.2.3")
	wantErr(t, err, ErrLimit)
	conns[1].Close()
	c, err := e.open("", "10.1.2.3")
	must(t, err)
	set(0)
	one := 1
	_, err = e.SetTunnel(t.Context(), "plant", TunnelChange{MaxFlows: &one})
	must(t, err)
	_, err = e.open("", "10.1.2.3")
	wantErr(t, err, ErrLimit, "plant")
	c.Close()
	c.Close() // counts once
	c, err = e.open("", "10.1.2.3")
	must(t, err)
	c.Close()
}

func isLimit(err error) bool { return peerResult(err) == tunnel.ResultLimit }

// A connector that vanishes without a word, as by kill -9 of its host, delays new flows by less than a second while a
// replica lives.
func TestVanishedConnector(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	gone, stays := &client{e: e, src: e.enrol("plant", "p1")}, &client{e: e, src: e.enrol("plant", "p2")}
	hole := newRelay(t, e.addr)
	for i := range 2 {
		gone.link(i, tunnel.RoleMain, tunnel.CarrierQUIC, hole.addr, saying("p1"))
		stays.link(i, tunnel.RoleMain, tunnel.CarrierQUIC, e.addr, saying("p2"))
	}
	by := map[string]int{}
	for range 8 {
		got, err := e.ask("", "10.1.2.3")
		must(t, err)
		by[got[:2]]++
	}
	if len(by) != 2 {
		t.Errorf("flows went to %v, want both connectors", by)
	}
	hole.swallow.Store(true)
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		conn, err := e.DialContext(ctx, "", "10.1.2.3", 443, netip.AddrPort{})
		cancel()
		if err != nil {
			t.Fatalf("a flow was not open within a second: %v", err)
		}
		if k := conn.(*flow).via.Load(); k.connector() != "p2" {
			t.Fatalf("a flow is open over %s", k.connector())
		}
		conn.Close()
	}
	// By now its sessions are suspect and tried last.
	p, list, err := e.candidates(Query{Host: "10.1.2.3", Port: 443})
	must(t, err)
	for i, k := range list {
		if want := map[bool]string{true: "p2", false: "p1"}[i < 2]; k.connector() != want {
			t.Errorf("candidate %d of tunnel %s is %s, want %s", i, p.tunnel, k.connector(), want)
		}
	}
}

// A relay passes UDP on to an address until it shall swallow everything.
type relay struct {
	addr    string
	swallow atomic.Bool
}

func newRelay(t *testing.T, to string) *relay {
	t.Helper()
	target := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to))
	front, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	r := &relay{addr: front.LocalAddr().String()}
	var wg sync.WaitGroup
	var mu sync.Mutex
	backs := map[netip.AddrPort]*net.UDPConn{}
	back := func(client netip.AddrPort) *net.UDPConn {
		mu.Lock()
		defer mu.Unlock()
		b := backs[client]
		if b != nil {
			return b
		}
		b, err := net.DialUDP("udp", nil, target)
		if err != nil {
			panic(fmt.Sprint(err))
		}
		backs[client] = b
		wg.Go(func() {
			buf := make([]byte, 65536)
			for {
				n, err := b.Read(buf)
				if err != nil {
					return
				}
				if !r.swallow.Load() {
					front.WriteToUDPAddrPort(buf[:n], client) //nolint:errcheck // as a network does
				}
			}
		})
		return b
	}
	wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := front.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if b := back(from); !r.swallow.Load() {
				b.Write(buf[:n]) //nolint:errcheck // as a network does
			}
		}
	})
	t.Cleanup(func() {
		front.Close()
		mu.Lock()
		for _, b := range backs {
			b.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return r
}
