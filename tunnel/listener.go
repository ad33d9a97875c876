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
	// maxJoinConns bounds the connections without a certificate.
	maxJoinConns = 64
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
	tls  *tls.Config
	udp  *net.UDPConn
	tcp  *net.TCPListener // nil if there is none
	tr   *quic.Transport
	ln   *quic.Listener
	join chan struct{} // holds one element for each join under way

	joinRate, noise *rateLimiter

	pending  atomic.Int64   // connections that are not admitted yet
	joining  atomic.Int64   // connections that came to join
	watchers sync.WaitGroup // see countPending
	served   atomic.Bool

	mu       sync.Mutex // guards the fields below
	stopping bool
	sessions map[*Session]struct{}
	peers    map[*peerServer]struct{}
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
		peers:    make(map[*peerServer]struct{}),
	}
	var err error
	if l.udp, l.tcp, err = listenSockets(cfg); err != nil {
		return nil, fmt.Errorf("tunnel: listen: %w", err)
	}
	l.tls = l.tlsConfig()
	l.tr = newTransport(l.udp)
	l.tr.ConnectionIDLength = connectionIDLen
	l.tr.ConnContext = l.countPending
	l.tr.VerifySourceAddress = func(net.Addr) bool { return l.pending.Load() > int64(cfg.MaxPending/4) }
	l.tr.StatelessResetKey, err = resetKey(l.tls)
	if err == nil {
		conf := edgeQUICConfig(cfg.Limits)
		conf.EnableDatagrams = !cfg.minor0
		l.ln, err = l.tr.Listen(l.tls, conf)
	}
	if err != nil {
		l.closeSockets()
		return nil, fmt.Errorf("tunnel: listen on %s: %w", cfg.Addr, err)
	}
	reportBuffers(l.udp, l.log)
	return l, nil
}

// tlsConfig serves connectors, those that join, and peer edges if they are wanted, each only by its own protocol.
func (l *Listener) tlsConfig() *tls.Config {
	conf := l.cfg.Identity.ServerConfig(mtls.ServerOptions{
		ALPN: []string{ALPN}, AnonymousALPN: []string{JoinALPN}, Accept: mtls.AcceptKinds(mtls.KindConnector),
	})
	peers := l.cfg.Identity.ServerConfig(mtls.ServerOptions{ALPN: []string{PeerALPN}, Accept: mtls.AcceptKinds(mtls.KindEdge)})
	connectors := conf.GetConfigForClient
	conf.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		offers := func(alpn string) bool { return slices.Contains(hello.SupportedProtos, alpn) }
		if offers(PeerALPN) && !offers(ALPN) && l.cfg.Peer != nil {
			return peers, nil
		}
		if offers(JoinALPN) && !offers(ALPN) {
			if p, ok := hello.Context().Value(pendingKey{}).(*pendingConn); !ok || !p.beginJoin() {
				return nil, ErrBusy
			}
		}
		return connectors(hello)
	}
	return conf
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

// A pendingConn is a connection that is counted until it is admitted or has ended.
type pendingConn struct {
	l        *Listener
	admitted func() // ends the counting
	joins    atomic.Bool
}

// newPending counts a connection, or returns nil if there are too many.
func (l *Listener) newPending() *pendingConn {
	if l.pending.Add(1) > int64(l.cfg.MaxPending) {
		l.pending.Add(-1)
		return nil
	}
	return &pendingConn{l: l, admitted: sync.OnceFunc(func() { l.pending.Add(-1) })}
}

// beginJoin counts a connection without a certificate, or reports that there are too many.
func (p *pendingConn) beginJoin() bool {
	if !p.joins.CompareAndSwap(false, true) {
		return true
	}
	if p.l.joining.Add(1) <= maxJoinConns {
		return true
	}
	p.end()
	return false
}

// end is called when the connection has ended.
func (p *pendingConn) end() {
	p.admitted()
	if p.joins.CompareAndSwap(true, false) {
		p.l.joining.Add(-1)
	}
}

