package signer

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts records and shows lanes. It implements [Recorder]. Labels come from the configuration and from fixed lists alone: clients that the policy
// has no rule for, and keys that the registry does not hold, count as "other".
type Metrics struct {
	operations *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	refusals   *prometheus.CounterVec
	keys       *prometheus.CounterVec
	clients    *prometheus.CounterVec
	homes      *prometheus.HistogramVec
}

// buckets are those of all histograms, in seconds.
var buckets = []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}

// other stands for all clients, and all keys, that are not configured.
const other = "other"

// NewMetrics registers the metrics of operations, and of the registry's keys and their lanes. Registering twice with one registerer panics.
func NewMetrics(reg prometheus.Registerer, keys *Registry) *Metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "keyhaven", Subsystem: "signer", Name: name, Help: help}, labels)
	}
	histogram := func(name, help string, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "keyhaven", Subsystem: "signer", Name: name, Help: help, Buckets: buckets}, labels)
	}
	m := &Metrics{
		operations: counter("operations_total", "Operations by kind, signature scheme and result.", "op", "scheme", "result"),
		seconds:    histogram("operation_seconds", "Time from a request's arrival at the service to its reply, for operations that were allowed.", "op", "scheme"),
		refusals:   counter("refusals_total", "Operations that were refused or failed, by reason.", "reason"),
		keys:       counter("key_operations_total", "Operations by the key that was asked for and result.", "key", "result"),
		clients:    counter("client_operations_total", "Operations by client and result.", "client", "result"),
		homes:      histogram("home_seconds", "Time that an operation took in the key's home, without the queue before it.", "home"),
	}
	reg.MustRegister(m.operations, m.seconds, m.refusals, m.keys, m.clients, m.homes, laneCollector{keys},
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "keyhaven", Subsystem: "signer", Name: "keys",
			Help: "Private keys that can be asked for.",
		}, func() float64 { return float64(len(keys.Entries())) }))
	return m
}

// Record implements [Recorder].
func (m *Metrics) Record(r Record) {
	result := string(r.Result)
	m.operations.WithLabelValues(r.Op, r.Scheme, result).Inc()
	m.keys.WithLabelValues(r.keyLabel(), result).Inc()
	m.clients.WithLabelValues(r.clientLabel(), result).Inc()
	if r.Result != ResultRefused {
		m.seconds.WithLabelValues(r.Op, r.Scheme).Observe(r.Duration.Seconds())
	}
	if r.Cause != "" {
		m.refusals.WithLabelValues(string(r.Cause)).Inc()
	}
	if r.Home != "" && r.Took > 0 {
		m.homes.WithLabelValues(r.Home).Observe(r.Took.Seconds())
	}
}

// keyLabel names a key that is configured by its first label, or by its SKI if it has none.
func (r *Record) keyLabel() string {
	switch {
	case r.key == nil:
		return other
	case len(r.key.Labels) > 0:
		return r.key.Labels[0]
	}
	return r.key.SKI.String()
}

func (r *Record) clientLabel() string {
	if r.client == "" {
		return other
	}
	return r.client
}

// A laneCollector asks the lanes of a registry's keys when it is scraped.
type laneCollector struct{ keys *Registry }

// laneMetric is one number of a lane.
type laneMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*LaneStats) float64
}

func laneDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("keyhaven_signer_lane_"+name, help, append([]string{"home"}, labels...), nil)
}

