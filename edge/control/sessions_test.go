package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// site adds a tunnel with a route for 10.0.0.0/8 in the network.
func (e *edge) site(name, network string) {
	e.b.t.Helper()
	_, err := e.AddTunnel(e.b.t.Context(), name, "")
	must(e.b.t, err)
	_, err = e.AddRoute(e.b.t.Context(), RouteSpec{VNet: network, Prefix: "10.0.0.0/8", Tunnel: name})
	must(e.b.t, err)
}

// The same address in two networks reaches two sites, at the same time.
func TestOverlappingNetworks(t *testing.T) {
	e := newBed(t).edge()
	red, err := e.AddVNet(t.Context(), "red", "", false)
	must(t, err)
	e.site("plant", "")
	e.site("office", "red")
	e.link(e.enrol("plant", "p1"), "i1", 0, saying("p1"))
	e.link(e.enrol("office", "o1"), "i1", 0, saying("o1"))
	def, err := e.VNet("")
	must(t, err)
	var wg sync.WaitGroup
	for _, tt := range []struct{ network, want string }{
		{"", fmt.Sprintf("p1 %s 10.1.2.3 443", def.ID)},
		{"default", fmt.Sprintf("p1 %s 10.1.2.3 443", def.ID)},
		{"red", fmt.Sprintf("o1 %s 10.1.2.3 443", red.ID)},
		{string(red.ID), fmt.Sprintf("o1 %s 10.1.2.3 443", red.ID)},
	} {
		wg.Go(func() {
			for range 5 {
				if got, err := e.ask(tt.network, "10.1.2.3"); err != nil || got != tt.want {
					t.Errorf("in %q: %q, %v, want %q", tt.network, got, err, tt.want)
				}
			}
		})
	}
	wg.Wait()
}

func TestDialErrors(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	_, err := e.open("", "10.1.2.3")
	wantErr(t, err, ErrTunnelDown, "plant")
	_, err = e.open("", "192.168.1.1")
	wantErr(t, err, ErrNoRoute, "192.168.1.1", "default")
	_, err = e.open("nope", "10.1.2.3")
	wantErr(t, err, ErrNotFound, "nope")
	_, err = e.open("", "a..b")
	wantErr(t, err, ErrInvalid, "a..b")

	src := e.enrol("plant", "p1")
	for _, r := range []tunnel.Result{tunnel.ResultRefused, tunnel.ResultDenied, tunnel.ResultTimedOut, tunnel.ResultNoRoute, tunnel.ResultNameNotFound} {
		l := e.link(src, "i1", 0, rejecting(r))
		_, err := e.open("", "10.1.2.3")
		if f, ok := errors.AsType[*tunnel.FlowError](err); !ok || f.Result != r {
			t.Errorf("connector says %v, DialContext says %v", r, err)
		}
		l.cut()
		eventually(t, "the session is gone", func() bool { return len(e.reg.all()) == 0 })
	}
}

func TestHostRoutes(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	_, err := e.AddRoute(t.Context(), RouteSpec{Host: "*.corp.example", Tunnel: "plant"})
	must(t, err)
	e.link(e.enrol("plant", "p1"), "i1", 0, saying("p1"))
	got, err := e.ask("", "DB.corp.example.")
	must(t, err)
	if !strings.HasSuffix(got, " db.corp.example 443") {
		t.Errorf("the connector is asked for %q", got)
	}
}

