package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

const (
	defaultIdleTimeout   = 12 * time.Second
	defaultKeepAlive     = 5 * time.Second
	defaultMaxFlows      = 16384
	defaultSetupTimeout  = 5 * time.Second
	defaultFlowWindow    = 4 << 20
	edgeSessionWindow    = 256 << 20
	defaultSessionWindow = 64 << 20

	// handshakeIdle is how long a handshake may make no progress.
	handshakeIdle = 5 * time.Second
	// initialFlowWindow is what a flow may receive before its reader has shown to be fast; quic-go then doubles it up
	// to Limits.FlowWindow. It is small against Limits.SessionWindow, so that only very many slow readers together can
	// stop a session's other flows.
	initialFlowWindow = 256 << 10
	// spareStreams is how many streams beyond Limits.MaxFlows a connector takes, to answer them with ResultLimit.
	spareStreams = 256
	// maxPeerFlows is how many flows one session between edges carries at a time.
	maxPeerFlows = 4096
	// smallPacket is the size of packets that each path for QUIC must carry. See RFC 9000, section 14.
	smallPacket = 1200
)

// withDefaults fills in zero fields.
func (l Limits) withDefaults(sessionWindow int) Limits {
	setDefault(&l.IdleTimeout, defaultIdleTimeout)
	setDefault(&l.KeepAlive, defaultKeepAlive)
	setDefault(&l.MaxFlows, defaultMaxFlows)
	setDefault(&l.SetupTimeout, defaultSetupTimeout)
	setDefault(&l.SessionWindow, sessionWindow)
	setDefault(&l.FlowWindow, defaultFlowWindow)
	return l
}

