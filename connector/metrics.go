package connector

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/tunnel"
)

type metrics struct {
	sessions   *prometheus.GaugeVec
	attempts   *prometheus.CounterVec
	reconnects *prometheus.CounterVec
	results    *prometheus.CounterVec
	dial       prometheus.Histogram
	bytes      *prometheus.CounterVec

	toOrigin, fromOrigin prometheus.Counter
}

func newMetrics() *metrics {
	name := func(s string) string { return "keyhaven_connector_" + s }
	m := &metrics{
		sessions: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name("sessions"),
			Help: "Sessions that are up, by edge as configured."}, []string{"edge"}),
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("session_attempts_total"),
			Help: "Attempts to reach an address of an edge, by edge as configured and result (ok, failed)."}, []string{"edge", "result"}),
		reconnects: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("reconnects_total"),
			Help: "Sessions that took the place of a lost or drained one."}, []string{"edge"}),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("flow_results_total"),
			Help: "Flows that edges asked for, by what became of the request."}, []string{"result"}),
		dial: prometheus.NewHistogram(prometheus.HistogramOpts{Name: name("dial_seconds"),
			Help:    "Time from a flow's arrival to its answer, flows that were not dialled included.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("bytes_total"),
			Help: "Bytes carried, by direction (to_origin, from_origin)."}, []string{"direction"}),
	}
	m.toOrigin, m.fromOrigin = m.bytes.WithLabelValues("to_origin"), m.bytes.WithLabelValues("from_origin")
	return m
}

// register shows the connector's metrics.
func (c *Connector) register(r prometheus.Registerer) error {
	m := c.metrics
	for _, l := range c.lines { // so that an edge that was never reached shows as 0, not as absent
		m.sessions.WithLabelValues(l.edge)
	}
	var errs []error
	for _, col := range []prometheus.Collector{
		m.sessions, m.attempts, m.reconnects, m.results, m.dial, m.bytes,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "keyhaven_connector_flows",
			Help: "Flows that are open or being dialled."}, func() float64 { return float64(c.flows.len()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "keyhaven_connector_certificate_not_after_seconds",
			Help: "When the connector's certificate runs out, as Unix time."},
			func() float64 { return float64(c.cfg.Identity.NotAfter().Unix()) }),
	} {
		errs = append(errs, r.Register(col))
	}
	return errors.Join(errs...)
}

// observe counts the answer to a flow.
func (m *metrics) observe(r tunnel.Result, d time.Duration) {
	m.results.WithLabelValues(label(r)).Inc()
	m.dial.Observe(d.Seconds())
}

// label returns a result's name in metrics.
func label(r tunnel.Result) string {
	switch r {
	case tunnel.ResultOK:
		return "ok"
	case tunnel.ResultRefused:
		return "refused"
	case tunnel.ResultTimedOut:
		return "timed_out"
	case tunnel.ResultDenied:
		return "denied"
	case tunnel.ResultNoRoute:
		return "no_route"
	case tunnel.ResultNameNotFound:
		return "name_not_found"
	case tunnel.ResultLimit:
		return "limit"
	case tunnel.ResultUnsupported:
		return "unsupported"
	}
	return "internal"
}