// Answers of the destination are final; failures of a session are not.
func TestRetry(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	counted := func(r tunnel.Result, n *atomic.Int32) func(context.Context, *tunnel.Incoming) {
		return func(ctx context.Context, in *tunnel.Incoming) {
			n.Add(1)
			rejecting(r)(ctx, in)
		}
	}
	for _, tt := range []struct {
		r    tunnel.Result
		want int32
	}{{tunnel.ResultRefused, 1}, {tunnel.ResultDenied, 1}, {tunnel.ResultTimedOut, 1}, {tunnel.ResultLimit, 4}, {tunnel.ResultInternal, 4}, {tunnel.ResultDraining, 4}} {
		var n atomic.Int32
		var ls []*link
		for i := range 4 {
			ls = append(ls, e.link(src, "i1", i, counted(tt.r, &n)))
		}
		if _, err := e.open("", "10.1.2.3"); err == nil {
			t.Errorf("%v: the flow was opened", tt.r)
		}
		if got := n.Load(); got != tt.want {
			t.Errorf("%v: tried on %d sessions, want %d", tt.r, got, tt.want)
		}
		for _, l := range ls {
			l.cut()
		}
		eventually(t, "the sessions are gone", func() bool { return len(e.reg.all()) == 0 })
	}
	// One session that works among three that do not is found.
	for i := range 3 {
		e.link(src, "i1", i, rejecting(tunnel.ResultLimit))
	}
	e.link(src, "i1", 3, saying("good"))
	for range 10 {
		got, err := e.ask("", "10.1.2.3")
		if err != nil || !strings.HasPrefix(got, "good ") {
			t.Fatalf("got %q, %v, want an answer from the session that works", got, err)
		}
	}
}

func TestLeastFlowsAndDraining(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	var ls []*link
	for i := range 4 {
		ls = append(ls, e.link(src, "i1", i, saying(fmt.Sprint(i))))
	}
	var conns []net.Conn
	by := map[string]int{}
	for range 8 {
		conn, err := e.open("", "10.1.2.3")
		must(t, err)
		conns = append(conns, conn)
		line, err := bufio.NewReader(conn).ReadString('\n')
		must(t, err)
		by[line[:1]]++
	}
	for i := range 4 {
		if by[fmt.Sprint(i)] != 2 {
			t.Errorf("8 flows over 4 sessions: %v, want 2 each", by)
			break
		}
	}
	if s := e.Status(); s.Flows != 8 || s.Sessions != 4 {
		t.Errorf("status says %d flows on %d sessions, want 8 on 4", s.Flows, s.Sessions)
	}
	// Two sessions drain: new flows go to the others only.
	var wg sync.WaitGroup
	drain, cancel := context.WithCancel(t.Context())
	for _, l := range ls[:2] {
		wg.Go(func() { l.Drain(drain) }) //nolint:errcheck // ends with the context
	}
	eventually(t, "two sessions drain", func() bool {
		d, err := e.Tunnel("plant")
		return err == nil && len(d.ConnectorList) == 1 && drains(d.ConnectorList[0].Sessions) == 2
	})
	if d, _ := e.Tunnel("plant"); d.Status != Degraded {
		t.Errorf("status while draining: %s, want degraded", d.Status)
	}
	for range 6 {
		got, err := e.ask("", "10.1.2.3")
		if err != nil || got[0] != '2' && got[0] != '3' {
			t.Errorf("while 0 and 1 drain: %q, %v", got, err)
		}
	}
	for _, c := range conns {
		c.Close()
	}
	cancel()
	wg.Wait()
}

func drains(ss []SessionView) (n int) {
	for _, s := range ss {
		if s.Draining {
			n++
		}
	}
	return n
}

