package control

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// Why this edge ends a session.
const (
	endRevoked  = tunnel.CloseRevoked
	endReplaced = tunnel.CloseReplaced
	endShutdown = tunnel.CloseShutdown
)

// twinLook is how often a session is looked at whose connector has a later process: longer than dead sessions last.
const twinLook = 15 * time.Second

// live is an admitted session.
type live struct {
	s         *tunnel.Session
	connector Connector // as it was when the session was admitted
	role      tunnel.Role
	since     time.Time

	process *process // whose session it is; set by registry.add

	due   chan struct{} // holds a value when the connector is to be told something; see Control.keep
	proof chan struct{} // holds a value when the connector is to give a sign of life
	ask   atomic.Int32  // bulk sessions wanted, plus one; 0: nothing to say

	superseded atomic.Int64 // when another process of the connector registered, in Unix nanoseconds; 0: none did later
}

// tell sees to it that the connector is told what is new. It never blocks.
func (l *live) tell() {
	select {
	case l.due <- struct{}{}:
	default:
	}
}

func (l *live) end(why tunnel.CloseReason) { l.s.Close(why) }

// A registry holds the live sessions. What is in the slices of byTunnel and byName is never changed in place, only appended to,
// so that a reader may go on with one after it has let go of mu.
type registry struct {
	mu       sync.RWMutex
	byTunnel map[string][]*live
	byName   map[string][]*live   // by the connector's name
	upSince  map[string]time.Time // of tunnels that have a main session; see Control.add
	count    int
	touched  set           // ids of tunnels whose sessions came or went since takeTouched
	twinLook time.Duration // does not change
}

func newRegistry() *registry {
	return &registry{touched: set{}, twinLook: twinLook, byTunnel: map[string][]*live{}, byName: map[string][]*live{}, upSince: map[string]time.Time{}}
}

// add enters l; a tunnel that had no main session is up since the given time. It returns the session whose place it
// takes, if any: the same process's with the same index. Sessions of the connector's other processes get no new flows
// from then on: a connector is one process, so they are most likely those of one that was killed, and would otherwise
// attract flows until they time out.
func (r *registry) add(l *live, since time.Time) (old *live) {
	r.mu.Lock()
	defer r.mu.Unlock()
	reg := l.s.Registration()
	own := &process{}
	own.alarm = func() { r.challenge(l.connector.Tunnel, own) }
	l.process = own
	for _, o := range r.byName[l.connector.Name] {
		or := o.s.Registration()
		switch {
		case o.connector.ID != l.connector.ID:
		case or.Instance != reg.Instance:
			o.superseded.CompareAndSwap(0, time.Now().UnixNano())
			o.s.Retire()
		default:
			l.process = o.process
			if or.Index == reg.Index && o.role == l.role {
				old = o
			}
		}
	}
	l.process.add(l)
	if old != nil {
		r.removeLocked(old)
	}
	id := l.connector.Tunnel
	r.byTunnel[id] = append(r.byTunnel[id], l)
	r.byName[l.connector.Name] = append(r.byName[l.connector.Name], l)
	r.touched[id] = struct{}{}
	r.count++
	if _, up := r.upSince[id]; !up && l.role == tunnel.RoleMain {
		r.upSince[id] = since
	}
	return old
}

// remove takes l out, if it is in.
func (r *registry) remove(l *live) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Contains(r.byName[l.connector.Name], l) {
		return
	}
	r.removeLocked(l)
	if !slices.ContainsFunc(r.byTunnel[l.connector.Tunnel], func(o *live) bool { return o.role == tunnel.RoleMain }) {
		delete(r.upSince, l.connector.Tunnel)
	}
}

func (r *registry) removeLocked(l *live) {
	l.process.remove(l)
	without(r.byTunnel, l.connector.Tunnel, l)
	without(r.byName, l.connector.Name, l)
	r.touched[l.connector.Tunnel] = struct{}{}
	r.count--
}

// takeTouched moves the ids of tunnels whose sessions came or went to ids.
func (r *registry) takeTouched(ids set) {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.Copy(ids, r.touched)
	clear(r.touched)
}

func without(m map[string][]*live, key string, l *live) {
	next := make([]*live, 0, len(m[key]))
	for _, o := range m[key] {
		if o != l {
			next = append(next, o)
		}
	}
	if len(next) == 0 {
		delete(m, key)
	} else {
		m[key] = next
	}
}

func (r *registry) of(tunnelID string) []*live {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.byTunnel[tunnelID]
}

// ofConnector returns the sessions of the connector name, if it serves the tunnel; with an empty id, whichever it serves.
func (r *registry) ofConnector(tunnelID, name string) []*live {
	r.mu.RLock()
	defer r.mu.RUnlock()
	ls := r.byName[name]
	if tunnelID == "" || !slices.ContainsFunc(ls, func(l *live) bool { return l.connector.Tunnel != tunnelID }) {
		return ls
	}
	return slices.DeleteFunc(slices.Clone(ls), func(l *live) bool { return l.connector.Tunnel != tunnelID })
}

