package connector

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/connector/ingress"
	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

const (
	// defaultUDPIdle is how long a flow of packets may carry nothing. The edge ends it earlier where its port says so.
	defaultUDPIdle = 5 * time.Minute
	// udpKeep is how long a socket whose session was lost waits for its flow to come back over another.
	udpKeep = 10 * time.Second
	// maxKept bounds the sockets that wait. More are closed at once.
	maxKept = 4096
)

// errTakenOver ends a flow whose socket a newer one has.
var errTakenOver = errors.New("a newer flow has taken the association over")

// A udpKey names an association that may move from session to session.
type udpKey struct {
	id   [16]byte
	vnet vnet.ID
	host string
	port uint16
}

// A udpSocket is a connected socket, used by one flow at a time.
type udpSocket struct {
	*net.UDPConn
	to      netip.AddrPort
	service *ingress.PacketOrigin   // whose socket it is; nil: it is no ingress rule's
	cut     context.CancelCauseFunc // of the flow that uses it; nil: it waits for one

	free   chan struct{} // closed when the flow that uses it lets go
	wanted bool          // a newer flow waits for free
	expiry *time.Timer   // closes it when nobody came
}

// Close closes the socket.
func (s *udpSocket) Close() error {
	if s.service != nil {
		return s.service.Close()
	}
	return s.UDPConn.Close()
}

// udpTable holds the sockets of associations that have a name. The zero value is ready.
type udpTable struct {
	mu      sync.Mutex // guards the fields below
	sockets map[udpKey]*udpSocket
	kept    int
	closed  bool
}

