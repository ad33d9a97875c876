package balance

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/edge/spec"
)

// A Visit is what is known of whoever is to be served.
type Visit struct {
	// IP is the visitor's address.
	IP netip.Addr
	// Request, if not nil, is where affinity looks for its cookie or header.
	Request *http.Request
	// Tried holds endpoints that failed this visitor: they are not picked again.
	Tried []*Lease
}

// A Lease is an endpoint for one request or connection. Call Done once.
type Lease struct {
	// Cookie is what the visitor is to be given, nil if nothing.
	Cookie *http.Cookie

	e    *endpoint
	once sync.Once
}

// A Result is how a lease ended.
type Result bool

const (
	// OK says that the endpoint was reached.
	OK Result = true
	// Failed says that the endpoint could not be reached, or broke off.
	Failed Result = false
)

// Endpoint returns the endpoint's configuration.
func (l *Lease) Endpoint() *spec.Endpoint { return &l.e.cfg }

// Key tells the endpoint's place apart from all others, over changes of its configuration.
func (l *Lease) Key() Key {
	return Key{l.e.pool.cfg.Name, l.e.cfg.VNet, l.e.cfg.Host, l.e.cfg.Connector, l.e.cfg.Port}
}

// A Key is a place in a pool.
type Key struct {
	Pool, VNet, Host, Connector string
	Port                        uint16
}

// ProxyProtocol returns the version that the endpoint expects, "" for none.
func (l *Lease) ProxyProtocol() string { return l.e.pool.cfg.ProxyProtocol }

// Open counts a connection to the endpoint, and returns what ends the count; call it once.
func (l *Lease) Open() (closed func()) {
	s := l.e.endpointState
	s.conns.Add(1)
	return func() { s.conns.Add(-1) }
}

// Done ends the lease. It is idempotent.
func (l *Lease) Done(r Result) {
	l.once.Do(func() {
		l.e.requests.Add(-1)
		if r == Failed {
			l.e.failures.Add(1)
		}
	})
}

// Usable reports whether new requests may go to the place, such as over connections that are open.
func (b *Balancer) Usable(k Key) bool {
	p := b.now.Load().pools[k.Pool]
	if p == nil {
		return false
	}
	return slices.ContainsFunc(p.endpoints, func(e *endpoint) bool {
		return !e.cfg.Disabled && placeOf(&e.cfg) == place{k.VNet, k.Host, k.Connector, k.Port}
	})
}