func TestStatus(t *testing.T) {
	b := newBed(t)
	e := b.edge()
	e.site("plant", "")
	status := func() string {
		d, err := e.Tunnel("plant")
		must(t, err)
		return d.Status
	}
	if got := status(); got != Inactive {
		t.Errorf("a new tunnel is %s, want inactive", got)
	}
	p1, p2 := e.enrol("plant", "p1"), e.enrol("plant", "p2")
	if got := status(); got != Inactive {
		t.Errorf("with connectors that never came: %s, want inactive", got)
	}
	var ls []*link
	for i := range 4 {
		if i > 0 && status() != Degraded {
			t.Errorf("with %d sessions: %s, want degraded", i, status())
		}
		ls = append(ls, e.link(p1, "i1", i, saying("p1")))
	}
	if got := status(); got != Degraded {
		t.Errorf("with one of two connectors: %s, want degraded", got)
	}
	for i := range 4 {
		ls = append(ls, e.link(p2, "i2", i, saying("p2")))
	}
	if got := status(); got != Healthy {
		t.Errorf("with all: %s, want healthy", got)
	}
	for i := range 4 { // p2 knows this edge by a second address
		ls = append(ls, e.link(p2, "i2", 4+i, saying("p2")))
		if got, want := status(), map[bool]string{true: Healthy, false: Degraded}[i == 3]; got != want {
			t.Errorf("with %d sessions to a second address: %s, want %s", i+1, got, want)
		}
	}
	d, err := e.Tunnel("plant")
	must(t, err)
	k := d.ConnectorList[0]
	if k.Name != "p1" || k.Status != Healthy || len(k.Sessions) != 4 || k.Origin == "" || k.LastSeen.IsZero() || d.Since.IsZero() {
		t.Errorf("connector %+v of %+v", k, d.TunnelView)
	}
	if k.Version != "1.0?" {
		t.Errorf("version %q, want the direction mark gone", k.Version)
	}
	// Revoked connectors do not count.
	_, err = e.RevokeConnector(t.Context(), "p2")
	must(t, err)
	eventually(t, "only p1 is left", func() bool { return len(e.reg.all()) == 4 })
	if got := status(); got != Healthy {
		t.Errorf("with the other connector revoked: %s, want healthy", got)
	}
	for _, l := range ls {
		l.cut()
	}
	eventually(t, "the tunnel is down", func() bool { return status() == Down })
	// What was seen survives a restart.
	e.stop()
	e = b.edge()
	d, err = e.Tunnel("plant")
	must(t, err)
	if d.Status != Down || d.LastSeen.IsZero() || d.ConnectorList[0].Hostname != "host" {
		t.Errorf("after a restart: %+v", d)
	}
}

func TestRestartKeepsConnectors(t *testing.T) {
	b := newBed(t)
	e := b.edge()
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	e.link(src, "i1", 0, saying("p1"))
	e.stop()
	e = b.edge()
	e.link(src, "i1", 0, saying("p1"))
	if got, err := e.ask("", "10.1.2.3"); err != nil || !strings.HasPrefix(got, "p1 ") {
		t.Errorf("after a restart: %q, %v", got, err)
	}
}

func TestJoin(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	tok := e.token("plant", 0)
	dir, r, err := e.join(tok, "p1")
	must(t, err)
	if want := "spiffe://edge.test/connector/p1"; r.Identity.String() != want || r.Tunnel != "plant" || r.Edges[0] != "edge.test:7844" {
		t.Errorf("reply %+v, want %s of plant", r, want)
	}
	src, err := mtls.OpenDir(dir, nil)
	must(t, err)
	if life := time.Until(src.NotAfter()); life < 23*time.Hour || life > 24*time.Hour {
		t.Errorf("the certificate lives for %v, want 24h", life)
	}
	_, _, err = e.join(tok, "p2")
	wantErr(t, err, tunnel.ErrTokenUsed)

	short := e.token("plant", time.Second)
	c := e.Control
	eventually(t, "the token expires", func() bool {
		_, err := c.checkJoin(tunnel.JoinRequest{TokenID: short.ID, Secret: short.Secret.Reveal(), Name: "x"})
		return errors.Is(err, ErrTokenExpired)
	})
	_, _, err = e.join(short, "p2")
	wantErr(t, err, tunnel.ErrTokenExpired)

	strange, err := mtls.NewJoinToken(e.b.authority.Pin(), []string{e.addr})
	must(t, err)
	_, _, err = e.join(strange, "p2")
	wantErr(t, err, tunnel.ErrTokenUnknown)
	stolen := e.token("plant", 0)
	stolen.Secret = strange.Secret // the right id, another secret
	_, _, err = e.join(stolen, "p2")
	wantErr(t, err, tunnel.ErrTokenUnknown)

	// A refusal for another reason does not use the token up.
	again := e.token("plant", 0)
	_, _, err = e.join(again, "p1")
	wantErr(t, err, tunnel.ErrNotAllowed)
	_, _, err = e.join(again, "No-Name")
	wantErr(t, err, tunnel.ErrBadRequest)
	_, r, err = e.join(again, "")
	must(t, err)
	if !strings.HasPrefix(r.Identity.Name, "plant-") {
		t.Errorf("made-up name %q, want one from the tunnel's", r.Identity.Name)
	}
	_, r, err = e.join(e.token("plant", 0), "pi-3.hall_2") // a host's name will do
	must(t, err)
	if r.Identity.Name != "pi-3.hall_2" {
		t.Errorf("name %q", r.Identity.Name)
	}
	// The tunnel of a token goes, and the token with it.
	gone := e.token("plant", 0)
	must(t, e.DeleteTunnel(t.Context(), "plant", true))
	_, _, err = e.join(gone, "p3")
	wantErr(t, err, tunnel.ErrTokenUnknown)
}

