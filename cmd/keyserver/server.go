package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/signer"
)

// errDraining is what /readyz says while operations in flight are finished.
var errDraining = errors.New("draining")

// A server is the running program.
type server struct {
	options loadOptions
	logger  *slog.Logger
	keys    *keyring
	service *signer.Service
	keyless *keyless.Server
	ops     *ops.Server
	records *signer.Queue

	current  atomic.Pointer[live]
	draining atomic.Bool
	renewals chan struct{} // holds a value when the identity was replaced
}

// live is a plan with the TLS configuration made of it.
type live struct {
	*plan
	tls *tls.Config
}

func newServer(p *plan, o loadOptions, logger *slog.Logger) *server {
	s := &server{options: o, logger: logger, keys: newKeyring(logger), renewals: make(chan struct{}, 1)}
	metrics := ops.NewRegistry()
	metrics.MustRegister(s.keys, s.certificateExpiry())
	s.records = signer.NewQueue(plainReasons{signer.LogRecorder(logger)}, recordQueue)
	s.service = signer.NewService(signer.ServiceConfig{
		Registry: s.keys.registry, Policy: p.policy, Sealer: p.sealer, Renew: s.renewClient,
		Recorder: signer.Recorders{s.records, signer.NewMetrics(metrics, s.keys.registry)},
	})
	metrics.MustRegister(s.lostRecords())
	s.use(p)
	s.ops = &ops.Server{Addr: p.cfg.Ops.Listen, AllowNonLoopback: p.cfg.Ops.AllowNonLoopback, Ready: s.ready, Registry: metrics, Logger: logger, Listening: func(a net.Addr) {
		logger.Info("serving health and metrics", "addr", a.String())
	}}
	l, t := p.cfg.Limits, p.cfg.Timeouts
	s.keyless = &keyless.Server{
		Handler: s.service, TLS: s.tlsConfig(), Identify: identify, Refused: newRefusals(logger).refused,
		HandshakeTimeout: t.Handshake, IdleTimeout: t.Idle, HeaderTimeout: t.Header, BodyTimeout: t.Body, WriteTimeout: t.Write,
		OpTimeout: t.Operation, DrainTimeout: t.Drain,
		MaxInFlight: l.InFlight, MaxConns: l.Connections, MaxConnsPerPeer: l.ConnectionsPerClient,
		Logger: logger, Metrics: connectionMetrics(metrics),
	}
	return s
}

// use makes a plan the present one for handshakes that begin from now on.
func (s *server) use(p *plan) {
	version := uint16(tls.VersionTLS13)
	if p.cfg.TLS.AllowTLS12 {
		version = tls.VersionTLS12
	}
	l := &live{plan: p}
	l.tls = p.source.ServerConfig(mtls.ServerOptions{
		MinVersion: version,
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
		},
		AcceptCert: func(id mtls.Identity, leaf *x509.Certificate) error { return s.accept(l, id, leaf) },
	})
	s.current.Store(l)
}

// tlsConfig returns a configuration that takes up the present plan in each handshake.
func (s *server) tlsConfig() *tls.Config {
	c := s.current.Load().tls.Clone()
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.current.Load().tls, nil }
	return c
}

// accept decides who may connect: clients that the policy names and that are not revoked.
func (s *server) accept(l *live, id mtls.Identity, leaf *x509.Certificate) error {
	if err := l.revoked.accept(id, leaf); err != nil { // first, as a revoked client's rules are left out
		return err
	}
	if !s.service.Admits(id.String()) {
		return fmt.Errorf("%w: no rule under clients names %s", mtls.ErrRefused, id)
	}
	return nil
}

func identify(cs tls.ConnectionState) (string, error) {
	id, err := mtls.PeerIdentity(cs)
	return id.String(), err
}

// recordQueue is how many operations may wait to be logged: some seconds' worth at full load, and few megabytes.
const recordQueue = 16 << 10

// logTimeout bounds the wait for the log at the end.
const logTimeout = 3 * time.Second

func (s *server) lostRecords() prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{
		Namespace: "keyhaven", Subsystem: "keyserver", Name: "records_lost_total",
		Help: "Operations that are not in the log, because it was not read fast enough.",
	}, func() float64 { return float64(s.records.Lost()) })
}

// renewClient issues a certificate for a connected client's own identity.
func (s *server) renewClient(_ context.Context, peer string, csrDER []byte) ([][]byte, error) {
	l := s.current.Load()
	if l.authority == nil {
		return nil, errors.New("no ca_dir is configured, so nothing can be issued here")
	}
	id, err := mtls.ParseIdentity(peer)
	if err != nil {
		return nil, err
	}
	if id.Kind != mtls.KindEdge {
		return nil, fmt.Errorf("%s is no edge; only edges renew here", peer)
	}
	if l.revoked.revokedID(peer) {
		return nil, fmt.Errorf("%s is revoked", peer)
	}
	chain, err := l.authority.IssueCSR(csrDER, id, 0)
	if err != nil {
		return nil, err
	}
	return chain, recordClient(l.cfg.CADir, id, chain)
}

func (s *server) ready(ctx context.Context) error {
	if s.draining.Load() {
		return errDraining
	}
	return errors.Join(s.keys.check(ctx), s.current.Load().source.Check())
}

