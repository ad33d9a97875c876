package connector

import (
	"errors"
	"strconv"
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

	*packetMetrics
}

func newMetrics() *metrics {
	name := func(s string) string { return "keyhaven_connector_" + s }
	m := &metrics{
		sessions: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name("sessions"),
			Help: "Sessions that are up, those that drain included, by edge, carrier (quic, tcp) and role (main, bulk)."}, []string{"edge", "carrier", "role"}),
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("session_attempts_total"),
			Help: "Attempts to reach an address of an edge, by edge and result (ok, failed)."}, []string{"edge", "result"}),
		reconnects: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("reconnects_total"),
			Help: "Main sessions that took the place of another, by edge and the reason."}, []string{"edge", "reason"}),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("flow_results_total"),
			Help: "Flows that edges asked for, by what became of the request."}, []string{"result"}),
		dial: prometheus.NewHistogram(prometheus.HistogramOpts{Name: name("dial_seconds"),
			Help:    "Time from a flow's arrival to its answer, flows that were not dialled included.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("bytes_total"),
			Help: "Bytes carried, by direction (to_origin, from_origin)."}, []string{"direction"}),
	}
	m.toOrigin, m.fromOrigin = m.bytes.WithLabelValues("to_origin"), m.bytes.WithLabelValues("from_origin")
	m.packetMetrics = newPacketMetrics(m.toOrigin, m.fromOrigin)
	return m
}

// remember makes an edge show, so that one that was never reached shows as 0, not as absent.
func (m *metrics) remember(edge string) {
	for _, carrier := range []string{CarrierQUIC, CarrierTCP} {
		m.sessions.WithLabelValues(edge, carrier, RoleMain)
	}
	for _, why := range reasons {
		m.reconnects.WithLabelValues(edge, why)
	}
}

// forget makes an edge that is no longer dialled disappear.
func (m *metrics) forget(edge string) {
	for _, v := range []*prometheus.MetricVec{m.sessions.MetricVec, m.attempts.MetricVec, m.reconnects.MetricVec} {
		v.DeletePartialMatch(prometheus.Labels{"edge": edge})
	}
}

func (m *metrics) reconnected(edge, why string) { m.reconnects.WithLabelValues(edge, why).Inc() }

// register shows the connector's metrics.
func (c *Connector) register(r prometheus.Registerer) error {
	m := c.metrics
	var errs []error
	for _, col := range append(m.packetMetrics.collectors(),
		m.sessions, m.attempts, m.reconnects, m.results, m.dial, m.bytes, view{c},
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "keyhaven_connector_certificate_not_after_seconds",
			Help: "When the connector's certificate runs out, as Unix time."},
			func() float64 { return float64(c.cfg.Identity.NotAfter().Unix()) }),
	) {
		errs = append(errs, r.Register(col))
	}
	return errors.Join(errs...)
}

// What is read from the connector's state when somebody asks.
var (
	descFlows = prometheus.NewDesc("keyhaven_connector_flows", "Flows that are open or being dialled.", nil, nil)
	descLimit = prometheus.NewDesc("keyhaven_connector_flows_limit", "How many flows there may be at a time.", nil, nil)

	descVNetFlows = prometheus.NewDesc("keyhaven_connector_vnet_flows", "Flows of a virtual network with a limit of its own.", []string{"vnet"}, nil)
	descVNetLimit = prometheus.NewDesc("keyhaven_connector_vnet_flows_limit", "How many flows of the virtual network there may be at a time.", []string{"vnet"}, nil)

	descRTT = prometheus.NewDesc("keyhaven_connector_session_rtt_seconds", "Smoothed round-trip time to the edge, by session.", []string{"edge", "index", "carrier"}, nil)
	descUp  = prometheus.NewDesc("keyhaven_connector_up_since_seconds", "Since when there has been at least one session, as Unix time; 0 if there is none.", nil, nil)
)

// view shows a connector's state as metrics.
type view struct{ c *Connector }

// Describe implements prometheus.Collector.
func (view) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descFlows, descLimit, descVNetFlows, descVNetLimit, descRTT, descUp} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (v view) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	st := v.c.Status()
	gauge(descFlows, float64(st.Flows))
	gauge(descLimit, float64(st.MaxFlows))
	for _, n := range st.VNets {
		gauge(descVNetFlows, float64(n.Flows), string(n.VNet))
		gauge(descVNetLimit, float64(n.Limit), string(n.VNet))
	}
	for _, s := range st.Sessions {
		if s.State == StateConnected {
			gauge(descRTT, s.RTT.Seconds(), s.Edge, strconv.Itoa(s.Index), s.Carrier)
		}
	}
	up := 0.0
	if !st.Up.IsZero() {
		up = float64(st.Up.Unix())
	}
	gauge(descUp, up)
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
	case tunnel.ResultForbidden:
		return "forbidden"
	}
	return "internal"
}