func setDefault[T ~int | ~int64](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

func quicConfig(l Limits) *quic.Config {
	return &quic.Config{
		Versions:                       []quic.Version{quic.Version1},
		HandshakeIdleTimeout:           handshakeIdle,
		MaxIdleTimeout:                 l.IdleTimeout,
		InitialStreamReceiveWindow:     uint64(min(initialFlowWindow, l.FlowWindow)),
		MaxStreamReceiveWindow:         uint64(l.FlowWindow),
		InitialConnectionReceiveWindow: uint64(l.SessionWindow),
		MaxConnectionReceiveWindow:     uint64(l.SessionWindow),
		MaxIncomingUniStreams:          -1,
		EnableDatagrams:                true,
		InitialPacketSize:              smallPacket, // larger ones are tried once the session is there
	}
}

// edgeQUICConfig allows as many streams as a peer edge may open. A connector may open one, control, but which of the two a
// client is shows too late; whoever opens more is cut off, see Listener.watchStreams.
func edgeQUICConfig(l Limits) *quic.Config {
	c := quicConfig(l)
	c.MaxIncomingStreams = maxPeerFlows + 1
	return c
}

func connectorQUICConfig(l Limits) *quic.Config {
	c := quicConfig(l)
	c.MaxIncomingStreams = int64(l.MaxFlows + spareStreams)
	c.KeepAlivePeriod = l.KeepAlive
	return c
}

// quicCarrier is a QUIC connection as a carrier.
type quicCarrier struct {
	conn *quic.Conn
	lost atomic.Pointer[SessionError] // how abandon ended it
	quicDatagrams
}

func newQUICCarrier(conn *quic.Conn) *quicCarrier { return &quicCarrier{conn: conn} }

func (c *quicCarrier) openStream() (stream, error) {
	s, err := c.conn.OpenStream()
	if err != nil {
		if limit := (*quic.StreamLimitReachedError)(nil); errors.As(err, &limit) {
			return nil, errStreamLimit
		}
		return nil, sessionErrorOf(err)
	}
	return quicStream{s}, nil
}

func (c *quicCarrier) acceptStream(ctx context.Context) (stream, error) {
	s, err := c.conn.AcceptStream(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, sessionErrorOf(err)
	}
	return quicStream{s}, nil
}

func (c *quicCarrier) close(reason CloseReason) {
	c.conn.CloseWithError(quic.ApplicationErrorCode(reason), "") //nolint:errcheck // it never fails
	c.quicDatagrams.wait()
}

func (c *quicCarrier) abandon(err error) {
	c.lost.CompareAndSwap(nil, &SessionError{Reason: CloseInternal, Err: err})
	c.conn.CloseWithError(quic.ApplicationErrorCode(CloseInternal), "") //nolint:errcheck // it never fails
}

func (c *quicCarrier) done() <-chan struct{} { return c.conn.Context().Done() }

func (c *quicCarrier) err() error {
	if c.conn.Context().Err() == nil {
		return nil
	}
	if lost := c.lost.Load(); lost != nil {
		return lost
	}
	return sessionErrorOf(context.Cause(c.conn.Context()))
}

func (c *quicCarrier) kind() Carrier                 { return CarrierQUIC }
func (c *quicCarrier) tlsState() tls.ConnectionState { return c.conn.ConnectionState().TLS }
func (c *quicCarrier) rtt() time.Duration            { return c.conn.ConnectionStats().SmoothedRTT }
func (c *quicCarrier) heard() uint64                 { return c.conn.ConnectionStats().PacketsReceived }
func (c *quicCarrier) localAddr() net.Addr           { return c.conn.LocalAddr() }
func (c *quicCarrier) remoteAddr() net.Addr          { return c.conn.RemoteAddr() }

// sessionErrorOf says in this package's terms how a QUIC connection ended or could not be made.
func sessionErrorOf(err error) error {
	var (
		app       *quic.ApplicationError
		transport *quic.TransportError
		idle      *quic.IdleTimeoutError
		handshake *quic.HandshakeTimeoutError
		reset     *quic.StatelessResetError
		session   *SessionError
	)
	switch {
	case errors.As(err, &session):
		return err
	case errors.As(err, &app) && app.ErrorCode <= 0xff:
		return &SessionError{Reason: CloseReason(app.ErrorCode), Remote: app.Remote}
	case errors.As(err, &transport) && transport.Remote && transport.ErrorCode.IsCryptoError():
		return fmt.Errorf("tunnel: %w (%w)", ErrCertificate, err)
	case errors.As(err, &idle), errors.As(err, &reset):
		return &SessionError{Reason: CloseInternal, Err: fmt.Errorf("%w: %w", ErrPeerLost, err)}
	case errors.As(err, &handshake):
		return ErrNoAnswer
	}
	return &SessionError{Reason: CloseInternal, Err: err}
}

// quicStream is a QUIC stream as a stream.
type quicStream struct{ *quic.Stream }

func (s quicStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	if err != nil && err != io.EOF {
		err = streamErrorOf(err)
	}
	return n, err
}

func (s quicStream) Write(p []byte) (int, error) {
	n, err := s.Stream.Write(p)
	if err != nil {
		err = streamErrorOf(err)
	}
	return n, err
}

func (s quicStream) closeWrite()                { s.Stream.Close() } //nolint:errcheck // fails only if aborted
func (s quicStream) abortRead(code Result)      { s.CancelRead(quic.StreamErrorCode(code)) }
func (s quicStream) abortWrite(code Result)     { s.CancelWrite(quic.StreamErrorCode(code)) }
func (s quicStream) writeOver() context.Context { return s.Context() }

func streamErrorOf(err error) error {
	if _, ok := errors.AsType[*FlowError](err); ok || err == net.ErrClosed {
		return err
	}
	if se, ok := errors.AsType[*quic.StreamError](err); ok {
		switch {
		case !se.Remote:
			return net.ErrClosed
		case se.ErrorCode > 0xff:
			return &FlowError{Result: ResultReset, Remote: true}
		}
		return &FlowError{Result: Result(se.ErrorCode), Remote: true}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return os.ErrDeadlineExceeded
	}
	if errors.Is(err, quic.ErrStreamClosed) {
		return net.ErrClosed
	}
	return &FlowError{Result: ResultSessionLost, Err: sessionErrorOf(err)}
}
