package control

import (
	"bufio"
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// Deleting a route reaches those who keep flows in a pool; other flows stay.
func TestRouteChangesReachOpenFlows(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	_, err := e.AddTunnel(t.Context(), "office", "")
	must(t, err)
	e.link(e.enrol("plant", "p1"), "i1", 0, saying("p1"))
	leaves := func(c net.Conn) <-chan struct{} { return c.(tunnel.Drainer).Draining() }
	open := func(host string) net.Conn {
		c, err := e.open("", host)
		must(t, err)
		t.Cleanup(func() { c.Close() })
		return c
	}
	near, far := open("10.1.2.3"), open("10.9.9.9")
	_, err = e.AddRoute(t.Context(), RouteSpec{Prefix: "10.1.0.0/16", Tunnel: "office"})
	must(t, err)
	select {
	case <-leaves(near):
	case <-time.After(patience):
		t.Fatal("a flow stays that the routes send to another tunnel")
	}
	select {
	case <-leaves(far):
		t.Error("a flow is asked to leave whose route is as before")
	default:
	}
	if line, err := bufio.NewReader(near).ReadString('\n'); err != nil || !strings.HasPrefix(line, "p1 ") {
		t.Errorf("the flow was cut: %q, %v", line, err)
	}
	_, err = e.DeleteRoute(t.Context(), RouteSpec{Prefix: "10.0.0.0/8"})
	must(t, err)
	select {
	case <-leaves(far):
	case <-time.After(patience):
		t.Fatal("a flow stays that has no route")
	}
	far.Close()
	near.Close()
	if n := e.flows.count(); n != 0 {
		t.Errorf("%d closed flows are remembered", n)
	}
}

// The caller's deadline holds where there is one, also if it is later than the default.
func TestDialTimeout(t *testing.T) {
	e := newBed(t).edge()
	e.cfg.DialTimeout = 100 * time.Millisecond
	e.site("plant", "")
	e.link(e.enrol("plant", "p1"), "i1", 0, func(ctx context.Context, in *tunnel.Incoming) {
		time.Sleep(500 * time.Millisecond) // a slow origin
		saying("p1")(ctx, in)
	})
	if _, err := e.DialContext(context.Background(), "", "10.1.2.3", 443, netip.AddrPort{}); err == nil {
		t.Error("without a deadline: the flow was waited for")
	}
	if got, err := e.ask("", "10.1.2.3"); err != nil || !strings.HasPrefix(got, "p1 ") {
		t.Errorf("with a deadline of %v: %q, %v", patience, got, err)
	}
}