// Pick returns an endpoint of the pool, or of those that take over for it. It waits only for first results of monitors.
// Errors are [ErrNoPool], [ErrNoEndpoint] and the context's.
func (b *Balancer) Pick(ctx context.Context, name string, v Visit) (*Lease, error) {
	var deadline <-chan time.Time
	for {
		changed := b.Changed()
		p := b.now.Load().pools[name]
		if p == nil {
			return nil, fmt.Errorf("%w: %q", ErrNoPool, name)
		}
		patience := p.patience()
		if late := len(v.Tried) > 0; late || patience == 0 || p.healthy() {
			return b.settle(p, v)
		}
		if deadline == nil {
			t := time.NewTimer(patience)
			defer t.Stop()
			deadline = t.C
		}
		select {
		case <-changed:
		case <-deadline:
			return b.settle(p, v)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// settle picks from what there is now.
func (b *Balancer) settle(p *pool, v Visit) (*Lease, error) {
	l := b.try(p, v)
	if l == nil {
		return nil, fmt.Errorf("%w: %q", ErrNoEndpoint, p.cfg.Name)
	}
	if len(v.Tried) > 0 {
		p.state.retries.Add(1)
	}
	return l, nil
}

// try picks without waiting. It returns nil if there is nothing to pick.
func (b *Balancer) try(p *pool, v Visit) *Lease {
	a := p.cfg.Affinity
	if a == nil || a.Type == "" || a.Type == spec.AffinityNone {
		return leaseOf(p.choose(&v, pointOf(v.IP), false))
	}
	switch a.Type {
	case spec.AffinityHeader:
		return b.byHeader(p, a, &v)
	default:
		return b.byCookie(p, a, &v)
	}
}

func leaseOf(e *endpoint) *Lease {
	if e == nil {
		return nil
	}
	e.requests.Add(1)
	e.picks.Add(1)
	return &Lease{e: e}
}

// tried reports whether e failed the visitor before.
func (v *Visit) tried(e *endpoint) bool {
	return slices.ContainsFunc(v.Tried, func(l *Lease) bool { return l.e.endpointState == e.endpointState })
}

// choose returns an endpoint for a new visitor: of p if it is healthy, else of the first pool after it that is. Where none
// is, what is up anywhere among them serves, and failing that the last pool whatever its monitor says, unless that is p.
// With stable the endpoint follows from the point, whatever the steering.
func (p *pool) choose(v *Visit, point uint64, stable bool) *endpoint {
	for _, healthy := range []bool{true, false} {
		for q := p; q != nil; q = q.next {
			if q.healthy() != healthy {
				continue
			}
			if e := q.steer(v, point, stable); e != nil {
				return e
			}
		}
	}
	last := p
	for last.next != nil {
		last = last.next
	}
	if last == p {
		return nil
	}
	return last.anyone(v)
}

// anyone is an endpoint of a fall-back pool whose monitor finds nothing healthy: it may be wrong.
func (p *pool) anyone(v *Visit) *endpoint {
	var all []*endpoint
	p.walk(func(e *endpoint) {
		if !e.cfg.Disabled && !v.tried(e) {
			all = append(all, e)
		}
	})
	if len(all) == 0 {
		return nil
	}
	return all[rand.IntN(len(all))]
}

// steer picks one of the pool's own endpoints, or of its members.
func (p *pool) steer(v *Visit, point uint64, stable bool) *endpoint {
	if len(p.members) > 0 {
		return p.steerMembers(v, point, stable)
	}
	for _, zero := range []bool{false, true} { // endpoints of weight zero come last
		usable := func(e *endpoint) bool { return e.fresh() && e.weight > 0 != zero && !v.tried(e) }
		var e *endpoint
		switch {
		case zero:
			e = p.least(usable, func(e *endpoint) float64 { return float64(e.requests.Load()) })
		case stable || p.cfg.Steering == spec.SteerHash:
			e = p.rendezvous(usable, point)
		case p.cfg.Steering == spec.SteerRoundRobin:
			e = p.roundRobin(usable)
		case p.cfg.Steering == spec.SteerLeastRequests:
			e = p.least(usable, func(e *endpoint) float64 { return float64(e.requests.Load()+1) / e.weight })
		case p.cfg.Steering == spec.SteerLeastConnections:
			e = p.least(usable, func(e *endpoint) float64 { return float64(e.conns.Load()+e.requests.Load()+1) / e.weight })
		default:
			e = p.random(usable)
		}
		if e != nil {
			return e
		}
	}
	return nil
}

// random picks by weight.
func (p *pool) random(usable func(*endpoint) bool) (picked *endpoint) {
	var sum float64
	for _, e := range p.endpoints {
		if !usable(e) {
			continue
		}
		// Each in turn takes the place of those before it with its share of the sum: one pass, and no list.
		if sum += e.weight; rand.Float64()*sum < e.weight {
			picked = e
		}
	}
	return picked
}

// roundRobin takes turns such that an endpoint's share follows its weight, and its turns are spread evenly.
func (p *pool) roundRobin(usable func(*endpoint) bool) (picked *endpoint) {
	p.state.mu.Lock()
	defer p.state.mu.Unlock()
	var sum float64
	for _, e := range p.endpoints {
		if !usable(e) {
			continue
		}
		sum += e.weight
		if e.turn += e.weight; picked == nil || e.turn > picked.turn {
			picked = e
		}
	}
	if picked != nil {
		picked.turn -= sum
	}
	return picked
}

// rendezvous picks by the highest random weight: when an endpoint comes or goes, only the visitors whom it gains or loses
// move.
func (p *pool) rendezvous(usable func(*endpoint) bool, point uint64) (picked *endpoint) {
	best := math.Inf(-1)
	for _, e := range p.endpoints {
		if !usable(e) {
			continue
		}
		h := mix(point ^ e.id.number())
		u := (float64(h>>11) + 0.5) / (1 << 53) // between 0 and 1, neither included
		if score := -e.weight / math.Log(u); score > best {
			best, picked = score, e
		}
	}
	return picked
}

// least picks the endpoint with the lowest score, and any among equals.
func (p *pool) least(usable func(*endpoint) bool, score func(*endpoint) float64) (picked *endpoint) {
	if len(p.endpoints) == 0 {
		return nil
	}
	best := math.Inf(1)
	for i, start := 0, rand.IntN(len(p.endpoints)); i < len(p.endpoints); i++ {
		e := p.endpoints[(start+i)%len(p.endpoints)]
		if !usable(e) {
			continue
		}
		if s := score(e); s < best {
			best, picked = s, e
		}
	}
	return picked
}

// steerMembers picks of a member that is healthy, and of the others only if none of these has an endpoint.
func (p *pool) steerMembers(v *Visit, point uint64, stable bool) *endpoint {
	order := slices.Clone(p.members)
	switch p.cfg.PoolSteering {
	case spec.SteerRandom:
		if !stable {
			rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		}
	case spec.SteerLatency:
		sortBy(order, func(m *pool) float64 {
			d, ok := m.latency()
			if !ok {
				return math.Inf(1)
			}
			return float64(d)
		})
	case spec.SteerLeastRequests:
		sortBy(order, (*pool).load)
	}
	for _, healthy := range []bool{true, false} {
		for _, m := range order {
			if m.healthy() != healthy {
				continue
			}
			if e := m.steer(v, point, stable); e != nil {
				return e
			}
		}
	}
	return nil
}

// sortBy orders pools by a score, which is asked for once each. Equals keep their order.
func sortBy(pools []*pool, score func(*pool) float64) {
	of := make(map[*pool]float64, len(pools))
	for _, p := range pools {
		of[p] = score(p)
	}
	slices.SortStableFunc(pools, func(a, b *pool) int {
		switch x, y := of[a], of[b]; {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
}
