package keyless

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// A Peer is the authenticated other end of a connection.
type Peer struct {
	ID   string // what Server.Identify returned, by default the URI SAN of the certificate
	Addr netip.AddrPort
}

// A Request is an operation with who asked for it. The slices of Operation are valid until Handle returns.
type Request struct {
	Operation
	Peer Peer
}

// A Handler answers requests. Handle is called from many goroutines at once. ctx ends with the operation's deadline or
// with the connection. The error decides the reply: an *Error in its chain sends that code, any other error sends
// CodeInternal; detail never crosses the wire and is the handler's to log. The payload is copied before the
// goroutine goes on, and must fit a packet (just below 64 KiB). A panic is caught, logged and answered as
// CodeInternal.
type Handler interface {
	Handle(ctx context.Context, req *Request) (payload []byte, err error)
}

// ServerMetrics are hooks for measuring. Any may be nil. They are called from many goroutines and must not block.
type ServerMetrics struct {
	Connections func(delta int)     // authenticated connections
	InFlight    func(delta int)     // operations in the handler
	Refused     func(reason string) // connections refused: "handshake", "identity", "limit", "peer-limit"
	Result      func(r Result)      // one operation, also those that the server itself answers
}

// A Result is one finished operation as a server saw it.
type Result struct {
	Opcode   Opcode
	Func     string    // CustomFunc of the request if it is a function of this project, "other" if not, "" without OpCustom
	Code     ErrorCode // 0 for success
	Duration time.Duration
}

// A Server answers keyless requests on TLS connections. The fields are read when Serve starts and not changed by it.
// Handler and TLS must be set; each other zero value stands for the default named beside it.
type Server struct {
	Handler Handler

	// TLS must require and verify client certificates (by ClientAuth, or by VerifyConnection or VerifyPeerCertificate
	// together with RequireAnyClientCert); Serve refuses to start with less.
	TLS *tls.Config
	// Identify names the peer or refuses it. If nil, the name is the only URI SAN of the leaf.
	Identify func(tls.ConnectionState) (string, error)
	// Refused is told of each connection whose handshake failed or whom Identify refused, with what the handshake came
	// to: certificates in it need not have been verified, nor need the peer have proved that it has their keys. It is
	// called from many goroutines and decides what of this is logged. If nil, failed handshakes are logged for debugging,
	// and those whom Identify refused as warnings.
	Refused func(addr net.Addr, state tls.ConnectionState, err error)

	HandshakeTimeout time.Duration // 5s
	IdleTimeout      time.Duration // 60s without a request; clients ping more often than each 30s
	HeaderTimeout    time.Duration // 5s from a packet's first byte to the end of its header
	BodyTimeout      time.Duration // 10s from the header to the end of the body
	WriteTimeout     time.Duration // 10s for one batch of replies
	OpTimeout        time.Duration // 10s for one operation
	DrainTimeout     time.Duration // 10s for the operations in flight when Serve's context ends

	MaxInFlight     int // 1024 operations of one connection; beyond it the connection is not read
	MaxConns        int // 1024 connections in all; beyond it new ones are closed
	MaxConnsPerPeer int // 64 connections of one peer; beyond it new ones are closed

	Logger  *slog.Logger // nil discards
	Metrics ServerMetrics

	mu    sync.Mutex // guards the rest
	open  int        // accepted connections, authenticated or not
	peers map[string]int
	conns map[*serverConn]struct{}
}

// Serve accepts connections from ln until ctx ends, then stops reading requests, finishes those in flight within
// DrainTimeout, closes everything and returns nil. It returns an error at once if the server lacks a part that security
// rests on, and when ln fails for good. ln is closed in every case, and nothing is left running. Several calls may run
// at once, one for each listener; the limits hold for all together.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	defer ln.Close()
	l, err := s.prepare()
	if err != nil {
		return err
	}
	var conns sync.WaitGroup
	defer conns.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conns.Go(func() {
		<-ctx.Done()
		ln.Close()
	})
	var backoff time.Duration
	for {
		conn, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case err != nil && isTemporary(err):
			backoff = min(max(2*backoff, 5*time.Millisecond), time.Second)
			l.log.Warn("accept failed, trying again", "err", err, "dur", backoff)
			sleep(ctx, backoff)
			continue
		case err != nil:
			return fmt.Errorf("keyless: accept on %s: %w", ln.Addr(), err)
		}
		backoff = 0
		if !s.reserve(l.maxConns) {
			l.refused("limit")
			conn.Close()
			continue
		}
		conns.Go(func() {
			defer s.release()
			l.serve(ctx, conn)
		})
	}
}

// isTemporary reports whether accept may work again later: too many open files, a connection gone before it was taken.
func isTemporary(err error) bool {
	for _, e := range [...]error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// CloseIf closes the connections of the peers for which drop returns true, in the middle of whatever they do: for
// peers that lost their permission. It does not wait for the connections' goroutines; Serve does.
func (s *Server) CloseIf(drop func(Peer) bool) {
	s.mu.Lock()
	var gone []*serverConn
	for c := range s.conns {
		if drop(c.peer) {
			gone = append(gone, c)
		}
	}
	s.mu.Unlock()
	for _, c := range gone {
		c.kill()
	}
}

func (s *Server) reserve(limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open >= limit {
		return false
	}
	s.open++
	return true
}

func (s *Server) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
}

