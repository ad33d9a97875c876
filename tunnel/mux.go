package tunnel

import (
	"bufio"
	"context"
	"crypto/tls"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// muxBatch is how many bytes of streams are gathered for one write; writers wait while it is full. While one batch is
	// written the next is gathered.
	muxBatch = 4 * (maxMuxData + muxHeaderLen)
	// muxTurns is how many waiting streams may go on when a batch is begun: each adds a frame, which makes it full.
	muxTurns = 4
	// muxSmall is the size up to which a write goes ahead of others' larger ones.
	muxSmall = 1 << 10
	// muxUrgent bounds what goes ahead: small writes then wait with the others, and datagrams are dropped.
	muxUrgent = 512 << 10
	// muxReadBuffer holds frames' headers and small frames; payloads that are larger go past it.
	muxReadBuffer = 1 << 10
	// muxDatagrams and muxDatagramBytes bound the datagrams that wait for their reader; more are dropped.
	muxDatagrams     = 4096
	muxDatagramBytes = 1 << 20
	// muxPingEvery is the least time between two pings that measure the round-trip time while streams send.
	muxPingEvery = 100 * time.Millisecond
	// muxLinger is how long a close may take to tell the peer.
	muxLinger = time.Second
)

// mux is TLS over TCP as a carrier. One goroutine reads, one writes; neither waits for a stream's user. See SPEC.md, "TCP".
type mux struct {
	conn        *tls.Conn
	raw         *corkConn // below conn
	state       tls.ConnectionState
	window      int // the largest window of a stream that the peer may have
	session     int // the session's window
	idle        time.Duration
	maxIncoming int

	wg      sync.WaitGroup
	doneCh  chan struct{}
	frames  atomic.Uint64 // frames that came
	lost    atomic.Uint64 // datagrams dropped
	srtt    atomic.Int64
	granted atomic.Int64 // what the peer may still send
	unread  atomic.Int64 // what streams' users have taken and the peer does not know of

	mu       sync.Mutex // guards the fields below, and the sending side of streams
	failed   error      // how the carrier ended
	reason   CloseReason
	tell     bool // the peer has to be told reason
	streams  map[uint64]*muxStream
	fresh    map[*muxStream]struct{} // opened here, and nothing sent yet: no number, thus not in streams
	next     uint64                  // the next stream that this side begins
	peerNext uint64                  // and the peer
	opened   int                     // streams of this side that have not ended
	accepted int                     // and of the peer
	maxOpen  int                     // how many the peer takes
	credit   int64                   // what this side may still send
	starved  []*muxStream

	wake    sync.Cond // of the writing goroutine
	urgent  []byte    // frames that go first
	bulk    []byte    // frames that follow
	batch   uint64    // number of the bulk
	waiting []*muxStream

	pinging  bool // a ping is due or on its way
	dirty    bool // streams have sent since the last ping
	pinged   time.Time
	pingTime *time.Timer

	incoming   []*muxStream
	incomingCh chan struct{}
	datagrams  [][]byte
	dgramBytes int
	dgramCh    chan struct{}
}

// muxBuffers holds batches.
var muxBuffers = sync.Pool{New: func() any {
	b := make([]byte, 0, muxBatch+1<<10)
	return &b
}}

// newMux makes a carrier of a connection whose handshake is over. dialled says which side this is. The peer may have
// maxIncoming streams open at a time.
func newMux(conn *tls.Conn, raw *corkConn, dialled bool, l Limits, maxIncoming int) *mux {
	m := &mux{
		conn: conn, raw: raw, state: conn.ConnectionState(), idle: l.IdleTimeout, maxIncoming: maxIncoming,
		window: max(l.FlowWindow, initialFlowWindow), session: max(l.SessionWindow, initialSessionWindow),
		doneCh: make(chan struct{}), streams: make(map[uint64]*muxStream), fresh: make(map[*muxStream]struct{}), credit: initialSessionWindow, maxOpen: 1,
		next: 2, peerNext: 1, batch: 1,
		incomingCh: make(chan struct{}, 1), dgramCh: make(chan struct{}, 1),
	}
	m.wake.L = &m.mu
	if dialled {
		m.next, m.peerNext = 1, 2
	}
	m.granted.Store(int64(m.session))
	m.urgent = appendMuxNumber(nil, muxLimits, 0, 4, uint64(maxIncoming))
	if more := m.session - initialSessionWindow; more > 0 {
		m.urgent = appendMuxNumber(m.urgent, muxWindow, 0, 4, min(uint64(more), 1<<32-1))
	}
	m.pinging, m.pinged = true, time.Now()
	m.urgent = m.appendPing(m.urgent)
	return m
}

