package main

import (
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11/worker"
)

// metrics are what the server tells of itself, besides operations and lanes, which package signer counts.
type metrics struct {
	server  *server
	reloads *prometheus.CounterVec
	last    *prometheus.GaugeVec
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	descUp         = desc("keyhaven_keyserver_token_up", "Whether the home of keys is open (1) or not (0).", "token")
	descHomeKeys   = desc("keyhaven_keyserver_home_keys", "Keys that the home holds.", "home")
	descWorkers    = desc("keyhaven_keyserver_workers", "Worker processes by state.", "token", "state")
	descRestarts   = desc("keyhaven_keyserver_worker_restarts_total", "Worker processes started in place of others.", "token")
	descKills      = desc("keyhaven_keyserver_worker_ends_total", "Worker processes that ended before they were told to, by reason.", "token", "reason")
	descNotAfter   = desc("keyhaven_keyserver_certificate_not_after_seconds", "When a certificate runs out, in seconds since 1970.", "kind", "name")
	descLogin      = desc("keyhaven_keyserver_login_expires_seconds", "When the login to a Transit engine ends unless it is renewed, in seconds since 1970.", "home")
	descProbe      = desc("keyhaven_keyserver_probe_success", "Whether the key's last probe in the home signed (1) or not (0).", "key", "home")
	descProbeTime  = desc("keyhaven_keyserver_probe_timestamp_seconds", "When the key was last probed in the home, in seconds since 1970.", "key", "home")
	descProbeTook  = desc("keyhaven_keyserver_probe_duration_seconds", "How long the key's last probe in the home took.", "key", "home")
	descRecords    = desc("keyhaven_keyserver_audit_records_total", "Audit records that are durable.")
	descBatches    = desc("keyhaven_keyserver_audit_writes_total", "Durable writes of the audit log; each holds a batch of records.")
	descAuditLost  = desc("keyhaven_keyserver_audit_lost_total", "Audit records that could not be kept, in the mode best-effort.")
	descAuditUp    = desc("keyhaven_keyserver_audit_up", "Whether audit records can be kept (1) or not (0). Absent if there is no audit.")
	descWaiting    = desc("keyhaven_keyserver_audit_waiting", "Audit records that wait to be written.")
	descSync       = desc("keyhaven_keyserver_audit_sync_seconds_total", "Time that durable writes of the audit log took.")
	descCheckpoint = desc("keyhaven_keyserver_audit_checkpoint_timestamp_seconds", "When the last checkpoint was signed, in seconds since 1970; 0 if none was yet.")
	descUncovered  = desc("keyhaven_keyserver_audit_uncovered", "Lines of the audit log that no checkpoint covers yet.")
	descOutLost    = desc("keyhaven_keyserver_audit_output_lost_total", "Lines of the audit log that did not reach an output.", "output")
	descLost       = desc("keyhaven_keyserver_records_lost_total", "Operations that are not in the log, because it was not read fast enough.")
	descBuild      = desc("keyhaven_keyserver_build_info", "Always 1.", "version", "go")
)

// newMetrics registers the metrics of the server.
func newMetrics(reg prometheus.Registerer, s *server) *metrics {
	m := &metrics{
		server:  s,
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_keyserver_reloads_total", Help: "Reloads of the configuration by result."}, []string{"result"}),
		last: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "keyhaven_keyserver_reload_timestamp_seconds", Help: "When the configuration was last reloaded with the result, in seconds since 1970.",
		}, []string{"result"}),
	}
	reg.MustRegister(m, m.reloads, m.last)
	return m
}

// reloaded counts a reload.
func (m *metrics) reloaded(r reloadReport) {
	result := "taken"
	switch {
	case !r.Taken:
		result = "refused"
	case len(r.Faults) > 0:
		result = "faulty"
	}
	m.reloads.WithLabelValues(result).Inc()
	m.last.WithLabelValues(result).Set(float64(r.At.UnixMilli()) / 1e3)
}

