package control

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// resolverHost and resolverPort are how a connector is asked for its site's name server.
	resolverHost = "_dns"
	resolverPort = 53

	// openPatience is how long one session may take to open a flow of packets before the next one is tried. They are not
	// tried side by side: a UDP association is used by one flow at a time, and the newer one would win.
	openPatience = 2 * time.Second
	// moveTime is how long a flow of packets looks for another session. The connector keeps the association for about as long.
	moveTime = 10 * time.Second
	// movePause is how long it waits between two tries.
	movePause = 100 * time.Millisecond
	// maxHeld bounds the packets that wait while a flow moves. More are dropped.
	maxHeld = 32
	// doubtTime, or four round-trip times, is how long a session that fell silent may take to show that it lives, before its
	// flows of packets leave it.
	doubtTime = 500 * time.Millisecond
	// maxQuickMoves is how often in a row a flow moves that does not live for a second.
	maxQuickMoves = 5
)

// packetNumbers are the metrics of flows of packets.
type packetNumbers struct {
	moves  *prometheus.CounterVec
	echoes *prometheus.CounterVec
	drops  tunnel.PacketDrops

	moveTime atomic.Int64 // nanoseconds; tests shorten it
}

func newPacketNumbers() *packetNumbers {
	n := &packetNumbers{
		moves: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_udp_moves_total",
			Help: "UDP flows that went on over another session, or could not, by result (ok, failed)."}, []string{"result"}),
		echoes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_echoes_total",
			Help: "Pings through tunnels, by result (ok, timed_out, unreachable, time_exceeded, failed)."}, []string{"result"}),
	}
	n.moveTime.Store(int64(moveTime))
	return n
}

func (n *packetNumbers) collectors() []prometheus.Collector {
	list := []prometheus.Collector{n.moves, n.echoes}
	for _, d := range []struct {
		why   string
		count func() uint64
	}{{"unknown", n.drops.Unknown.Load}, {"receive", n.drops.Receive.Load}, {"send", n.drops.Send.Load}, {"stream", n.drops.Stream.Load}} {
		list = append(list, prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "keyhaven_edge_packets_dropped_total",
			Help:        "Packets that the tunnel dropped on this side, by why (unknown flow, receive queue, send queue, stream queue).",
			ConstLabels: prometheus.Labels{"reason": d.why}}, func() float64 { return float64(d.count()) }))
	}
	return list
}

// Drops counts the packets that the sessions of this edge drop. It is made for [tunnel.ListenConfig].
func (c *Control) Drops() *tunnel.PacketDrops { return &c.packets.drops }

