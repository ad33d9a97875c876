package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

const (
	// controlQueue is how many control frames wait to be written. A sender waits while it is full.
	controlQueue = 8
	// controlWriteTimeout is how long a peer may leave a control frame unread before the session is given up.
	controlWriteTimeout = 10 * time.Second
)

// session is what both sides' sessions have in common: the control stream, the count of flows, the drain, and the watch on
// the peer's life.
type session struct {
	car     carrier
	control stream
	limits  Limits
	log     *slog.Logger
	minor   int // the lower one of both sides
	role    Role
	live    liveness
	packets packetTable

	out  chan []byte   // control frames to write
	kick chan struct{} // says that the drain may have got further

	mu          sync.Mutex // guards the fields below
	flows       int
	draining    bool // no new flows, on either side's wish
	drainSelf   bool // on this side's wish
	goodbyeSent bool
	goodbyeGot  bool
	drainCh     chan struct{} // closed with draining
	over        bool          // nothing may be started any more
	wg          sync.WaitGroup
}

func newSession(car carrier, control stream, l Limits, log *slog.Logger, minor int, role Role) *session {
	return &session{
		car: car, control: control, limits: l, log: log, minor: minor, role: role,
		out:     make(chan []byte, controlQueue),
		kick:    make(chan struct{}, 1),
		drainCh: make(chan struct{}),
	}
}

// LocalAddr is this side's address of the connection below the session.
func (s *session) LocalAddr() net.Addr { return s.car.localAddr() }

// RemoteAddr is the peer's address of the connection below the session.
func (s *session) RemoteAddr() net.Addr { return s.car.remoteAddr() }

// RTT is the smoothed round-trip time to the peer, zero if not measured yet.
func (s *session) RTT() time.Duration { return s.car.rtt() }

// Carrier is what the session runs over.
func (s *session) Carrier() Carrier { return s.car.kind() }

// Role is what the session is for.
func (s *session) Role() Role { return s.role }

// Minor is the protocol's minor version that both sides speak.
func (s *session) Minor() int { return s.minor }

// DatagramsDropped counts the datagrams that queues on this side had no room for.
func (s *session) DatagramsDropped() uint64 { return s.car.dropped() }

// spawn runs f in a goroutine that finish waits for. f must return when the session has ended. It reports false, and does
// nothing, if the session is over.
func (s *session) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.over {
		s.wg.Go(f)
	}
	return !s.over
}

// finish waits for all that the ended session has started.
func (s *session) finish() {
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	s.car.close(CloseInternal) // has ended; waits
	s.wg.Wait()
}

// Done is closed when the session has ended.
func (s *session) Done() <-chan struct{} { return s.car.done() }

// Err says how the session ended: a *SessionError with CloseDrained after a drain. It is nil while the session lives.
func (s *session) Err() error { return s.car.err() }

// Flows is the number of flows open or being opened.
func (s *session) Flows() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows
}

// Close ends the session at once; open flows are cut. The peer learns the reason. It may be called more than once, and
// waits until the session has ended.
func (s *session) Close(reason CloseReason) { s.car.close(reason) }

// Drain lets no new flow begin, waits until the open ones have ended on both sides, and ends the session. If ctx ends
// first, it cuts them with CloseShutdown and returns the context's cause. It returns nil if the session ended without
// cutting a flow, and the session's error if it ended otherwise.
func (s *session) Drain(ctx context.Context) error {
	s.beginDrain()
	select {
	case <-s.Done():
	case <-ctx.Done():
		s.Close(CloseShutdown)
		if err := s.ended(); err != nil {
			return fmt.Errorf("tunnel: drain: %w", context.Cause(ctx))
		}
	}
	return s.ended()
}

// ended is Err, but nil after a drain.
func (s *session) ended() error {
	err := s.Err()
	if se, ok := errors.AsType[*SessionError](err); ok && se.Reason == CloseDrained && se.Err == nil {
		return nil
	}
	return err
}

func (s *session) beginDrain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drainSelf = true
	s.drainLocked()
	s.kickWriter()
}

