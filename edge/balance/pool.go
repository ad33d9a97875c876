package balance

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/edge/spec"
)

// A pool is one of a table.
type pool struct {
	cfg       spec.PoolConfig
	endpoints []*endpoint
	members   []*pool
	next      *pool // nil: none
	minimum   int
	byID      map[id]*endpoint // of this pool and all that it leads to
	state     *poolState
}

// A poolState is what outlives a change of a pool's configuration.
type poolState struct {
	retries atomic.Uint64
	values  affinities // of headers

	mu sync.Mutex // guards the turns of the endpoints, for round robin
}

// An endpoint is one of a pool of a table.
type endpoint struct {
	cfg    spec.Endpoint
	label  string
	id     id
	pool   *pool
	weight float64
	watch  bool // it has a monitor
	*endpointState
}

// An endpointState is what outlives a change of an endpoint's configuration, as long as its pool and address stay.
type endpointState struct {
	requests, conns atomic.Int64 // outstanding, open
	picks, failures atomic.Uint64
	good, bad       atomic.Uint64 // probes
	rtt             atomic.Int64  // of probes, smoothed, in nanoseconds; zero: not known
	health          atomic.Uint32 // of healthUnknown and so on

	turn float64 // guarded by the pool's mu

	mu     sync.Mutex // guards the rest
	since  time.Time  // of health
	reason string     // of the last failed probe
	row    int        // of equal results: above zero good ones, below zero bad ones
	stop   func()     // ends the monitor; nil: there is none
	of     spec.Monitor
}

// States of health.
const (
	healthUnknown uint32 = iota
	healthUp
	healthDown
)

// place tells endpoints of one pool apart.
type place struct {
	vnet, host, connector string
	port                  uint16
}

func placeOf(e *spec.Endpoint) place { return place{e.VNet, e.Host, e.Connector, e.Port} }

// compile makes a pool of its configuration and of what was before it, which may be nil.
func (b *Balancer) compile(cfg spec.PoolConfig, old *pool) *pool {
	p := &pool{cfg: cfg, minimum: max(1, cfg.Minimum), byID: map[id]*endpoint{}, state: new(poolState)}
	states := map[place]*endpointState{}
	if old != nil {
		p.state = old.state
		for _, e := range old.endpoints {
			states[placeOf(&e.cfg)] = e.endpointState
		}
	}
	for i := range cfg.Endpoints {
		c := cfg.Endpoints[i]
		e := &endpoint{cfg: c, label: c.Label(), id: b.idOf(cfg.Name, &c), pool: p, weight: c.Share(), watch: cfg.Monitor != nil, endpointState: states[placeOf(&c)]}
		if e.endpointState == nil {
			e.endpointState = &endpointState{since: time.Now()}
		}
		p.endpoints = append(p.endpoints, e)
	}
	return p
}

// link resolves the names of other pools.
func (p *pool) link(t *table) {
	for _, m := range p.cfg.Members {
		p.members = append(p.members, t.pools[m])
	}
	p.next = t.pools[p.cfg.Next]
}

// index enters every endpoint that p leads to.
func (p *pool) index(into map[id]*endpoint, seen map[*pool]bool) {
	if p == nil || seen[p] {
		return
	}
	seen[p] = true
	for _, e := range p.endpoints {
		into[e.id] = e
	}
	for _, m := range p.members {
		m.index(into, seen)
	}
	p.next.index(into, seen)
}

// up reports whether the endpoint can be used as far as is known. One without a monitor always can.
func (e *endpoint) up() bool {
	return !e.cfg.Disabled && (!e.watch || e.health.Load() == healthUp)
}

// keeps reports whether the endpoint can be used for those whom affinity sends to it: it is not known to be down.
func (e *endpoint) keeps() bool {
	return !e.cfg.Disabled && (!e.watch || e.health.Load() != healthDown)
}

// fresh reports whether the endpoint can be used for new visitors.
func (e *endpoint) fresh() bool { return e.up() && !e.cfg.Drain }

// healthy reports whether the pool has as many usable endpoints as it needs.
func (p *pool) healthy() bool {
	for _, m := range p.members {
		if m.healthy() {
			return true
		}
	}
	n := 0
	for _, e := range p.endpoints {
		if e.fresh() {
			if n++; n >= p.minimum {
				return true
			}
		}
	}
	return false
}

// patience is how long the first results of p may take, zero if none are due.
func (p *pool) patience() (d time.Duration) {
	for _, m := range p.members {
		d = max(d, m.patience())
	}
	if p.cfg.Monitor == nil {
		return d
	}
	for _, e := range p.endpoints {
		if !e.cfg.Disabled && e.health.Load() == healthUnknown {
			return max(d, timeoutOf(p.cfg.Monitor))
		}
	}
	return d
}

// latency is the mean of the usable endpoints' round trips, and false if none is known.
func (p *pool) latency() (mean time.Duration, ok bool) {
	var sum, n int64
	for _, m := range p.members {
		if d, ok := m.latency(); ok {
			sum, n = sum+int64(d), n+1
		}
	}
	for _, e := range p.endpoints {
		if rtt := e.rtt.Load(); rtt > 0 && e.fresh() {
			sum, n = sum+rtt, n+1
		}
	}
	if n == 0 {
		return 0, false
	}
	return time.Duration(sum / n), true
}

// load is the outstanding requests for each unit of weight that can be used.
func (p *pool) load() float64 {
	var requests, weight float64
	p.walk(func(e *endpoint) {
		if e.fresh() {
			requests += float64(e.requests.Load())
			weight += e.weight
		}
	})
	if weight == 0 {
		weight = 1e-3
	}
	return requests / weight
}

// walk calls f for the endpoints of p and its members.
func (p *pool) walk(f func(*endpoint)) {
	for _, m := range p.members {
		m.walk(f)
	}
	for _, e := range p.endpoints {
		f(e)
	}
}
