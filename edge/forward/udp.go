package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/proxyproto"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	udpIdle = time.Minute
	// maxEarly and maxEarlyBytes bound what waits of a visitor for the service to be reached, and maxPortEarlyBytes what
	// waits of all visitors of a port; further packets are dropped.
	maxEarly          = 1024
	maxEarlyBytes     = 256 << 10
	maxPortEarlyBytes = 64 << 20
	// udpBuffer is what the system is asked to hold of packets that have not been read, in bytes.
	udpBuffer = 4 << 20
)

// openUDP binds a socket and serves until it is closed. The caller holds f.mu.
func (p *port) openUDP(ctx context.Context) error {
	addr, err := net.ResolveUDPAddr("udp", p.listen)
	if err != nil {
		return err
	}
	conn, err := net.ListenUDP("udp", addr)
	if err != nil {
		return err
	}
	_ = conn.SetReadBuffer(udpBuffer) // as much as the system permits
	p.closer, p.addr = conn, conn.LocalAddr()
	u := &udpPort{port: p, conn: conn, sessions: map[netip.AddrPort]*session{}}
	p.pause = u.drain
	p.f.running.Go(func() { u.run(ctx) })
	return nil
}

// A udpPort hands the packets of each visitor address to a session of its own. One visitor at most fills what is due to
// one address, and all visitors the port's limit: packets that would begin a session beyond are dropped and counted.
type udpPort struct {
	*port
	conn     *net.UDPConn
	draining atomic.Bool
	early    atomic.Int64 // bytes that wait for services to be reached

	mu       sync.Mutex // guards sessions
	sessions map[netip.AddrPort]*session
	wg       sync.WaitGroup
}

// drain lets sessions go on, until none is left, and begins none.
func (u *udpPort) drain() {
	u.draining.Store(true)
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.sessions) == 0 {
		_ = u.conn.Close()
	}
}

func (u *udpPort) run(ctx context.Context) {
	defer u.wg.Wait()
	stop := context.AfterFunc(ctx, func() { _ = u.conn.Close() })
	defer stop()
	buf := make([]byte, tunnel.MaxPacket+1)
	for {
		n, from, err := u.conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil { // such as an ICMP error of a visitor who has gone
			if ctx.Err() != nil {
				break
			}
			continue
		}
		if n > tunnel.MaxPacket {
			u.count.refused(refusedLong)
			continue
		}
		if s := u.session(ctx, from); s != nil {
			s.fromVisitor(buf[:n])
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, s := range u.sessions {
		s.cut(errRemoved)
	}
}

// session returns the session of a visitor, a new one if there is none, or nil if there can be none.
func (u *udpPort) session(ctx context.Context, from netip.AddrPort) *session {
	u.mu.Lock()
	defer u.mu.Unlock()
	if s := u.sessions[from]; s != nil {
		return s
	}
	if u.draining.Load() {
		return nil
	}
	visitor := netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	fctx, cut := context.WithCancelCause(ctx)
	o, cfg, refusal := u.enter(visitor.Addr(), cut)
	if refusal != "" {
		cut(nil)
		u.count.refused(refusal)
		return nil
	}
	s := &session{u: u, from: from, visitor: visitor, cut: cut}
	s.last.Store(int64(time.Since(epoch)))
	u.sessions[from] = s
	u.count.begin()
	u.wg.Go(func() {
		defer cut(nil)
		defer u.count.end()
		defer u.leave(o)
		defer u.forget(s)
		s.run(fctx, &cfg)
	})
	return s
}

func (u *udpPort) forget(s *session) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.sessions[s.from] == s {
		delete(u.sessions, s.from)
	}
	if u.draining.Load() && len(u.sessions) == 0 {
		_ = u.conn.Close()
	}
}

// A session carries the packets of one visitor address.
type session struct {
	u       *udpPort
	from    netip.AddrPort // as the socket knows it
	visitor netip.AddrPort
	cut     context.CancelCauseFunc
	last    atomic.Int64 // when there was a packet in either direction, since epoch
	in, out atomic.Int64

	mu     sync.Mutex
	flow   tunnel.PacketConn // nil until the service is reached
	header []byte            // of the PROXY protocol, in front of each packet; nil: none
	early  [][]byte          // packets that wait for it
	held   int               // their bytes
}

// fromVisitor passes a packet on. It never waits.
func (s *session) fromVisitor(b []byte) {
	s.last.Store(int64(time.Since(epoch)))
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.flow != nil:
		s.writeLocked(b)
	case len(s.early) < maxEarly && s.held+len(b) <= maxEarlyBytes && s.u.early.Load() < maxPortEarlyBytes:
		s.early = append(s.early, append(make([]byte, 0, len(b)), b...))
		s.held += len(b)
		s.u.early.Add(int64(len(b)))
	default:
		s.u.count.refused(refusedEarly)
	}
}

