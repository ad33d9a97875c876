package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/edge/proxy"
	"github.com/keyhaven/keyhaven/edge/proxyproto"
	"github.com/keyhaven/keyhaven/internal/household"
)

// listeners holds the sockets of a server.
type listeners struct {
	tls      []net.Listener
	udp      []net.PacketConn // one per entry of tls, or none at all
	redirect []net.Listener
}

// bindTries is how often a port chosen by the system is tried for TCP and UDP together.
const bindTries = 8

// listen binds every address of the configuration, or none.
func listen(cfg Listen, bind func(network, addr string) (net.Listener, error)) (*listeners, error) {
	if bind == nil {
		bind = net.Listen
	}
	l := &listeners{}
	for _, addr := range cfg.TLS {
		if err := l.bindTLS(addr, cfg.HTTP3, bind); err != nil {
			return nil, errors.Join(err, l.close())
		}
	}
	for _, addr := range cfg.Redirect {
		ln, err := bind("tcp", addr)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("listen for plain HTTP: %w", err), l.close())
		}
		l.redirect = append(l.redirect, ln)
	}
	return l, nil
}

func (l *listeners) bindTLS(addr string, http3 bool, bind func(network, addr string) (net.Listener, error)) error {
	for try := 1; ; try++ {
		tcp, err := bind("tcp", addr)
		if err != nil {
			return fmt.Errorf("listen for TLS: %w", err)
		}
		if !http3 {
			l.tls = append(l.tls, tcp)
			return nil
		}
		// With port 0 the UDP port is the one that TCP was given, which may be taken.
		udp, err := net.ListenPacket("udp", bindAddr(addr, tcp.Addr()))
		if err == nil {
			l.tls, l.udp = append(l.tls, tcp), append(l.udp, udp)
			return nil
		}
		_ = tcp.Close()
		if _, port, _ := net.SplitHostPort(addr); port != "0" || try == bindTries {
			return fmt.Errorf("listen for HTTP/3: %w", err)
		}
	}
}

// bindAddr is addr with the port of bound.
func bindAddr(addr string, bound net.Addr) string {
	host, _, _ := net.SplitHostPort(addr)
	_, port, _ := net.SplitHostPort(bound.String())
	return net.JoinHostPort(host, port)
}

