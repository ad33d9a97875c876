package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/sync/errgroup"

	"github.com/keyhaven/keyhaven/edge/proxy"
)

const (
	quicHandshakeIdle = 5 * time.Second
	quicUnverified    = 200 // new QUIC connections a second without proof of address; beyond it visitors must prove theirs
	redirectTimeout   = 10 * time.Second
	redirectHeader    = 8 << 10
	handshakeGrace    = 3 * time.Second        // for handshakes in progress when the server stops; a signature takes less
	firstRequestGrace = time.Second            // for the first requests of new connections then; some never send any
	lingerHTTP3       = 500 * time.Millisecond // for the last bytes to idle QUIC connections at the end
)

var errTooMany = errors.New("too many connections")

// Run serves until ctx ends, then stops accepting, lets requests in flight finish within the drain timeout, and returns
// with nothing left running. It returns an error if a listener fails. It may be called once.
func (s *Server) Run(ctx context.Context) error {
	s.reload.Lock()
	if s.started || s.closed {
		s.reload.Unlock()
		return errors.New("edge: the server was run or closed before")
	}
	s.started = true
	s.reload.Unlock()

	base, abort := context.WithCancel(context.Background()) // of every request; ends what has not drained
	defer abort()
	g, failed := errgroup.WithContext(ctx)
	g.Go(func() error { return s.tickets.Run(failed) })
	g.Go(func() error { return s.forward.Run(failed, s.cfg.Limits.DrainTimeout) })
	s.retired.Go(func() { _ = s.balancer.Run(s.ctx) }) // until everything has drained
	if s.deps.KeyIdentity != nil {
		g.Go(func() error {
			_ = s.deps.KeyIdentity.KeepRenewed(failed, s.renewShared) // it logs its failures, and ends with the context
			return nil
		})
	}
	var drains []func(context.Context)
	for _, ln := range s.listeners.tls {
		drains = append(drains, s.serveTLS(g, base, ln))
	}
	for _, conn := range s.listeners.udp {
		drain, err := s.serveQUIC(g, conn)
		if err != nil {
			g.Go(func() error { return err })
			break
		}
		drains = append(drains, drain)
	}
	for _, ln := range s.listeners.redirect {
		drains = append(drains, s.serveRedirect(g, ln))
	}
	for _, a := range s.Addrs() {
		s.log.Info("serving visitors", "addr", a.String(), "http3", len(s.listeners.udp) > 0)
	}
	<-failed.Done()
	s.drain(drains, abort)
	err := g.Wait()
	s.reload.Lock()
	defer s.reload.Unlock()
	return errors.Join(err, s.closeLocked())
}

// drain stops the listeners and waits for requests in flight, WebSockets included, up to the drain timeout.
func (s *Server) drain(drains []func(context.Context), abort context.CancelFunc) {
	s.stopping.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Limits.DrainTimeout)
	defer cancel()
	var g errgroup.Group
	for _, d := range drains {
		g.Go(func() error { d(ctx); return nil })
	}
	_ = g.Wait()
	if err := s.requests.wait(ctx); err != nil {
		s.log.Warn("requests cut at the end of the drain timeout")
	}
	abort()
	_ = s.requests.wait(context.Background())
}

// handler counts requests and hands them to the proxy of the moment.
func (s *Server) handler(w http.ResponseWriter, r *http.Request) {
	now := s.now.Load()
	s.requests.begin()
	now.requests.begin()
	if c, ok := r.Context().Value(freshKey{}).(*countedConn); ok {
		c.known()
	}
	if s.stopping.Load() && r.ProtoMajor == 1 && r.Header.Get("Upgrade") == "" {
		w.Header().Set("Connection", "close")
	}
	defer s.requests.end()
	defer now.requests.end()
	now.proxy.ServeHTTP(w, r)
}

// serveTLS serves HTTP/1.1 and HTTP/2 on one listener and returns what drains it.
func (s *Server) serveTLS(g *errgroup.Group, base context.Context, ln net.Listener) func(context.Context) {
	lim := s.cfg.Limits
	tl := &tlsListener{
		Listener: ln,
		config: &tls.Config{
			MinVersion: tls.VersionTLS12,
			GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
				return s.configFor(hello, func(n *snapshot) *visitorTLS { return n.tcp })
			},
		},
		timeout: lim.HandshakeTimeout,
		trust:   s.trust,
		conns:   make(chan struct{}, lim.Connections),
		census:  newCensus(lim.Connections, lim.ConnectionsPerAddress),
		log:     s.log,
		opened:  func(delta int) { s.metrics.connections.Add(float64(delta)) },
		result:  s.shaken,
		ready:   make(chan net.Conn),
		done:    make(chan struct{}),
	}
	srv := &http.Server{
		Handler:           http.HandlerFunc(s.handler),
		ReadHeaderTimeout: lim.HeaderTimeout,
		IdleTimeout:       lim.IdleTimeout,
		MaxHeaderBytes:    lim.HeaderBytes,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: lim.Streams, WriteByteTimeout: lim.BodyIdleTimeout},
		ErrorLog:          s.serverLog(),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext:       visitorContext,
	}
	actx, stop := context.WithCancel(base) // visitors are let in until the drain begins
	hctx, cut := context.WithCancel(base)
	g.Go(func() error { defer cut(); return tl.run(actx, hctx) })
	g.Go(func() error { return ignoreServerClosed(srv.Serve(tl)) })
	return func(ctx context.Context) {
		stop()
		tl.stop()
		// Who is being let in still is, and has its first request served: Shutdown would cut connections that have had none.
		grace, cancel := context.WithTimeout(ctx, handshakeGrace)
		context.AfterFunc(grace, cut)
		<-tl.done
		cancel()
		first, cancel := context.WithTimeout(ctx, firstRequestGrace)
		_ = tl.fresh.wait(first)
		cancel()
		if srv.Shutdown(ctx) != nil {
			_ = srv.Close()
		}
	}
}

