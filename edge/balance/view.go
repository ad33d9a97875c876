package balance

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/edge/spec"
)

// A PoolHealth is what this edge sees of a pool.
type PoolHealth struct {
	Name      string           `json:"name"`
	Healthy   bool             `json:"healthy"`
	Endpoints []EndpointHealth `json:"endpoints,omitempty"`
	Members   []string         `json:"members,omitempty"`
	Next      string           `json:"next,omitempty"`
	Retries   uint64           `json:"retries"`
}

// An EndpointHealth is what this edge sees of an endpoint.
type EndpointHealth struct {
	Name        string        `json:"name"`
	VNet        string        `json:"vnet,omitempty"`
	Addr        string        `json:"addr"`
	State       string        `json:"state"`            // "up", "down", "unknown", "unmonitored" or "disabled"
	Reason      string        `json:"reason,omitempty"` // of the last failed probe
	Since       time.Time     `json:"since"`            // of State
	RTT         spec.Duration `json:"rtt,omitzero"`     // of probes, smoothed
	Weight      float64       `json:"weight"`
	Drain       bool          `json:"drain,omitempty"`
	Requests    int64         `json:"requests"`    // outstanding
	Connections int64         `json:"connections"` // open
	Picks       uint64        `json:"picks"`
	Failures    uint64        `json:"failures"`
}

// Health describes all pools, in the order of the configuration.
func (b *Balancer) Health() []PoolHealth {
	t := b.now.Load()
	all := make([]PoolHealth, 0, len(t.order))
	for _, p := range t.order {
		h := PoolHealth{Name: p.cfg.Name, Healthy: p.healthy(), Members: p.cfg.Members, Next: p.cfg.Next, Retries: p.state.retries.Load()}
		for _, e := range p.endpoints {
			h.Endpoints = append(h.Endpoints, e.view())
		}
		all = append(all, h)
	}
	return all
}

func (e *endpoint) view() EndpointHealth {
	e.mu.Lock()
	defer e.mu.Unlock()
	return EndpointHealth{
		Name: e.label, VNet: e.cfg.VNet, Addr: e.cfg.Addr(), State: e.stateText(), Reason: e.reason, Since: e.since,
		RTT: spec.Duration(e.rtt.Load()), Weight: e.weight, Drain: e.cfg.Drain, Requests: e.requests.Load(), Connections: e.conns.Load(),
		Picks: e.picks.Load(), Failures: e.failures.Load(),
	}
}

func (e *endpoint) stateText() string {
	switch {
	case e.cfg.Disabled:
		return "disabled"
	case !e.watch:
		return "unmonitored"
	}
	switch e.health.Load() {
	case healthUp:
		return "up"
	case healthDown:
		return "down"
	}
	return "unknown"
}

// A Place is an endpoint in the order in which it should be used.
type Place struct {
	spec.Endpoint
	Last bool // it is down, drains, or has no weight: only where there is no other
}

// Places returns the endpoints of a pool and of those that it leads to which are not disabled, those that are up first,
// and in the order of the configuration otherwise; endpoints that drain come after all others that are up.
func (b *Balancer) Places(name string) []Place {
	p := b.now.Load().pools[name]
	if p == nil {
		return nil
	}
	var rows [3][]Place
	for q := p; q != nil; q = q.next {
		q.walk(func(e *endpoint) {
			switch {
			case e.cfg.Disabled:
			case !e.keeps():
				rows[2] = append(rows[2], Place{e.cfg, true})
			case e.cfg.Drain || e.weight == 0:
				rows[1] = append(rows[1], Place{e.cfg, true})
			default:
				rows[0] = append(rows[0], Place{e.cfg, false})
			}
		})
	}
	return append(append(rows[0], rows[1]...), rows[2]...)
}

// collector reads the states when the metrics are read.
type collector struct{ b *Balancer }

var (
	byEndpoint   = []string{"pool", "endpoint"}
	descHealthy  = prometheus.NewDesc("keyhaven_edge_pool_healthy", "1 if the pool has as many usable endpoints as it needs.", []string{"pool"}, nil)
	descRetries  = prometheus.NewDesc("keyhaven_edge_pool_retries_total", "Requests that were tried on another endpoint.", []string{"pool"}, nil)
	descUp       = prometheus.NewDesc("keyhaven_edge_pool_endpoint_up", "1 if the endpoint's monitor finds it up; absent without a monitor.", byEndpoint, nil)
	descRequests = prometheus.NewDesc("keyhaven_edge_pool_endpoint_requests", "Outstanding requests.", byEndpoint, nil)
	descConns    = prometheus.NewDesc("keyhaven_edge_pool_endpoint_connections", "Open connections.", byEndpoint, nil)
	descPicks    = prometheus.NewDesc("keyhaven_edge_pool_picks_total", "Requests and connections that the endpoint was picked for.", byEndpoint, nil)
	descFailures = prometheus.NewDesc("keyhaven_edge_pool_failures_total", "Requests and connections that failed at the endpoint.", byEndpoint, nil)
	descProbes   = prometheus.NewDesc("keyhaven_edge_pool_probes_total", "Probes by result.", []string{"pool", "endpoint", "result"}, nil)
	descRTT      = prometheus.NewDesc("keyhaven_edge_pool_probe_seconds", "Round trip of good probes, smoothed; absent until there is one.", byEndpoint, nil)
)

// Describe implements [prometheus.Collector].
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descHealthy, descRetries, descUp, descRequests, descConns, descPicks, descFailures, descProbes, descRTT} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (c collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	for _, p := range c.b.now.Load().order {
		name := p.cfg.Name
		gauge(descHealthy, truth(p.healthy()), name)
		count(descRetries, p.state.retries.Load(), name)
		for _, e := range p.endpoints {
			gauge(descRequests, float64(e.requests.Load()), name, e.label)
			gauge(descConns, float64(e.conns.Load()), name, e.label)
			count(descPicks, e.picks.Load(), name, e.label)
			count(descFailures, e.failures.Load(), name, e.label)
			count(descProbes, e.good.Load(), name, e.label, "ok")
			count(descProbes, e.bad.Load(), name, e.label, "failed")
			if h := e.health.Load(); e.watch && !e.cfg.Disabled && h != healthUnknown {
				gauge(descUp, truth(h == healthUp), name, e.label)
			}
			if rtt := e.rtt.Load(); rtt != 0 {
				gauge(descRTT, time.Duration(rtt).Seconds(), name, e.label)
			}
		}
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