// run serves until ctx ends and what is in flight then is done.
func (s *server) run(ctx context.Context) (err error) {
	hangups := cli.Hangups(ctx) // from the start, as an unexpected SIGHUP ends a process
	plan := s.current.Load().plan
	err = bounded(ctx, hangTimeout, func() error { return s.keys.start(ctx, plan) })
	switch {
	case errors.Is(err, errHangs):
		return err
	case err != nil:
		return errors.Join(err, s.closeKeys())
	}
	defer func() {
		if !errors.Is(err, errHangs) {
			err = errors.Join(err, s.closeKeys())
		}
	}()
	logging, endLogging := context.WithCancel(context.WithoutCancel(ctx))
	logged := make(chan struct{})
	go func() {
		defer close(logged)
		s.records.Run(logging)
	}()
	defer func() { // before the tokens close, as that may take its time
		endLogging()
		select {
		case <-logged:
		case <-time.After(logTimeout):
			err = errors.Join(err, errors.New("the last operations are not in the log: nobody reads it"))
		}
	}()
	s.warnAboutPolicy()
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.current.Load().cfg.Listen)
	if err != nil {
		return cli.ListenError(fmt.Errorf("listen: %w", err))
	}
	s.logger.Info("serving", "addr", ln.Addr().String(), "identity", s.current.Load().source.Identity().String(), "keys", len(s.keys.registry.Entries()))

	// The side services outlive the drain, so that /readyz can tell of it.
	side, endSide := context.WithCancel(context.WithoutCancel(ctx))
	defer endSide()
	stop := context.AfterFunc(ctx, func() {
		s.draining.Store(true)
		s.logger.Info("draining: no new connections; operations in flight are finished")
	})
	defer stop()
	g, main := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer endSide()
		return s.keyless.Serve(main, ln)
	})
	g.Go(func() error { return cli.ListenError(s.ops.Run(side)) })
	g.Go(func() error { return s.keys.run(main) })
	g.Go(func() error { return s.keepRenewed(main) })
	g.Go(func() error { return s.reloads(main, hangups) })
	err = bounded(main, s.current.Load().cfg.Timeouts.Drain+hangTimeout, g.Wait)
	s.logger.Info("stopped")
	return err
}

// bounded runs f, but waits for it no longer than limit once ctx has ended: a call into a module that hangs cannot be ended but
// with the process.
func bounded(ctx context.Context, limit time.Duration, f func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- f() }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(limit):
		return fmt.Errorf("operations did not end within %v: %w; the process ends, and they with it", limit, errHangs)
	}
}

var errHangs = errors.New("a token's module hangs")

// Bounds of the wait for modules at the end.
const (
	hangTimeout  = 5 * time.Second // after the drain
	closeTimeout = 10 * time.Second
)

// closeKeys closes the tokens. A module that hangs must not keep the process from ending, which ends the module too.
func (s *server) closeKeys() error {
	closed := make(chan error, 1)
	go func() { closed <- s.keys.close() }()
	select {
	case err := <-closed:
		return err
	case <-time.After(closeTimeout):
		return fmt.Errorf("a token did not close within %v: %w", closeTimeout, errHangs)
	}
}

// keepRenewed renews the server's own certificate where the authority is at hand.
func (s *server) keepRenewed(ctx context.Context) error {
	for ctx.Err() == nil {
		l := s.current.Load()
		round, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if l.authority == nil {
				return
			}
			_ = l.source.KeepRenewed(round, func(_ context.Context, csrDER []byte) ([][]byte, error) {
				return l.authority.IssueCSR(csrDER, l.source.Identity(), 0)
			}) // ends with its context alone
		}()
		select {
		case <-ctx.Done():
		case <-s.renewals:
		}
		cancel()
		<-done
	}
	return nil
}

func (s *server) reloads(ctx context.Context, hangups <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			if err := s.reload(ctx); err != nil {
				s.logger.Error("new configuration refused; the old one goes on", "err", err)
			}
		}
	}
}

// warnAboutPolicy tells of rules that name a key in doubt: none, or several under one label.
func (s *server) warnAboutPolicy() {
	for i, rule := range s.current.Load().cfg.Clients {
		for _, name := range rule.Keys {
			if name == "*" {
				continue
			}
			switch n := len(s.keys.registry.ByName(name)); {
			case n == 0:
				s.logger.Warn("a rule names a key that is not here now", "rule", i, "peer", rule.ID, "key", name)
			case n > 1:
				s.logger.Warn("a rule's label stands for several keys; name them by SKI to tell them apart", "rule", i, "peer", rule.ID, "key", name, "count", n)
			}
		}
	}
}

func (s *server) certificateExpiry() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "keyhaven", Subsystem: "keyserver", Name: "certificate_not_after_seconds",
		Help: "When the server's own certificate runs out, in seconds since 1970.",
	}, func() float64 { return float64(s.current.Load().source.NotAfter().Unix()) })
}

// connectionMetrics counts connections and what is refused before a request is read.
func connectionMetrics(reg prometheus.Registerer) keyless.ServerMetrics {
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "keyhaven", Subsystem: "keyserver", Name: name, Help: help}
	}
	conns := prometheus.NewGauge(prometheus.GaugeOpts(opts("connections", "Authenticated connections.")))
	inFlight := prometheus.NewGauge(prometheus.GaugeOpts(opts("operations_in_flight", "Operations that are being served.")))
	refused := prometheus.NewCounterVec(prometheus.CounterOpts(opts("connections_refused_total", "Connections refused, by reason.")), []string{"reason"})
	reg.MustRegister(conns, inFlight, refused)
	return keyless.ServerMetrics{
		Connections: func(d int) { conns.Add(float64(d)) },
		InFlight:    func(d int) { inFlight.Add(float64(d)) },
		Refused:     func(reason string) { refused.WithLabelValues(reason).Inc() },
	}
}
