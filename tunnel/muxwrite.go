package tunnel

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"time"
)

// write writes what is queued until the carrier ends, and then tells the peer why.
func (m *mux) write() {
	var deadline time.Time
	for {
		m.mu.Lock()
		for len(m.urgent) == 0 && len(m.bulk) == 0 && m.failed == nil {
			m.wake.Wait()
		}
		if m.failed != nil {
			break
		}
		urgent, bulk := m.urgent, m.bulk
		m.urgent, m.bulk = nil, nil
		m.batch++
		m.giveTurnsLocked(muxTurns)
		m.mu.Unlock()
		if now := time.Now(); now.Add(m.idle * 7 / 8).After(deadline) {
			deadline = now.Add(m.idle)
			m.conn.SetWriteDeadline(deadline) //nolint:errcheck // Write would fail too
		}
		if err := m.writeOut(urgent, bulk); err != nil {
			m.awaitLastWords(err)
			m.fail(lostBecause(err), 0, false)
			m.raw.Close() //nolint:errcheck // nothing is left to lose
			return
		}
	}
	tell, reason, last := m.tell, m.reason, m.urgent
	m.urgent = nil
	m.mu.Unlock()
	if tell {
		m.conn.SetWriteDeadline(time.Now().Add(muxLinger)) //nolint:errcheck // Write would fail too
		last = appendMuxNumber(last, muxClose, 0, 1, uint64(reason))
		if m.writeOut(last, nil) == nil && m.conn.CloseWrite() == nil {
			m.raw.flush()
			m.raw.closeWrite() // the peer closes; until then its bytes are read, lest they make ours be lost
			return
		}
	}
	m.raw.Close() //nolint:errcheck // nothing is left to lose
}

// awaitLastWords gives the reading goroutine time to find why the peer takes nothing any more, which it may have said
// before it closed: a write fails with err at once, and what came before that is still to be read.
func (m *mux) awaitLastWords(err error) {
	if isTimeout(err) || errors.Is(err, net.ErrClosed) {
		return
	}
	select {
	case <-m.doneCh:
	case <-time.After(muxLinger):
	}
}

func (m *mux) writeOut(urgent, bulk []byte) error {
	for _, b := range [...][]byte{urgent, bulk} {
		if len(b) == 0 {
			continue
		}
		if _, err := m.conn.Write(b); err != nil {
			return err
		}
	}
	err := m.raw.flush()
	putMuxBuffer(urgent)
	putMuxBuffer(bulk)
	return err
}

func getMuxBuffer() []byte { return (*muxBuffers.Get().(*[]byte))[:0] }

func putMuxBuffer(b []byte) {
	if cap(b) >= muxBatch && cap(b) <= 2*muxUrgent {
		b = b[:0]
		muxBuffers.Put(&b)
	}
}

// sentLocked has the writing goroutine write.
func (m *mux) sentLocked() {
	m.dirty = true
	if !m.pinging {
		m.pinging = true
		m.schedulePingLocked()
	}
	m.wake.Signal()
}

// giveTurnsLocked lets up to n of the streams that wait for room go on, in the order of their coming.
func (m *mux) giveTurnsLocked(n int) {
	for n > 0 && len(m.waiting) > 0 {
		s := m.waiting[0]
		m.waiting[0] = nil
		m.waiting = m.waiting[1:]
		s.queued = false
		s.turn = true
		s.sendWake.Signal()
		n--
	}
	if len(m.waiting) == 0 {
		m.waiting = nil
	}
}

// controlLocked queues a frame that may overtake what streams have queued.
func (m *mux) controlLocked(t muxType, stream uint64, size int, v uint64) {
	if m.failed == nil {
		m.urgent = appendMuxNumber(m.urgentLocked(), t, stream, size, v)
		m.wake.Signal()
	}
}

// urgentLocked is the buffer of what goes first.
func (m *mux) urgentLocked() []byte {
	if m.urgent == nil {
		return getMuxBuffer()
	}
	return m.urgent
}

// appendPing puts the time into a ping, which the pong brings back.
func (m *mux) appendPing(b []byte) []byte {
	m.dirty = false
	return appendMuxNumber(b, muxPing, 0, 8, uint64(m.pinged.UnixNano()))
}

// schedulePingLocked sends a ping soon. There is one at a time, so whatever streams send is answered by a pong.
func (m *mux) schedulePingLocked() {
	wait := muxPingEvery - time.Since(m.pinged)
	if wait <= 0 {
		m.pingLocked()
		return
	}
	if m.pingTime == nil {
		m.pingTime = time.AfterFunc(wait, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.pingLocked()
		})
		return
	}
	m.pingTime.Reset(wait)
}

func (m *mux) pingLocked() {
	if m.failed == nil {
		m.pinged = time.Now()
		m.urgent = m.appendPing(m.urgentLocked())
		m.wake.Signal()
	}
}

// pong takes the answer to a ping.
func (m *mux) pong(b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.pinging || binary.BigEndian.Uint64(b) != uint64(m.pinged.UnixNano()) {
		return
	}
	rtt := max(time.Since(m.pinged), 1)
	if old := m.srtt.Load(); old != 0 {
		rtt = time.Duration(old) + (rtt-time.Duration(old))/8
	}
	m.srtt.Store(int64(rtt))
	m.pinging = m.dirty
	if m.dirty {
		m.schedulePingLocked()
	}
}

// corkConn gathers what TLS writes, a record at a time, until flush.
type corkConn struct {
	net.Conn

	mu     sync.Mutex // guards the fields below, and writes: reading can make TLS write too
	corked bool       // gather; else pass on
	out    []byte
}

func (c *corkConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.corked {
		return c.Conn.Write(b)
	}
	if len(c.out) > 0 && len(c.out)+len(b) > cap(c.out) {
		if err := c.flushLocked(); err != nil {
			return 0, err
		}
	}
	if c.out == nil {
		c.out = getMuxBuffer()
	}
	c.out = append(c.out, b...)
	return len(b), nil
}

// flush writes what was gathered.
func (c *corkConn) flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flushLocked()
}

func (c *corkConn) flushLocked() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.Conn.Write(c.out)
	putMuxBuffer(c.out)
	c.out = nil
	return err
}

// closeWrite sends a FIN.
func (c *corkConn) closeWrite() {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		w.CloseWrite() //nolint:errcheck // the peer has gone, then
	}
}
