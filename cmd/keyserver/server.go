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
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/notify"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/internal/takeover"
	"github.com/keyhaven/keyhaven/internal/tracing"
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
	started time.Time
	keys    *keyring
	probes  *prober
	service *signer.Service
	auditor *auditor
	spans   *tracing.Provider // nil: no tracing
	keyless *keyless.Server
	ops     *ops.Server
	control *control // nil: none
	records *operationLog
	metrics *metrics
	notify  notify.Notifier
	self    *takeover.Process
	next    *takeover.Successor // takes over at the end; nil: none

	stopped   context.Context         // of run; for what the control socket starts
	reloading sync.Mutex              // held during a reload
	newest    atomic.Pointer[request] // the last reload that was asked for
	current   atomic.Pointer[live]
	last      atomic.Pointer[reloadReport] // of the last reload; nil before the first
	endings   atomic.Pointer[[]expiry]     // as of the last look
	draining  atomic.Bool
	renewals  chan struct{} // holds a value when the identity was replaced

	expiryNews chan struct{} // holds a value when the configuration was replaced
}

// live is a plan with the TLS configuration made of it.
type live struct {
	*plan
	tls *tls.Config
}

// newServer wires a server. Nothing is opened yet but the exporter of spans, which connects later.
func newServer(ctx context.Context, p *plan, o loadOptions, logger *slog.Logger) (*server, error) {
	s := &server{options: o, logger: logger, started: time.Now(), keys: newKeyring(logger), notify: notify.Notifier{Logger: logger}, self: &takeover.Process{},
		renewals: make(chan struct{}, 1), expiryNews: make(chan struct{}, 1)}
	s.probes = newProber(s.keys.registry, p.cfg.Probe.Interval, logger)
	s.auditor = newAuditor(s.keys.registry, func() int { return s.service.InProgress() }, logger)
	registry := ops.NewRegistry()
	s.records = newOperationLog(logger, s.auditor.keeps)
	s.service = signer.NewService(signer.ServiceConfig{
		Registry: s.keys.registry, Policy: p.policy, Sealer: p.sealer, Renew: s.renewClient, Auditor: s.auditor,
		Recorder: signer.Recorders{s.records, signer.NewMetrics(registry, s.keys.registry)},
	})
	s.metrics = newMetrics(registry, s)
	s.use(p)
	s.ops = &ops.Server{Addr: p.cfg.Ops.Listen, AllowNonLoopback: p.cfg.Ops.AllowNonLoopback, Ready: s.ready, Degraded: s.degraded, Registry: registry, Logger: logger,
		Listen: func(network, addr string) (net.Listener, error) { return s.self.Listen(network, addr) }}
	handler := keyless.Handler(s.service)
	var err error
	if s.spans, err = tracing.Open(ctx, p.cfg.Tracing, "keyhaven-keyserver", p.source.Identity().String(), logger); err != nil {
		return nil, err
	}
	if t := s.spans.Tracer("cmd/keyserver"); t != nil {
		handler = traced{handler, t}
	}
	l, t := p.cfg.Limits, p.cfg.Timeouts
	s.keyless = &keyless.Server{
		Handler: handler, TLS: s.tlsConfig(), Identify: identify, Refused: newRefusals(logger).refused,
		HandshakeTimeout: t.Handshake, IdleTimeout: t.Idle, HeaderTimeout: t.Header, BodyTimeout: t.Body, WriteTimeout: t.Write,
		OpTimeout: t.Operation, DrainTimeout: t.Drain,
		MaxInFlight: l.InFlight, MaxConns: l.Connections, MaxConnsPerPeer: l.ConnectionsPerClient,
		Logger: logger, Metrics: connectionMetrics(registry),
	}
	return s, nil
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

// logTimeout bounds the wait for the log at the end.
const logTimeout = 3 * time.Second

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

// ready returns why the server cannot do all its work.
func (s *server) ready(ctx context.Context) error {
	if s.draining.Load() {
		return errDraining
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	v := s.probes.verdict(ctx)
	errs := append(v.failing, s.unserved(v)...)
	if err := s.auditor.Ready(); err != nil {
		errs = append(errs, fmt.Errorf("audit: %w", err))
	}
	return errors.Join(append(errs, s.current.Load().source.Check())...)
}

// degraded returns what does not work without keeping the server from its work.
func (s *server) degraded() (lines []string) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // what there is, without waiting
	for _, err := range append(s.probes.verdict(ctx).degraded, s.keys.faults()...) {
		lines = append(lines, err.Error())
	}
	if err := s.auditor.trouble(); err != nil {
		lines = append(lines, "audit: "+err.Error())
	}
	if stats := s.auditor.stats(); stats != nil && stats.CheckpointErr != "" {
		lines = append(lines, "audit: no checkpoint: "+stats.CheckpointErr)
	}
	return lines
}

const (
	// readyTimeout bounds the wait for first probes, within the deadline of the operations server.
	readyTimeout = 3 * time.Second
	// startTimeout is how long the start waits for places; those that take longer come later.
	startTimeout = 15 * time.Second
)

// run serves until ctx ends and what is in flight then is done.
func (s *server) run(ctx context.Context) (err error) {
	hangups := cli.Hangups(ctx) // from the start, as an unexpected SIGHUP ends a process
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	s.stopped = ctx
	l := s.current.Load()
	// Before a PIN is tried: where a server runs already, and does not hand over, this one ends here. Commands that come wait until
	// it serves.
	var claim claim
	defer claim.release()
	if !s.self.Succeeds() {
		if err := claim.take(l.plan, s.options); err != nil {
			return err
		}
	}
	if s.control, err = s.listenControl(l.cfg.Control); err != nil {
		return err
	}
	defer s.control.close()
	starting, cancel := context.WithTimeout(ctx, startTimeout)
	s.keys.start(starting, l.places)
	cancel()
	defer func() {
		s.keys.registry.Wait()
		err = errors.Join(err, s.keys.close())
	}()
	if s.self.Succeeds() {
		if err := s.succeed(ctx, &claim); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, s.handOver(&claim)) }() // when the audit log and the budgets are closed
	if err := s.auditor.use(l.plan); err != nil {
		s.logger.Error("the audit is out of order", "config", l.where("audit"), "err", err)
	}
	defer func() { err = errors.Join(err, s.auditor.close()) }() // before the keys, one of which may sign the last checkpoint
	defer s.log(&err)()
	s.warn()
	ln, err := s.self.Listen("tcp", l.cfg.Listen)
	if err != nil {
		return cli.ListenError(fmt.Errorf("listen: %w", err))
	}
	s.logger.Info("serving", "addr", ln.Addr().String(), "identity", l.source.Identity().String(), "keys", len(s.keys.registry.Entries()))
	err = errors.Join(s.serve(ctx, stop, ln, hangups), s.spans.Close(ctx))
	s.logger.Info("stopped")
	return err
}