// Of many who come with one token at the same time, one gets in.
func TestJoinConcurrently(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	tok := e.token("plant", 0)
	const n = 12
	var won, used int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			_, _, err := e.join(tok, fmt.Sprintf("p%d", i))
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				won++
			case errors.Is(err, tunnel.ErrTokenUsed):
				used++
			default:
				t.Errorf("join: %v", err)
			}
		})
	}
	wg.Wait()
	if won != 1 || used != n-1 {
		t.Errorf("%d joined and %d were told that the token is used, want 1 and %d", won, used, n-1)
	}
	if ks, _ := e.Connectors(""); len(ks) != 1 {
		t.Errorf("%d connectors, want 1", len(ks))
	}
}

func TestRevokeLive(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src, other := e.enrol("plant", "p1"), e.enrol("plant", "p2")
	var ls []*link
	for i := range 4 {
		ls = append(ls, e.link(src, "i1", i, saying("p1")))
	}
	keep := e.link(other, "i1", 0, saying("p2"))
	_, err := e.RevokeConnector(t.Context(), "p1")
	must(t, err)
	for _, l := range ls {
		select {
		case <-l.Done():
		case <-time.After(patience):
			t.Fatal("a session of the revoked connector lives on")
		}
		if want := (&tunnel.SessionError{Reason: tunnel.CloseRevoked, Remote: true}); !errors.Is(l.Err(), want) {
			t.Errorf("session ended with %v, want %v", l.Err(), want)
		}
	}
	_, err = e.dial(src, "i1", 0, saying("p1"))
	wantErr(t, err, tunnel.ErrRevoked)
	_, err = e.Renew(t.Context(), src.Identity(), nil)
	wantErr(t, err, tunnel.ErrRevoked)
	if got, err := e.ask("", "10.1.2.3"); err != nil || !strings.HasPrefix(got, "p2 ") || keep.Err() != nil {
		t.Errorf("the other connector: %q, %v, %v", got, err, keep.Err())
	}
	_, err = e.RevokeConnector(t.Context(), "p1")
	wantErr(t, err, ErrRevoked)
	_, err = e.RevokeConnector(t.Context(), "p9")
	wantErr(t, err, ErrNotFound)

	// The name can be enrolled again; certificates from before stay out.
	again := e.enrol("plant", "p1")
	e.link(again, "i2", 0, saying("p1 again"))
	_, err = e.dial(src, "i1", 0, saying("p1"))
	wantErr(t, err, tunnel.ErrRevoked)
}

// A revocation that another edge writes to the store ends the sessions here.
func TestRevokeThroughTheStore(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	l := e.link(e.enrol("plant", "p1"), "i1", 0, saying("p1"))
	e.model.mu.RLock()
	k := e.model.connectors["p1"]
	e.model.mu.RUnlock()
	k.Revoked = e.now()
	_, err := e.cfg.Store.Txn(t.Context(), nil, []state.Op{put(prefixConn+"p1", k), state.Put(keyGeneration, []byte(schema))})
	must(t, err)
	select {
	case <-l.Done():
	case <-time.After(patience):
		t.Fatal("the session lives on")
	}
}

