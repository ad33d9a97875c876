package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/quic-go/quic-go"
)

// A ClientSession is the connector's side of a session. Its methods may be called concurrently.
type ClientSession struct {
	*session
	peer   mtls.Identity
	handle func(context.Context, *Incoming)
	shut   func() // frees the socket

	ran     atomic.Bool
	renewMu sync.Mutex // one renewal at a time

	answerMu sync.Mutex // guards the fields below
	renewID  uint32
	answer   chan renewAnswer // where the answer to renewID goes; nil if nobody waits
}

type renewAnswer struct {
	code  RefusalCode
	chain [][]byte
}

// Dial connects to an edge and registers. The error is ErrNoAnswer (wrapped) if nothing answers, a *RefusedError if the
// edge does not admit the connector, and says otherwise what failed. The caller must call Run, or Close.
func Dial(ctx context.Context, cfg DialConfig) (*ClientSession, error) {
	if cfg.Identity == nil || cfg.Handle == nil {
		return nil, errors.New("tunnel: dial: DialConfig needs Identity and Handle")
	}
	register, err := appendRegister(nil, cfg.Registration)
	if err != nil {
		return nil, fmt.Errorf("tunnel: dial %s: %w", cfg.Addr, err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l := cfg.Limits.withDefaults(defaultSessionWindow)
	tlsConf := cfg.Identity.ClientConfig(mtls.ClientOptions{ALPN: []string{ALPN}, Expect: mtls.AcceptKinds(mtls.KindEdge)})
	conn, shut, err := dialQUIC(ctx, cfg.Addr, cfg.LocalAddr, tlsConf, connectorQUICConfig(l), cfg.Logger)
	if err != nil {
		return nil, fmt.Errorf("tunnel: dial %s: %w", cfg.Addr, err)
	}
	c, err := newClientSession(ctx, quicCarrier{conn}, l, register, cfg)
	if err != nil {
		conn.CloseWithError(quic.ApplicationErrorCode(CloseRefused), "") //nolint:errcheck // never fails
		shut()
		return nil, fmt.Errorf("tunnel: dial %s: %w", cfg.Addr, err)
	}
	c.shut = sync.OnceFunc(shut)
	return c, nil
}

// newClientSession registers over a fresh carrier.
func newClientSession(ctx context.Context, car carrier, l Limits, register []byte, cfg DialConfig) (*ClientSession, error) {
	peer, err := mtls.PeerIdentity(car.tlsState())
	if err != nil {
		return nil, err
	}
	control, err := car.openStream()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		control.abortRead(ResultCancelled)
		control.abortWrite(ResultCancelled)
	})
	err = exchangeRegister(control, register, 2*l.SetupTimeout)
	if !stop() {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		if lost := (*FlowError)(nil); errors.As(err, &lost) && lost.Err != nil {
			err = lost.Err // the session's end says more: a TLS alert, for one
		}
		return nil, fmt.Errorf("register: %w", err)
	}
	log := cfg.Logger.With("peer", peer.String(), "conn", cfg.Registration.Index)
	return &ClientSession{session: newSession(car, control, l, log), peer: peer, handle: cfg.Handle}, nil
}

// exchangeRegister sends the registration and reads the answer.
func exchangeRegister(control stream, register []byte, timeout time.Duration) error {
	if err := control.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := control.Write(register); err != nil {
		return err
	}
	f, err := readFrame(control, 0)
	if err != nil {
		return unexpectedEOF(err)
	}
	if err := control.SetDeadline(time.Time{}); err != nil {
		return err
	}
	switch f.typ {
	case frameRegistered:
		p, err := splitVersion(f.payload)
		if err == nil {
			_, err = parseCertItems(p) // none known: all must be skippable
		}
		return err
	case frameRefused:
		return parseRefused(f.payload)
	}
	return malformed("control frame 0x%02x in answer to register", byte(f.typ))
}

func parseRefused(p []byte) error {
	if len(p) != 1 {
		return malformed("refused of %d bytes", len(p))
	}
	return &RefusedError{RefusalCode(p[0])}
}

// Peer is the edge's identity.
func (c *ClientSession) Peer() mtls.Identity { return c.peer }

// Draining is closed when either side has begun to drain. It is the time to dial another session.
func (c *ClientSession) Draining() <-chan struct{} { return c.drainCh }

// Close ends the session at once; see Session.Close. If Run was called, Run frees what the session holds.
func (c *ClientSession) Close(reason CloseReason) {
	c.session.Close(reason)
	if !c.ran.Load() {
		c.shut()
	}
}