// countPending counts a QUIC connection, or refuses it. It also sees to it that failed handshakes are logged.
func (l *Listener) countPending(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	p := l.newPending()
	if p == nil {
		return nil, ErrBusy
	}
	l.watchers.Add(1)
	context.AfterFunc(ctx, func() {
		defer l.watchers.Done()
		p.end()
		cause := context.Cause(ctx)
		if te, ok := errors.AsType[*quic.TransportError](cause); ok && te.ErrorCode.IsCryptoError() {
			l.warn(info.RemoteAddr, "handshake failed", cause)
		}
	})
	return context.WithValue(ctx, pendingKey{}, p), nil
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
	if l.tcp != nil {
		wg.Go(func() { l.serveTCP(ctx, &wg) })
	}
	var err error
	for {
		var conn *quic.Conn
		if conn, err = l.ln.Accept(ctx); err != nil {
			break
		}
		wg.Go(func() {
			l.serveConn(ctx, newQUICCarrier(conn), conn.Context().Value(pendingKey{}).(*pendingConn))
		})
	}
	if ctx.Err() != nil {
		err = nil
	}
	l.ln.Close() //nolint:errcheck // never fails; stops new handshakes
	if l.tcp != nil {
		l.tcp.Close() //nolint:errcheck // nothing is left to lose
	}
	l.drain(ctx)
	wg.Wait()
	l.tr.Close() //nolint:errcheck // every connection is closed
	l.closeSockets()
	l.watchers.Wait()
	if err != nil {
		return fmt.Errorf("tunnel: serve: %w", err)
	}
	return nil
}

func (l *Listener) closeSockets() {
	l.udp.Close() //nolint:errcheck // nothing is left to lose
	if l.tcp != nil {
		l.tcp.Close() //nolint:errcheck // nothing is left to lose
	}
}

func (l *Listener) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.cfg.DrainTimeout)
	defer cancel()
	l.mu.Lock()
	l.stopping = true
	open := make([]*session, 0, len(l.sessions)+len(l.peers))
	for s := range l.sessions {
		open = append(open, s.session)
	}
	for p := range l.peers {
		open = append(open, p.session)
	}
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

// serveConn serves a connection whose handshake is over, to its end.
func (l *Listener) serveConn(ctx context.Context, car carrier, pending *pendingConn) {
	log := l.log.With("remote", car.remoteAddr().String(), "carrier", string(car.kind()))
	switch car.tlsState().NegotiatedProtocol {
	case ALPN:
		s, err := admit(ctx, l, car, func(ctx context.Context, control stream, reg Registration) (*Session, error) {
			return l.register(ctx, car, control, reg, log)
		})
		if err != nil {
			l.warn(car.remoteAddr(), "session not admitted", err)
			return
		}
		pending.admitted()
		l.serveSession(ctx, s)
	case PeerALPN:
		p, err := admit(ctx, l, car, func(ctx context.Context, control stream, reg Registration) (*peerServer, error) {
			return l.registerPeer(ctx, car, control, reg, log)
		})
		if err != nil {
			l.warn(car.remoteAddr(), "peer edge not admitted", err)
			return
		}
		pending.admitted()
		l.servePeer(ctx, p)
	case JoinALPN:
		if err := l.serveJoin(ctx, car); err != nil {
			l.warn(car.remoteAddr(), "join refused", err)
		}
	default: // TLS has refused it already
		car.close(CloseProtocol)
	}
}