func TestDeletedTunnelEndsSessions(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	l := e.link(src, "i1", 0, saying("p1"))
	wantErr(t, e.DeleteTunnel(t.Context(), "plant", false), ErrInUse, "p1", "10.0.0.0/8")
	must(t, e.DeleteTunnel(t.Context(), "plant", true))
	select {
	case <-l.Done():
	case <-time.After(patience):
		t.Fatal("the session lives on")
	}
	_, err := e.dial(src, "i1", 0, saying("p1"))
	wantErr(t, err, tunnel.ErrUnknown)
}

func TestAdmit(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	id := src.Identity()
	strange := id
	strange.Name = "p9"
	foreign := id
	foreign.TrustDomain = "other.test"
	kind := id
	kind.Kind = mtls.KindEdge
	for _, tt := range []struct {
		name string
		id   mtls.Identity
		reg  tunnel.Registration
		want error
	}{
		{"enrolled", id, tunnel.Registration{Index: 3}, nil},
		{"never enrolled", strange, tunnel.Registration{}, tunnel.ErrUnknown},
		{"another trust domain", foreign, tunnel.Registration{}, tunnel.ErrNotAllowed},
		{"an edge", kind, tunnel.Registration{}, tunnel.ErrNotAllowed},
		{"by its second address", id, tunnel.Registration{Index: 4}, nil},
	} {
		if err := e.Admit(t.Context(), tt.id, src.Leaf(), tt.reg); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	for i := range maxSessionsPerConnector {
		e.link(src, fmt.Sprint(i/4), i%4, saying("p1"))
	}
	_, err := e.dial(src, "one more", 0, saying("p1"))
	wantErr(t, err, tunnel.ErrBusy)
}

// A session takes the place of an older one of the same process and index.
func TestReplacedSession(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	old := e.link(src, "i1", 0, saying("old"))
	e.link(src, "i1", 0, saying("new"))
	select {
	case <-old.Done():
	case <-time.After(patience):
		t.Fatal("the old session lives on")
	}
	if want := (&tunnel.SessionError{Reason: tunnel.CloseReplaced, Remote: true}); !errors.Is(old.Err(), want) {
		t.Errorf("the old session ended with %v, want %v", old.Err(), want)
	}
	for range 4 {
		if got, err := e.ask("", "10.1.2.3"); err != nil || !strings.HasPrefix(got, "new ") {
			t.Errorf("got %q, %v, want the new session", got, err)
		}
	}
}

func TestRenewThroughTheTunnel(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	l := e.link(src, "i1", 0, saying("p1"))
	before := src.Leaf().SerialNumber
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must(t, src.Renew(ctx, l.Renew))
	if src.Leaf().SerialNumber.Cmp(before) == 0 {
		t.Error("the certificate is the old one")
	}
	e.link(src, "i1", 1, saying("p1"))
	_, err := l.Renew(ctx, []byte("no request"))
	wantErr(t, err, tunnel.ErrBadRequest)
}

func TestDialContextEnds(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	e.link(e.enrol("plant", "p1"), "i1", 0, func(ctx context.Context, _ *tunnel.Incoming) { <-ctx.Done() })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := e.DialContext(ctx, "", "10.1.2.3", 443, netip.AddrPort{})
		done <- err
	}()
	eventually(t, "the flow is on its way", func() bool { return e.Status().Flows == 1 })
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want the context's error", err)
		}
	case <-time.After(patience):
		t.Fatal("DialContext does not return")
	}
}

// A connector that was killed and started again gets the flows at once, not when its old sessions have timed out.
func TestSuccessorTakesOver(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src := e.enrol("plant", "c1")
	e.link(src, "old", 0, saying("old"))
	e.link(src, "old", 1, saying("old"))
	e.link(src, "new", 0, saying("new"))
	eventually(t, "the successor is up", func() bool { return len(e.reg.all()) == 3 })
	for range 10 {
		if got, err := e.ask("", "10.1.2.3"); err != nil || !strings.HasPrefix(got, "new ") {
			t.Fatalf("got %q, %v; want the successor's answer", got, err)
		}
	}
}
