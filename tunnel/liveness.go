package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// probeSize is the least payload of a ping or pong that shall show whether large packets pass.
	probeSize = 1200
	// maxProbes bounds the probes of one session that wait for an answer.
	maxProbes = 64
	// suspectAfter is the least silence that makes a session suspect while an answer is due.
	suspectAfter = time.Second
	// pongTimeout, in keep-alive intervals, is how long a connector waits for an answer to its pings. With the interval
	// before the ping it makes less than three.
	pongTimeout = 1.8
)

// liveness is what a session knows of its peer's life.
type liveness struct {
	// due is when the first thing was sent that the peer has to acknowledge, in Unix nanoseconds; 0 if nothing is due. count
	// is what carrier.heard returned then.
	due   atomic.Int64
	count atomic.Uint64
	// at is when something was heard last, as far as it was looked at; seen is what carrier.heard returned then.
	at   atomic.Int64
	seen atomic.Uint64

	mu     sync.Mutex // guards the fields below
	lastID uint64
	probes map[uint64]chan struct{}
}

// expect notes that something is about to be sent that the peer has to acknowledge.
func (s *session) expect() {
	n := s.car.heard()
	if s.live.due.Load() != 0 && s.live.count.Load() == n {
		return
	}
	now := time.Now().UnixNano()
	s.noteHeard(n, now)
	s.live.count.Store(n)
	s.live.due.Store(now)
}

func (s *session) noteHeard(n uint64, now int64) {
	if s.live.seen.Swap(n) != n || s.live.at.Load() == 0 {
		s.live.at.Store(now)
	}
}

// LastHeard is when the peer was heard last. While nothing is sent and nobody asks it may lag behind by as long as the
// keep-alives are apart.
func (s *session) LastHeard() time.Time {
	s.noteHeard(s.car.heard(), time.Now().UnixNano())
	return time.Unix(0, s.live.at.Load())
}

// Suspect reports whether the peer owes an acknowledgement, of a flow's opening, a probe, or a flow's bytes or packets, and nothing
// was heard of it for a second or four round-trip times, whichever is longer.
func (s *session) Suspect() bool {
	due := s.live.due.Load()
	if due == 0 {
		return false
	}
	now := time.Now().UnixNano()
	if n := s.car.heard(); n != s.live.count.Load() {
		s.noteHeard(n, now)
		s.live.due.CompareAndSwap(due, 0)
		return false
	}
	return time.Duration(now-due) > max(suspectAfter, 4*s.RTT())
}

// Probe sends a ping as large as the packets that the session sends, waits for its echo and returns how long that took.
// A peer of minor version 0 echoes nothing; then any sign of it will do. It fails when ctx ends or the session does.
func (s *session) Probe(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	id, answer, err := s.beginProbe()
	if err != nil {
		return 0, err
	}
	defer s.endProbe(id)
	if s.minor == 0 {
		return s.probeOld(ctx, start)
	}
	s.expect()
	if err := s.send(ctx, s.pingFrame(framePing, id)); err != nil {
		return 0, fmt.Errorf("tunnel: probe: %w", err)
	}
	select {
	case <-answer:
		return time.Since(start), nil
	case <-s.Done():
		return 0, fmt.Errorf("tunnel: probe: %w", s.Err())
	case <-ctx.Done():
		return 0, fmt.Errorf("tunnel: probe: no answer after %v: %w", time.Since(start).Round(time.Millisecond), context.Cause(ctx))
	}
}

// probeOld sends a ping that QUIC alone acknowledges.
func (s *session) probeOld(ctx context.Context, start time.Time) (time.Duration, error) {
	before := s.car.heard()
	b := byteFrame(framePing, make([]byte, pingLen)...)
	b[1] = flagSkippable
	if err := s.send(ctx, b); err != nil {
		return 0, fmt.Errorf("tunnel: probe: %w", err)
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for s.car.heard() == before {
		select {
		case <-tick.C:
		case <-s.Done():
			return 0, fmt.Errorf("tunnel: probe: %w", s.Err())
		case <-ctx.Done():
			return 0, fmt.Errorf("tunnel: probe: no sign of the peer after %v: %w", time.Since(start).Round(time.Millisecond), context.Cause(ctx))
		}
	}
	return time.Since(start), nil
}

var errProbes = errors.New("tunnel: probe: too many probes at a time")

func (s *session) beginProbe() (uint64, chan struct{}, error) {
	s.live.mu.Lock()
	defer s.live.mu.Unlock()
	if len(s.live.probes) >= maxProbes {
		return 0, nil, errProbes
	}
	if s.live.probes == nil {
		s.live.probes = make(map[uint64]chan struct{})
	}
	s.live.lastID++
	answer := make(chan struct{})
	s.live.probes[s.live.lastID] = answer
	return s.live.lastID, answer, nil
}

func (s *session) endProbe(id uint64) {
	s.live.mu.Lock()
	defer s.live.mu.Unlock()
	delete(s.live.probes, id)
}

// pingFrame makes a ping or pong that fills a packet of the largest size in use. See SPEC.md, "Ping".
func (s *session) pingFrame(t frameType, id uint64) []byte {
	size := probeSize
	if s.car.kind() == CarrierQUIC {
		size = max(size, s.car.maxDatagram())
	}
	b, start := beginFrame(make([]byte, 0, frameHeaderLen+size), t)
	b[start+1] = flagSkippable
	b = binary.BigEndian.AppendUint64(b, id)
	b, _ = endFrame(b[:start+frameHeaderLen+size], start) // a packet is smaller than a frame may be
	return b
}

// handlePing answers a ping, or takes an answer.
func (s *session) handlePing(f frame) error {
	if !f.skippable {
		return malformed("control frame 0x%02x is not skippable", byte(f.typ))
	}
	if len(f.payload) < 8 {
		return nil // asks for no answer
	}
	id := binary.BigEndian.Uint64(f.payload)
	if f.typ == framePing {
		return s.send(context.Background(), s.pingFrame(framePong, id))
	}
	s.live.mu.Lock()
	defer s.live.mu.Unlock()
	if answer := s.live.probes[id]; answer != nil {
		close(answer)
		delete(s.live.probes, id)
	}
	return nil
}

// keepAlive probes the peer every KeepAlive and ends the session if no echo comes: the connector's side of a session does
// that. QUIC's own keep-alives would do to keep a session, but they are so small that an edge which was started anew does
// not answer them, and that they pass where larger packets are lost; see SPEC.md, "Ping".
func (s *session) keepAlive() {
	tick := time.NewTicker(s.limits.KeepAlive)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.Done():
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(pongTimeout*float64(s.limits.KeepAlive)))
		_, err := s.Probe(ctx)
		cancel()
		if err != nil && s.Err() == nil && !errors.Is(err, errProbes) && s.minor >= 1 {
			s.log.Warn("no echo of a ping; does the path lose large packets?", "carrier", string(s.Carrier()))
			s.car.abandon(fmt.Errorf("%w: no echo of a ping of %d bytes", ErrPeerLost, probeSize))
			return
		}
	}
}