// DialPacket opens a UDP flow to where q says, as [Control.Dial] does for flows of bytes. When the session under it is lost,
// falls silent or drains, the flow goes on over another one, of the same connector if it can, where the destination sees no
// difference; what is sent meanwhile waits, as far as there is room. The flow is a [tunnel.Drainer] that asks to leave
// when the routes change, and a [tunnel.PacketReceiver].
func (c *Control) DialPacket(ctx context.Context, q Query) (tunnel.PacketConn, error) {
	var id [16]byte
	rand.Read(id[:]) //nolint:errcheck // never fails
	conn, r, err := c.openPacket(ctx, q, packetKind(q), id, "")
	c.dials.WithLabelValues(dialResult(err)).Inc()
	if err != nil {
		return nil, err
	}
	p := &packetFlow{c: c, id: id, conn: conn, record: r, changed: make(chan struct{}), doubt: make(chan struct{}, 1), leave: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.running.Go(p.keep)
	return p, nil
}

// packetKind is the kind of flow that answers q.
func packetKind(q Query) tunnel.FlowKind {
	if q.Tunnel != "" && !q.Resolver {
		return tunnel.KindIngressUDP
	}
	return tunnel.KindUDP
}

// openInTurn opens p's flow on the first candidate that can.
func (p plan) openInTurn(ctx context.Context, list []candidate) (conn tunnel.PacketConn, via candidate, err error) {
	for i, k := range list {
		try, cancel := ctx, context.CancelFunc(func() {})
		if i < len(list)-1 {
			try, cancel = context.WithTimeout(ctx, max(openPatience, 4*k.rtt()))
		}
		conn, err = p.openPacketOn(try, k)
		cancel()
		if err == nil {
			return conn, k, nil
		}
		if ctx.Err() != nil || try.Err() == nil && !elsewhere(ctx, err) {
			break
		}
	}
	return nil, candidate{}, err
}

func (p plan) openPacketOn(ctx context.Context, k candidate) (tunnel.PacketConn, error) {
	s, err := k.session(ctx)
	if err != nil {
		return nil, err
	}
	return s.OpenPacket(ctx, p.flowNow(ctx))
}

// A packetFlow is a UDP flow that moves from session to session.
type packetFlow struct {
	c       *Control
	id      [16]byte
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup
	doubt   chan struct{} // holds a value when a packet was sent over a session that is suspect
	leave   chan struct{} // closed when the routes send the flow elsewhere
	leaving sync.Once

	mu       sync.Mutex // guards the fields below
	conn     tunnel.PacketConn
	record   *record
	changed  chan struct{} // closed, and replaced, when one of these changes
	err      error         // why it is all over
	closed   bool
	deadline time.Time
	held     [][]byte // packets that wait for a session
}

// keep moves the flow when it must, until it ends.
func (p *packetFlow) keep() {
	quick, stuck := 0, false
	for {
		p.mu.Lock()
		conn, r := p.conn, p.record
		p.mu.Unlock()
		began := time.Now()
		why := p.watch(conn, r, stuck)
		if time.Since(began) > time.Second {
			quick = 0
		}
		if quick++; !movable(why) || quick > maxQuickMoves {
			p.finish(why)
			return
		}
		lives := why == errDrains || why == errSilent || why == errNoRoom
		if !lives {
			r.forget() // its place is the next one's
		}
		q := r.plan.q
		if why == errNoRoom {
			q = overTCP(q)
		}
		err := p.move(conn, r, q)
		if p.ctx.Err() != nil {
			return
		}
		if err != nil && lives {
			stuck, quick = stuck || why == errDrains, 0
			continue
		}
		if err != nil {
			p.c.packets.moves.WithLabelValues("failed").Inc()
			p.c.log.Debug("flow of packets lost", "vnet", r.plan.flow.VNet, "err", err)
			p.finish(why)
			return
		}
		p.c.packets.moves.WithLabelValues("ok").Inc()
		stuck = false
	}
}

// Why a flow of packets leaves a session that is still there.
var (
	errDrains = errors.New("control: the session drains")
	errSilent = errors.New("control: nothing is heard of the session")
	errNoRoom = errors.New("control: the session has too little room for packets")
)

// movable reports whether a flow that ended with err can go on elsewhere. A reset is how another edge says that its session
// was lost.
func movable(err error) bool {
	return err == errDrains || err == errSilent || err == errNoRoom || errors.Is(err, tunnel.ErrSessionLost) || errors.Is(err, tunnel.ErrReset)
}

// watch waits until the flow has to move, or has ended, and says why. A stuck one does not move for a drain.
func (p *packetFlow) watch(conn tunnel.PacketConn, r *record, stuck bool) error {
	ender := conn.(tunnel.Ender) // all flows of sessions are
	leave := r.leave
	if stuck {
		leave = nil
	}
	var noRoom <-chan struct{}
	if q, ok := conn.(tunnel.Squeezer); ok {
		noRoom = q.NoRoom()
	}
	for {
		select {
		case <-ender.Ended():
			return ender.Err()
		case <-leave:
			if !p.c.astray(r) {
				return errDrains
			}
			leave = nil
			p.leaving.Do(func() { close(p.leave) })
		case <-p.doubt:
			if k := r.via.Load(); k != nil && p.silent(*k) {
				return errSilent
			}
		case <-noRoom:
			if p.c.roomier(r) {
				return errNoRoom
			}
		case <-p.ctx.Done():
			return net.ErrClosed
		}
	}
}

// roomier reports whether a flow of packets that QUIC has too little room for can go over TCP. If there is no such session,
// one is asked for.
func (c *Control) roomier(r *record) bool {
	k := r.via.Load()
	if k == nil || k.l == nil || k.carrier() == tunnel.CarrierTCP || r.plan.q.Carrier != "" || c.bulk.mode == BulkQUIC {
		return false
	}
	if slices.ContainsFunc(c.reg.ofConnector(r.plan.tunnel, k.connector()), func(l *live) bool {
		return l.s.Carrier() == tunnel.CarrierTCP && !l.s.Draining() && !l.s.Suspect()
	}) {
		return true
	}
	c.bulk.await(k.l)
	return false
}

// overTCP is q for a flow of packets that needs the room.
func overTCP(q Query) Query {
	q.Carrier, q.Class = tunnel.CarrierTCP, tunnel.ClassBulk
	return q
}

// silent reports whether the session stays suspect though it is asked for a sign of life.
func (p *packetFlow) silent(k candidate) bool {
	if !k.owes() {
		return false
	}
	if k.l != nil {
		k.l.prove()
	}
	tick := time.NewTicker(doubtTime / 10)
	defer tick.Stop()
	for end := time.Now().Add(max(doubtTime, 4*k.rtt())); time.Now().Before(end); {
		select {
		case <-tick.C:
		case <-p.ctx.Done():
			return false
		}
		if !k.owes() {
			return false
		}
	}
	return true
}

// owes reports whether the session that carries a flow is itself suspect.
func (k candidate) owes() bool {
	if k.l != nil {
		return k.l.Suspect()
	}
	return k.e.suspect()
}

// move opens the flow again, as q has it, and puts it in place of conn.
func (p *packetFlow) move(conn tunnel.PacketConn, r *record, q Query) error {
	ctx, cancel := context.WithTimeout(p.ctx, time.Duration(p.c.packets.moveTime.Load()))
	defer cancel()
	connector := ""
	if k := r.via.Load(); k != nil {
		connector = k.connector()
	}
	for {
		next, nr, err := p.c.openPacket(ctx, q, packetKind(q), p.id, connector)
		if err == nil {
			nr.in.Store(r.in.Load())
			nr.out.Store(r.out.Load())
			nr.since = r.since
			p.replace(next, nr)
			r.forget()
			conn.Close() //nolint:errcheck // nobody uses it any more
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(movePause):
		}
		if e, ok := errors.AsType[*Error](err); ok && e.Code != CodeTunnelDown {
			return err // the routes do not lead there any more
		}
	}
}

// replace puts a new conn to use and sends what has waited for it.
func (p *packetFlow) replace(conn tunnel.PacketConn, r *record) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		conn.Close() //nolint:errcheck // nobody uses it
		r.forget()
		return
	}
	p.conn, p.record = conn, r
	conn.SetReadDeadline(p.deadline) //nolint:errcheck // a read says so
	held := p.held
	p.held = nil
	p.changeLocked()
	p.mu.Unlock()
	for _, b := range held {
		if conn.WritePacket(b) != nil {
			return
		}
	}
}

