package tunnel

import (
	"bufio"
	"context"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// muxStream is a stream of a mux. What is sent is gathered in the mux's batches at once, so there is no buffer of its own;
// what is received lies in chunks until it is read, never more than the window.
type muxStream struct {
	m   *mux
	own bool // this side opened it

	// Guarded by m.mu:
	id         uint64 // 0 until something is sent
	credit     int64  // what may be sent
	inBatch    uint64 // the last batch that holds something of this stream
	sendWake   sync.Cond
	queued     bool // in m.waiting
	turn       bool // may go on though others wait
	starved    bool // in m.starved
	sendEnded  bool
	peerEnded  bool // the peer's direction has ended
	forgotten  bool
	sendErr    error // what Write returns after the end
	sendLimit  deadline
	over       context.Context
	overCancel context.CancelCauseFunc

	writing sync.Mutex // one Write at a time

	// Of the reading goroutine:
	allowed int          // what the peer may still send
	grant   atomic.Int64 // and what was added
	gone    atomic.Bool  // nobody reads any more

	mu         sync.Mutex // guards the fields below
	recvWake   sync.Cond
	head, tail *chunk
	fin        bool
	recvErr    error // what Read returns, before what is buffered
	recvLimit  deadline
	window     int       // the window as it is now
	untold     int       // bytes read that the peer does not know of
	toldAt     time.Time // when it was told last
}

func newMuxStream(m *mux, id uint64, own bool) *muxStream {
	s := &muxStream{m: m, own: own, id: id, credit: initialFlowWindow, allowed: initialFlowWindow, window: initialFlowWindow}
	s.sendWake.L = &m.mu
	s.recvWake.L = &s.mu
	return s
}

// A deadline wakes whoever waits for a condition. Its fields are guarded by the condition's lock.
type deadline struct {
	timer   *time.Timer
	expired bool
	set     uint64
}

// setLocked is called with the condition's lock held.
func (d *deadline) setLocked(t time.Time, c *sync.Cond) {
	d.set++
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.expired = !t.IsZero() && !t.After(time.Now())
	if d.expired {
		c.Broadcast()
	}
	if t.IsZero() || d.expired {
		return
	}
	set := d.set
	d.timer = time.AfterFunc(time.Until(t), func() {
		c.L.Lock()
		defer c.L.Unlock()
		if d.set == set {
			d.expired = true
			c.Broadcast()
		}
	})
}

func (s *muxStream) SetDeadline(t time.Time) error {
	s.SetReadDeadline(t) //nolint:errcheck // always nil
	return s.SetWriteDeadline(t)
}

func (s *muxStream) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.recvErr == nil {
		s.recvLimit.setLocked(t, &s.recvWake)
	}
	return nil
}

func (s *muxStream) SetWriteDeadline(t time.Time) error {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if !s.sendEnded {
		s.sendLimit.setLocked(t, &s.sendWake)
	}
	return nil
}

// Write puts p into the mux's batches and returns when all of it is there.
func (s *muxStream) Write(p []byte) (n int, err error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	m := s.m
	m.mu.Lock()
	defer m.mu.Unlock()
	small := len(p) <= muxSmall
	for len(p) > 0 {
		switch {
		case s.sendEnded:
			err = s.sendErr
		case s.sendLimit.expired:
			err = os.ErrDeadlineExceeded
		}
		if err != nil {
			break
		}
		k := s.appendLocked(p, small)
		p, n = p[k:], n+k
		if k > 0 {
			continue
		}
		s.sendWake.Wait()
	}
	if s.queued { // gives up
		s.queued = false
		m.waiting = slices.DeleteFunc(m.waiting, func(w *muxStream) bool { return w == s })
	}
	s.passTurnLocked()
	return n, err
}

// appendLocked queues a frame with as much of p as there is room for, and if there is none, sees to it that the stream will
// be woken.
func (s *muxStream) appendLocked(p []byte, small bool) int {
	m := s.m
	n := min(int64(len(p)), maxMuxData, s.credit, m.credit)
	if n == 0 {
		s.passTurnLocked() // others may have credit
		if s.credit > 0 && !s.starved {
			s.starved = true
			m.starved = append(m.starved, s)
		}
		return 0
	}
	if small && s.inBatch != m.batch && len(m.urgent) < muxUrgent {
		m.urgent = s.frameTo(m.urgentLocked(), p[:n])
	} else {
		room := muxBatch - len(m.bulk) - muxHeaderLen
		if len(m.waiting) > 0 && !s.turn || room < min(int(n), muxSmall) {
			if !s.queued {
				s.queued = true
				s.turn = false
				m.waiting = append(m.waiting, s)
			}
			return 0
		}
		n = min(n, int64(room))
		if m.bulk == nil {
			m.bulk = getMuxBuffer()
		}
		m.bulk = s.frameTo(m.bulk, p[:n])
		s.inBatch = m.batch
		s.turn = false
	}
	s.credit -= n
	m.credit -= n
	m.sentLocked()
	return int(n)
}

// frameTo appends the stream's next data frame.
func (s *muxStream) frameTo(b, p []byte) []byte {
	t := muxData
	if s.id == 0 {
		t = muxOpen
		s.beginLocked()
	}
	return append(appendMuxHeader(b, muxHeader{t, len(p), s.id}), p...)
}

// beginLocked gives the stream its number.
func (s *muxStream) beginLocked() {
	s.id = s.m.next
	s.m.next += 2
	s.m.streams[s.id] = s
	delete(s.m.fresh, s)
}

// passTurnLocked lets another stream have the turn that this one does not use.
func (s *muxStream) passTurnLocked() {
	if s.turn {
		s.turn = false
		s.m.giveTurnsLocked(1)
	}
}