// visitorContext makes the requests of a TCP connection known as those of one visitor.
func visitorContext(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		if conn, ok := t.NetConn().(*countedConn); ok {
			return proxy.WithVisitor(context.WithValue(ctx, freshKey{}, conn), &conn.visitor)
		}
	}
	return ctx
}

// shaken records how a handshake over TCP ended.
func (s *Server) shaken(h *handshake, cs tls.ConnectionState, err error) {
	switch {
	case err == nil:
		s.metrics.handshake(h.zoneName(), "tcp", resultOK, cs.DidResume)
	case h.count():
		s.metrics.handshake(h.zoneName(), "tcp", resultFailed, false)
		s.log.Debug("handshake failed", "zone", h.zoneName(), "err", err)
	}
}

// serveQUIC serves HTTP/3 on one socket and returns what drains it.
func (s *Server) serveQUIC(g *errgroup.Group, conn net.PacketConn) (func(context.Context), error) {
	lim := s.cfg.Limits
	unverified := rate{limit: quicUnverified}
	census := newCensus(lim.Connections, lim.ConnectionsPerAddress)
	tr := &quic.Transport{
		Conn: conn,
		ConnContext: func(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
			from := addrOf(info.RemoteAddr)
			if !census.enter(from) {
				return nil, errTooMany
			}
			ctx, h := withHandshake(ctx)
			context.AfterFunc(ctx, func() {
				census.leave(from)
				if h.count() {
					s.metrics.handshake(h.zoneName(), "quic", resultFailed, false)
				}
			})
			return ctx, nil
		},
		// A forged source address must neither cost the key server signatures without bound, nor use up the connections of
		// the visitor whose address it is.
		VerifySourceAddress: func(a net.Addr) bool { return census.nearlyFull(addrOf(a)) || !unverified.allow(time.Now()) },
	}
	// Not ListenEarly: a connection is served when its handshake is complete, never before the visitor has proved to be
	// the one who began it.
	ln, err := tr.Listen(http3.ConfigureTLSConfig(&tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return s.configFor(hello, func(n *snapshot) *visitorTLS { return n.quic })
		},
	}), &quic.Config{
		HandshakeIdleTimeout: quicHandshakeIdle,
		MaxIdleTimeout:       lim.IdleTimeout,
		MaxIncomingStreams:   int64(lim.Streams),
		Allow0RTT:            false,
	})
	if err != nil {
		return nil, fmt.Errorf("edge: serve HTTP/3: %w", err)
	}
	var requests tracker
	srv := &http3.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests.begin()
			defer requests.end()
			s.handler(w, r)
		}),
		MaxHeaderBytes: lim.HeaderBytes,
		IdleTimeout:    lim.IdleTimeout,
		Logger:         s.log,
		ConnContext: func(ctx context.Context, c *quic.Conn) context.Context {
			h := handshakeOf(ctx)
			h.count()
			s.metrics.handshake(h.zoneName(), "quic", resultOK, c.ConnectionState().TLS.DidResume)
			visitor := new(proxy.Visitor)
			context.AfterFunc(c.Context(), visitor.Close)
			// httputil cuts a broken response only under a server that it knows.
			return proxy.WithVisitor(context.WithValue(ctx, http.ServerContextKey, &http.Server{}), visitor)
		},
	}
	g.Go(func() error { return ignoreServerClosed(srv.ServeListener(ln)) })
	return func(ctx context.Context) {
		// Visitors close their connections when they see GOAWAY; those that do not are closed once nothing is in flight.
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		g.Go(func() error {
			if requests.wait(ctx) == nil {
				sleep(ctx, lingerHTTP3)
				cancel()
			}
			return nil
		})
		_ = srv.Shutdown(ctx)
		_ = ln.Close()
		_ = tr.Close()
	}, nil
}

// serveRedirect answers plain HTTP on one listener and returns what drains it.
func (s *Server) serveRedirect(g *errgroup.Group, ln net.Listener) func(context.Context) {
	srv := &http.Server{
		Handler:        http.HandlerFunc(s.redirect),
		ReadTimeout:    redirectTimeout,
		WriteTimeout:   redirectTimeout,
		MaxHeaderBytes: redirectHeader,
		ErrorLog:       s.serverLog(),
	}
	lim := s.cfg.Limits
	few := &limitedListener{ln, newCensus(lim.Connections, lim.ConnectionsPerAddress), s.trust}
	g.Go(func() error { return ignoreServerClosed(srv.Serve(few)) })
	return func(ctx context.Context) {
		if srv.Shutdown(ctx) != nil {
			_ = srv.Close()
		}
	}
}

// renewShared renews the identity of Deps through the groups that use it.
func (s *Server) renewShared(ctx context.Context, csrDER []byte) ([][]byte, error) {
	err := errors.New("no key server group uses the edge's client certificate")
	for _, g := range s.now.Load().groups {
		if g.own {
			continue
		}
		var chain [][]byte
		if chain, err = g.renew(ctx, csrDER); err == nil {
			return chain, nil
		}
	}
	return nil, err
}

// serverLog takes the lines of net/http. A panic is ours to mend; all others are of visitors' making.
func (s *Server) serverLog() *log.Logger { return log.New(lineLog{s.log}, "", 0) }

type lineLog struct{ log *slog.Logger }

// Write implements [io.Writer] for one line.
func (l lineLog) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	if strings.Contains(text, "panic serving") {
		l.log.Error("panic while serving a visitor", "err", text)
	} else {
		l.log.Debug("http server", "err", text)
	}
	return len(line), nil
}

func ignoreServerClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