// take returns the association's socket, if there is one, and puts it into the hands of the flow that cut cuts. A flow
// that has it is cut, and waited for.
func (t *udpTable) take(ctx context.Context, k udpKey, cut context.CancelCauseFunc) (*udpSocket, error) {
	for {
		t.mu.Lock()
		s := t.sockets[k]
		if s == nil || s.cut == nil {
			if s != nil {
				s.expiry.Stop()
				s.cut, s.free, s.wanted = cut, make(chan struct{}), false
				t.kept--
			}
			t.mu.Unlock()
			return s, nil
		}
		s.wanted = true
		s.cut(errTakenOver)
		free := s.free
		t.mu.Unlock()
		select {
		case <-free:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// enter makes s the association's socket, unless there is one by now.
func (t *udpTable) enter(k udpKey, s *udpSocket) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.sockets[k] != nil {
		return
	}
	if t.sockets == nil {
		t.sockets = map[udpKey]*udpSocket{}
	}
	t.sockets[k] = s
}

// leave takes s from the flow that used it. If keep, or if a newer flow wants it, it stays open for a while.
func (t *udpTable) leave(k udpKey, s *udpSocket, keep bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	close(s.free)
	if t.sockets[k] != s {
		s.Close() //nolint:errcheck // nothing to lose
		return
	}
	if t.closed || !keep && !s.wanted || t.kept >= maxKept || s.SetReadDeadline(time.Time{}) != nil {
		delete(t.sockets, k)
		s.Close() //nolint:errcheck // nothing to lose
		return
	}
	t.kept++
	s.cut = nil
	s.expiry = time.AfterFunc(udpKeep, func() { t.expire(k, s) })
}

func (t *udpTable) expire(k udpKey, s *udpSocket) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.cut != nil || t.sockets[k] != s {
		return // somebody came in the last moment
	}
	delete(t.sockets, k)
	t.kept--
	s.Close() //nolint:errcheck // nothing to lose
}

// close closes the sockets that wait. No flow may be open.
func (t *udpTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	for _, s := range t.sockets {
		if s.expiry != nil {
			s.expiry.Stop()
		}
		s.Close() //nolint:errcheck // nothing to lose
	}
	t.sockets, t.kept = nil, 0
}

// serveUDP connects a flow's socket, accepts the flow, and serves it to its end. An error means that the flow is not
// answered yet.
func (c *Connector) serveUDP(ctx context.Context, in incoming, start time.Time) error {
	flowCtx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	fl := in.Flow()
	k := udpKey{fl.ID, fl.VNet, fl.Host, fl.Port}
	t, sock, err := c.openUDP(ctx, in, k, cut)
	if err != nil {
		return err
	}
	f := &flow{target: t, to: sock.to, cut: cut}
	if !c.flows.add(f, &c.allow) {
		c.udp.leave(k, sock, false)
		return errDenied
	}
	defer c.flows.remove(f)
	keep := c.carryUDP(flowCtx, in, sock, start)
	c.udp.leave(k, sock, keep || ctx.Err() != nil)
	return nil
}

// carryUDP accepts a flow, whose socket is connected, and serves it to its end. It reports whether the socket should stay for
// a flow to come.
func (c *Connector) carryUDP(ctx context.Context, in incoming, sock *udpSocket, start time.Time) (keep bool) {
	f := in.Flow()
	c.metrics.observe(tunnel.ResultOK, time.Since(start))
	conn, err := in.AcceptPacket()
	if err != nil {
		c.log.Debug("flow was given up before it began", "vnet", f.VNet, "host", f.Host, "to", sock.to, "err", err)
		return true // the edge may be trying another session already
	}
	u := &udpFlow{conn: conn, sock: sock, idle: newIdle(c.cfg.UDPIdle, sock.cut), packets: c.metrics.udp}
	err = u.carry(ctx)
	c.log.Debug("flow of packets ended", "vnet", f.VNet, "host", f.Host, "to", sock.to, "dur", time.Since(start), "err", err)
	return errors.Is(err, tunnel.ErrSessionLost)
}

// openUDP returns the association's socket: the one it had, or a new one.
func (c *Connector) openUDP(ctx context.Context, in incoming, k udpKey, cut context.CancelCauseFunc) (target, *udpSocket, error) {
	t, err := c.target(in.Flow())
	if err != nil {
		return t, nil, err
	}
	addrs, err := c.locate(ctx, in, t)
	if err != nil {
		return t, nil, err
	}
	s, err := c.udp.associate(ctx, k, cut, func() (*udpSocket, error) {
		conn, err := c.dialer.net.DialUDP(ctx, "udp", netip.AddrPort{}, addrs[0])
		return &udpSocket{UDPConn: conn, to: addrs[0]}, err
	})
	return t, s, err
}

// associate returns an association's socket: the one it had, or the one that dial makes.
func (t *udpTable) associate(ctx context.Context, k udpKey, cut context.CancelCauseFunc, dial func() (*udpSocket, error)) (*udpSocket, error) {
	named := k.id != [16]byte{}
	if named {
		if s, err := t.take(ctx, k, cut); err != nil || s != nil {
			return s, err
		}
	}
	s, err := dial()
	if err != nil {
		return nil, err
	}
	s.cut, s.free = cut, make(chan struct{})
	if named {
		t.enter(k, s)
	}
	return s, nil
}

// A udpFlow carries packets between a flow and a socket.
type udpFlow struct {
	conn    tunnel.PacketConn
	sock    *udpSocket
	idle    *idle
	packets *packetCounters
	out, in func([]byte) error // pass a packet on, to the socket and to the flow
}

// carry returns when the flow has ended, and says why. The socket stays open.
func (u *udpFlow) carry(ctx context.Context) error {
	u.out, u.in = u.send, u.conn.WritePacket
	if s := u.sock.service; s != nil {
		out, in := s.ToService(u.out), s.ToVisitor(u.in)
		defer out.Close()
		defer in.Close()
		u.out, u.in = out.Pass, in.Pass
	}
	stop := context.AfterFunc(ctx, func() { u.conn.Close() })
	var wg sync.WaitGroup
	wg.Go(u.fromSocket)
	err := u.toSocket()
	stop()
	u.idle.stop()
	u.sock.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // it is closed, then
	wg.Wait()
	u.conn.Close() //nolint:errcheck // nothing to lose
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if err == io.EOF {
		return nil
	}
	return err
}

func (u *udpFlow) toSocket() error {
	for {
		b, err := tunnel.ReceivePacket(u.conn)
		if err != nil {
			if _, ok := errors.AsType[*tunnel.UnreachableError](err); ok {
				continue // sockets cannot pass it on
			}
			return err
		}
		u.idle.touch()
		if err := u.out(b); err != nil {
			return err
		}
	}
}

// send sends a packet to the destination. An error is the end of the socket.
func (u *udpFlow) send(b []byte) error {
	_, err := u.sock.Write(b)
	if refusedBefore(err) { // what is reported in place of sending is about an earlier packet
		u.conn.Unreachable(unreachableCode(err))
		_, err = u.sock.Write(b)
	}
	switch {
	case err == nil:
		u.packets.out(len(b))
	case errors.Is(err, net.ErrClosed):
		return err
	default:
		u.packets.bad.Inc()
		u.conn.Unreachable(unreachableCode(err))
	}
	return nil
}

func (u *udpFlow) fromSocket() {
	r, err := newPacketReader(u.sock.UDPConn)
	if err != nil {
		return
	}
	for {
		err := r.read(func(b []byte) error {
			u.idle.touch()
			u.packets.in(len(b))
			return u.in(b)
		})
		switch {
		case err == nil:
		case refusedBefore(err):
			u.idle.touch()
			u.conn.Unreachable(unreachableCode(err))
		case errors.Is(err, net.ErrClosed): // perhaps the socket, because its service is not permitted any more
			u.conn.Close() //nolint:errcheck // nothing to lose
			return
		default: // the flow or the socket has ended, or is to end
			return
		}
	}
}

// refusedBefore reports whether err says that somebody on the way refused an earlier packet.
func refusedBefore(err error) bool {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	switch resultOf(err) {
	case tunnel.ResultRefused, tunnel.ResultNoRoute:
		errno, ok := errors.AsType[syscall.Errno](err)
		return ok && errno != syscall.EADDRNOTAVAIL
	}
	return false
}

// unreachableCode is what the flow is told about a socket's error.
func unreachableCode(err error) byte {
	switch {
	case errors.Is(err, syscall.EMSGSIZE):
		return tunnel.UnreachableTooBig
	case errors.Is(err, syscall.ENETUNREACH):
		return tunnel.UnreachableNet
	}
	switch resultOf(err) {
	case tunnel.ResultRefused:
		return tunnel.UnreachablePort
	case tunnel.ResultDenied:
		return tunnel.UnreachableProhibited
	}
	return tunnel.UnreachableHost
}
