package tunnel

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// A packetEvent is a packet, or a report that one was refused.
type packetEvent struct {
	data    []byte
	refused bool
	code    byte
}

// packetConn is an open flow of packets. It implements PacketConn.
type packetConn struct {
	s             *session
	st            stream
	id            uint32
	local, remote net.Addr
	release       func() // called once, at the end of Close or Reset
	ended         chan struct{}
	running       sync.WaitGroup // the stream's reader and writer
	opener        bool           // this side opened the flow
	noRoom        chan struct{}  // holds a value after packets were dropped; of the opener
	tried, lost   atomic.Int64   // packets written since lossWindow began, and those that were dropped

	mu       sync.Mutex // guards the fields below
	arrived  sync.Cond  // on mu: there is something for ReadPacket
	in       []packetEvent
	inBytes  int
	err      error // why nothing will arrive any more
	deadline time.Time
	timer    *time.Timer
	out      [][]byte // encoded messages
	outBytes int
	writing  bool
	closed   bool
}

func newPacketConn(s *session, local, remote net.Addr, release func()) *packetConn {
	p := &packetConn{s: s, local: local, remote: remote, release: release, ended: make(chan struct{}), noRoom: make(chan struct{}, 1)}
	p.arrived.L = &p.mu
	return p
}

// start begins to read the stream, once the flow is open.
func (p *packetConn) start() { p.running.Go(p.readStream) }

func (p *packetConn) LocalAddr() net.Addr  { return p.local }
func (p *packetConn) RemoteAddr() net.Addr { return p.remote }

// Draining implements Drainer.
func (p *packetConn) Draining() <-chan struct{} { return p.s.drainCh }

// Ended implements Ender.
func (p *packetConn) Ended() <-chan struct{} { return p.ended }

// Err implements Ender.
func (p *packetConn) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// ReadPacket implements PacketConn.
func (p *packetConn) ReadPacket(b []byte) (int, error) {
	packet, err := p.ReceivePacket()
	return copy(b, packet), err
}

// ReceivePacket implements PacketReceiver.
func (p *packetConn) ReceivePacket() ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.closed:
			return nil, net.ErrClosed
		case !p.deadline.IsZero() && !time.Now().Before(p.deadline):
			return nil, os.ErrDeadlineExceeded
		case len(p.in) > 0:
			e := p.in[0]
			p.in[0] = packetEvent{}
			if p.in = p.in[1:]; len(p.in) == 0 {
				p.in = nil
			}
			p.inBytes -= len(e.data)
			if e.refused {
				return nil, &UnreachableError{e.code}
			}
			return e.data, nil
		case p.err != nil:
			return nil, p.err
		}
		p.arrived.Wait()
	}
}

// SetReadDeadline implements PacketConn.
func (p *packetConn) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return net.ErrClosed
	}
	p.deadline = t
	switch {
	case t.IsZero():
		if p.timer != nil {
			p.timer.Stop()
		}
	case p.timer == nil:
		p.timer = time.AfterFunc(time.Until(t), func() {
			p.mu.Lock() // a reader between its look at the clock and its wait would miss the call
			p.arrived.Broadcast()
			p.mu.Unlock()
		})
	default:
		p.timer.Reset(time.Until(t))
	}
	p.arrived.Broadcast()
	return nil
}

// receive queues a packet, which it keeps, for the reader.
func (p *packetConn) receive(b []byte) { p.queue(packetEvent{data: b}) }

func (p *packetConn) queue(e packetEvent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed || p.err != nil:
		p.s.packets.dropped(func(d *PacketDrops) *atomic.Uint64 { return &d.Unknown })
	case len(p.in) >= receiveQueue || p.inBytes+len(e.data) > receiveQueueBytes:
		p.s.packets.dropped(func(d *PacketDrops) *atomic.Uint64 { return &d.Receive })
	default:
		p.in = append(p.in, e)
		p.inBytes += len(e.data)
		p.arrived.Signal()
	}
}

var packetBuffers = sync.Pool{New: func() any { return new([contextIDLen + MaxPacket]byte) }}

// WritePacket implements PacketConn.
func (p *packetConn) WritePacket(b []byte) error {
	if len(b) > MaxPacket {
		return ErrPacketTooLong
	}
	p.mu.Lock()
	err := p.sendErrLocked()
	p.mu.Unlock()
	if err != nil {
		return err
	}
	p.s.expect()
	buf := packetBuffers.Get().(*[contextIDLen + MaxPacket]byte)
	binary.BigEndian.PutUint32(buf[:], p.id)
	n := copy(buf[contextIDLen:], b)
	err = p.s.car.sendDatagram(buf[:contextIDLen+n])
	packetBuffers.Put(buf)
	p.weigh(err)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errDatagramDropped):
		p.s.packets.dropped(func(d *PacketDrops) *atomic.Uint64 { return &d.Send })
		return nil
	case errors.Is(err, errDatagramTooLarge):
		return p.send(messagePacket, b)
	}
	return &FlowError{Result: ResultSessionLost, Err: err}
}

// NoRoom implements Squeezer.
func (p *packetConn) NoRoom() <-chan struct{} { return p.noRoom }

