package control

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// Why this edge ends a session.
const (
	endRevoked  = tunnel.CloseRevoked
	endReplaced = tunnel.CloseReplaced
	endShutdown = tunnel.CloseShutdown
)

// live is an admitted session.
type live struct {
	s         *tunnel.Session
	connector Connector // as it was when the session was admitted
	since     time.Time
}

func (l *live) end(why tunnel.CloseReason) { l.s.Close(why) }

// A registry holds the live sessions. Slices in byTunnel are never changed in place, so that a reader may go on with
// one after it has let go of mu.
type registry struct {
	mu       sync.RWMutex
	byTunnel map[string][]*live
}

func newRegistry() *registry {
	return &registry{byTunnel: map[string][]*live{}}
}

// add enters l. It returns the session whose place it takes, if any: the same process's with the same index. Sessions of
// the connector's other processes get no new flows from then on: a connector is one process, so they are most likely
// those of one that was killed, and would otherwise attract flows until they time out.
func (r *registry) add(l *live) (old *live) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id, reg := l.connector.Tunnel, l.s.Registration()
	next := make([]*live, 0, len(r.byTunnel[id])+1)
	for _, o := range r.byTunnel[id] {
		or := o.s.Registration()
		if o.connector.ID == l.connector.ID && or.Instance == reg.Instance && or.Index == reg.Index {
			old = o
			continue
		}
		if o.connector.ID == l.connector.ID && or.Instance != reg.Instance {
			o.s.Retire()
		}
		next = append(next, o)
	}
	r.byTunnel[id] = append(next, l)
	return old
}

// remove takes l out.
func (r *registry) remove(l *live) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := l.connector.Tunnel
	next := make([]*live, 0, len(r.byTunnel[id]))
	for _, o := range r.byTunnel[id] {
		if o != l {
			next = append(next, o)
		}
	}
	if len(next) == 0 {
		delete(r.byTunnel, id)
	} else {
		r.byTunnel[id] = next
	}
}

func (r *registry) of(tunnelID string) []*live {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.byTunnel[tunnelID]
}

func (r *registry) all() []*live {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var list []*live
	for _, ls := range r.byTunnel {
		list = append(list, ls...)
	}
	return list
}

func (r *registry) countOf(tunnelID, connectorID string) (n int) {
	for _, l := range r.of(tunnelID) {
		if l.connector.ID == connectorID {
			n++
		}
	}
	return n
}

// viewsOf returns a connector's sessions, oldest first.
func (r *registry) viewsOf(tunnelID, connectorID string) []SessionView {
	views := []SessionView{}
	for _, l := range r.of(tunnelID) {
		if l.connector.ID != connectorID {
			continue
		}
		reg := l.s.Registration()
		views = append(views, SessionView{Index: reg.Index, Instance: plain(reg.Instance), Remote: l.s.RemoteAddr().String(), Since: l.since,
			Flows: l.s.Flows(), Draining: l.s.Draining(), Version: plain(reg.Version), Expires: l.s.Cert().NotAfter})
	}
	slices.SortFunc(views, func(a, b SessionView) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Index, b.Index)) })
	return views
}

// pick returns the session of the tunnel that has the least flows, takes new ones and was not tried, or nil. Among
// equals, any.
func (r *registry) pick(tunnelID string, tried []*live) *live {
	ls := r.of(tunnelID)
	if len(ls) == 0 {
		return nil
	}
	var best *live
	var least int
	for i, start := 0, rand.IntN(len(ls)); i < len(ls); i++ {
		l := ls[(start+i)%len(ls)]
		if l.s.Draining() || slices.Contains(tried, l) {
			continue
		}
		if n := l.s.Flows(); best == nil || n < least {
			best, least = l, n
		}
	}
	return best
}

// Handle keeps an admitted session in the registry while it lives. It is made for [tunnel.ListenConfig].
func (c *Control) Handle(_ context.Context, s *tunnel.Session) {
	k, err := c.admitted(s.Peer())
	if err != nil {
		s.Close(endRevoked)
		return
	}
	l := &live{s: s, connector: k, since: c.now()}
	if old := c.reg.add(l); old != nil {
		old.end(endReplaced)
	}
	// From here on sweep finds the session; what happened before is looked at once more.
	if !c.stillGood(l) {
		l.end(endRevoked)
	}
	c.sighted(l)
	<-s.Done()
	c.reg.remove(l)
	c.sighted(l)
}

// stillGood reports whether the connector of l is enrolled as it was when l was admitted.
func (c *Control) stillGood(l *live) bool {
	k, err := c.admitted(l.s.Peer())
	return err == nil && k.ID == l.connector.ID && k.Tunnel == l.connector.Tunnel && !l.s.Cert().NotBefore.Before(k.ValidFrom)
}

// sweep ends the sessions of connectors that lost their permission.
func (c *Control) sweep() {
	for _, l := range c.reg.all() {
		if !c.stillGood(l) {
			c.log.Info("session ended, its connector is no longer enrolled", "peer", l.s.Peer().String())
			l.end(endRevoked)
		}
	}
}
