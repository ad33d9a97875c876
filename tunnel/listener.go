package tunnel

import (
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/quic-go/quic-go"
)

const (
	defaultAddr         = ":7844"
	defaultDrainTimeout = 30 * time.Second
	defaultMaxPending   = 1024
	defaultJoinRate     = 10
	// maxJoins bounds the joins that are worked on at a time; more are refused as busy.
	maxJoins = 16
	// noisePerMinute is how many refusals of one source are logged as warnings; more are logged at debug level.
	noisePerMinute = 10
	// connectionIDLen leaves room for hundreds of thousands of sessions without a collision. It must stay the same over
	// restarts, for stateless resets.
	connectionIDLen = 8
)

// A Listener is an edge's listening socket and its sessions.
type Listener struct {
	cfg  ListenConfig
	log  *slog.Logger
	udp  *net.UDPConn
	tr   *quic.Transport
	ln   *quic.Listener
	join chan struct{} // holds one element for each join under way

	joinRate, noise *rateLimiter

	pending  atomic.Int64   // connections that are not admitted yet
	watchers sync.WaitGroup // see countPending
	served   atomic.Bool

	mu       sync.Mutex // guards the fields below
	stopping bool
	sessions map[*Session]struct{}
}

// Listen opens the socket. Serve must follow, to serve and, in the end, to close it.
func Listen(cfg ListenConfig) (*Listener, error) {
	if cfg.Identity == nil {
		return nil, errors.New("tunnel: listen: ListenConfig needs Identity")
	}
	if cfg.Addr == "" {
		cfg.Addr = defaultAddr
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&cfg.DrainTimeout, defaultDrainTimeout)
	setDefault(&cfg.MaxPending, defaultMaxPending)
	setDefault(&cfg.JoinRate, defaultJoinRate)
	cfg.Limits = cfg.Limits.withDefaults(edgeSessionWindow)

	l := &Listener{
		cfg: cfg, log: cfg.Logger,
		joinRate: newRateLimiter(cfg.JoinRate, time.Minute),
		noise:    newRateLimiter(noisePerMinute, time.Minute),
		join:     make(chan struct{}, maxJoins),
		sessions: make(map[*Session]struct{}),
	}
	addr, err := net.ResolveUDPAddr("udp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("tunnel: listen: %w", err)
	}
	if l.udp, err = net.ListenUDP("udp", addr); err != nil {
		return nil, fmt.Errorf("tunnel: listen: %w", err)
	}
	tlsConf := cfg.Identity.ServerConfig(mtls.ServerOptions{
		ALPN: []string{ALPN}, AnonymousALPN: []string{JoinALPN}, Accept: mtls.AcceptKinds(mtls.KindConnector),
	})
	l.tr = newTransport(l.udp)
	l.tr.ConnectionIDLength = connectionIDLen
	l.tr.ConnContext = l.countPending
	l.tr.VerifySourceAddress = func(net.Addr) bool { return l.pending.Load() > int64(cfg.MaxPending/4) }
	l.tr.StatelessResetKey, err = resetKey(tlsConf)
	if err == nil {
		l.ln, err = l.tr.Listen(tlsConf, edgeQUICConfig(cfg.Limits))
	}
	if err != nil {
		l.udp.Close() //nolint:errcheck // the error that matters is at hand
		return nil, fmt.Errorf("tunnel: listen on %s: %w", cfg.Addr, err)
	}
	reportBuffers(l.udp, l.log)
	return l, nil
}

// resetKey derives the key of stateless resets from the edge's private key, so that an edge which is started again can
// tell connectors at once that their sessions are gone. See RFC 9000, section 10.3.
func resetKey(conf *tls.Config) (*quic.StatelessResetKey, error) {
	var key quic.StatelessResetKey
	cert, err := conf.GetCertificate(&tls.ClientHelloInfo{})
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil { // a key that cannot be read: connectors wait for the idle timeout after a restart
		_, err := rand.Read(key[:])
		return &key, err
	}
	k, err := hkdf.Key(sha256.New, der, nil, "keyhaven-tunnel/1 stateless reset", len(key))
	copy(key[:], k)
	return &key, err
}

// Addr is the address that the listener has.
func (l *Listener) Addr() net.Addr { return l.udp.LocalAddr() }

// Sessions is the number of admitted sessions.
func (l *Listener) Sessions() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.sessions)
}

type pendingKey struct{}

// countPending counts a connection until it is admitted or has ended, and refuses it if there are too many. It also sees
// to it that failed handshakes are logged.
func (l *Listener) countPending(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	if l.pending.Add(1) > int64(l.cfg.MaxPending) {
		l.pending.Add(-1)
		return nil, ErrBusy
	}
	admitted := sync.OnceFunc(func() { l.pending.Add(-1) })
	l.watchers.Add(1)
	context.AfterFunc(ctx, func() {
		defer l.watchers.Done()
		admitted()
		cause := context.Cause(ctx)
		if te, ok := errors.AsType[*quic.TransportError](cause); ok && te.ErrorCode.IsCryptoError() {
			l.warn(info.RemoteAddr, "handshake failed", cause)
		}
	})
	return context.WithValue(ctx, pendingKey{}, admitted), nil
}

// warn logs what anybody can bring about, within limits.
func (l *Listener) warn(remote net.Addr, msg string, err error) {
	level := slog.LevelWarn
	if !l.noise.allow(addrPortOf(remote).Addr(), time.Now()) {
		level = slog.LevelDebug
	}
	l.log.Log(context.Background(), level, msg, "remote", remote.String(), "err", err)
}

