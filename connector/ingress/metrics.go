package ingress

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	answers *prometheus.CounterVec
	refused prometheus.Counter
	version prometheus.Gauge
	// overBandwidth counts what did not fit into its rule's bandwidth.
	overBandwidth prometheus.Counter
}

func newMetrics() *metrics {
	return &metrics{
		answers: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_connector_ingress_responses_total",
			Help: "Responses to requests of the ingress, by class of status."}, []string{"status"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{Name: "keyhaven_connector_remote_config_refusals_total",
			Help: "Configurations from the edge that were refused."}),
		overBandwidth: prometheus.NewCounter(prometheus.CounterOpts{Name: "keyhaven_connector_ingress_packets_dropped_total",
			Help: "Packets of udp:// services that were dropped because the bandwidth of their rule was used up."}),
		version: prometheus.NewGauge(prometheus.GaugeOpts{Name: "keyhaven_connector_remote_config_version",
			Help: "Version of the last configuration that was taken from the edge; 0 if there was none."}),
	}
}

var classes = [...]string{"1xx", "2xx", "3xx", "4xx", "5xx"}

func (m *metrics) answered(status int) {
	if i := status/100 - 1; i >= 0 && i < len(classes) {
		m.answers.WithLabelValues(classes[i]).Inc()
	}
}

func (m *metrics) register(r prometheus.Registerer) error {
	if r == nil {
		return nil
	}
	return errors.Join(r.Register(m.answers), r.Register(m.refused), r.Register(m.version), r.Register(m.overBandwidth))
}
