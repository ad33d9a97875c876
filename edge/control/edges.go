package control

import (
	"cmp"
	mrand "math/rand/v2"
	"slices"
	"time"
)

// with returns the other edges that have a session of the tunnel, and of the connector if one is named: at most
// maxForwards, those that could not be reached a moment ago last.
func (p *peers) with(tunnelID, connector string) []*peerEdge {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if _, removed := p.removed[p.name]; removed { // the others would refuse it
		return nil
	}
	var ready, resting []*peerEdge
	for name, v := range p.present[tunnelID] {
		e := p.edges[name]
		if name == p.name || e == nil || !e.alive || !v.serves(connector) {
			continue
		}
		if e.resting() {
			resting = append(resting, &e.peerEdge)
		} else {
			ready = append(ready, &e.peerEdge)
		}
	}
	mrand.Shuffle(len(ready), func(i, j int) { ready[i], ready[j] = ready[j], ready[i] })
	ready = append(ready, resting...)
	return ready[:min(len(ready), maxForwards)]
}

func (v presence) serves(connector string) bool {
	return slices.ContainsFunc(v.Processes, func(k presentProcess) bool { return k.Sessions > 0 && (connector == "" || k.Connector == connector) })
}

// elsewhere returns what the other edges that live have of a tunnel, by edge name.
func (p *peers) elsewhere(tunnelID string) map[string]presence {
	p.mu.RLock()
	defer p.mu.RUnlock()
	var by map[string]presence
	for name, v := range p.present[tunnelID] {
		if e := p.edges[name]; name != p.name && e != nil && e.alive {
			if by == nil {
				by = map[string]presence{}
			}
			by[name] = v
		}
	}
	return by
}

// upSince is since when the tunnel counts as up, for an edge that gets its first session of it now.
func (p *peers) upSince(tunnelID string, now time.Time) time.Time {
	for _, v := range p.elsewhere(tunnelID) {
		if !v.Since.IsZero() && v.Since.Before(now) {
			now = v.Since
		}
	}
	return now
}

func (p *peers) knows(name string) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.edges[name] != nil
}

// living is the number of edges that live, this one included.
func (p *peers) living() (n int) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for _, e := range p.edges {
		if e.alive && e.name != p.name {
			n++
		}
	}
	return n + 1
}

// EdgeView is an edge as shown.
type EdgeView struct {
	Name      string    `json:"name"`
	Here      bool      `json:"here"` // the edge that answers
	Alive     bool      `json:"alive"`
	Advertise []string  `json:"advertise"`
	Listen    string    `json:"listen,omitempty"`
	Version   string    `json:"version,omitempty"`
	Started   time.Time `json:"started"`
	Sessions  int       `json:"sessions"` // main sessions of connectors
	Removed   time.Time `json:"removed,omitzero"`
	Problem   string    `json:"problem,omitempty"` // what is wrong with it
}

// Edges returns the edges of the installation, sorted by name.
func (c *Control) Edges() []EdgeView {
	p := c.peers
	own := EdgeView{Name: cmp.Or(p.name, c.cfg.Name), Here: true, Alive: true, Advertise: p.own.Advertise, Listen: p.own.Listen,
		Version: p.own.Version, Started: p.own.Started, Sessions: c.reg.sessions()}
	p.mu.RLock()
	defer p.mu.RUnlock()
	own.Removed, own.Problem = p.removed[p.name].Removed, p.problemLocked()
	views := []EdgeView{own}
	for name, r := range p.removed {
		if p.edges[name] == nil && name != p.name {
			views = append(views, EdgeView{Name: name, Advertise: []string{}, Removed: r.Removed})
		}
	}
	for name, e := range p.edges {
		if name == p.name {
			continue
		}
		v := EdgeView{Name: name, Alive: e.alive, Advertise: e.rec.Advertise, Listen: e.rec.Listen, Version: e.rec.Version, Started: e.rec.Started,
			Removed: p.removed[name].Removed}
		for _, by := range p.present {
			for _, k := range by[name].Processes {
				v.Sessions += k.Sessions
			}
		}
		views = append(views, v)
	}
	slices.SortFunc(views, func(a, b EdgeView) int { return cmp.Compare(a.Name, b.Name) })
	return views
}

const doubleProblem = "another process has the identity of this edge; give each edge its own"

// A double is another process that tells of itself by the name of this edge. What a process left behind that has ended is
// none: only one that beats is.
type double struct {
	instance string
	beat     uint64
	last     time.Time // when it beat, after it was first seen
}

// seen notes a record and reports whether it is news that its process lives.
func (d *double) seen(rec edgeRecord, now time.Time) bool {
	if d.instance != rec.Instance {
		*d = double{instance: rec.Instance, beat: rec.Beat}
		return false
	}
	if rec.Beat == d.beat {
		return false
	}
	news := d.last.IsZero()
	d.beat, d.last = rec.Beat, now
	return news
}

// problemLocked says what is wrong with this edge, or nothing.
func (p *peers) problemLocked() string {
	if p.double.last.IsZero() || time.Since(p.double.last) > beatsMissed*p.every {
		return ""
	}
	return doubleProblem
}
