package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// A datagram is a context id (u32) and a packet. What does not fit into one, and what is about the flow, goes over the
// flow's stream as messages of
//
//	0      type (u8)
//	1..2   length n (u16), at most 65,507
//	3..    n bytes
//
// See SPEC.md, "Packets".
const (
	contextIDLen     = 4
	messageHeaderLen = 3

	messagePacket      = 0x01 // a packet
	messageUnreachable = 0x02 // u8 code
	messageSkippable   = 0x80 // types from here on are skipped if they are not known
	messageNoRoom      = 0x80 // empty; packets of the flow were dropped

	// receiveQueue and receiveQueueBytes bound what waits in a flow for its reader. Full: new packets are dropped.
	receiveQueue      = 4096
	receiveQueueBytes = 1 << 20
	// sendQueue and sendQueueBytes bound what waits in a flow for its stream. Full: new packets are dropped.
	sendQueue      = 64
	sendQueueBytes = 512 << 10
	// lossWindow is over how many packets of a flow it is looked at how many the session had no room for, and lossShare the
	// part of them, one in so many, from which on the flow had better go over another session.
	lossWindow = 64
	lossShare  = 16
	// packetCloseGrace is how long Close waits for messages that are under way.
	packetCloseGrace = 2 * time.Second
)

// PacketDrops counts the packets that were dropped, by why. Several sessions may share one.
type PacketDrops struct {
	// Unknown: datagrams shorter than their header, or for a flow that is not there (any more).
	Unknown atomic.Uint64
	// Receive: the flow's reader was too slow.
	Receive atomic.Uint64
	// Send: the connection below the session took no more datagrams.
	Send atomic.Uint64
	// Stream: packets longer than a datagram came faster than the flow's stream carried them.
	Stream atomic.Uint64
}

// packetTable holds a session's flows of packets. The zero value is ready.
type packetTable struct {
	drops *PacketDrops // nil: nobody wants to know

	mu    sync.RWMutex // guards the fields below
	last  uint64       // context id given out last
	flows map[uint32]*packetConn
}

// begin enters p under a context id that was never used. The error is a *FlowError.
func (t *packetTable) begin(p *packetConn) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == math.MaxUint32 {
		return &FlowError{Result: ResultLimit, Err: errors.New("the session has used up its context ids")}
	}
	t.last++
	p.id = uint32(t.last)
	return t.enterLocked(p)
}

// enter enters p under the context id that the peer gave it.
func (t *packetTable) enter(p *packetConn) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flows[p.id] != nil {
		return malformed("context id %d is in use", p.id)
	}
	return t.enterLocked(p)
}

// enterLocked starts the session's reading of datagrams with its first flow of packets.
func (t *packetTable) enterLocked(p *packetConn) error {
	if t.flows == nil {
		if !p.s.spawn(p.s.routePackets) {
			return &FlowError{Result: ResultSessionLost, Err: p.s.Err()}
		}
		t.flows = map[uint32]*packetConn{}
	}
	t.flows[p.id] = p
	return nil
}

func (t *packetTable) remove(p *packetConn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flows[p.id] == p {
		delete(t.flows, p.id)
	}
}

// deliver hands a datagram, which it keeps, to its flow.
func (t *packetTable) deliver(b []byte) {
	if len(b) >= contextIDLen {
		t.mu.RLock()
		p := t.flows[binary.BigEndian.Uint32(b)]
		t.mu.RUnlock()
		if p != nil {
			p.receive(b[contextIDLen:])
			return
		}
	}
	t.dropped(func(d *PacketDrops) *atomic.Uint64 { return &d.Unknown })
}

func (t *packetTable) dropped(why func(*PacketDrops) *atomic.Uint64) {
	if t.drops != nil {
		why(t.drops).Add(1)
	}
}

// routePackets hands datagrams to their flows until the session ends.
func (s *session) routePackets() {
	for {
		b, err := s.car.receiveDatagram(context.Background())
		if err != nil {
			return
		}
		s.packets.deliver(b)
	}
}

// carriesPackets reports whether flows of kind k are of packets.
func (k FlowKind) carriesPackets() bool { return k == KindUDP || k == KindICMP || k == KindIngressUDP }

// OpenPacket opens a flow of packets, KindUDP, KindICMP or KindIngressUDP, and waits for the peer's answer, or until ctx ends, as Open does.
// A context id is used once in a session. The error is a *FlowError.
func (s opener) OpenPacket(ctx context.Context, f Flow) (PacketConn, error) {
	if err := ctx.Err(); err != nil {
		return nil, cancelledError(ctx)
	}
	if s.Err() != nil {
		return nil, &FlowError{Result: ResultSessionLost, Err: s.Err()}
	}
	if !f.Kind.carriesPackets() {
		return nil, &FlowError{Result: ResultUnsupported, Err: fmt.Errorf("kind %d is no kind of packets", f.Kind)}
	}
	if r := s.beginFlow(); r != ResultOK {
		return nil, &FlowError{Result: r}
	}
	p := newPacketConn(s.session, s.LocalAddr(), flowAddr{canonicalHost(f.Host), f.Port}, s.endFlow)
	p.opener = true
	err := s.packets.begin(p) // before the peer can send
	if err == nil {
		f.context = p.id
		p.st, err = s.open(ctx, f)
	}
	if err != nil {
		s.packets.remove(p)
		s.endFlow()
		return nil, err
	}
	p.start()
	return p, nil
}

// AcceptPacket says that the destination of a flow of packets is there and returns the flow. The caller must close it.
func (in *Incoming) AcceptPacket() (PacketConn, error) {
	if !in.flow.Kind.carriesPackets() {
		return nil, fmt.Errorf("tunnel: accept flow: kind %d is no kind of packets", in.flow.Kind)
	}
	s := in.conn.s
	p := newPacketConn(s, in.conn.local, in.conn.remote, func() {
		if in.conn.closed.CompareAndSwap(false, true) {
			s.endFlow()
		}
	})
	p.id, p.st = in.flow.context, in.conn.stream
	if err := s.packets.enter(p); err != nil { // before the edge learns that it may send
		in.Reject(ResultMalformed) //nolint:errcheck // says that it was answered
		return nil, fmt.Errorf("tunnel: accept flow: %w", err)
	}
	if !in.answered.CompareAndSwap(false, true) {
		s.packets.remove(p)
		return nil, errAnswered
	}
	if _, err := p.st.Write([]byte{byte(ResultOK)}); err != nil {
		s.packets.remove(p)
		in.conn.Reset(ResultReset)
		return nil, fmt.Errorf("tunnel: accept flow: %w", err)
	}
	in.packets = p
	p.start()
	return p, nil
}
