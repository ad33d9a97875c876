package control

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// answers reports whether a flow into the default network can be opened.
func (m *member) answers() bool {
	conn, err := m.open("", "10.1.2.3")
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// An edge that was removed forwards nothing more, not even over what is open, whoever holds its identity.
func TestRemovedEdge(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	ctx := t.Context()
	a.site("plant", "")
	b.link(b.enrol("plant", "p1"), "i1", 0, echoing("p1"))
	eventually(t, "a can reach the tunnel", a.answers)
	open, err := a.open("", "10.1.2.3")
	must(t, err)
	defer open.Close()
	id := mtls.Identity{TrustDomain: trustDomain, Kind: mtls.KindEdge, Name: "a"}
	must(t, b.AdmitPeer(ctx, id, nil))

	_, err = b.RemoveEdge(ctx, "b")
	wantErr(t, err, ErrInvalid, "another edge")
	_, err = b.RemoveEdge(ctx, "../a")
	wantErr(t, err, ErrInvalid, "no name of an edge")
	v, err := b.RemoveEdge(ctx, "a")
	must(t, err)
	if v.Removed.IsZero() || v.Alive {
		t.Errorf("a is shown as %+v", v)
	}
	_, err = b.RemoveEdge(ctx, "a")
	wantErr(t, err, ErrRevoked, "was removed on")

	if _, err := io.ReadAll(open); err == nil {
		t.Error("the flow that a had forwarded ended as if nothing was missing")
	}
	if err := b.AdmitPeer(ctx, id, nil); !errors.Is(err, tunnel.ErrRevoked) {
		t.Errorf("a new session of a: %v, want ErrRevoked", err)
	}
	if _, ok := b.peers.leash("a"); ok {
		t.Error("a flow over an old session of a would be served")
	}
	if got := b.addrs(); !slices.Equal(got, []string{b.addr}) {
		t.Errorf("connectors are told %v, want only %s", got, b.addr)
	}
	eventually(t, "a knows it", func() bool { return !a.Edges()[0].Removed.IsZero() })
	if a.answers() {
		t.Error("a still forwards")
	}
	if got := a.addrs(); !slices.Equal(got, []string{b.addr}) {
		t.Errorf("connectors of a are told %v, want only %s", got, b.addr)
	}
	// Whoever writes a's record all the same is not believed.
	_, err = b.cfg.Store.Txn(ctx, nil, []state.Op{put(prefixEdge+"a", edgeRecord{Instance: "thief", Beat: 1, Advertise: []string{"thief.test:1"}})})
	must(t, err)
	eventually(t, "the record is seen", func() bool { return b.peers.knows("a") && b.Edges()[0].Advertise[0] == "thief.test:1" })
	if b.peers.living() != 1 || slices.Contains(b.addrs(), "thief.test:1") {
		t.Errorf("%d edges live, at %v", b.peers.living(), b.addrs())
	}

	_, err = b.RestoreEdge(ctx, "a")
	must(t, err)
	_, err = b.RestoreEdge(ctx, "a")
	wantErr(t, err, ErrNotFound)
	eventually(t, "a forwards again", a.answers)
}

// A peer that lies gets no further than the routes of the edge that it talks to, and names networks by nothing but ids.
func TestLyingPeer(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	ctx := t.Context()
	a.site("plant", "")
	_, err := a.AddVNet(ctx, "red", "", false)
	must(t, err)
	_, err = a.AddRoute(ctx, RouteSpec{Prefix: "10.0.0.0/8", VNet: "red", Tunnel: "plant"})
	must(t, err)
	b.link(b.enrol("plant", "p1"), "i1", 0, echoing("p1"))
	eventually(t, "b knows the network", func() bool { _, err := b.VNet("red"); return err == nil })
	red, err := b.VNet("red")
	must(t, err)
	s, err := tunnel.DialPeer(ctx, tunnel.DialConfig{Addr: b.addr, Identity: a.cfg.Identity})
	must(t, err)
	defer s.Close(tunnel.CloseShutdown)
	for _, tt := range []struct {
		name string
		flow tunnel.Flow
		want tunnel.Result
	}{
		{"by id", tunnel.Flow{VNet: red.ID, Host: "10.1.2.3", Port: 80}, tunnel.ResultOK},
		{"by name", tunnel.Flow{VNet: "red", Host: "10.1.2.3", Port: 80}, tunnel.ResultDraining},
		{"unknown network", tunnel.Flow{VNet: "vn_none", Host: "10.1.2.3", Port: 80}, tunnel.ResultDraining},
		{"no route", tunnel.Flow{VNet: red.ID, Host: "192.0.2.1", Port: 80}, tunnel.ResultNoRoute},
		{"past the routes", tunnel.Flow{VNet: red.ID, Host: "192.0.2.1", Port: 80, Tunnel: "plant"}, tunnel.ResultMalformed},
		{"an ingress of no tunnel", tunnel.Flow{Kind: tunnel.KindIngress, VNet: red.ID, Host: "10.1.2.3", Port: 80, Service: "tcp"}, tunnel.ResultMalformed},
	} {
		conn, err := s.Open(ctx, tt.flow)
		if err == nil {
			conn.Close()
		}
		if got := resultOf(err); got != tt.want {
			t.Errorf("%s: %v (%v), want %v", tt.name, got, err, tt.want)
		}
	}
}

func resultOf(err error) tunnel.Result {
	if e, ok := errors.AsType[*tunnel.FlowError](err); ok {
		return e.Result
	}
	if err != nil {
		return tunnel.ResultInternal
	}
	return tunnel.ResultOK
}

// A network that is deleted and made again with its name is another one: flows into the old one have to leave.
func TestNetworkOfTheSameName(t *testing.T) {
	e := newBed(t).edge()
	ctx := t.Context()
	e.site("plant", "")
	network := func() {
		_, err := e.AddVNet(ctx, "red", "", false)
		must(t, err)
		_, err = e.AddRoute(ctx, RouteSpec{Prefix: "10.0.0.0/8", VNet: "red", Tunnel: "plant"})
		must(t, err)
	}
	network()
	e.link(e.enrol("plant", "p1"), "i1", 0, saying("p1"))
	conn, err := e.open("red", "10.1.2.3")
	must(t, err)
	defer conn.Close()
	r := conn.(*flow).record
	r.leave = make(chan struct{}) // what the deletion itself asks for does not count
	must(t, e.DeleteVNet(ctx, "red", true))
	network()
	if !e.astray(r) {
		t.Error("a flow into the deleted network is taken for one into the new one")
	}
}

// Two processes with one name are told of, on both sides; what a killed one left behind is not taken for a second one.
func TestTwoEdgesOfOneName(t *testing.T) {
	var d double
	now := time.Now()
	for i, tt := range []struct {
		instance string
		beat     uint64
		want     bool
	}{
		{"old", 7, false}, // left behind
		{"twin", 1, false}, {"twin", 1, false},
		{"twin", 2, true}, // it lives
		{"twin", 3, false},
	} {
		if got := d.seen(edgeRecord{Instance: tt.instance, Beat: tt.beat}, now); got != tt.want {
			t.Errorf("step %d: %v, want %v", i, got, tt.want)
		}
	}
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("a")
	for _, m := range []*member{a, b} {
		eventually(t, "the edge tells of the other", func() bool { return m.Edges()[0].Problem != "" })
	}
}

// What an edge left behind that is not in the store any more goes too.
func TestBuryOrphans(t *testing.T) {
	f := newCluster(t, 1)
	a := f.edge("a")
	_, err := a.cfg.Store.Txn(t.Context(), nil, []state.Op{put(prefixPresent+"tn_x/gone", presence{})})
	must(t, err)
	eventually(t, "it is deleted", func() bool {
		ps, _, err := a.cfg.Store.List(context.Background(), prefixPresent)
		return err == nil && len(ps) == 0
	})
}