func (s *session) drainLocked() {
	if !s.draining {
		s.draining = true
		close(s.drainCh)
	}
}

// beginFlow counts a new flow in, or says with a result why there may be none.
func (s *session) beginFlow() Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.draining:
		return ResultDraining
	case s.flows >= s.limits.MaxFlows:
		return ResultLimit
	}
	s.flows++
	return ResultOK
}

func (s *session) endFlow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flows--
	if s.flows == 0 && s.draining {
		s.kickWriter()
	}
}

func (s *session) kickWriter() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// send queues a control frame. It fails only when the session has ended or ctx does.
func (s *session) send(ctx context.Context, b []byte) error {
	select {
	case s.out <- b:
		return nil
	case <-s.Done():
		return s.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// writeControl writes control frames, and takes the steps of the drain, until the session ends.
func (s *session) writeControl() {
	drainSent := false
	for {
		var err error
		select {
		case b := <-s.out:
			err = s.writeFrame(b)
		case <-s.kick:
			err = s.stepDrain(&drainSent)
		case <-s.Done():
			return
		}
		if err != nil {
			s.log.Warn("control stream failed", "op", "write", "err", err)
			s.Close(CloseProtocol)
			return
		}
	}
}

func (s *session) writeFrame(b []byte) error {
	s.control.SetWriteDeadline(time.Now().Add(controlWriteTimeout)) //nolint:errcheck // Write would fail too
	_, err := s.control.Write(b)
	if errors.Is(err, ErrSessionLost) {
		return nil // the session's end is no failure of the stream
	}
	return err
}

// stepDrain does what the drain asks for next. See SPEC.md, "Drain".
func (s *session) stepDrain(drainSent *bool) error {
	s.mu.Lock()
	sendDrain := s.drainSelf && !*drainSent
	idle := s.flows == 0
	sendGoodbye := s.drainSelf && idle && !s.goodbyeSent && !s.goodbyeGot
	over := s.goodbyeGot && idle
	s.goodbyeSent = s.goodbyeSent || sendGoodbye
	s.mu.Unlock()

	if over {
		s.Close(CloseDrained)
		return nil
	}
	if sendDrain {
		*drainSent = true
		if err := s.writeFrame(byteFrame(frameDrain)); err != nil {
			return err
		}
	}
	if sendGoodbye {
		return s.writeFrame(byteFrame(frameGoodbye, byte(CloseDrained)))
	}
	return nil
}

// readControl reads control frames until the session ends, and hands those that are not common to both sides to handle.
func (s *session) readControl(handle func(frame) error) {
	for {
		f, err := readFrame(s.control, s.limits.SetupTimeout)
		if err == nil {
			err = s.handleControl(f, handle)
		}
		if err == nil {
			continue
		}
		// Streams end a little before their session is over.
		if !errors.Is(err, ErrSessionLost) && s.Err() == nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF // control must outlive everything else
			}
			s.log.Warn("control stream failed", "op", "read", "err", err)
			s.Close(CloseProtocol)
		}
		return
	}
}

// errUnknownFrame is what a side's handler returns for a frame that it does not expect.
var errUnknownFrame = malformed("unexpected control frame")

func (s *session) handleControl(f frame, handle func(frame) error) error {
	switch f.typ {
	case frameDrain:
		if len(f.payload) != 0 {
			return malformed("drain with a payload")
		}
		s.mu.Lock()
		s.drainLocked()
		s.mu.Unlock()
		return nil
	case frameGoodbye:
		if len(f.payload) != 1 {
			return malformed("goodbye of %d bytes", len(f.payload))
		}
		s.mu.Lock()
		s.drainLocked()
		s.goodbyeGot = true
		s.kickWriter()
		s.mu.Unlock()
		return nil
	}
	if s.minor >= 1 && (f.typ == framePing || f.typ == framePong) {
		return s.handlePing(f)
	}
	err := handle(f)
	if err == errUnknownFrame && f.skippable {
		return nil
	}
	return err
}