// weigh counts a packet that was written, and sees to it that the opener learns when too many of them were dropped.
func (p *packetConn) weigh(err error) {
	if errors.Is(err, errDatagramDropped) {
		p.lost.Add(1)
	}
	if p.tried.Add(1)%lossWindow != 0 || p.lost.Swap(0) < lossWindow/lossShare {
		return
	}
	if p.opener {
		notify(p.noRoom)
		return
	}
	p.send(messageNoRoom, nil) //nolint:errcheck // the flow has ended, then
}

// Unreachable implements PacketConn.
func (p *packetConn) Unreachable(code byte) {
	p.send(messageUnreachable, []byte{code}) //nolint:errcheck // the flow has ended, then
}

// sendErrLocked says why nothing can be sent.
func (p *packetConn) sendErrLocked() error {
	switch {
	case p.closed:
		return net.ErrClosed
	case p.err == io.EOF:
		return &FlowError{Result: ResultClosed, Remote: true}
	}
	return p.err
}

// send queues a message for the stream, or drops it.
func (p *packetConn) send(typ byte, b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.sendErrLocked(); err != nil {
		return err
	}
	if len(p.out) >= sendQueue || p.outBytes+len(b) > sendQueueBytes {
		p.s.packets.dropped(func(d *PacketDrops) *atomic.Uint64 { return &d.Stream })
		return nil
	}
	p.out = append(p.out, appendMessage(make([]byte, 0, messageHeaderLen+len(b)), typ, b))
	p.outBytes += len(b)
	if !p.writing {
		p.writing = true
		p.running.Go(p.writeStream)
	}
	return nil
}

func appendMessage(dst []byte, typ byte, b []byte) []byte {
	dst = append(dst, typ, byte(len(b)>>8), byte(len(b)))
	return append(dst, b...)
}

// writeStream writes the queued messages. After Close it ends the stream's sending direction too.
func (p *packetConn) writeStream() {
	for {
		p.mu.Lock()
		if len(p.out) == 0 {
			p.out, p.writing = nil, false
			closed := p.closed
			p.mu.Unlock()
			if closed {
				p.st.closeWrite()
			}
			return
		}
		b := p.out[0]
		p.out[0] = nil
		p.out = p.out[1:]
		p.outBytes -= len(b) - messageHeaderLen
		p.mu.Unlock()
		if _, err := p.st.Write(b); err != nil {
			p.st.abortWrite(ResultReset)
			p.fail(flowErrorOf(err))
			p.mu.Lock()
			p.out, p.writing = nil, false
			p.mu.Unlock()
			return
		}
	}
}

// readStream reads messages until the stream ends.
func (p *packetConn) readStream() {
	defer close(p.ended)
	for {
		typ, b, err := readMessage(p.st)
		switch {
		case err == io.EOF:
			p.fail(io.EOF)
			return
		case errors.Is(err, errMalformed):
			p.s.log.Warn("flow of packets broke the protocol", "err", err)
			p.st.abortRead(ResultMalformed)
			p.st.abortWrite(ResultMalformed)
			p.fail(&FlowError{Result: ResultMalformed, Err: err})
			return
		case err != nil:
			p.fail(flowErrorOf(err))
			return
		case typ == messagePacket:
			p.receive(b)
		case typ == messageNoRoom:
			notify(p.noRoom)
		case typ == messageUnreachable:
			p.queue(packetEvent{refused: true, code: b[0]})
		}
	}
}

// readMessage reads a message of a flow's stream. It returns io.EOF only between messages.
func readMessage(r io.Reader) (typ byte, body []byte, err error) {
	var h [messageHeaderLen]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if err == io.ErrUnexpectedEOF {
			err = malformed("message cut short")
		}
		return 0, nil, err
	}
	typ, n := h[0], int(binary.BigEndian.Uint16(h[1:]))
	switch {
	case n > MaxPacket:
		return 0, nil, malformed("message of %d bytes, at most %d allowed", n, MaxPacket)
	case typ == messageUnreachable && n != 1:
		return 0, nil, malformed("unreachable of %d bytes", n)
	case typ != messagePacket && typ != messageUnreachable && typ < messageSkippable:
		return 0, nil, malformed("message type 0x%02x", typ)
	}
	body = make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = malformed("message cut short")
		}
		return 0, nil, err
	}
	return typ, body, nil
}

// fail says that nothing will arrive any more, after what has.
func (p *packetConn) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
		p.arrived.Broadcast()
	}
}

// Close implements PacketConn. Packets that are on their way may be lost; reports of refusals are not.
func (p *packetConn) Close() error {
	p.shut(func(writing bool) {
		if writing { // the writer ends the stream after what is queued
			p.st.SetWriteDeadline(time.Now().Add(packetCloseGrace)) //nolint:errcheck // Write would fail too
		} else {
			p.st.closeWrite()
		}
		p.st.abortRead(ResultClosed)
	})
	return nil
}

// Reset implements Resetter.
func (p *packetConn) Reset(r Result) {
	p.shut(func(bool) {
		p.st.abortWrite(r)
		p.st.abortRead(r)
	})
}

// shut ends the flow with end, once, and waits for what runs.
func (p *packetConn) shut(end func(writing bool)) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.closed = true
	writing := p.writing
	p.in, p.inBytes = nil, 0
	if p.timer != nil {
		p.timer.Stop()
	}
	p.arrived.Broadcast()
	p.mu.Unlock()
	p.s.packets.remove(p)
	end(writing)
	p.running.Wait()
	p.release()
}