// log runs the log of operations until what it returns is called.
func (s *server) log(err *error) (end func()) {
	logging, endLogging := context.WithCancel(context.Background())
	logged := make(chan struct{})
	go func() {
		defer close(logged)
		s.records.queue.Run(logging)
	}()
	return func() {
		endLogging()
		select {
		case <-logged:
		case <-time.After(logTimeout):
			*err = errors.Join(*err, errors.New("the last operations are not in the log: nobody reads it"))
		}
	}
}

// serve runs all loops until ctx ends, or end is called because another process takes over, and what is in flight then is done.
func (s *server) serve(ctx context.Context, end context.CancelCauseFunc, ln net.Listener, hangups <-chan os.Signal) error {
	// The side services outlive the drain, so that /readyz can tell of it.
	side, endSide := context.WithCancel(context.WithoutCancel(ctx))
	defer endSide()
	drained := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(drained)
		s.draining.Store(true)
		if !errors.Is(context.Cause(ctx), errReplaced) { // which does not stop the unit
			s.notify.Stopping("finishing operations in flight")
		}
		s.logger.Info("draining: no new connections; operations in flight are finished")
	})
	defer func() {
		if !stop() {
			<-drained
		}
	}()
	g, main := errgroup.WithContext(ctx)
	bound := make(chan struct{}) // closed when health and metrics are served
	s.ops.Listening = func(a net.Addr) {
		s.logger.Info("serving health and metrics", "addr", a.String())
		close(bound)
	}
	if s.ops.Addr == "" {
		close(bound)
	}
	g.Go(func() error {
		defer endSide()
		return s.keyless.Serve(main, ln)
	})
	g.Go(func() error { return cli.ListenError(s.ops.Run(side)) })
	g.Go(func() error { return s.control.serve(side) })
	g.Go(func() error { return s.keys.run(main) })
	g.Go(func() error { return s.probes.run(main) })
	g.Go(func() error { return s.keepRenewed(main) })
	g.Go(func() error { return s.watchExpiry(main) })
	g.Go(func() error { return s.keepQuotas(side) })
	g.Go(func() error { return s.reloads(main, hangups) })
	g.Go(func() error {
		if s.replaced(main) {
			end(errReplaced)
		}
		return nil
	})
	g.Go(func() error {
		select {
		case <-bound:
			s.self.Discard() // all is bound
			s.notify.Ready(s.summary())
		case <-main.Done():
			return nil
		}
		return s.notify.Watchdog(side, s.alive)
	})
	return g.Wait()
}

