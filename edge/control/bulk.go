package control

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// Which carrier bulk flows take.
const (
	BulkAuto = "auto" // the one that measures better
	BulkQUIC = "quic"
	BulkTCP  = "tcp"
)

const (
	// measuredFrom is how many bytes a flow must have carried for its throughput to count.
	measuredFrom = 1 << 20
	// exploreEvery is how often a bulk flow takes the carrier that measured worse, to measure it again, and exploreFar how
	// often if that one measured less than half.
	exploreEvery = 20
	exploreFar   = 400
	// switchAbove is how much better a carrier must measure to be taken instead.
	switchAbove = 1.25
	// measureWeight is that of the latest flow in the average.
	measureWeight = 0.3
	// maxBulkSessions bounds the bulk sessions that are asked of one connector.
	maxBulkSessions = 8
	// bulkSpare is how many bulk sessions a connector of which bulk flows are asked shall have beside those in use, so that
	// the next flow need not wait for one.
	bulkSpare = 2
	// bulkRest is how long a connector keeps bulk sessions that nothing needed.
	bulkRest = time.Minute
	// bulkForget is how long what was measured of a connector is kept that has no session.
	bulkForget = 10 * time.Minute
	// bulkPatience is how long a connector may take to do what it was asked for, before it is asked again.
	bulkPatience = time.Second
	// bulkRemind is how often a connector is asked again that keeps fewer sessions than were asked for, while no flow needs
	// them.
	bulkRemind = time.Minute
)

// bulk chooses what carries flows of many bytes.
type bulk struct {
	mode     string
	reg      *registry
	expected atomic.Pointer[[]Query] // where such flows may go at any time

	mu sync.Mutex
	by map[string]*bulkState // by connector name, for those that had such flows
}

// A bulkState is what is known of one connector's carriers and wanted of it.
type bulkState struct {
	rate   map[tunnel.Carrier]float64 // bytes a second, of carriers that were measured
	choice tunnel.Carrier
	open   int       // bulk flows over TCP now
	asked  int       // bulk sessions that the connector was last asked for
	told   time.Time // when
	needed time.Time // when so many were needed last
	gone   time.Time // since when it has no session; zero: it has
}

func newBulk(mode string, reg *registry) *bulk {
	if mode == "" {
		mode = BulkAuto
	}
	return &bulk{mode: mode, reg: reg, by: map[string]*bulkState{}}
}

// A preference is what a flow would like to be carried by.
type preference struct {
	carrier tunnel.Carrier
	own     bool // a bulk session, one of its own where there is a spare one
}

// explore draws a lot that decides whether p's flow takes the carrier that measured worse.
func (b *bulk) explore(p plan) (lot int) {
	if p.q.Class == tunnel.ClassBulk && p.q.Carrier == "" && b.mode == BulkAuto {
		return rand.IntN(exploreFar)
	}
	return exploreFar
}

// prefer returns what p's flow would like of the connector of l, with what it has drawn from explore.
func (b *bulk) prefer(p plan, l *live, lot int) preference {
	carrier := p.q.Carrier
	switch {
	case carrier != "":
	case p.q.Class != tunnel.ClassBulk:
		return preference{carrier: tunnel.CarrierQUIC}
	case b.mode != BulkAuto:
		carrier = tunnel.Carrier(b.mode)
	default:
		carrier = b.choose(l.connector.Name, lot)
	}
	return preference{carrier, p.q.Class == tunnel.ClassBulk && carrier == tunnel.CarrierTCP}
}

// choose returns the carrier for a bulk flow with a lot: what measured better, or now and then the other one.
func (b *bulk) choose(connector string, lot int) tunnel.Carrier {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.by[connector]
	if s == nil {
		s = &bulkState{choice: tunnel.CarrierTCP}
	}
	other := tunnel.CarrierTCP
	if s.choice == other {
		other = tunnel.CarrierQUIC
	}
	winners := exploreFar / exploreEvery
	if rate, measured := s.rate[other]; measured && rate < s.rate[s.choice]/2 {
		winners = 1
	}
	if lot < winners {
		return other
	}
	return s.choice
}

func (b *bulk) stateLocked(connector string) *bulkState {
	s := b.by[connector]
	if s == nil {
		s = &bulkState{rate: map[tunnel.Carrier]float64{}, choice: tunnel.CarrierTCP}
		b.by[connector] = s
	}
	return s
}

// wants reports whether r is a flow for which bulk sessions are asked.
func (b *bulk) wants(r *record, k candidate) bool {
	if k.l == nil || r.plan.q.Class != tunnel.ClassBulk {
		return false
	}
	return b.prefer(r.plan, k.l, exploreFar).own
}

// begun counts a flow in, and asks its connector for more bulk sessions if it has few for such flows.
func (b *bulk) begun(r *record, k candidate) {
	if !b.wants(r, k) {
		return
	}
	r.bulky = true
	b.need(k.l, 1, bulkPatience)
}

// await asks the connector of l for bulk sessions before there is a flow for them.
func (b *bulk) await(l *live) { b.need(l, 0, bulkPatience) }