// admit counts an authenticated connection in, unless its peer has as many as it may have.
func (s *Server) admit(c *serverConn, limit int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peers[c.peer.ID] >= limit {
		return false
	}
	if s.conns == nil {
		s.conns, s.peers = map[*serverConn]struct{}{}, map[string]int{}
	}
	s.peers[c.peer.ID]++
	s.conns[c] = struct{}{}
	return true
}

func (s *Server) dismiss(c *serverConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if s.peers[c.peer.ID]--; s.peers[c.peer.ID] == 0 {
		delete(s.peers, c.peer.ID)
	}
}

// A serverLoop is a Server's configuration with the defaults in place, as one call of Serve sees it.
type serverLoop struct {
	server                            *Server
	handler                           Handler
	tls                               *tls.Config
	identify                          func(tls.ConnectionState) (string, error)
	onRefused                         func(net.Addr, tls.ConnectionState, error)
	handshake, idle, header, body     time.Duration
	write, op, drain                  time.Duration
	maxInFlight, maxConns, maxPerPeer int
	log                               *slog.Logger
	metrics                           ServerMetrics
}

func (s *Server) prepare() (*serverLoop, error) {
	if s.Handler == nil {
		return nil, errors.New("keyless: server has no Handler")
	}
	cfg, err := hardenTLS(s.TLS)
	if err != nil {
		return nil, err
	}
	l := &serverLoop{
		server: s, handler: s.Handler, tls: cfg,
		identify:    s.Identify,
		onRefused:   s.Refused,
		handshake:   orDefault(s.HandshakeTimeout, 5*time.Second),
		idle:        orDefault(s.IdleTimeout, time.Minute),
		header:      orDefault(s.HeaderTimeout, 5*time.Second),
		body:        orDefault(s.BodyTimeout, 10*time.Second),
		write:       orDefault(s.WriteTimeout, 10*time.Second),
		op:          orDefault(s.OpTimeout, 10*time.Second),
		drain:       orDefault(s.DrainTimeout, 10*time.Second),
		maxInFlight: orDefault(s.MaxInFlight, 1024),
		maxConns:    orDefault(s.MaxConns, 1024),
		maxPerPeer:  orDefault(s.MaxConnsPerPeer, 64),
		log:         s.Logger,
		metrics:     s.Metrics,
	}
	if l.identify == nil {
		l.identify = onlyURI
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	if l.onRefused == nil {
		l.onRefused = l.logRefused
	}
	return l, nil
}

func orDefault[T int | time.Duration](v, def T) T {
	if v <= 0 {
		return def
	}
	return v
}

// hardenTLS copies cfg and refuses one that would let in a client without a verified certificate. Resumption is off: it
// saves nothing on connections that live long, and would carry an old authentication past a reload.
func hardenTLS(cfg *tls.Config) (*tls.Config, error) {
	if cfg == nil {
		return nil, errors.New("keyless: server has no TLS configuration")
	}
	cfg = cfg.Clone()
	cfg.SessionTicketsDisabled = true
	cfg.DynamicRecordSizingDisabled = true
	if cfg.MinVersion == 0 {
		cfg.MinVersion = tls.VersionTLS13
	}
	if choose := cfg.GetConfigForClient; choose != nil {
		cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(hello)
			if err != nil || chosen == nil {
				return nil, err
			}
			chosen = chosen.Clone()
			chosen.GetConfigForClient = nil
			return hardenTLS(chosen)
		}
	}
	checks := cfg.VerifyConnection != nil || cfg.VerifyPeerCertificate != nil
	switch {
	case cfg.ClientAuth == tls.RequireAndVerifyClientCert && cfg.ClientCAs == nil:
		return nil, errors.New("keyless: server's TLS configuration has no ClientCAs, so the system's would admit clients")
	case cfg.ClientAuth == tls.RequireAndVerifyClientCert:
	case cfg.ClientAuth == tls.RequireAnyClientCert && checks:
	case cfg.GetConfigForClient != nil && cfg.ClientAuth == tls.NoClientCert:
		// The chosen configuration is checked for each connection; without one there is no certificate and serve refuses.
	default:
		return nil, errors.New("keyless: server's TLS configuration does not require and verify client certificates")
	}
	return cfg, nil
}

// onlyURI is the default of Server.Identify.
func onlyURI(cs tls.ConnectionState) (string, error) {
	leaf := cs.PeerCertificates[0]
	if len(leaf.URIs) != 1 {
		return "", fmt.Errorf("keyless: client certificate has %d URI names, want exactly one", len(leaf.URIs))
	}
	return leaf.URIs[0].String(), nil
}
