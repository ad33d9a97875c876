package control

import (
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/state"
)

// What counts as healthy over several edges.
func TestHealthOverEdges(t *testing.T) {
	one := func(sessions, want int, complete bool) presentProcess {
		return presentProcess{Connector: "p1", Instance: "i", Sessions: sessions, Want: want, Complete: complete}
	}
	for _, tt := range []struct {
		name  string
		edges int
		have  map[string]presentProcess
		want  string
	}{
		{"one edge, all", 1, map[string]presentProcess{"": one(4, 4, true)}, Healthy},
		{"one edge, one missing", 1, map[string]presentProcess{"": one(3, 4, false)}, Degraded},
		{"one session is all that it wants", 1, map[string]presentProcess{"": one(1, 1, true)}, Healthy},
		{"two edges, two each", 2, map[string]presentProcess{"": one(2, 2, true), "b": one(2, 2, true)}, Healthy},
		{"two edges, one not reached", 2, map[string]presentProcess{"": one(2, 2, true)}, Degraded},
		{"two edges, only the other reached", 2, map[string]presentProcess{"b": one(2, 2, true)}, Degraded},
		{"two edges, one incomplete", 2, map[string]presentProcess{"": one(2, 2, true), "b": one(1, 2, false)}, Degraded},
		{"three edges, two each", 3, map[string]presentProcess{"": one(2, 2, true), "b": one(2, 2, true), "c": one(2, 2, true)}, Healthy},
		{"five edges, one each", 5, map[string]presentProcess{"a": one(1, 1, true), "b": one(1, 1, true), "c": one(1, 1, true), "d": one(1, 1, true), "e": one(1, 1, true)}, Healthy},
		{"nowhere", 2, nil, Down},
	} {
		w := work{edges: tt.edges, processes: map[[2]string]map[string]presentProcess{}}
		for edge, p := range tt.have {
			w.add(edge, presence{Processes: []presentProcess{p}})
		}
		got, up := w.status("p1")
		if got != tt.want || up != (tt.want != Down) {
			t.Errorf("%s: %s, up %v, want %s", tt.name, got, up, tt.want)
		}
	}
}

// The time since when a tunnel is up goes on while any connection is left, on whichever edge, and begins anew after none
// was.
func TestUpSince(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	a.site("plant", "")
	src := a.enrol("plant", "p1")
	since := func(m *member) time.Time {
		d, _ := m.Tunnel("plant") // which the other edge may not know yet
		return d.Since
	}
	first := a.link(src, "i1", 0, saying("p1"))
	eventually(t, "b knows of a's session", func() bool { return !since(b).IsZero() })
	began := since(a)
	time.Sleep(10 * time.Millisecond)
	second := b.link(src, "i1", 4, saying("p1"))
	first.cut()
	eventually(t, "a's session is gone", func() bool { return a.reg.sessions() == 0 })
	for _, m := range []*member{a, b} {
		eventually(t, m.name+" has the tunnel up over b alone since a's beginning", func() bool {
			d, err := m.Tunnel("plant")
			return err == nil && d.Sessions == 1 && d.Since.Equal(began)
		})
	}
	second.cut()
	eventually(t, "both know that it is down", func() bool {
		da, _ := a.Tunnel("plant")
		db, _ := b.Tunnel("plant")
		return da.Status == Down && db.Status == Down && da.Since.IsZero() && db.Since.IsZero()
	})
	a.link(src, "i1", 0, saying("p1"))
	eventually(t, "it is up, since after the pause", func() bool { return since(a).After(began) })
}

// The cached counts agree with a fresh look, whatever changed.
func TestCountsFollow(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	_, err := e.AddTunnel(t.Context(), "office", "")
	must(t, err)
	check := func(what string, healthy, degraded, down, inactive, connectors int) {
		t.Helper()
		eventually(t, what, func() bool {
			n := e.counts()
			return n.byStatus[Healthy] == healthy && n.byStatus[Degraded] == degraded && n.byStatus[Down] == down &&
				n.byStatus[Inactive] == inactive && n.connectors == connectors
		})
	}
	check("two new tunnels", 0, 0, 0, 2, 0)
	src := e.enrol("plant", "p1")
	check("a connector", 0, 0, 0, 2, 1)
	l := e.link(src, "i1", 0, saying("p1"))
	check("a session", 0, 1, 0, 1, 1)
	l.cut()
	check("gone", 0, 0, 1, 1, 1)
	_, err = e.RevokeConnector(t.Context(), "p1")
	must(t, err)
	check("revoked", 0, 0, 1, 1, 0)
	must(t, e.DeleteTunnel(t.Context(), "plant", true))
	check("deleted", 0, 0, 0, 1, 0)
}

// Edges that are gone for long leave nothing in the store.
func TestBury(t *testing.T) {
	f := newCluster(t, 1)
	a := f.edge("a")
	a.site("plant", "")
	d, err := a.Tunnel("plant")
	must(t, err)
	_, err = a.cfg.Store.Txn(t.Context(), nil, []state.Op{
		put(prefixEdge+"z", edgeRecord{Instance: "dead", Beat: 7}), put(prefixPresent+d.ID+"/z", presence{})})
	must(t, err)
	eventually(t, "z is taken for gone", func() bool {
		a.peers.mu.Lock()
		defer a.peers.mu.Unlock()
		e := a.peers.edges["z"]
		if e == nil || e.alive || e.goneAt.IsZero() { // one that has just been read is not alive yet
			return false
		}
		e.goneAt = e.goneAt.Add(-2 * buryAfter)
		return true
	})
	eventually(t, "its records are deleted", func() bool {
		es, _, err := a.cfg.Store.List(t.Context(), prefixEdge)
		ps, _, perr := a.cfg.Store.List(t.Context(), prefixPresent)
		return err == nil && perr == nil && len(es) == 1 && len(ps) == 0
	})
}
