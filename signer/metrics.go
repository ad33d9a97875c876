package signer

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts records. It implements [Recorder]. No label holds a value that a client chooses.
type Metrics struct {
	operations *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
}

// NewMetrics registers the metrics of operations and of the registry's keys. Registering twice with one registerer panics.
func NewMetrics(reg prometheus.Registerer, keys *Registry) *Metrics {
	m := &Metrics{
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "keyhaven", Subsystem: "signer", Name: "operations_total",
			Help: "Operations by kind, signature scheme and result.",
		}, []string{"op", "scheme", "result"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "keyhaven", Subsystem: "signer", Name: "operation_seconds",
			Help:    "Time from a request's arrival at the service to its reply, for operations that were allowed.",
			Buckets: []float64{.00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}, []string{"op", "scheme"}),
	}
	reg.MustRegister(m.operations, m.seconds, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "keyhaven", Subsystem: "signer", Name: "keys",
		Help: "Private keys that can be asked for.",
	}, func() float64 { return float64(len(keys.Entries())) }))
	return m
}

// Record implements [Recorder].
func (m *Metrics) Record(r Record) {
	m.operations.WithLabelValues(r.Op, r.Scheme, string(r.Result)).Inc()
	if r.Result != ResultRefused {
		m.seconds.WithLabelValues(r.Op, r.Scheme).Observe(r.Duration.Seconds())
	}
}
