package control

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/tunnel"
)

// A collector shows what the control knows, in numbers that do not grow with the number of tunnels.
type collector struct{ c *Control }

var (
	descTunnels = prometheus.NewDesc("keyhaven_edge_tunnels", "Tunnels by status.", []string{"status"}, nil)
	descVNets   = prometheus.NewDesc("keyhaven_edge_vnets", "Virtual networks.", nil, nil)
	descRoutes  = prometheus.NewDesc("keyhaven_edge_routes", "Routes over all virtual networks.", nil, nil)
	descConns   = prometheus.NewDesc("keyhaven_edge_connectors", "Connectors that are enrolled and not revoked.", nil, nil)
	descLive    = prometheus.NewDesc("keyhaven_edge_sessions", "Live sessions of connectors.", nil, nil)
	descEdges   = prometheus.NewDesc("keyhaven_edge_edges", "Edges of the installation that live, this one included.", nil, nil)
	descFlows   = prometheus.NewDesc("keyhaven_edge_flows", "Open flows over all sessions.", nil, nil)
)

// Describe implements prometheus.Collector.
func (k collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descTunnels, descVNets, descRoutes, descConns, descLive, descFlows, descEdges} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (k collector) Collect(ch chan<- prometheus.Metric) {
	s := k.c.counts()
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	for status, n := range s.byStatus {
		gauge(descTunnels, n, status)
	}
	gauge(descVNets, s.vnets)
	gauge(descRoutes, s.routes)
	gauge(descConns, s.connectors)
	gauge(descLive, s.sessions)
	gauge(descFlows, s.flows)
	gauge(descEdges, s.edges)
}

func newDials() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_dials_total",
		Help: "Flows that were asked for, by result."}, []string{"result"})
}

func newOpened() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_flows_opened_total",
		Help: "Flows that were opened, by way (local, forwarded to another edge, or for another edge), carrier and role of the session."},
		[]string{"way", "carrier", "role"})
}

// way is the label of how a flow came to its connector.
func (r *record) way(k candidate) string {
	switch {
	case k.e != nil:
		return "forwarded"
	case r.plan.q.Local:
		return "for_peer"
	}
	return "local"
}

// dialResult is the label of a dial that ended with err.
func dialResult(err error) string {
	if err == nil {
		return "ok"
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return string(e.Code)
	}
	if e, ok := errors.AsType[*tunnel.FlowError](err); ok {
		if name, ok := flowResults[e.Result]; ok {
			return name
		}
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return "cancelled"
	}
	return "failed"
}

var flowResults = map[tunnel.Result]string{
	tunnel.ResultRefused: "refused", tunnel.ResultTimedOut: "timed_out", tunnel.ResultDenied: "denied", tunnel.ResultNoRoute: "unreachable",
	tunnel.ResultNameNotFound: "name_not_found", tunnel.ResultDraining: "draining", tunnel.ResultLimit: "limit",
	tunnel.ResultCancelled: "cancelled", tunnel.ResultSessionLost: "session_lost",
}
