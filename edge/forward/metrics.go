package forward

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// Why a connection or packet is refused.
const (
	refusedForbidden = "not_allowed"
	refusedLimit     = "limit"
	refusedSource    = "source_limit"
	refusedEarly     = "early"    // a packet while the service is being reached
	refusedLong      = "too_long" // a packet that does not fit with its header
)

type metrics struct {
	open     *prometheus.GaugeVec
	total    *prometheus.CounterVec
	refused  *prometheus.CounterVec
	failures *prometheus.CounterVec
	bytes    *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	byPort := []string{"port"}
	m := &metrics{
		open:     prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "keyhaven_edge_port_connections", Help: "Open connections of TCP ports, and sessions of UDP ports."}, byPort),
		total:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_port_connections_total", Help: "Connections and sessions that were taken."}, byPort),
		refused:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_port_refused_total", Help: "Connections and packets that were not taken, by reason."}, []string{"port", "reason"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_port_failures_total", Help: "Connections and sessions whose service could not be reached, by reason."}, []string{"port", "reason"}),
		bytes:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_port_bytes_total", Help: "Bytes carried by connections and sessions that have ended, by direction."}, []string{"port", "direction"}),
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range m.all() {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.open, m.total, m.refused, m.failures, m.bytes}
}

func (m *metrics) unregister(reg prometheus.Registerer) {
	if reg == nil {
		return
	}
	for _, c := range m.all() {
		reg.Unregister(c)
	}
}

// counts are the metrics of one port.
type counts struct {
	m    *metrics
	name string
}

func (m *metrics) of(name string) counts { return counts{m, name} }

func (c counts) begin() {
	c.m.open.WithLabelValues(c.name).Inc()
	c.m.total.WithLabelValues(c.name).Inc()
}

func (c counts) end()                  { c.m.open.WithLabelValues(c.name).Dec() }
func (c counts) refused(reason string) { c.m.refused.WithLabelValues(c.name, reason).Inc() }
func (c counts) failed()               { c.m.failures.WithLabelValues(c.name, "dial").Inc() }
func (c counts) unreachable()          { c.m.failures.WithLabelValues(c.name, "unreachable").Inc() }

func (c counts) bytes(in, out int64) {
	c.m.bytes.WithLabelValues(c.name, "in").Add(float64(in))
	c.m.bytes.WithLabelValues(c.name, "out").Add(float64(out))
}