// frameLocked queues a frame behind what the stream has queued: FIN, RESET or STOP.
func (s *muxStream) frameLocked(t muxType, code byte) {
	m := s.m
	if m.failed != nil {
		return
	}
	to := &m.urgent
	if s.inBatch == m.batch && m.bulk != nil {
		to = &m.bulk
	} else {
		m.urgent = m.urgentLocked()
	}
	if s.id == 0 {
		*to = s.frameTo(*to, nil)
	}
	if t == muxFin {
		*to = appendMuxHeader(*to, muxHeader{t, 0, s.id})
	} else {
		*to = appendMuxNumber(*to, t, s.id, 1, uint64(code))
	}
	m.sentLocked()
}

// endSendLocked notes the end of the sending direction.
func (s *muxStream) endSendLocked(err error) {
	if s.sendEnded {
		return
	}
	s.sendEnded, s.sendErr = true, err
	s.sendLimit.setLocked(time.Time{}, &s.sendWake)
	s.sendWake.Broadcast()
	if s.overCancel != nil {
		s.overCancel(err)
	}
}

func (s *muxStream) closeWrite() { s.endWrite(muxFin, 0) }

func (s *muxStream) abortWrite(code Result) { s.endWrite(muxReset, byte(code)) }

func (s *muxStream) endWrite(t muxType, code byte) {
	m := s.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.sendEnded {
		return
	}
	if s.id != 0 || t == muxFin {
		s.frameLocked(t, code)
	} else { // the peer never hears of it
		s.peerEnded = true
	}
	s.endSendLocked(net.ErrClosed)
	m.forgetLocked(s)
}

func (s *muxStream) abortRead(code Result) {
	s.endReceive(net.ErrClosed)
	m := s.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if !s.peerEnded && !s.gone.Swap(true) && s.id != 0 {
		s.frameLocked(muxStop, byte(code))
	}
}

func (s *muxStream) writeOver() context.Context {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.over == nil {
		s.over, s.overCancel = context.WithCancelCause(context.Background())
		if s.sendEnded {
			s.overCancel(s.sendErr)
		}
	}
	return s.over
}

// Read returns what has come.
func (s *muxStream) Read(p []byte) (int, error) {
	s.mu.Lock()
	for {
		var err error
		switch {
		case s.recvErr != nil:
			err = s.recvErr
		case s.recvLimit.expired:
			err = os.ErrDeadlineExceeded
		case len(p) == 0 || s.head != nil:
			n := s.takeLocked(p)
			s.mu.Unlock()
			s.m.taken(s, n)
			return n, nil
		case s.fin:
			err = io.EOF
		}
		if err != nil {
			s.mu.Unlock()
			return 0, err
		}
		s.recvWake.Wait()
	}
}

func (s *muxStream) takeLocked(p []byte) (n int) {
	for s.head != nil && n < len(p) {
		c := s.head
		k := copy(p[n:], c.b[c.r:c.w])
		n += k
		if c.r += k; c.r == c.w {
			if s.head = c.next; s.head == nil {
				s.tail = nil
			}
			c.free()
		}
	}
	return n
}

// fill reads up to n bytes of the stream's data. Only the reading goroutine calls it.
func (s *muxStream) fill(r *bufio.Reader, n int) (int, error) {
	if n <= r.Buffered() || n < muxSmall { // small: join it to what is there
		b, err := r.Peek(min(n, muxReadBuffer))
		if err != nil {
			return 0, err
		}
		s.mu.Lock()
		if s.tail == nil || s.tail.w == len(s.tail.b) {
			s.linkLocked(newChunk(len(b)))
		}
		k := copy(s.tail.b[s.tail.w:], b)
		s.tail.w += k
		s.arrivedLocked()
		s.mu.Unlock()
		return r.Discard(k)
	}
	c := newChunk(n)
	k, err := io.ReadFull(r, c.b[:n])
	c.w = k
	s.mu.Lock()
	s.linkLocked(c)
	s.arrivedLocked()
	s.mu.Unlock()
	return k, err
}

func (s *muxStream) linkLocked(c *chunk) {
	if s.tail == nil {
		s.head = c
	} else {
		s.tail.next = c
	}
	s.tail = c
}

// arrivedLocked wakes the reader, or throws away what came for one that has gone.
func (s *muxStream) arrivedLocked() {
	if s.recvErr != nil {
		s.dropLocked()
		return
	}
	s.recvWake.Signal()
}

// dropLocked throws away what was received and lets the peer send as much on other streams.
func (s *muxStream) dropLocked() {
	n := 0
	for s.head != nil {
		c := s.head
		n += c.w - c.r
		s.head = c.next
		c.free()
	}
	s.tail = nil
	if n > 0 {
		s.m.taken(nil, n)
	}
}

// finish notes the peer's clean end.
func (s *muxStream) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fin = true
	s.recvWake.Broadcast()
}

// endReceive ends reading with err.
func (s *muxStream) endReceive(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.recvErr != nil {
		return
	}
	s.recvErr = err
	s.recvLimit.setLocked(time.Time{}, &s.recvWake)
	s.dropLocked()
	s.recvWake.Broadcast()
}

// widenBy notes that n bytes were read and returns by how much the window moves on: not for each read, but for half of the
// window at a time. A reader that is fast against the round-trip time gets a window twice as large.
func (s *muxStream) widenBy(n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.untold += n; s.untold < s.window/2 || s.fin {
		return 0
	}
	now, more := time.Now(), s.untold
	if quick := max(4*s.m.rtt(), 5*time.Millisecond); s.window < s.m.window && now.Sub(s.toldAt) < quick {
		grown := min(2*s.window, s.m.window)
		more += grown - s.window
		s.window = grown
	}
	s.untold, s.toldAt = 0, now
	return more
}
