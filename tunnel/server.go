package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// A server is the side of a session that serves flows: the connector, and the listener towards a peer edge.
type server struct {
	*session
	peer     mtls.Identity
	handle   func(context.Context, *Incoming)
	onConfig func(ctx context.Context, version uint64, body []byte) error
	onDevice func(directive []byte) (report []byte)
	fromPeer bool // the opener is a peer edge

	configMu sync.Mutex // one configuration at a time
}

// acceptFlows serves flows until ctx or the session ends.
func (s *server) acceptFlows(ctx context.Context) {
	for {
		st, err := s.car.acceptStream(ctx)
		if err != nil {
			return
		}
		if r := s.beginFlow(); r != ResultOK {
			answerAndEnd(st, r)
			continue
		}
		if !s.spawn(func() { s.serveFlow(ctx, st) }) {
			s.endFlow()
		}
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

func (s *server) serveFlow(ctx context.Context, st stream) {
	in := &Incoming{peer: s.peer, conn: flowConn{stream: st, s: s.session, local: s.LocalAddr(), remote: s.RemoteAddr()}}
	defer in.cut()
	buf := headerBuffers.Get().(*[flowHeaderLen + maxFlowItemsLen]byte)
	st.SetReadDeadline(time.Now().Add(s.limits.SetupTimeout)) //nolint:errcheck // Read would fail too
	f, r, err := readFlow(st, buf[:], s.minor)
	headerBuffers.Put(buf)
	if err != nil {
		s.log.Debug("flow refused", "err", err)
		in.Reject(r) //nolint:errcheck // the edge has gone, then
		return
	}
	st.SetReadDeadline(time.Time{}) //nolint:errcheck // Read would fail too
	switch f.Kind {
	case kindConfig:
		s.serveConfig(ctx, in)
		return
	case kindDevice:
		s.serveDevice(in)
		return
	}
	f.Forwarded = s.fromPeer
	in.flow = f
	in.conn.local = flowAddr{f.Host, f.Port}
	if f.Visitor.IsValid() {
		in.conn.remote = net.TCPAddrFromAddrPort(f.Visitor)
	}
	s.handle(ctx, in)
}

// An Incoming is a flow that the edge asks for. Exactly one of Accept and Reject is to be called, once.
type Incoming struct {
	peer     mtls.Identity
	flow     Flow
	conn     flowConn
	packets  *packetConn // what AcceptPacket made of conn
	answered atomic.Bool
}

var errAnswered = errors.New("tunnel: the flow was answered already")

// Peer is the edge that asks.
func (in *Incoming) Peer() mtls.Identity { return in.peer }

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
		in.conn.s.endFlow()
	}
	return nil
}

// cut ends what the handler has left open.
func (in *Incoming) cut() {
	if in.packets != nil {
		in.packets.Reset(ResultReset)
		return
	}
	if in.Reject(ResultInternal) != nil {
		in.conn.Reset(ResultReset)
	}
}
