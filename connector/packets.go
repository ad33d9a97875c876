package connector

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/tunnel"
)

// packetMetrics are the numbers of flows of packets.
type packetMetrics struct {
	udp, icmp *packetCounters
	drops     tunnel.PacketDrops // by the tunnel

	packets, refused *prometheus.CounterVec
}

// packetCounters are those of one kind.
type packetCounters struct {
	inPackets, outPackets prometheus.Counter
	inBytes, outBytes     prometheus.Counter
	bad                   prometheus.Counter
}

func newPacketMetrics(toOrigin, fromOrigin prometheus.Counter) *packetMetrics {
	m := &packetMetrics{
		packets: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_connector_packets_total",
			Help: "Packets carried, by kind (udp, icmp) and direction (to_origin, from_origin)."}, []string{"kind", "direction"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_connector_packets_refused_total",
			Help: "Packets from edges that were malformed or that this host could not send, by kind (udp, icmp)."}, []string{"kind"}),
	}
	of := func(kind string) *packetCounters {
		return &packetCounters{
			inPackets: m.packets.WithLabelValues(kind, "from_origin"), outPackets: m.packets.WithLabelValues(kind, "to_origin"),
			inBytes: fromOrigin, outBytes: toOrigin, bad: m.refused.WithLabelValues(kind),
		}
	}
	m.udp, m.icmp = of("udp"), of("icmp")
	return m
}

// collectors are what shows the numbers.
func (m *packetMetrics) collectors() []prometheus.Collector {
	list := []prometheus.Collector{m.packets, m.refused}
	for why, n := range map[string]*atomic.Uint64{"unknown": &m.drops.Unknown, "receive": &m.drops.Receive, "send": &m.drops.Send, "stream": &m.drops.Stream} {
		list = append(list, prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "keyhaven_connector_packets_dropped_total",
			Help:        "Packets that the tunnel dropped on this side, by why (unknown flow, receive queue, send queue, stream queue).",
			ConstLabels: prometheus.Labels{"reason": why}}, func() float64 { return float64(n.Load()) }))
	}
	return list
}

func (p *packetCounters) in(n int) {
	p.inPackets.Inc()
	p.inBytes.Add(float64(n))
}

func (p *packetCounters) out(n int) {
	p.outPackets.Inc()
	p.outBytes.Add(float64(n))
}