// Run serves the session: it takes flows and control frames until the session ends or ctx does, and returns when every
// handler has returned. It returns nil after a drain of either side, the context's cause if ctx ended it, and otherwise the
// session's error. It must be called once.
func (c *ClientSession) Run(ctx context.Context) error {
	if !c.ran.CompareAndSwap(false, true) {
		return errors.New("tunnel: Run called twice")
	}
	defer c.shut()
	var wg sync.WaitGroup
	wg.Go(c.writeControl)
	wg.Go(func() { c.readControl(c.handleFrame) })
	wg.Go(c.ping)
	flowCtx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // handlers see the session end first
	wg.Go(func() { c.acceptFlows(flowCtx, &wg) })

	var cause error
	select {
	case <-c.Done():
	case <-ctx.Done():
		c.session.Close(CloseShutdown)
		if c.ended() != nil {
			cause = context.Cause(ctx)
		}
	}
	cancel()
	wg.Wait()
	if cause != nil {
		return cause
	}
	return c.ended()
}

// ping sends something now and then. The carrier's own keep-alives would do to keep the session, but an edge that was
// started anew does not answer packets as small as those of QUIC; see SPEC.md, "Ping".
func (c *ClientSession) ping() {
	b := byteFrame(framePing, make([]byte, pingLen)...)
	b[1] = flagSkippable
	tick := time.NewTicker(c.limits.KeepAlive)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			c.send(context.Background(), b) //nolint:errcheck // the session has ended, then
		case <-c.Done():
			return
		}
	}
}

func (c *ClientSession) acceptFlows(ctx context.Context, wg *sync.WaitGroup) {
	for {
		st, err := c.car.acceptStream(ctx)
		if err != nil {
			return
		}
		if r := c.beginFlow(); r != ResultOK {
			answerAndEnd(st, r)
			continue
		}
		wg.Go(func() { c.serveFlow(ctx, st) })
	}
}

// answerAndEnd refuses a flow.
func answerAndEnd(st stream, r Result) {
	st.SetWriteDeadline(time.Now().Add(controlWriteTimeout)) //nolint:errcheck // Write would fail too
	if _, err := st.Write([]byte{byte(r)}); err != nil {
		st.abortWrite(r)
	}
	st.closeWrite()
	st.abortRead(r)
}

var headerBuffers = sync.Pool{New: func() any { return new([flowHeaderLen + maxFlowItemsLen]byte) }}

func (c *ClientSession) serveFlow(ctx context.Context, st stream) {
	in := &Incoming{conn: flowConn{stream: st, local: c.LocalAddr(), remote: c.RemoteAddr(), draining: c.drainCh, ended: c.endFlow}}
	defer in.cut()
	buf := headerBuffers.Get().(*[flowHeaderLen + maxFlowItemsLen]byte)
	st.SetReadDeadline(time.Now().Add(c.limits.SetupTimeout)) //nolint:errcheck // Read would fail too
	f, r, err := readFlow(st, buf[:])
	headerBuffers.Put(buf)
	if err != nil {
		c.log.Debug("flow refused", "err", err)
		in.Reject(r) //nolint:errcheck // the edge has gone, then
		return
	}
	st.SetReadDeadline(time.Time{}) //nolint:errcheck // Read would fail too
	in.flow = f
	in.conn.local = flowAddr{f.Host, f.Port}
	if f.Visitor.IsValid() {
		in.conn.remote = net.TCPAddrFromAddrPort(f.Visitor)
	}
	c.handle(ctx, in)
}

// An Incoming is a flow that the edge asks for. Exactly one of Accept and Reject is to be called, once.
type Incoming struct {
	flow     Flow
	conn     flowConn
	answered atomic.Bool
}

var errAnswered = errors.New("tunnel: the flow was answered already")

// Flow is what the edge asks for.
func (in *Incoming) Flow() Flow { return in.flow }

// Cancelled is closed when the edge no longer waits for the answer, or wants no more of the flow's bytes.
func (in *Incoming) Cancelled() <-chan struct{} { return in.conn.writeOver().Done() }

// Accept says that the destination is connected and returns the flow. The caller must close it.
func (in *Incoming) Accept() (Conn, error) {
	if !in.answered.CompareAndSwap(false, true) {
		return nil, errAnswered
	}
	if _, err := in.conn.stream.Write([]byte{byte(ResultOK)}); err != nil {
		in.conn.Reset(ResultReset)
		return nil, fmt.Errorf("tunnel: accept flow: %w", err)
	}
	return &in.conn, nil
}

