package connector

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/tunnel"
)

var (
	// errLimit says that there are as many flows as there may be.
	errLimit = errors.New("as many flows as the limit permits")
	// errKind says that a flow is of a kind that this connector does not carry.
	errKind = errors.New("unsupported kind of flow")
	// errWithdrawn cuts a flow that a new allow-list does not permit.
	errWithdrawn = errors.New("no longer permitted by the allow-list")
)

// A flow is open: its destination is connected.
type flow struct {
	target target
	to     netip.AddrPort
	cut    context.CancelCauseFunc
}

// flowSet bounds and remembers the flows of all sessions.
type flowSet struct {
	counts

	openMu sync.Mutex // guards the field below
	open   map[*flow]struct{}
}

func (s *flowSet) len() int {
	used, _ := s.total()
	return used
}

// add remembers f if the list that holds at that moment permits it.
func (s *flowSet) add(f *flow, allow *atomic.Pointer[Allow]) bool {
	s.openMu.Lock()
	defer s.openMu.Unlock()
	if !f.target.permitted(allow.Load(), f.to) {
		return false
	}
	if s.open == nil {
		s.open = map[*flow]struct{}{}
	}
	s.open[f] = struct{}{}
	return true
}

func (s *flowSet) remove(f *flow) {
	s.openMu.Lock()
	defer s.openMu.Unlock()
	delete(s.open, f)
}

// sweep cuts the flows that a does not permit and returns how many.
func (s *flowSet) sweep(a *Allow) (n int) {
	s.openMu.Lock()
	defer s.openMu.Unlock()
	for f := range s.open {
		if !f.target.permitted(a, f.to) {
			f.cut(errWithdrawn)
			n++
		}
	}
	return n
}

// incoming is what a Connector needs of a *tunnel.Incoming.
type incoming interface {
	Flow() tunnel.Flow
	Cancelled() <-chan struct{}
	Accept() (tunnel.Conn, error)
	AcceptPacket() (tunnel.PacketConn, error)
	Reject(tunnel.Result) error
}

// handle answers one flow and serves it to its end. ctx ends with the session.
func (c *Connector) handle(ctx context.Context, in incoming) {
	start, f := time.Now(), in.Flow()
	if !c.flows.reserve(f.VNet) {
		c.reject(in, errLimit, start)
		return
	}
	// It is called before a refusal is sent, so that the edge, once it has that, finds room for another flow.
	release := sync.OnceFunc(func() { c.flows.release(f.VNet) })
	defer release()
	var err error
	switch f.Kind {
	case tunnel.KindTCP, 0:
		err = c.serveTCP(ctx, in, start)
	case tunnel.KindIngress:
		err = c.serveIngress(ctx, in, start)
	case tunnel.KindIngressUDP:
		err = c.serveIngressUDP(ctx, in, start)
	case tunnel.KindUDP:
		err = c.serveUDP(ctx, in, start)
	case tunnel.KindICMP:
		err = c.serveEcho(ctx, in, start)
	default:
		err = errKind
	}
	if err != nil {
		release()
		c.reject(in, err, start)
	}
}

// serveTCP dials a flow's destination, accepts the flow, and serves it to its end. An error means that the flow is not
// answered yet.
func (c *Connector) serveTCP(ctx context.Context, in incoming, start time.Time) error {
	origin, t, err := c.open(ctx, in)
	if err != nil {
		return err
	}
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	f := &flow{target: t, to: origin.RemoteAddr().(*net.TCPAddr).AddrPort(), cut: cut}
	if !c.flows.add(f, &c.allow) {
		origin.Close()
		return errDenied
	}
	defer c.flows.remove(f)
	c.metrics.observe(tunnel.ResultOK, time.Since(start))
	conn, err := in.Accept()
	if err != nil {
		origin.Close()
		c.log.Debug("flow was given up before it began", "vnet", t.vnet, "to", f.to, "err", err)
		return nil
	}
	counted := &countedConn{TCPConn: origin, in: c.metrics.fromOrigin, out: c.metrics.toOrigin}
	if _, _, err := tunnel.Splice(ctx, conn, counted); err != nil {
		c.log.Debug("flow was cut", "vnet", t.vnet, "to", f.to, "dur", time.Since(start), "err", err)
	}
	return nil
}

// open reads the destination and connects to it, within the time that the flow has and while the edge waits.
func (c *Connector) open(ctx context.Context, in incoming) (*net.TCPConn, target, error) {
	f := in.Flow()
	t, err := c.target(f)
	if err != nil {
		return nil, t, err
	}
	limit := c.cfg.DialTimeout
	if f.Deadline > 0 {
		limit = min(limit, f.Deadline)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-in.Cancelled():
			cancel()
		case <-ctx.Done():
		}
	})
	conn, err := c.dialer.dial(ctx, c.allow.Load(), t)
	cancel()
	wg.Wait()
	return conn, t, err
}

// reject tells the edge that a flow cannot be, and the log why.
func (c *Connector) reject(in incoming, err error, start time.Time) {
	var result tunnel.Result
	switch {
	case errors.Is(err, errLimit):
		result = tunnel.ResultLimit
	case errors.Is(err, errKind):
		result = tunnel.ResultUnsupported
	case errors.Is(err, errNoService):
		result = tunnel.ResultNoRoute
	default:
		result = resultOf(err)
	}
	c.metrics.observe(result, time.Since(start))
	f := in.Flow()
	args := []any{"vnet", f.VNet, "host", f.Host, "port", f.Port, "dur", time.Since(start), "err", err}
	switch result {
	case tunnel.ResultDenied, tunnel.ResultLimit, tunnel.ResultInternal:
		// An edge can trigger these at will.
		if ok, missed := c.denied.allow(time.Now()); ok {
			c.log.Warn("flow refused", append(args, "unlogged", missed)...)
		}
	default:
		c.log.Debug("flow failed", args...)
	}
	if err := in.Reject(result); err != nil {
		c.log.Debug("the edge did not wait for the result", "vnet", f.VNet, "err", err)
	}
}

// countedConn counts the bytes of a connection to a destination as they pass.
type countedConn struct {
	*net.TCPConn
	in, out prometheus.Counter
}

func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	c.in.Add(float64(n))
	return n, err
}

func (c *countedConn) Write(b []byte) (int, error) {
	n, err := c.TCPConn.Write(b)
	c.out.Add(float64(n))
	return n, err
}

// throttle lets one event through per second and counts the others.
type throttle struct {
	mu     sync.Mutex // guards the fields below
	last   time.Time
	missed int
}

func (t *throttle) allow(now time.Time) (ok bool, missed int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.last.IsZero() && now.Sub(t.last) < time.Second {
		t.missed++
		return false, 0
	}
	missed, t.missed, t.last = t.missed, 0, now
	return true, missed
}