// start begins to read and write.
func (m *mux) start() {
	m.wg.Go(m.write)
	m.wg.Go(func() { m.read(bufio.NewReaderSize(&idleReader{m: m}, muxReadBuffer)) })
}

func (m *mux) openStream() (stream, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed != nil {
		return nil, m.failed
	}
	if m.opened >= m.maxOpen || m.next > maxMuxStream {
		return nil, errStreamLimit
	}
	m.opened++
	s := newMuxStream(m, 0, true)
	m.fresh[s] = struct{}{}
	return s, nil
}

func (m *mux) acceptStream(ctx context.Context) (stream, error) {
	for {
		m.mu.Lock()
		if m.failed != nil {
			m.mu.Unlock()
			return nil, m.failed
		}
		if len(m.incoming) > 0 {
			s := m.incoming[0]
			m.incoming[0] = nil
			m.incoming = m.incoming[1:]
			m.mu.Unlock()
			return s, nil
		}
		m.mu.Unlock()
		select {
		case <-m.incomingCh:
		case <-m.doneCh:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (m *mux) close(reason CloseReason) {
	m.fail(&SessionError{Reason: reason}, reason, true)
	m.wg.Wait()
}

func (m *mux) abandon(err error) {
	m.fail(&SessionError{Reason: CloseInternal, Err: err}, CloseInternal, true)
}

// fail ends the carrier; tell has the peer told the reason. Only the first call counts.
func (m *mux) fail(err error, reason CloseReason, tell bool) {
	m.mu.Lock()
	if m.failed != nil {
		m.mu.Unlock()
		return
	}
	m.failed, m.reason, m.tell = err, reason, tell
	close(m.doneCh)
	if m.pingTime != nil {
		m.pingTime.Stop()
	}
	open := slices.AppendSeq(slices.Collect(maps.Values(m.streams)), maps.Keys(m.fresh))
	lost := &FlowError{Result: ResultSessionLost, Err: err}
	for _, s := range open {
		s.endSendLocked(lost)
	}
	m.streams, m.fresh, m.waiting, m.starved, m.incoming, m.bulk = nil, nil, nil, nil, nil, nil
	m.wake.Broadcast()
	m.mu.Unlock()
	// The writer may hang in a write, the reader always does.
	m.conn.SetDeadline(time.Now().Add(muxLinger)) //nolint:errcheck // it is closed, then
	if !tell {
		m.raw.Close() //nolint:errcheck // nothing is left to lose
	}
	for _, s := range open {
		s.endReceive(lost)
	}
}

func (m *mux) done() <-chan struct{} { return m.doneCh }

func (m *mux) err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.failed
}

func (m *mux) kind() Carrier                 { return CarrierTCP }
func (m *mux) tlsState() tls.ConnectionState { return m.state }
func (m *mux) rtt() time.Duration            { return time.Duration(m.srtt.Load()) }
func (m *mux) heard() uint64                 { return m.frames.Load() }
func (m *mux) dropped() uint64               { return m.lost.Load() }
func (m *mux) maxDatagram() int              { return maxMuxDatagram }
func (m *mux) localAddr() net.Addr           { return m.raw.LocalAddr() }
func (m *mux) remoteAddr() net.Addr          { return m.raw.RemoteAddr() }

func (m *mux) sendDatagram(b []byte) error {
	if len(b) > maxMuxDatagram {
		return errDatagramTooLarge
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed != nil {
		return m.failed
	}
	if len(m.urgent)+len(b) > muxUrgent {
		m.lost.Add(1)
		return errDatagramDropped
	}
	m.urgent = append(appendMuxHeader(m.urgentLocked(), muxHeader{muxDatagram, len(b), 0}), b...)
	m.sentLocked()
	return nil
}

func (m *mux) receiveDatagram(ctx context.Context) ([]byte, error) {
	for {
		m.mu.Lock()
		if len(m.datagrams) > 0 {
			b := m.datagrams[0]
			m.datagrams[0] = nil
			m.datagrams = m.datagrams[1:]
			m.dgramBytes -= len(b)
			m.mu.Unlock()
			return b, nil
		}
		err := m.failed
		m.mu.Unlock()
		if err != nil {
			return nil, err
		}
		select {
		case <-m.dgramCh:
		case <-m.doneCh:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// keepDatagram queues a datagram for its reader.
func (m *mux) keepDatagram(b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.datagrams) >= muxDatagrams || m.dgramBytes+len(b) > muxDatagramBytes {
		m.lost.Add(1)
		return
	}
	m.datagrams = append(m.datagrams, b)
	m.dgramBytes += len(b)
	notify(m.dgramCh)
}

// notify wakes whoever waits for ch, which has room for one element.
func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