// up returns since when the tunnel has had a main session here, and the sessions.
func (r *registry) up(tunnelID string) (time.Time, []*live) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.upSince[tunnelID], r.byTunnel[tunnelID]
}

func (r *registry) all() []*live {
	r.mu.RLock()
	defer r.mu.RUnlock()
	list := make([]*live, 0, r.count)
	for _, ls := range r.byTunnel {
		list = append(list, ls...)
	}
	return list
}

func (r *registry) sessions() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.count
}

func (r *registry) countOf(connector string) int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.byName[connector])
}

// viewsOf returns the sessions of the connector k, oldest first.
func (r *registry) viewsOf(k Connector) []SessionView {
	views := []SessionView{}
	for _, l := range r.ofConnector(k.Tunnel, k.Name) {
		if l.connector.ID != k.ID {
			continue
		}
		reg := l.s.Registration()
		views = append(views, SessionView{Index: reg.Index, Instance: plain(reg.Instance), Remote: l.s.RemoteAddr().String(), Since: l.since,
			Flows: l.s.Flows(), Draining: l.s.Draining(), Version: plain(reg.Version), Expires: l.s.Cert().NotAfter,
			Carrier: string(l.s.Carrier()), Role: l.role.String(), RTT: l.s.RTT().Seconds(), Suspect: l.suspect()})
	}
	slices.SortFunc(views, func(a, b SessionView) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Index, b.Index)) })
	return views
}

// Handle keeps an admitted session in the registry while it lives. It is made for [tunnel.ListenConfig].
func (c *Control) Handle(_ context.Context, s *tunnel.Session) {
	k, err := c.admitted(s.Peer())
	if err != nil {
		s.Close(endRevoked)
		return
	}
	l := &live{s: s, connector: k, role: s.Registration().Role, since: c.now(), due: make(chan struct{}, 1), proof: make(chan struct{}, 1)}
	if old := c.reg.add(l, c.peers.upSince(k.Tunnel, l.since)); old != nil {
		old.end(endReplaced)
	}
	// From here on sweep finds the session; what happened before is looked at once more.
	if !c.stillGood(l) {
		l.end(endRevoked)
	}
	c.changed(l)
	c.bulk.up(l)
	if l.role == tunnel.RoleMain {
		l.tell()
		c.sessionUp(l)
	}
	c.keep(l)
	c.reg.remove(l)
	c.changed(l)
}

// keep tells the connector what there is to tell, and asks flows to leave when the session drains, until it has ended.
func (c *Control) keep(l *live) {
	retired := l.s.Retired()
	look := time.NewTicker(c.reg.twinLook)
	defer look.Stop()
	var told []string
	var probes sync.WaitGroup
	defer probes.Wait()
	for {
		select {
		case <-l.proof:
			probes.Go(func() { l.probe(context.Background()) }) // ends with the session
		case <-look.C:
			if l.twin() {
				l.end(endReplaced)
			}
		case <-l.due:
			if addrs := c.addrs(); l.role == tunnel.RoleMain && !slices.Equal(addrs, told) {
				l.s.TellEdges(addrs)
				told = addrs
			}
			if n := l.ask.Swap(0); n > 0 {
				l.s.AskBulk(int(n - 1))
			}
		case <-retired:
			retired = nil
			c.flows.expelFrom(l)
			c.touch(l.connector.Tunnel)
		case <-l.s.Done():
			return
		}
	}
}

// twin reports whether the process of l is alive though another of the same connector registered later, so that it is not
// one that was killed: somebody runs two with one identity, and has to know. Open flows may end first.
func (l *live) twin() bool {
	at := l.superseded.Load()
	return at != 0 && l.s.Flows() == 0 && l.s.LastHeard().Sub(time.Unix(0, at)) > time.Second // what was on its way does not count
}

// changed notes that l came or went.
func (c *Control) changed(l *live) {
	c.sighted(l)
	c.touch(l.connector.Tunnel)
}

// touch notes that something about a tunnel's sessions here changed.
func (c *Control) touch(tunnelID string) {
	c.status.mark(tunnelID)
	c.peers.mark(tunnelID)
}

// stillGood reports whether the connector of l is enrolled as it was when l was admitted.
func (c *Control) stillGood(l *live) bool {
	k, err := c.admitted(l.s.Peer())
	return err == nil && k.ID == l.connector.ID && k.Tunnel == l.connector.Tunnel && !l.s.Cert().NotBefore.Before(k.ValidFrom)
}

// sweep ends those of the sessions whose connectors lost their permission.
func (c *Control) sweep(ls []*live) {
	for _, l := range ls {
		if !c.stillGood(l) {
			c.log.Info("session ended, its connector is no longer enrolled", "peer", l.s.Peer().String())
			l.end(endRevoked)
		}
	}
}