// Serve accepts sessions until ctx ends, then lets the open ones drain for DrainTimeout, and closes the socket. When it
// returns, every callback has. It returns nil if it ended because of ctx. It must be called once.
func (l *Listener) Serve(ctx context.Context) error {
	if !l.served.CompareAndSwap(false, true) {
		return errors.New("tunnel: Serve called twice")
	}
	var wg sync.WaitGroup
	var err error
	for {
		var conn *quic.Conn
		if conn, err = l.ln.Accept(ctx); err != nil {
			break
		}
		wg.Go(func() { l.serveConn(ctx, conn) })
	}
	if ctx.Err() != nil {
		err = nil
	}
	l.ln.Close() //nolint:errcheck // never fails; stops new handshakes
	l.drain(ctx)
	wg.Wait()
	l.tr.Close()  //nolint:errcheck // every connection is closed
	l.udp.Close() //nolint:errcheck // nothing is left to lose
	l.watchers.Wait()
	if err != nil {
		return fmt.Errorf("tunnel: serve: %w", err)
	}
	return nil
}

func (l *Listener) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.cfg.DrainTimeout)
	defer cancel()
	l.mu.Lock()
	l.stopping = true
	open := slices.Collect(maps.Keys(l.sessions))
	l.mu.Unlock()
	var wg sync.WaitGroup
	for _, s := range open {
		wg.Go(func() {
			if err := s.Drain(ctx); err != nil {
				s.log.Info("session not drained", "err", err)
			}
		})
	}
	wg.Wait()
}

func (l *Listener) serveConn(ctx context.Context, conn *quic.Conn) {
	car := quicCarrier{conn}
	log := l.log.With("remote", conn.RemoteAddr().String())
	switch car.tlsState().NegotiatedProtocol {
	case ALPN:
		s, err := l.admit(ctx, car, log)
		if err != nil {
			l.warn(conn.RemoteAddr(), "session not admitted", err)
			return
		}
		conn.Context().Value(pendingKey{}).(func())()
		l.serveSession(ctx, s)
	case JoinALPN:
		if err := l.serveJoin(ctx, car); err != nil {
			l.warn(conn.RemoteAddr(), "join refused", err)
		}
	default: // TLS has refused it already
		car.close(CloseProtocol)
	}
}

// admit registers a connection as a session, or refuses and closes it.
func (l *Listener) admit(ctx context.Context, car carrier, log *slog.Logger) (*Session, error) {
	setup, cancel := context.WithTimeout(ctx, l.cfg.Limits.SetupTimeout)
	defer cancel()
	control, err := car.acceptStream(setup)
	if err != nil {
		car.close(CloseProtocol)
		return nil, fmt.Errorf("wait for control stream: %w", err)
	}
	s, err := l.register(ctx, car, control, log)
	if err == nil {
		return s, nil
	}
	refuse(car, control, refusalOf(err), CloseRefused, l.cfg.Limits.SetupTimeout)
	return nil, err
}

// refuse sends a refusal, waits until the peer has taken it and closed, or for a while, and closes.
func refuse(car carrier, st stream, code RefusalCode, reason CloseReason, wait time.Duration) {
	finish(car, st, byteFrame(frameRefused, byte(code)), reason, wait)
}

func finish(car carrier, st stream, last []byte, reason CloseReason, wait time.Duration) {
	st.SetWriteDeadline(time.Now().Add(wait)) //nolint:errcheck // Write would fail too
	if _, err := st.Write(last); err == nil {
		st.closeWrite()
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-car.done():
		case <-timer.C:
		}
	}
	car.close(reason)
}

func (l *Listener) register(ctx context.Context, car carrier, control stream, log *slog.Logger) (*Session, error) {
	control.SetReadDeadline(time.Now().Add(l.cfg.Limits.SetupTimeout)) //nolint:errcheck // Read would fail too
	f, err := readFrame(control, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadRequest, unexpectedEOF(err))
	}
	control.SetReadDeadline(time.Time{}) //nolint:errcheck // Read would fail too
	if f.typ != frameRegister {
		return nil, fmt.Errorf("%w: control frame 0x%02x in place of register", ErrBadRequest, byte(f.typ))
	}
	reg, err := parseRegister(f.payload)
	if err != nil {
		if errors.Is(err, errMalformed) {
			err = fmt.Errorf("%w: %w", ErrBadRequest, err)
		}
		return nil, err
	}
	cs := car.tlsState()
	peer, err := mtls.PeerIdentity(cs)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotAllowed, err)
	}
	if peer.Kind != mtls.KindConnector || l.cfg.Admit == nil {
		return nil, fmt.Errorf("%s: %w", peer, ErrNotAllowed)
	}
	admitCtx, cancel := context.WithTimeout(ctx, l.cfg.Limits.SetupTimeout)
	defer cancel()
	if err := l.cfg.Admit(admitCtx, peer, cs.PeerCertificates[0], reg); err != nil {
		return nil, fmt.Errorf("%s: %w", peer, err)
	}
	s := &Session{
		session: newSession(car, control, l.cfg.Limits, log.With("peer", peer.String(), "conn", reg.Index)),
		peer:    peer, reg: reg, cert: cs.PeerCertificates[0], renew: l.cfg.Renew,
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopping || ctx.Err() != nil {
		return nil, ErrEdgeDraining
	}
	l.sessions[s] = struct{}{}
	return s, nil
}

// serveSession runs an admitted session to its end.
func (l *Listener) serveSession(ctx context.Context, s *Session) {
	defer func() {
		l.mu.Lock()
		delete(l.sessions, s)
		l.mu.Unlock()
	}()
	start := time.Now()
	s.log.Info("session opened", "version", s.reg.Version)
	// The session outlives ctx while it drains.
	s.run(context.WithoutCancel(ctx), l.cfg.Handle)
	s.log.Info("session ended", "err", s.ended(), "dur", time.Since(start))
}