// need counts more flows in that are worth bulk sessions, and asks for as many sessions, and some to spare: again after a
// while if the connector keeps fewer.
func (b *bulk) need(l *live, more int, again time.Duration) {
	name, have := l.connector.Name, b.sessions(l.connector)
	b.mu.Lock()
	s := b.stateLocked(name)
	s.open += more
	now, need := time.Now(), min(s.open+bulkSpare, maxBulkSessions)
	lacks := need > s.asked || have < need && now.Sub(s.told) > again // it may have closed some
	if need >= s.asked {
		s.asked, s.needed = need, now
	}
	if lacks {
		need, s.told = s.asked, now
	}
	b.mu.Unlock()
	if lacks {
		b.ask(name, l.connector.Tunnel, need)
	}
}

// over counts a flow out and takes its throughput into account.
func (b *bulk) over(r *record, k candidate) {
	if k.l == nil {
		return
	}
	moved, busy := r.in.Load()+r.out.Load(), time.Duration(r.busy.Load())
	packets := r.kind == tunnel.KindUDP || r.kind == tunnel.KindIngressUDP // which go at a pace of their own
	measured := moved >= measuredFrom && busy > 0 && !packets
	if !measured && !r.bulky {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.stateLocked(k.l.connector.Name)
	if r.bulky {
		s.open--
	}
	if measured {
		s.observe(k.l.s.Carrier(), float64(moved)/busy.Seconds())
	}
}

func (s *bulkState) observe(c tunnel.Carrier, rate float64) {
	if old, ok := s.rate[c]; ok {
		rate = old + measureWeight*(rate-old)
	}
	s.rate[c] = rate
	for other, r := range s.rate {
		if mine, ok := s.rate[s.choice]; ok && other != s.choice && r > switchAbove*mine {
			s.choice = other
			return
		}
	}
}

// ask tells one session of the connector how many bulk sessions are wanted.
func (b *bulk) ask(connector, tunnelID string, n int) {
	for _, l := range b.reg.ofConnector(tunnelID, connector) {
		if l.role == tunnel.RoleMain && !l.s.Draining() {
			l.wantBulk(n)
			return
		}
	}
}

// up tells the connector of a new session how many bulk sessions are wanted, if it may have others: it keeps what an edge
// asked for that has been started anew since.
func (b *bulk) up(l *live) {
	b.mu.Lock()
	n := 0
	if s := b.by[l.connector.Name]; s != nil {
		n = s.asked
	}
	b.mu.Unlock()
	if n > 0 || b.sessions(l.connector) > 0 {
		b.ask(l.connector.Name, l.connector.Tunnel, n)
	}
}

// sessions counts the bulk sessions of a connector.
func (b *bulk) sessions(k Connector) (n int) {
	for _, l := range b.reg.ofConnector(k.Tunnel, k.Name) {
		if l.role == tunnel.RoleBulk && !l.s.Draining() {
			n++
		}
	}
	return n
}

// wantBulk has the connector told how many bulk sessions are wanted.
func (l *live) wantBulk(n int) {
	l.ask.Store(int32(n) + 1)
	l.tell()
}

// ExpectBulk says where flows of many bytes may go at any time: the connectors there keep bulk sessions ready. It
// replaces what was said before. The slice must not be changed any more.
func (c *Control) ExpectBulk(qs []Query) { c.bulk.expected.Store(&qs) }

// tendBulk sees to the connectors' bulk sessions, every now and then.
func (c *Control) tendBulk(now time.Time) {
	tunnels := map[string]bool{}
	if qs := c.bulk.expected.Load(); qs != nil && c.bulk.mode != BulkQUIC {
		for _, q := range *qs {
			if p, err := c.plan(q); err == nil {
				tunnels[p.tunnel] = true
			}
		}
	}
	c.bulk.rest(now, tunnels)
	for id := range tunnels {
		asked := map[string]bool{}
		for _, l := range c.reg.of(id) {
			if name := l.connector.Name; l.role == tunnel.RoleMain && !l.s.Draining() && !asked[name] {
				asked[name] = true
				c.bulk.need(l, 0, bulkRemind)
			}
		}
	}
}

// rest lets connectors close the bulk sessions that were not needed for a while, but for spare ones where flows of the
// tunnel are expected, and forgets connectors that are gone.
func (b *bulk) rest(now time.Time, expected map[string]bool) {
	lower := map[string]int{}
	b.mu.Lock()
	for name, s := range b.by {
		need := s.open
		if ls := b.reg.ofConnector("", name); len(ls) > 0 && expected[ls[0].connector.Tunnel] {
			need += bulkSpare
		}
		if need = min(need, maxBulkSessions); need < s.asked && now.Sub(s.needed) > bulkRest {
			s.asked, s.needed = need, now
			lower[name] = need
		}
		switch {
		case s.open > 0 || b.reg.countOf(name) > 0:
			s.gone = time.Time{}
		case s.gone.IsZero():
			s.gone = now
		case now.Sub(s.gone) > bulkForget:
			delete(b.by, name)
		}
	}
	b.mu.Unlock()
	for name, n := range lower {
		b.ask(name, "", n)
	}
}
