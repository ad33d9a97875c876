package control

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// maxAttempts bounds how many sessions of this edge one flow is tried on, and maxForwards how many other edges.
	maxAttempts = 4
	maxForwards = 2
	// maxRanked bounds how many of a tunnel's sessions are compared for one flow; of more, some are taken at random.
	maxRanked = 64
)

// A session opens flows: a connector's, or one with another edge.
type session interface {
	Open(ctx context.Context, f tunnel.Flow) (tunnel.Conn, error)
	OpenPacket(ctx context.Context, f tunnel.Flow) (tunnel.PacketConn, error)
	Suspect() bool
	RTT() time.Duration
	Carrier() tunnel.Carrier
	Done() <-chan struct{}
}

// A candidate may carry a flow: a live session of this edge, or another edge that has one.
type candidate struct {
	l *live     // or
	e *peerEdge // with which a session is opened where there is none
}

// session returns what to open the flow on.
func (k candidate) session(ctx context.Context) (session, error) {
	if k.l != nil {
		return k.l.s, nil
	}
	s, err := k.e.session(ctx)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (k candidate) rtt() time.Duration {
	if k.l != nil {
		return k.l.s.RTT()
	}
	return k.e.rtt()
}

func (k candidate) suspect() bool {
	if k.l != nil {
		return k.l.suspect()
	}
	return k.e.suspect()
}

func (k candidate) draining() bool { return k.l != nil && k.l.s.Draining() }

// connector is the name of the connector, if it is known here.
func (k candidate) connector() string {
	if k.l != nil {
		return k.l.connector.Name
	}
	return ""
}

// edge is the name of the other edge.
func (k candidate) edge() string {
	if k.e != nil {
		return k.e.name
	}
	return ""
}

func (k candidate) carrier() tunnel.Carrier {
	if k.l != nil {
		return k.l.s.Carrier()
	}
	return k.e.carrier()
}

func (k candidate) role() tunnel.Role {
	if k.l != nil {
		return k.l.role
	}
	return tunnel.RoleMain
}

// candidates returns what may carry a flow for q, best first, and what to open there: sessions of this edge, then other
// edges, then sessions that are suspect. An empty list is no error; [Control.down] says why it is empty.
func (c *Control) candidates(q Query) (plan, []candidate, error) {
	p, err := c.plan(q)
	if err != nil {
		return p, nil, err
	}
	good, suspect := c.rank(p)
	if !q.Local {
		for _, e := range c.peers.with(p.tunnel, q.Connector) {
			good = append(good, candidate{e: e})
		}
	}
	return p, append(good, suspect...), nil
}

// A ranked is a session with what its place in the order depends on.
type ranked struct {
	l     *live
	rank  int
	flows int
}

// rank orders the sessions of this edge that take p's flow.
func (c *Control) rank(p plan) (good, suspect []candidate) {
	ls := c.reg.of(p.tunnel)
	if p.q.Connector != "" {
		ls = c.reg.ofConnector(p.tunnel, p.q.Connector)
	}
	if len(ls) == 0 {
		return nil, nil
	}
	n := min(len(ls), maxRanked)
	list := make([]ranked, 0, n)
	lot := c.bulk.explore(p)
	for i, start := 0, rand.IntN(len(ls)); i < len(ls) && len(list) < n; i++ {
		l := ls[(start+i)%len(ls)]
		if l.s.Draining() {
			continue
		}
		r := ranked{l: l, flows: l.s.Flows()}
		r.rank = rankOf(l, r.flows, c.bulk.prefer(p, l, lot))
		switch {
		case l.Suspect():
			r.rank += 2 * rankSuspect
		case l.process.silent():
			r.rank += rankSuspect
		}
		list = append(list, r)
	}
	slices.SortStableFunc(list, func(a, b ranked) int { return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.flows, b.flows)) })
	diversify(list)
	for _, r := range list {
		if r.rank >= rankSuspect {
			suspect = append(suspect, candidate{l: r.l})
		} else {
			good = append(good, candidate{l: r.l})
		}
	}
	good = good[:min(len(good), maxAttempts)]
	return good, suspect[:min(len(suspect), maxAttempts-len(good))]
}

// rankSuspect is added for sessions of a process that fell silent, twice for those that are suspect themselves.
const rankSuspect = 100

// rankOf is the place of a session for a flow that prefers a carrier; own says that the flow is worth a session of its
// own. Where none is idle it shares one of the right carrier, the one with the fewest flows.
func rankOf(l *live, flows int, want preference) int {
	right := l.s.Carrier() == want.carrier
	switch {
	case l.role == tunnel.RoleBulk && !want.own:
		return 8 // rather than none
	case l.role == tunnel.RoleBulk && right && flows == 0:
		return 0
	case right:
		return 1
	}
	return 2
}

// diversify puts a session of another connector second, where there is one that is not suspect: what keeps the first from
// answering may be its connector.
func diversify(list []ranked) {
	if len(list) < 3 || list[0].l.connector.ID != list[1].l.connector.ID {
		return
	}
	for i := 2; i < len(list) && list[i].rank < rankSuspect; i++ {
		if r := list[i]; r.l.connector.ID != list[0].l.connector.ID {
			copy(list[2:i+1], list[1:i])
			list[1] = r
			return
		}
	}
}