// summary is a line about the server for the service manager.
func (s *server) summary() string {
	open, places := 0, s.keys.present()
	for _, p := range places {
		if p.backend != nil {
			open++
		}
	}
	return fmt.Sprintf("serving %d keys from %d of %d homes", len(s.keys.registry.Entries()), open, len(places))
}

// alive returns an error if a part of the server does not go on: a lock that is not given back, or a loop that stands still.
func (s *server) alive(ctx context.Context) error {
	answered := make(chan struct{})
	go func() { // left behind if a lock is not given back; the process is to be ended then
		defer close(answered)
		s.keys.present()
		s.probes.all()
		s.service.Admits("")
	}()
	select {
	case <-answered:
	case <-ctx.Done():
		return errors.New("a lock is not given back")
	}
	if s.draining.Load() {
		return nil
	}
	for name, beat := range map[string]*atomic.Int64{"the loop that opens homes": &s.keys.beat, "the loop that probes keys": &s.probes.beat} {
		if at := time.Unix(0, beat.Load()); time.Since(at) > beatTimeout {
			return fmt.Errorf("%s stands still since %v", name, at.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// beatTimeout is how long a loop that looks around several times a second may stand still.
const beatTimeout = 10 * time.Second

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

// reloads answers SIGHUP until ctx ends.
func (s *server) reloads(ctx context.Context, hangups <-chan os.Signal) error {
	var reload sync.WaitGroup // one at a time
	defer reload.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			_, cancel := s.overtake(ctx)
			reload.Wait()
			cancel(nil)
			reload.Go(func() { s.reload(ctx) })
		}
	}
}

// keepQuotas saves what clients have used of their daily budgets, until ctx ends.
func (s *server) keepQuotas(ctx context.Context) error {
	path := s.current.Load().cfg.beside(quotaFile)
	if path == "" || s.options.quotas == nil {
		return nil
	}
	return s.options.quotas.Run(ctx, path, 0, s.logger)
}

// warn logs, and returns, what of the configuration matches nothing at present, or too much.
func (s *server) warn() (all []error) {
	p := s.current.Load().plan
	for _, err := range p.policy.Warnings(s.keys.registry) {
		err = p.ruleError(err)
		s.logger.Warn("a rule matches nothing, or is in doubt", "err", err)
		all = append(all, err)
	}
	if a := p.cfg.Audit; a.mode() != "off" && a.Key != "" {
		if n := len(s.keys.registry.ByName(a.Key)); n != 1 {
			err := p.file.Errorf("audit.key", "%d keys have the name %q now, so that no checkpoint is signed; name one key, by its SKI if labels are not enough, and see that its token is there", n, a.Key)
			s.logger.Warn("checkpoints of the audit log cannot be signed", "err", err)
			all = append(all, err)
		}
	}
	return all
}
