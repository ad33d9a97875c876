package control

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

// A Suspecter is a flow that can tell that its session has most likely died: something is outstanding and nothing was
// heard for a while. What can be repeated is best repeated on another flow then.
type Suspecter interface{ Suspect() bool }

// A flow is an open flow of bytes. Whoever keeps it in a pool learns from Draining when it should go.
type flow struct {
	tunnel.Conn
	*record
}

// Read implements net.Conn.
func (f *flow) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	f.got(n)
	return n, err
}

// Write implements net.Conn.
func (f *flow) Write(p []byte) (int, error) {
	n, err := f.Conn.Write(p)
	f.sent(n)
	return n, err
}

// Close implements net.Conn.
func (f *flow) Close() error {
	f.forget()
	return f.Conn.Close()
}

// Reset implements [tunnel.Resetter].
func (f *flow) Reset(r tunnel.Result) {
	f.forget()
	if c, ok := f.Conn.(tunnel.Resetter); ok {
		c.Reset(r)
	} else {
		_ = f.Conn.Close()
	}
}

// Unwrap returns the flow that bytes are counted of.
func (f *flow) Unwrap() tunnel.Conn { return f.Conn }

// A record is a flow as the control knows it, from before it is opened until it is closed: the question that the routes
// answered, and what carries it.
type record struct {
	c    *Control
	plan plan
	kind tunnel.FlowKind

	via   atomic.Pointer[candidate] // nil while the flow is being opened
	since time.Time                 // when it was open
	in    atomic.Int64              // bytes from the destination
	out   atomic.Int64              // bytes to the destination
	last  atomic.Int64              // when bytes moved last, Unix nanoseconds
	busy  atomic.Int64              // nanoseconds without pauses
	bulky bool                      // counted by bulk; set before the flow is handed out

	leave, over    chan struct{}
	leaving, ended sync.Once
}

// idleGap is the time without bytes from which on a flow counts as pausing, in measuring its throughput.
const idleGap = 500 * time.Millisecond

func (r *record) got(n int) {
	r.in.Add(int64(n))
	r.tick()
}

func (r *record) sent(n int) {
	r.out.Add(int64(n))
	r.tick()
}

func (r *record) tick() {
	now := time.Now().UnixNano()
	if gap := now - r.last.Swap(now); gap > 0 && gap < int64(idleGap) {
		r.busy.Add(gap)
	}
}

// Draining implements [tunnel.Drainer].
func (r *record) Draining() <-chan struct{} { return r.leave }

// Suspect implements [Suspecter].
func (r *record) Suspect() bool {
	k := r.via.Load()
	return k != nil && k.suspect()
}

func (r *record) expel() { r.leaving.Do(func() { close(r.leave) }) }

// forget takes the flow out of the books. Calls after the first do nothing.
func (r *record) forget() {
	r.ended.Do(func() {
		close(r.over)
		r.c.flows.remove(r)
		if k := r.via.Load(); k != nil {
			r.c.bulk.over(r, *k)
		}
	})
}

// flows are those that are open or being opened. The zero value is ready.
type flows struct {
	mu       sync.Mutex
	open     map[*record]struct{}
	byVNet   map[vnet.ID]int
	byTunnel map[string]int
	byLive   map[*live]map[*record]struct{} // those that are open over a session of this edge
}

// reserve enters a flow before it is opened, or refuses it with [ErrLimit], which is a [tunnel.ResultLimit] too.
func (c *Control) reserve(p plan) (*record, error) {
	c.model.mu.RLock()
	network, t := c.model.vnets[p.flow.VNet], c.model.tunnels[p.tunnel]
	c.model.mu.RUnlock()
	r := &record{c: c, plan: p, kind: p.flow.Kind, since: time.Now(), leave: make(chan struct{}), over: make(chan struct{})}
	r.last.Store(r.since.UnixNano())
	s := &c.flows
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open, s.byVNet, s.byTunnel = map[*record]struct{}{}, map[vnet.ID]int{}, map[string]int{}
		s.byLive = map[*live]map[*record]struct{}{}
	}
	if n := network.MaxFlows; n > 0 && s.byVNet[p.flow.VNet] >= n {
		return nil, limitError("virtual network", network.Name, n)
	}
	if n := t.MaxFlows; n > 0 && s.byTunnel[p.tunnel] >= n {
		return nil, limitError("tunnel", t.Name, n)
	}
	s.open[r] = struct{}{}
	s.byVNet[p.flow.VNet]++
	s.byTunnel[p.tunnel]++
	return r, nil
}

func limitError(what, name string, n int) error {
	return fmt.Errorf("%w (%w)", refusal(CodeLimit, "wait until some end, or raise its max_flows", "%s %q has %d flows on this edge, which is its limit", what, name, n),
		&tunnel.FlowError{Result: tunnel.ResultLimit})
}

