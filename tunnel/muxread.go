package tunnel

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// read takes frames until the carrier ends, and then whatever comes until the peer has closed.
func (m *mux) read(r *bufio.Reader) {
	err := m.readFrames(r)
	_, closed := errors.AsType[*SessionError](err)
	switch {
	case closed:
		m.fail(err, 0, false)
	case errors.Is(err, errMalformed):
		m.fail(&SessionError{Reason: CloseProtocol, Err: err}, CloseProtocol, true)
	default:
		m.fail(lostBecause(err), 0, false)
	}
	io.Copy(io.Discard, r) //nolint:errcheck // ends at the latest with the deadline of fail
	m.raw.Close()          //nolint:errcheck // nothing is left to lose
}

// lostBecause is the carrier's end if the connection fails with err.
func lostBecause(err error) error {
	if alertFrom(err) {
		return fmt.Errorf("tunnel: %w (%w)", ErrCertificate, err)
	}
	return &SessionError{Reason: CloseInternal, Err: fmt.Errorf("%w: %w", ErrPeerLost, err)}
}

// alertFrom reports whether err is a TLS alert of the peer.
func alertFrom(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error"
}

// idleReader reads from the connection with the idle timeout as its deadline.
type idleReader struct {
	m   *mux
	due time.Time
}

func (r *idleReader) Read(p []byte) (int, error) {
	if now := time.Now(); now.Add(r.m.idle * 7 / 8).After(r.due) {
		r.due = now.Add(r.m.idle)
		r.m.conn.SetReadDeadline(r.due) //nolint:errcheck // Read would fail too
		select {
		case <-r.m.doneCh: // fail has set a shorter one, or is about to
			r.m.conn.SetReadDeadline(now.Add(muxLinger)) //nolint:errcheck // Read would fail too
		default:
		}
	}
	return r.m.conn.Read(p)
}

// readFrames returns a *SessionError if the peer closes, errMalformed if it breaks the protocol, and what failed otherwise.
func (m *mux) readFrames(r *bufio.Reader) error {
	var recent *muxStream // the stream of the last data
	for {
		b, err := r.Peek(muxHeaderLen)
		if err != nil {
			if len(b) > 0 {
				err = unexpectedEOF(err)
			}
			return err
		}
		h, err := parseMuxHeader(b)
		if err != nil {
			return err
		}
		r.Discard(muxHeaderLen) //nolint:errcheck // it is there
		m.frames.Add(1)
		if h.typ == muxData && recent != nil && recent.id == h.stream {
			err = m.takeData(r, recent, h.n)
		} else {
			recent, err = m.takeFrame(r, h) // which may have been the stream's end
		}
		if err != nil {
			return err
		}
	}
}

// takeFrame handles a frame whose header was read. It returns the stream that data came for.
func (m *mux) takeFrame(r *bufio.Reader, h muxHeader) (*muxStream, error) {
	switch h.typ {
	case muxData, muxOpen:
		s, err := m.streamOf(h)
		if err != nil {
			return nil, err
		}
		return s, m.takeData(r, s, h.n)
	case muxDatagram:
		b := make([]byte, h.n)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, unexpectedEOF(err)
		}
		m.keepDatagram(b)
		return nil, nil
	}
	if h.typ >= muxSkippable {
		_, err := io.CopyN(io.Discard, r, int64(h.n))
		return nil, err
	}
	b, err := r.Peek(h.n) // at most 8 bytes
	if err != nil {
		return nil, unexpectedEOF(err)
	}
	defer r.Discard(h.n) //nolint:errcheck // it is there
	return nil, m.takeControl(h, b)
}

func (m *mux) takeControl(h muxHeader, b []byte) error {
	switch h.typ {
	case muxFin, muxReset:
		s, err := m.streamOf(h)
		if err != nil {
			return err
		}
		if h.typ == muxFin {
			return m.endOfPeer(s, nil)
		}
		return m.endOfPeer(s, &FlowError{Result: Result(b[0]), Remote: true})
	case muxStop:
		return m.stopped(h.stream, Result(b[0]))
	case muxWindow:
		return m.widen(h.stream, int64(binary.BigEndian.Uint32(b)))
	case muxPing:
		m.mu.Lock()
		m.controlLocked(muxPong, 0, 8, binary.BigEndian.Uint64(b))
		m.mu.Unlock()
	case muxPong:
		m.pong(b)
	case muxClose:
		return &SessionError{Reason: CloseReason(b[0]), Remote: true}
	case muxLimits:
		m.mu.Lock()
		m.maxOpen = int(min(binary.BigEndian.Uint32(b), 1<<30))
		m.mu.Unlock()
	}
	return nil
}