// Reject answers with any result but ResultOK and ends the flow.
func (in *Incoming) Reject(r Result) error {
	if r == ResultOK {
		return errors.New("tunnel: reject flow with ResultOK")
	}
	if !in.answered.CompareAndSwap(false, true) {
		return errAnswered
	}
	if in.conn.closed.CompareAndSwap(false, true) {
		answerAndEnd(in.conn.stream, r)
		in.conn.ended()
	}
	return nil
}

// cut ends what the handler has left open.
func (in *Incoming) cut() {
	if in.Reject(ResultInternal) != nil {
		in.conn.Reset(ResultReset)
	}
}

// Renew asks the edge to sign a certificate request and returns the new chain, leaf first, in DER. Run must be running.
// The error is a *RefusedError (wrapped) if the edge refuses.
func (c *ClientSession) Renew(ctx context.Context, csrDER []byte) ([][]byte, error) {
	c.renewMu.Lock()
	defer c.renewMu.Unlock()
	answer := make(chan renewAnswer, 1)
	c.answerMu.Lock()
	c.renewID++
	id := c.renewID
	c.answer = answer
	c.answerMu.Unlock()
	defer func() {
		c.answerMu.Lock()
		c.answer = nil
		c.answerMu.Unlock()
	}()

	b, err := appendRenew(nil, id, csrDER)
	if err == nil {
		err = c.send(ctx, b)
	}
	if err != nil {
		return nil, fmt.Errorf("tunnel: renew: %w", err)
	}
	select {
	case a := <-answer:
		if a.code != 0 {
			return nil, fmt.Errorf("tunnel: renew: %w", &RefusedError{a.code})
		}
		return a.chain, nil
	case <-c.Done():
		return nil, fmt.Errorf("tunnel: renew: %w", c.Err())
	case <-ctx.Done():
		return nil, fmt.Errorf("tunnel: renew: %w", context.Cause(ctx))
	}
}

// handleFrame handles the frames that only an edge sends.
func (c *ClientSession) handleFrame(f frame) error {
	if f.typ != frameRenewed {
		return errUnknownFrame
	}
	id, code, chain, err := parseRenewed(f.payload)
	if err != nil {
		return err
	}
	c.answerMu.Lock()
	defer c.answerMu.Unlock()
	if c.answer != nil && id == c.renewID { // else the caller gave up
		c.answer <- renewAnswer{code, chain}
		c.answer = nil
	}
	return nil
}

// dialQUIC tries the addresses of addr in order. shut frees the socket; the connection must be closed before.
func dialQUIC(ctx context.Context, addr string, local netip.Addr, tlsConf *tls.Config, conf *quic.Config, log *slog.Logger) (_ *quic.Conn, shut func(), err error) {
	addrs, err := resolve(ctx, addr)
	if err != nil {
		return nil, nil, err
	}
	var errs []error
	for _, a := range addrs {
		conn, shut, err := dialOne(ctx, a, local, tlsConf, conf, log)
		if err == nil {
			return conn, shut, nil
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		errs = append(errs, fmt.Errorf("%s: %w", a, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, nil, errors.Join(errs...)
}

func resolve(ctx context.Context, addr string) ([]netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "udp", service)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.AddrPort, 0, len(ips))
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), uint16(port)))
	}
	return addrs, nil
}

func dialOne(ctx context.Context, to netip.AddrPort, local netip.Addr, tlsConf *tls.Config, conf *quic.Config, log *slog.Logger) (*quic.Conn, func(), error) {
	network := "udp6"
	if to.Addr().Is4() {
		network = "udp4"
	}
	var laddr *net.UDPAddr
	if local.IsValid() {
		laddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	udp, err := net.ListenUDP(network, laddr)
	if err != nil {
		return nil, nil, err
	}
	tr := newTransport(udp)
	shut := func() {
		tr.Close()  //nolint:errcheck // nothing is left to lose
		udp.Close() //nolint:errcheck // nothing is left to lose
	}
	conn, err := tr.Dial(ctx, net.UDPAddrFromAddrPort(to), tlsConf, conf)
	if err != nil {
		shut()
		return nil, nil, dialErrorOf(err)
	}
	reportBuffers(udp, log)
	return conn, shut, nil
}

// dialErrorOf is sessionErrorOf for a connection that never was.
func dialErrorOf(err error) error {
	var idle *quic.IdleTimeoutError
	if errors.As(err, &idle) {
		return ErrNoAnswer
	}
	mapped := sessionErrorOf(err)
	if se, ok := errors.AsType[*SessionError](mapped); ok && se.Err != nil {
		return se.Err
	}
	return mapped
}
