package control

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// Status sums up the edge.
func (c *Control) Status() Summary {
	tunnels := c.Tunnels()
	n := c.counts()
	return Summary{TrustDomain: c.cfg.Authority.TrustDomain(), Started: c.started.UTC(), VNets: n.vnets, Routes: n.routes,
		Connectors: n.connectors, Sessions: n.sessions, Flows: n.flows, Tunnels: tunnels}
}

// statuses keeps what is known of each tunnel's state, so that looking at it does not walk over connectors: what changes is
// marked, and worked out anew when somebody looks.
type statuses struct {
	mu    sync.Mutex
	all   bool // every tunnel is dirty
	dirty set  // tunnel ids
	names set  // connectors whose tunnels are dirty
	known map[string]tunnelState

	byStatus   map[string]int
	connectors int
}

// A tunnelState is a tunnel's state over all edges.
type tunnelState struct {
	status     string
	since      time.Time
	lastSeen   time.Time
	sessions   int
	connectors int
}

func newStatuses() *statuses {
	return &statuses{all: true, dirty: set{}, names: set{}, known: map[string]tunnelState{},
		byStatus: map[string]int{Healthy: 0, Degraded: 0, Down: 0, Inactive: 0}}
}

func (s *statuses) mark(tunnelID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dirty[tunnelID] = struct{}{}
}

func (s *statuses) markConnector(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names[name] = struct{}{}
}

func (s *statuses) markAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = true
}

// settleLocked works out anew what is dirty. Callers hold the model's mu and the statuses'.
func (c *Control) settleLocked() {
	s, m := c.status, c.model
	c.reg.takeTouched(s.dirty) // so that whoever has seen a session come or go finds the state that goes with it
	if s.all {
		for id := range s.known {
			s.dirty[id] = struct{}{}
		}
		for id := range m.tunnels {
			s.dirty[id] = struct{}{}
		}
	}
	for name := range s.names {
		if k, ok := m.connectors[name]; ok {
			s.dirty[k.Tunnel] = struct{}{}
		} else { // deleted: its tunnel is not known any more
			for id := range m.tunnels {
				s.dirty[id] = struct{}{}
			}
		}
	}
	for id := range s.dirty {
		if old, ok := s.known[id]; ok {
			s.byStatus[old.status]--
			s.connectors -= old.connectors
			delete(s.known, id)
		}
		if _, ok := m.tunnels[id]; !ok {
			continue
		}
		now := c.tunnelStateLocked(id)
		s.known[id] = now
		s.byStatus[now.status]++
		s.connectors += now.connectors
	}
	s.all = false
	clear(s.dirty)
	clear(s.names)
}

// tunnelStateLocked works out the state of a tunnel.
func (c *Control) tunnelStateLocked(id string) tunnelState {
	w := c.workOf(id)
	t := tunnelState{status: Inactive, since: w.since}
	healthy, everSeen := true, false
	for name := range c.model.connectorsOfTunnel[id] {
		k := c.model.connectors[name]
		seen, ok := c.model.seen[name]
		if ok && !seen.Last.Before(k.Created) {
			everSeen = true
			if seen.Last.After(t.lastSeen) {
				t.lastSeen = seen.Last
			}
		}
		if !k.Revoked.IsZero() {
			continue
		}
		t.connectors++
		status, _ := w.status(name)
		healthy = healthy && status == Healthy
	}
	for _, by := range w.processes {
		for _, p := range by {
			t.sessions += p.Sessions + p.Draining
		}
	}
	switch {
	case t.sessions > 0 && healthy:
		t.status = Healthy
	case t.sessions > 0:
		t.status = Degraded
	case everSeen:
		t.status = Down
	}
	return t
}

// tunnelSummaryLocked is the view of t; the caller holds the model's mu.
func (c *Control) tunnelSummaryLocked(t Tunnel) TunnelView {
	c.status.mu.Lock()
	c.settleLocked()
	s := c.status.known[t.ID]
	c.status.mu.Unlock()
	v := TunnelView{Tunnel: t, Status: s.status, Since: s.since, LastSeen: s.lastSeen, Routes: len(c.model.routesOfTunnel[t.ID]),
		Sessions: s.sessions, Flows: c.flows.ofTunnel(t.ID), Connectors: s.connectors}
	if v.Sessions > 0 {
		v.LastSeen = c.now()
	}
	return v
}

// counts are numbers that metrics show.
type counts struct {
	byStatus                                          map[string]int
	vnets, routes, connectors, sessions, flows, edges int
}

func (c *Control) counts() counts {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := counts{vnets: len(m.vnets), routes: len(m.routes), sessions: c.reg.sessions(), flows: c.flows.count(), edges: c.peers.living(),
		byStatus: map[string]int{}}
	c.status.mu.Lock()
	defer c.status.mu.Unlock()
	c.settleLocked()
	n.connectors = c.status.connectors
	for k, v := range c.status.byStatus {
		n.byStatus[k] = v
	}
	return n
}

// work is what all edges together have of one tunnel.
type work struct {
	since     time.Time
	edges     int                                     // that live
	processes map[[2]string]map[string]presentProcess // by connector and instance, then by edge; "" is this one
}

func (c *Control) workOf(tunnelID string) work {
	w := work{edges: c.peers.living(), processes: map[[2]string]map[string]presentProcess{}}
	w.add("", c.here(tunnelID))
	for edge, v := range c.peers.elsewhere(tunnelID) {
		w.add(edge, v)
	}
	return w
}

func (w *work) add(edge string, v presence) {
	if !v.Since.IsZero() && (w.since.IsZero() || v.Since.Before(w.since)) {
		w.since = v.Since
	}
	for _, p := range v.Processes {
		key := [2]string{p.Connector, p.Instance}
		if w.processes[key] == nil {
			w.processes[key] = map[string]presentProcess{}
		}
		w.processes[key][edge] = p
	}
}

// status is the state of a connector that has a session somewhere. Healthy: each process of it has all the sessions that it
// announced for each edge that it has reached, and four over all edges where there are enough.
func (w *work) status(connector string) (status string, up bool) {
	status = Healthy
	for key, by := range w.processes {
		if key[0] != connector {
			continue
		}
		up = true
		total, want := 0, 0
		for _, p := range by {
			if !p.Complete {
				status = Degraded
			}
			total += p.Sessions
			want = max(want, p.Want)
		}
		if total < min(sessionsPerEdge, want*w.edges) {
			status = Degraded
		}
	}
	if !up {
		return Down, false
	}
	return status, true
}

// elsewhereOf returns what the other edges have of a connector, sorted by edge.
func (w *work) elsewhereOf(connector string) (views []ElsewhereView) {
	for key, by := range w.processes {
		if key[0] != connector {
			continue
		}
		for edge, p := range by {
			if edge != "" {
				views = append(views, ElsewhereView{Edge: edge, Sessions: p.Sessions, Complete: p.Complete})
			}
		}
	}
	slices.SortFunc(views, func(a, b ElsewhereView) int { return cmp.Compare(a.Edge, b.Edge) })
	return views
}