var laneMetrics = []laneMetric{
	{laneDesc("capacity", "Operations that the home does at once, as configured."), prometheus.GaugeValue, func(s *LaneStats) float64 { return float64(s.Capacity) }},
	{laneDesc("limit", "The same now: below the capacity after the home throttled."), prometheus.GaugeValue, func(s *LaneStats) float64 { return float64(s.Limit) }},
	{laneDesc("in_flight", "Operations in the home, and a few that were sent ahead."), prometheus.GaugeValue, func(s *LaneStats) float64 { return float64(s.InFlight) }},
	{laneDesc("waiting", "Operations in the queue before the home."), prometheus.GaugeValue, func(s *LaneStats) float64 { return float64(s.Waiting) }},
	{laneDesc("done_total", "Operations that the home answered with a result."), prometheus.CounterValue, func(s *LaneStats) float64 { return float64(s.Done) }},
	{laneDesc("failed_total", "Failures of the home that its breaker counted."), prometheus.CounterValue, func(s *LaneStats) float64 { return float64(s.Failed) }},
	{laneDesc("breaker_opened_total", "How often the home's breaker opened."), prometheus.CounterValue, func(s *LaneStats) float64 { return float64(s.Opened) }},
	{laneDesc("throttled_total", "Answers by which the home asked to be left alone."), prometheus.CounterValue, func(s *LaneStats) float64 { return float64(s.Throttled) }},
	{laneDesc("failovers_total", "Operations that went on from this home to another one."), prometheus.CounterValue, func(s *LaneStats) float64 { return float64(s.Failovers) }},
	{laneDesc("hedges_total", "Operations for which a second home was asked because this one took long."), prometheus.CounterValue, func(s *LaneStats) float64 { return float64(s.Hedges) }},
	{laneDesc("hedges_won_total", "Hedged operations that the second home answered first."), prometheus.CounterValue, func(s *LaneStats) float64 { return float64(s.HedgesWon) }},
}

var (
	laneRefused = laneDesc("refused_total", "Operations that were not let into the home, by reason.", "reason")
	laneBreaker = laneDesc("breaker_state", "1 for the state that the home's breaker is in, 0 for the others.", "state")
	laneLatency = laneDesc("latency_seconds", "Estimated quantiles of the time from asking for the home to its result, of late, the queue included.", "quantile")
	laneService = laneDesc("service_seconds", "Estimated quantiles of the time in the home, of late.", "quantile")
)

// Describe implements [prometheus.Collector].
func (c laneCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range laneMetrics {
		ch <- m.desc
	}
	for _, d := range []*prometheus.Desc{laneRefused, laneBreaker, laneLatency, laneService} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (c laneCollector) Collect(ch chan<- prometheus.Metric) {
	for _, s := range c.stats() {
		for _, m := range laneMetrics {
			ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(&s), s.Name)
		}
		for reason, n := range map[string]uint64{"overloaded": s.Refused.Overloaded, "deadline": s.Refused.Deadline, "open": s.Refused.Open} {
			ch <- prometheus.MustNewConstMetric(laneRefused, prometheus.CounterValue, float64(n), s.Name, reason)
		}
		for _, state := range []string{"closed", "half-open", "open"} {
			is := 0.0
			if s.Breaker == state {
				is = 1
			}
			ch <- prometheus.MustNewConstMetric(laneBreaker, prometheus.GaugeValue, is, s.Name, state)
		}
		for desc, p := range map[*prometheus.Desc]Percentiles{laneLatency: s.Latency, laneService: s.Service} {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, p.P50.Seconds(), s.Name, "0.5")
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, p.P95.Seconds(), s.Name, "0.95")
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, p.P99.Seconds(), s.Name, "0.99")
		}
	}
}

// stats returns the state of each lane once. Of two lanes with one name, which would be two series that are the same, the first counts.
func (c laneCollector) stats() []LaneStats {
	seen := make(map[*Lane]bool)
	var all []LaneStats
	for _, e := range c.keys.Entries() {
		for _, h := range e.Homes {
			if h.Lane == nil || seen[h.Lane] {
				continue
			}
			seen[h.Lane] = true
			s := h.Lane.Stats()
			s.Name = h.Lane.Name()
			if !slices.ContainsFunc(all, func(o LaneStats) bool { return o.Name == s.Name }) {
				all = append(all, s)
			}
		}
	}
	return all
}