func (p *packetFlow) changeLocked() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// finish ends the flow for good.
func (p *packetFlow) finish(why error) {
	if why == nil {
		why = io.EOF
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.err = why
	p.held = nil
	p.record.forget()
	p.changeLocked()
}

// ReceivePacket implements [tunnel.PacketReceiver].
func (p *packetFlow) ReceivePacket() ([]byte, error) {
	for {
		p.mu.Lock()
		conn, r, changed, over, closed, deadline := p.conn, p.record, p.changed, p.err, p.closed, p.deadline
		p.mu.Unlock()
		if closed {
			return nil, net.ErrClosed
		}
		b, err := tunnel.ReceivePacket(conn)
		if err == nil {
			r.got(len(b))
			return b, nil
		}
		if _, ok := errors.AsType[*tunnel.UnreachableError](err); ok {
			return nil, err
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if !expired(deadline) {
				continue // it was set anew
			}
			return nil, err
		}
		if over != nil {
			return nil, over
		}
		if !await(changed, deadline) {
			return nil, os.ErrDeadlineExceeded
		}
	}
}

func expired(deadline time.Time) bool { return !deadline.IsZero() && !time.Now().Before(deadline) }

// await waits for changed, and reports false if the deadline comes first.
func await(changed <-chan struct{}, deadline time.Time) bool {
	if deadline.IsZero() {
		<-changed
		return true
	}
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	select {
	case <-changed:
		return true
	case <-t.C:
		return false
	}
}

// ReadPacket implements [tunnel.PacketConn].
func (p *packetFlow) ReadPacket(b []byte) (int, error) {
	packet, err := p.ReceivePacket()
	return copy(b, packet), err
}

// WritePacket implements [tunnel.PacketConn].
func (p *packetFlow) WritePacket(b []byte) error {
	p.mu.Lock()
	conn, r := p.conn, p.record
	p.mu.Unlock()
	err := conn.WritePacket(b)
	if err == nil {
		r.sent(len(b))
		if k := r.via.Load(); k != nil && k.owes() {
			select {
			case p.doubt <- struct{}{}:
			default:
			}
		}
	}
	if err == nil || errors.Is(err, tunnel.ErrPacketTooLong) {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return net.ErrClosed
	case p.err != nil:
		return err
	case p.conn != conn:
		return p.conn.WritePacket(b)
	case len(p.held) < maxHeld:
		p.held = append(p.held, slices.Clone(b))
	}
	return nil
}

// SetReadDeadline implements [tunnel.PacketConn].
func (p *packetFlow) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return net.ErrClosed
	}
	p.deadline = t
	p.changeLocked()
	return p.conn.SetReadDeadline(t)
}

// LocalAddr implements [tunnel.PacketConn].
func (p *packetFlow) LocalAddr() net.Addr { return p.current().LocalAddr() }

// RemoteAddr implements [tunnel.PacketConn].
func (p *packetFlow) RemoteAddr() net.Addr { return p.current().RemoteAddr() }

// Unreachable implements [tunnel.PacketConn].
func (p *packetFlow) Unreachable(code byte) { p.current().Unreachable(code) }

func (p *packetFlow) current() tunnel.PacketConn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn
}

// Draining implements [tunnel.Drainer].
func (p *packetFlow) Draining() <-chan struct{} { return p.leave }

// Close implements [tunnel.PacketConn].
func (p *packetFlow) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	conn, r := p.conn, p.record
	p.changeLocked()
	p.mu.Unlock()
	p.cancel()
	conn.Close() //nolint:errcheck // nothing to save
	r.forget()
	p.running.Wait()
	return nil
}