// Describe implements prometheus.Collector. What there is depends on the configuration, so nothing is promised.
func (m *metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	gauge(descBuild, 1, cli.Version(), runtime.Version())
	counter(descLost, float64(m.server.records.queue.Lost()))
	m.homes(gauge, counter)
	m.probes(gauge)
	m.audit(gauge, counter)
	for id, to := range m.server.firstEnds() {
		gauge(descNotAfter, float64(to.Unix()), id[0], id[1])
	}
}

type show func(d *prometheus.Desc, v float64, labels ...string)

func (m *metrics) homes(gauge, counter show) {
	for _, p := range m.server.keys.present() {
		if p.kind != kindFiles {
			gauge(descUp, truth(p.backend != nil), p.name)
		}
		gauge(descHomeKeys, float64(len(p.homes)), p.name)
		switch b := p.backend.(type) {
		case *worker.Pool:
			stats := b.Stats()
			showWorkers(gauge, p.name, stats.Workers)
			counter(descRestarts, float64(stats.Restarts), p.name)
			for _, reason := range worker.Reasons() {
				counter(descKills, float64(stats.Kills[reason]), p.name, reason)
			}
		case nil:
			if refusesPIN(p.err) { // by the first worker, which is gone
				showWorkers(gauge, p.name, []worker.WorkerStats{{State: worker.StateRefused}})
			}
		case interface{ Expires() time.Time }:
			if t := b.Expires(); !t.IsZero() {
				gauge(descLogin, float64(t.Unix()), p.name)
			}
		}
	}
}

// showWorkers counts workers by state.
func showWorkers(gauge show, token string, workers []worker.WorkerStats) {
	states := map[string]int{worker.StateReady: 0, worker.StateStarting: 0, worker.StateWaiting: 0, worker.StateRefused: 0, worker.StateDraining: 0}
	for _, w := range workers {
		states[w.State]++
	}
	for state, n := range states {
		gauge(descWorkers, float64(n), token, state)
	}
}

func (m *metrics) probes(gauge show) {
	results, _, _ := m.server.probes.all()
	for id, r := range results {
		gauge(descProbe, truth(r.Err == nil), id.ski.String(), id.home)
		gauge(descProbeTime, float64(r.At.UnixMilli())/1e3, id.ski.String(), id.home)
		gauge(descProbeTook, r.Took.Seconds(), id.ski.String(), id.home)
	}
}

func (m *metrics) audit(gauge, counter show) {
	if m.server.current.Load().cfg.Audit.mode() == "off" {
		return
	}
	gauge(descAuditUp, truth(m.server.auditor.trouble() == nil))
	s := m.server.auditor.stats()
	if s == nil {
		return
	}
	counter(descRecords, float64(s.Records))
	counter(descBatches, float64(s.Batches))
	counter(descAuditLost, float64(s.Lost))
	gauge(descWaiting, float64(s.Waiting))
	counter(descSync, s.SyncTotal.Seconds())
	last := 0.0
	if !s.LastCheckpoint.IsZero() {
		last = float64(s.LastCheckpoint.Unix())
	}
	gauge(descCheckpoint, last)
	gauge(descUncovered, float64(s.Seq-min(s.Seq, s.Covered)))
	for _, o := range s.Outputs {
		counter(descOutLost, float64(o.Lost), o.Name)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// connectionMetrics counts connections and what is refused before a request is read.
func connectionMetrics(reg prometheus.Registerer) keyless.ServerMetrics {
	conns := prometheus.NewGauge(prometheus.GaugeOpts{Name: "keyhaven_keyserver_connections", Help: "Authenticated connections."})
	inFlight := prometheus.NewGauge(prometheus.GaugeOpts{Name: "keyhaven_keyserver_operations_in_flight", Help: "Operations that are being served."})
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_keyserver_connections_refused_total", Help: "Connections refused, by reason."}, []string{"reason"})
	reg.MustRegister(conns, inFlight, refused)
	return keyless.ServerMetrics{
		Connections: func(d int) { conns.Add(float64(d)) },
		InFlight:    func(d int) { inFlight.Add(float64(d)) },
		Refused:     func(reason string) { refused.WithLabelValues(reason).Inc() },
	}
}