func (l *listeners) close() error {
	var errs []error
	for _, ln := range l.tls {
		errs = append(errs, ignoreClosed(ln.Close()))
	}
	for _, c := range l.udp {
		errs = append(errs, ignoreClosed(c.Close()))
	}
	for _, ln := range l.redirect {
		errs = append(errs, ignoreClosed(ln.Close()))
	}
	return errors.Join(errs...)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (l *listeners) tlsAddrs() []net.Addr      { return addrsOf(l.tls) }
func (l *listeners) redirectAddrs() []net.Addr { return addrsOf(l.redirect) }

func addrsOf(lns []net.Listener) []net.Addr {
	addrs := make([]net.Addr, len(lns))
	for i, ln := range lns {
		addrs[i] = ln.Addr()
	}
	return addrs
}

// publicPort is the port that visitors dial.
func (l *listeners) publicPort(cfg Listen) int {
	if cfg.PublicPort != 0 {
		return cfg.PublicPort
	}
	return l.tls[0].Addr().(*net.TCPAddr).Port
}

// altSvc is the value by which responses over TCP announce HTTP/3 (RFC 9114, section 3.1.1); "" without HTTP/3.
func (l *listeners) altSvc(cfg Listen) string {
	if len(l.udp) == 0 {
		return ""
	}
	return fmt.Sprintf(`h3=":%d"; ma=86400`, l.publicPort(cfg))
}

// A tlsListener accepts connections and hands them out with their handshake done. Connections beyond the limit wait in
// the kernel's queue; those of an address that has too many are closed.
type tlsListener struct {
	net.Listener
	config  *tls.Config
	timeout time.Duration
	trust   proxyproto.Trust // whose connections begin with a PROXY protocol header
	conns   chan struct{}    // one entry per open connection
	census  *census
	log     *slog.Logger
	opened  func(delta int)
	result  func(h *handshake, cs tls.ConnectionState, err error)

	fresh tracker // of connections that have not asked for anything yet
	ready chan net.Conn
	done  chan struct{} // closed when no more connections are made ready
}

// Accept returns the next connection whose handshake has succeeded.
func (l *tlsListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// acceptPause is waited after a failed accept, such as for want of descriptors.
const acceptPause = 50 * time.Millisecond

// run accepts until ctx ends and stop is called, closes the listener, waits for the handshakes in progress, which hctx cuts,
// and returns.
func (l *tlsListener) run(ctx, hctx context.Context) error {
	var wg sync.WaitGroup
	defer close(l.done)
	defer wg.Wait()
	for {
		select {
		case l.conns <- struct{}{}:
		case <-ctx.Done():
			l.takeQueue(hctx, &wg)
			return nil
		}
		raw, err := l.Listener.Accept()
		if err == nil {
			l.admit(hctx, &wg, raw)
			continue
		}
		<-l.conns
		if ctx.Err() != nil {
			l.takeQueue(hctx, &wg)
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept visitors: %w", err)
		}
		l.log.Warn("accept failed", "err", err)
		sleep(ctx, acceptPause)
	}
}

// stop ends the wait for the next connection, once the context of run has ended.
func (l *tlsListener) stop() {
	if d, ok := l.Listener.(interface{ SetDeadline(time.Time) error }); ok && d.SetDeadline(time.Unix(1, 0)) == nil {
		return
	}
	_ = l.Close()
}

// takeQueue closes the listener and takes in who was in its queue.
func (l *tlsListener) takeQueue(ctx context.Context, wg *sync.WaitGroup) {
	waiting := queued(l.Listener)
	_ = l.Close()
	for _, raw := range waiting {
		select {
		case l.conns <- struct{}{}:
			l.admit(ctx, wg, raw)
		default: // more than may be open
			_ = raw.Close()
		}
	}
}

// admit begins to serve a connection, which has its place in conns.
func (l *tlsListener) admit(ctx context.Context, wg *sync.WaitGroup, raw net.Conn) {
	limitBacklog(raw)
	if l.trust.Has(addrOf(raw.RemoteAddr())) {
		wg.Go(func() { l.behind(ctx, raw) })
		return
	}
	if conn := l.count(raw); conn != nil {
		wg.Go(func() { l.handshake(ctx, conn) })
	}
}

// count takes a connection in, or closes it and returns nil if its address has too many.
func (l *tlsListener) count(raw net.Conn) *countedConn {
	from := addrOf(raw.RemoteAddr())
	if !l.census.enter(from) {
		<-l.conns
		_ = raw.Close()
		return nil
	}
	l.opened(1)
	return &countedConn{Conn: raw, closed: sync.OnceFunc(func() {
		l.census.leave(from)
		l.opened(-1)
		<-l.conns
	})}
}

// behind serves a connection from a load balancer: what counts is the visitor behind it.
func (l *tlsListener) behind(ctx context.Context, raw net.Conn) {
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	conn, err := proxyproto.Accept(raw, l.timeout)
	if !stop() || err != nil {
		<-l.conns
		_ = raw.Close()
		l.log.Debug("connection of a load balancer refused", "err", err)
		return
	}
	if conn := l.count(conn); conn != nil {
		l.handshake(ctx, conn)
	}
}

func (l *tlsListener) handshake(ctx context.Context, raw *countedConn) {
	conn := tls.Server(raw, l.config)
	hctx, cancel := context.WithTimeout(ctx, l.timeout)
	hctx, h := withHandshake(hctx)
	err := conn.HandshakeContext(hctx)
	cancel()
	l.result(h, conn.ConnectionState(), err)
	if err != nil {
		_ = raw.Close()
		return
	}
	l.fresh.begin()
	raw.known = sync.OnceFunc(l.fresh.end)
	select {
	case l.ready <- conn:
	case <-ctx.Done():
		_ = conn.Close()
	}
}

// A countedConn gives back its place when it is closed.
type countedConn struct {
	net.Conn
	closed  func()
	known   func()        // notes that the visitor has asked, or has gone; may be called again. Set when the handshake is done
	visitor proxy.Visitor // whose connection it is
}

// freshKey is where a request's context has its connection.
type freshKey struct{}

func (c *countedConn) Close() error {
	err := c.Conn.Close()
	if c.known != nil {
		c.known()
	}
	c.closed()
	c.visitor.Close()
	return err
}

// A limitedListener closes connections beyond the limits of its census.
type limitedListener struct {
	net.Listener
	census *census
	trust  proxyproto.Trust
}

// Accept returns the next connection within the limits.
func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := addrOf(conn.RemoteAddr())
		if l.trust.Has(from) { // its visitors are many, and the header is read by whoever serves it
			if l.census.enterAny() {
				counted := &countedConn{Conn: conn, closed: sync.OnceFunc(l.census.leaveAny)}
				return proxyproto.Lazily(counted, redirectTimeout), nil
			}
		} else if l.census.enter(from) {
			return &countedConn{Conn: conn, closed: sync.OnceFunc(func() { l.census.leave(from) })}, nil
		}
		_ = conn.Close()
	}
}

// A census counts connections by address and in all.
type census struct {
	limit, perAddress int

	mu    sync.Mutex
	total int
	by    map[netip.Addr]int
}

func newCensus(limit, perAddress int) *census {
	return &census{limit: limit, perAddress: perAddress, by: make(map[netip.Addr]int)}
}

// enter counts a connection and reports true, unless a limit is reached.
func (c *census) enter(a netip.Addr) bool {
	p := household.Of(a)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.total >= c.limit || c.by[p] >= c.perAddress {
		return false
	}
	c.total++
	c.by[p]++
	return true
}

// leave ends what enter counted.
func (c *census) leave(a netip.Addr) {
	p := household.Of(a)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total--
	if c.by[p]--; c.by[p] == 0 {
		delete(c.by, p)
	}
}

// enterAny counts a connection whose visitor is not known, and reports true unless the limit for all is reached.
func (c *census) enterAny() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.total >= c.limit {
		return false
	}
	c.total++
	return true
}

// leaveAny ends what enterAny counted.
func (c *census) leaveAny() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total--
}

// nearlyFull reports whether the address has half of the connections that it may have.
func (c *census) nearlyFull(a netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.by[household.Of(a)] >= c.perAddress/2
}