// admit registers a connection as a session, or refuses and closes it.
func admit[T any](ctx context.Context, l *Listener, car carrier, register func(context.Context, stream, Registration) (T, error)) (s T, err error) {
	setup, cancel := context.WithTimeout(ctx, l.cfg.Limits.SetupTimeout)
	defer cancel()
	control, err := car.acceptStream(setup)
	if err != nil {
		car.close(CloseProtocol)
		return s, fmt.Errorf("wait for control stream: %w", err)
	}
	reg, err := l.readRegistration(control)
	if err == nil {
		if s, err = register(ctx, control, reg); err == nil {
			return s, nil
		}
	}
	refuse(car, control, refusalOf(err), CloseRefused, l.cfg.Limits.SetupTimeout)
	return s, err
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

func (l *Listener) readRegistration(control stream) (Registration, error) {
	control.SetReadDeadline(time.Now().Add(l.cfg.Limits.SetupTimeout)) //nolint:errcheck // Read would fail too
	f, err := readFrame(control, 0)
	if err != nil {
		return Registration{}, fmt.Errorf("%w: %w", ErrBadRequest, unexpectedEOF(err))
	}
	control.SetReadDeadline(time.Time{}) //nolint:errcheck // Read would fail too
	if f.typ != frameRegister {
		return Registration{}, fmt.Errorf("%w: control frame 0x%02x in place of register", ErrBadRequest, byte(f.typ))
	}
	reg, err := parseRegister(f.payload)
	if errors.Is(err, errMalformed) {
		err = fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	return reg, err
}

// register asks Admit about a connector.
func (l *Listener) register(ctx context.Context, car carrier, control stream, reg Registration, log *slog.Logger) (*Session, error) {
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
	log = log.With("peer", peer.String(), "conn", reg.Index)
	s := &Session{
		opener: opener{session: newSession(car, control, l.cfg.Limits, log, min(reg.Minor, l.minor()), reg.Role)},
		peer:   peer, reg: reg, cert: cs.PeerCertificates[0], renew: l.cfg.Renew, ownMinor: l.minor(),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopping || ctx.Err() != nil {
		return nil, ErrEdgeDraining
	}
	s.packets.drops = l.cfg.Drops
	l.sessions[s] = struct{}{}
	return s, nil
}

// registerPeer asks Peer about a peer edge.
func (l *Listener) registerPeer(ctx context.Context, car carrier, control stream, reg Registration, log *slog.Logger) (*peerServer, error) {
	cs := car.tlsState()
	peer, err := mtls.PeerIdentity(cs)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotAllowed, err)
	}
	if peer.Kind != mtls.KindEdge || l.cfg.Peer == nil {
		return nil, fmt.Errorf("%s: %w", peer, ErrNotAllowed)
	}
	admitCtx, cancel := context.WithTimeout(ctx, l.cfg.Limits.SetupTimeout)
	defer cancel()
	if err := l.cfg.Peer(admitCtx, peer, cs.PeerCertificates[0]); err != nil {
		return nil, fmt.Errorf("%s: %w", peer, err)
	}
	handle := l.cfg.HandlePeer
	if handle == nil {
		handle = func(_ context.Context, in *Incoming) { in.Reject(ResultUnsupported) } //nolint:errcheck // the peer has gone, then
	}
	log = log.With("peer", peer.String(), "conn", reg.Index)
	p := &peerServer{
		server:   server{session: newSession(car, control, l.cfg.Limits, log, min(reg.Minor, l.minor()), reg.Role), peer: peer, handle: handle, fromPeer: true},
		notAfter: cs.PeerCertificates[0].NotAfter, ownMinor: l.minor(),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopping || ctx.Err() != nil {
		return nil, ErrEdgeDraining
	}
	p.packets.drops = l.cfg.Drops
	l.peers[p] = struct{}{}
	return p, nil
}

// minor is the minor version that the listener speaks.
func (l *Listener) minor() int {
	if l.cfg.minor0 {
		return 0
	}
	return protocolMinor
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

// servePeer runs a peer edge's session to its end.
func (l *Listener) servePeer(ctx context.Context, p *peerServer) {
	defer func() {
		l.mu.Lock()
		delete(l.peers, p)
		l.mu.Unlock()
	}()
	start := time.Now()
	p.log.Info("peer edge's session opened")
	p.run(context.WithoutCancel(ctx))
	p.log.Info("peer edge's session ended", "err", p.ended(), "dur", time.Since(start))
}
