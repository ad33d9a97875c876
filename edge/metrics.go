package edge

import (
	"errors"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Results of a handshake.
const (
	resultOK     = "ok"
	resultNoZone = "no_zone" // no zone for the name, or not over this protocol
	resultSigner = "signer"  // the key server failed or could not be reached
	resultFailed = "failed"  // anything else: the visitor left, or the two agree on nothing
)

type metrics struct {
	handshakes  *prometheus.CounterVec
	signatures  *prometheus.HistogramVec
	requests    *prometheus.CounterVec
	connections prometheus.Gauge
	up          upCollector
	expiry      expiryCollector
}

func newMetrics(reg prometheus.Registerer, up func() map[string]bool, expiry func() []expiry) (*metrics, error) {
	m := &metrics{
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyhaven_edge_handshakes_total", Help: "TLS handshakes of visitors by zone, transport, result, and whether a ticket resumed them.",
		}, []string{"zone", "transport", "result", "resumed"}),
		signatures: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "keyhaven_edge_signature_seconds", Help: "Time that handshakes waited for the key server, by zone and result.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}, []string{"zone", "result"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "keyhaven_edge_requests_total", Help: "Requests by zone, HTTP version and status.",
		}, []string{"zone", "version", "code"}),
		connections: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "keyhaven_edge_connections", Help: "Open TCP connections of visitors.",
		}),
		up:     upCollector{up},
		expiry: expiryCollector{expiry},
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
	return []prometheus.Collector{m.handshakes, m.signatures, m.requests, m.connections, m.up, m.expiry}
}

func (m *metrics) unregister(reg prometheus.Registerer) {
	if reg == nil {
		return
	}
	for _, c := range m.all() {
		reg.Unregister(c)
	}
}

func (m *metrics) handshake(zone, transport, result string, resumed bool) {
	m.handshakes.WithLabelValues(zone, transport, result, strconv.FormatBool(resumed)).Inc()
}

func (m *metrics) signature(zone string, began time.Time, err error) {
	result := resultOK
	if err != nil {
		result = "failed"
	}
	m.signatures.WithLabelValues(zone, result).Observe(time.Since(began).Seconds())
}

func (m *metrics) request(zone, version string, status int) {
	m.requests.WithLabelValues(zone, version, strconv.Itoa(status)).Inc()
}

// An upCollector asks for the state of the key server groups when the metrics are read.
type upCollector struct{ up func() map[string]bool }

var upDesc = prometheus.NewDesc("keyhaven_edge_key_server_up", "1 if the key server group can be reached.", []string{"group"}, nil)

// Describe implements [prometheus.Collector].
func (c upCollector) Describe(ch chan<- *prometheus.Desc) { ch <- upDesc }

// Collect implements [prometheus.Collector].
func (c upCollector) Collect(ch chan<- prometheus.Metric) {
	for group, up := range c.up() {
		v := 0.0
		if up {
			v = 1
		}
		ch <- prometheus.MustNewConstMetric(upDesc, prometheus.GaugeValue, v, group)
	}
}

// An expiry is the end of a certificate that the edge works with.
type expiry struct {
	kind, name string // "zone" and its name, or "key_server" and the group's
	file       string // of a zone's certificate
	at         time.Time
}

// An expiryCollector asks for the certificates' ends when the metrics are read.
type expiryCollector struct{ all func() []expiry }

var expiryDesc = prometheus.NewDesc("keyhaven_edge_certificate_not_after_seconds",
	"When a zone's certificate, or the edge's own towards a key server group, runs out, in Unix time.", []string{"kind", "name", "file"}, nil)

// Describe implements [prometheus.Collector].
func (c expiryCollector) Describe(ch chan<- *prometheus.Desc) { ch <- expiryDesc }

// Collect implements [prometheus.Collector].
func (c expiryCollector) Collect(ch chan<- prometheus.Metric) {
	for _, e := range c.all() {
		ch <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, float64(e.at.Unix()), e.kind, e.name, e.file)
	}
}