func (s *session) writeLocked(b []byte) {
	if s.header != nil {
		b = append(s.header[:len(s.header):len(s.header)], b...)
	}
	if err := s.flow.WritePacket(b); err != nil {
		if errors.Is(err, tunnel.ErrPacketTooLong) {
			s.u.count.refused(refusedLong)
		} else {
			s.cut(err)
		}
		return
	}
	s.in.Add(int64(len(b)))
}

// run reaches the service and passes its packets on until the session ends.
func (s *session) run(ctx context.Context, cfg *spec.PortConfig) {
	flow, header, lease, err := s.dial(ctx, cfg)
	defer s.dropEarly()
	if err != nil {
		s.u.count.failed()
		s.u.f.log.Debug("port's service cannot be reached", "port", s.u.name, "err", err)
		return
	}
	defer flow.Close() //nolint:errcheck // nothing to save
	if lease != nil {
		defer lease.Open()()
		defer lease.Done(balance.OK)
	}
	stop := context.AfterFunc(ctx, func() { _ = flow.Close() })
	defer stop()
	s.mu.Lock()
	s.flow, s.header = flow, header
	for _, b := range s.early {
		s.writeLocked(b)
	}
	s.dropEarlyLocked()
	s.mu.Unlock()
	idle := watchIdle(cfg.IdleTimeout.D(udpIdle), &s.last, func() { s.cut(errIdle) })
	defer idle()
	for {
		b, err := tunnel.ReceivePacket(flow)
		if err != nil {
			s.ended(ctx, err)
			break
		}
		s.last.Store(int64(time.Since(epoch)))
		if _, err := s.u.conn.WriteToUDPAddrPort(b, s.from); err == nil {
			s.out.Add(int64(len(b)))
		}
	}
	s.u.count.bytes(s.in.Load(), s.out.Load())
}

// dropEarly gives up what waits for the service.
func (s *session) dropEarly() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropEarlyLocked()
}

func (s *session) dropEarlyLocked() {
	s.u.early.Add(-int64(s.held))
	s.early, s.held = nil, 0
}

// ended counts why the service sends no more. A service that is not there ends the session: the visitor's next packet
// begins another, and finds the service if it is back.
func (s *session) ended(ctx context.Context, err error) {
	if _, ok := errors.AsType[*tunnel.UnreachableError](err); ok {
		s.u.count.unreachable()
	}
	if ctx.Err() == nil {
		s.u.f.log.Debug("port's session ended", "port", s.u.name, "err", err)
	}
}

// dial reaches the service, or another endpoint of its pool.
func (s *session) dial(ctx context.Context, cfg *spec.PortConfig) (tunnel.PacketConn, []byte, *balance.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var tried []*balance.Lease
	for {
		q, version, lease, err := s.u.target(ctx, cfg, s.visitor, tried)
		if err != nil {
			return nil, nil, nil, err
		}
		var header []byte
		if version != "" {
			header, err = proxyproto.Header("v2", "udp", s.visitor, plain(s.u.conn.LocalAddr()))
		}
		var flow tunnel.PacketConn
		if err == nil {
			q.Class = tunnel.ClassInteractive
			flow, err = s.u.f.cfg.Dialer.DialPacket(ctx, q)
		}
		if err == nil {
			return flow, header, lease, nil
		}
		if lease == nil {
			return nil, nil, nil, err
		}
		lease.Done(balance.Result(errors.Is(ctx.Err(), context.Canceled)))
		if tried = append(tried, lease); len(tried) > 1 || ctx.Err() != nil {
			return nil, nil, nil, err
		}
	}
}