// streamOf finds the stream of a frame that its peer's sending direction must be open for, and begins it for muxOpen.
func (m *mux) streamOf(h muxHeader) (*muxStream, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed != nil {
		return nil, m.failed
	}
	if h.typ == muxOpen {
		if h.stream != m.peerNext || m.accepted >= m.maxIncoming {
			return nil, malformed("stream %d begun where %d is next, with %d of %d open", h.stream, m.peerNext, m.accepted, m.maxIncoming)
		}
		s := newMuxStream(m, h.stream, false)
		m.streams[s.id] = s
		m.peerNext += 2
		m.accepted++
		m.incoming = append(m.incoming, s)
		notify(m.incomingCh)
		return s, nil
	}
	s := m.streams[h.stream]
	if s == nil || s.peerEnded {
		return nil, malformed("frame 0x%02x for stream %d, which is not open", byte(h.typ), h.stream)
	}
	return s, nil
}

// takeData reads n bytes for s.
func (m *mux) takeData(r *bufio.Reader, s *muxStream, n int) error {
	if s.allowed -= n; s.allowed < 0 {
		if s.allowed += int(s.grant.Swap(0)); s.allowed < 0 {
			return malformed("stream %d has more data than its window", s.id)
		}
	}
	if m.granted.Add(-int64(n)) < 0 {
		return malformed("more data than the session's window")
	}
	for n > 0 {
		if s.gone.Load() { // nobody wants it
			if _, err := r.Discard(n); err != nil {
				return unexpectedEOF(err)
			}
			m.taken(nil, n)
			return nil
		}
		k, err := s.fill(r, n)
		if err != nil {
			return unexpectedEOF(err)
		}
		n -= k
	}
	return nil
}

// taken notes that a stream's user has taken n bytes, and lets the peer send as many again.
func (m *mux) taken(s *muxStream, n int) {
	if s != nil {
		if more := s.widenBy(n); more > 0 {
			m.mu.Lock()
			if m.failed == nil && !s.peerEnded {
				s.grant.Add(int64(more))
				m.controlLocked(muxWindow, s.id, 4, uint64(more))
			}
			m.mu.Unlock()
		}
	}
	if all := m.unread.Add(int64(n)); all >= int64(min(m.session/4, 4<<20)) && m.unread.CompareAndSwap(all, 0) {
		m.granted.Add(all)
		m.mu.Lock()
		m.controlLocked(muxWindow, 0, 4, uint64(all))
		m.mu.Unlock()
	}
}

// endOfPeer ends the peer's sending direction of s.
func (m *mux) endOfPeer(s *muxStream, err *FlowError) error {
	m.mu.Lock()
	if s.peerEnded {
		m.mu.Unlock()
		return malformed("stream %d ended twice", s.id)
	}
	s.peerEnded = true
	m.forgetLocked(s)
	m.mu.Unlock()
	if err == nil {
		s.finish()
	} else {
		s.endReceive(err)
	}
	return nil
}

// stopped ends this side's sending direction because the peer reads no more.
func (m *mux) stopped(id uint64, code Result) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.knownLocked(id)
	if s == nil || s.sendEnded {
		return err
	}
	s.frameLocked(muxReset, byte(code))
	s.endSendLocked(&FlowError{Result: code, Remote: true})
	m.forgetLocked(s)
	return nil
}

// widen lets this side send more.
func (m *mux) widen(id uint64, n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if id == 0 {
		if m.credit += n; m.credit > maxMuxWindow {
			return malformed("the session's window grows without end")
		}
		for _, s := range m.starved {
			s.starved = false
			s.sendWake.Signal()
		}
		m.starved = m.starved[:0]
		return nil
	}
	s, err := m.knownLocked(id)
	if s == nil {
		return err
	}
	if s.credit += n; s.credit > maxMuxWindow {
		return malformed("the window of stream %d grows without end", id)
	}
	s.sendWake.Signal()
	return nil
}

// knownLocked returns the stream, nil if it has ended, and an error if it has not begun.
func (m *mux) knownLocked(id uint64) (*muxStream, error) {
	if m.failed != nil {
		return nil, m.failed
	}
	next := m.next
	if id%2 == m.peerNext%2 {
		next = m.peerNext
	}
	if id == 0 || id >= next {
		return nil, malformed("stream %d has not begun", id)
	}
	return m.streams[id], nil
}

// forgetLocked takes a stream off the table when both directions have ended.
func (m *mux) forgetLocked(s *muxStream) {
	if !s.sendEnded || !s.peerEnded || s.forgotten {
		return
	}
	s.forgotten = true
	delete(m.streams, s.id)
	delete(m.fresh, s)
	if s.own {
		m.opened--
	} else {
		m.accepted--
	}
}

// A chunk is a part of what a stream has received.
type chunk struct {
	next *chunk
	r, w int
	b    []byte
}

// chunkPools hold chunks of 2, 4, 8 and 16 KiB, so that at most half of one stays empty.
var chunkPools [4]sync.Pool

const leastChunk = 2 << 10

func newChunk(n int) *chunk {
	class := 0
	for leastChunk<<class < n {
		class++
	}
	if c, ok := chunkPools[class].Get().(*chunk); ok {
		return c
	}
	return &chunk{b: make([]byte, leastChunk<<class)}
}

func (c *chunk) free() {
	c.next, c.r, c.w = nil, 0, 0
	class := 0
	for leastChunk<<class < len(c.b) {
		class++
	}
	chunkPools[class].Put(c)
}