func (s *flows) remove(r *record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, r)
	s.detachLocked(r)
	if v := r.plan.flow.VNet; s.byVNet[v] > 1 {
		s.byVNet[v]--
	} else {
		delete(s.byVNet, v)
	}
	if t := r.plan.tunnel; s.byTunnel[t] > 1 {
		s.byTunnel[t]--
	} else {
		delete(s.byTunnel, t)
	}
}

// begin notes that r is open over via as conn, also if it was over another session before.
func (c *Control) begin(r *record, via candidate, conn any) *record {
	c.flows.attach(r, via)
	c.bulk.begun(r, via)
	c.opened.WithLabelValues(r.way(via), string(via.carrier()), via.role().String()).Inc()
	// What changed before expelWhere could see it.
	if via.draining() || c.astray(r) {
		r.expel()
	}
	if d, ok := conn.(tunnel.Drainer); ok && via.e != nil { // sessions of this edge say so themselves; see Control.keep
		go func() { // ends with the flow or its session
			select {
			case <-d.Draining():
				r.expel()
			case <-r.over:
			}
		}()
	}
	return r
}

// attach notes what carries r from now on.
func (s *flows) attach(r *record, via candidate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.open[r]; !ok { // over already
		return
	}
	s.detachLocked(r)
	r.via.Store(&via)
	if via.l == nil {
		return
	}
	if s.byLive[via.l] == nil {
		s.byLive[via.l] = map[*record]struct{}{}
	}
	s.byLive[via.l][r] = struct{}{}
}

func (s *flows) detachLocked(r *record) {
	k := r.via.Load()
	if k == nil || k.l == nil {
		return
	}
	delete(s.byLive[k.l], r)
	if len(s.byLive[k.l]) == 0 {
		delete(s.byLive, k.l)
	}
}

// expelFrom asks the flows over a session to leave.
func (s *flows) expelFrom(l *live) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r := range s.byLive[l] {
		r.expel()
	}
}

// expelWhere asks flows to leave.
func (s *flows) expelWhere(f func(*record) bool) {
	s.mu.Lock()
	list := make([]*record, 0, len(s.open))
	for r := range s.open {
		list = append(list, r)
	}
	s.mu.Unlock()
	for _, r := range list {
		if f(r) {
			r.expel()
		}
	}
}

func (s *flows) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

func (s *flows) ofTunnel(id string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byTunnel[id]
}

// astray reports whether the routes would send a flow elsewhere today, or nowhere.
func (c *Control) astray(r *record) bool {
	p, err := c.plan(r.plan.q)
	return err != nil || p.tunnel != r.plan.tunnel || p.flow.VNet != r.plan.flow.VNet
}

// reroute asks the flows to leave that would not be opened, or not to the same tunnel, today: those of the network v, or
// of all if v is empty.
func (c *Control) reroute(v vnet.ID) {
	c.flows.expelWhere(func(r *record) bool {
		return (v == "" || r.plan.flow.VNet == v) && c.astray(r)
	})
}

// FlowView is an open flow as shown.
type FlowView struct {
	Kind      string    `json:"kind"` // tcp, udp, icmp, ingress, ingress_udp
	VNet      string    `json:"vnet,omitempty"`
	Host      string    `json:"host"`
	Port      uint16    `json:"port"`
	Visitor   string    `json:"visitor,omitempty"`
	Tunnel    string    `json:"tunnel"` // name
	Connector string    `json:"connector,omitempty"`
	Carrier   string    `json:"carrier"`
	Role      string    `json:"role"`
	Edge      string    `json:"edge,omitempty"` // the edge that it is forwarded to
	BytesIn   int64     `json:"bytes_in"`       // from the destination
	BytesOut  int64     `json:"bytes_out"`      // to the destination
	Since     time.Time `json:"since"`
}

var kindNames = map[tunnel.FlowKind]string{tunnel.KindTCP: "tcp", tunnel.KindUDP: "udp", tunnel.KindICMP: "icmp", tunnel.KindIngress: "ingress",
	tunnel.KindIngressUDP: "ingress_udp"}

// Flows returns the open flows of this edge, oldest first.
func (c *Control) Flows() []FlowView {
	c.flows.mu.Lock()
	open := make([]*record, 0, len(c.flows.open))
	for r := range c.flows.open {
		open = append(open, r)
	}
	c.flows.mu.Unlock()
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	views := make([]FlowView, 0, len(open))
	for _, r := range open {
		k := r.via.Load()
		if k == nil {
			continue
		}
		v := FlowView{Kind: kindNames[r.kind], VNet: c.model.vnets[r.plan.flow.VNet].Name, Host: r.plan.flow.Host, Port: r.plan.flow.Port,
			Tunnel: c.model.tunnels[r.plan.tunnel].Name, Connector: k.connector(), Carrier: string(k.carrier()), Role: k.role().String(),
			Edge: k.edge(), BytesIn: r.in.Load(), BytesOut: r.out.Load(), Since: r.since.UTC()}
		if r.plan.flow.Visitor.IsValid() {
			v.Visitor = r.plan.flow.Visitor.String()
		}
		views = append(views, v)
	}
	slices.SortFunc(views, func(a, b FlowView) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Host, b.Host)) })
	return views
}
