package ingress

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// paceChunk is the time that a flow may fill at once before others have their turn, minChunk and maxChunk its bounds in
	// bytes.
	paceChunk = 10 * time.Millisecond
	minChunk  = 1 << 10
	maxChunk  = 16 << 10
	// paceBurst is how much unused time is given later, maxBurst its bound in bytes.
	paceBurst = 50 * time.Millisecond
	maxBurst  = 256 << 10
	// paceQueue is for how long packets of one flow may wait for their turn, minQueue its bound in bytes from below.
	paceQueue = 100 * time.Millisecond
	minQueue  = 4 << 10
	// maxQueued bounds their number.
	maxQueued = 256
	// paceWindow is how far away, in time to it and back, a service can be and still fill its rule's bandwidth; minWindow and
	// maxBurst bound what it may send ahead, in bytes.
	paceWindow = 50 * time.Millisecond
	minWindow  = 4 << 10
)

// A pace bounds what the flows of one rule carry together, in each direction. They take turns: each waits in line with one
// chunk at a time. Nil bounds nothing.
type pace struct {
	toService, toVisitor *rate.Limiter
	chunk                int // bytes
	queue                int // bytes
	window               int // bytes; what a service may send ahead
	dropped              prometheus.Counter
}

func newPace(bytes int64, dropped prometheus.Counter) *pace {
	in := func(d time.Duration) int { return int(min(bytes*int64(d/time.Millisecond)/1000, maxBurst)) }
	p := &pace{chunk: min(max(in(paceChunk), minChunk), maxChunk), queue: max(in(paceQueue), minQueue), window: max(in(paceWindow), minWindow), dropped: dropped}
	burst := max(in(paceBurst), p.chunk)
	p.toService, p.toVisitor = rate.NewLimiter(rate.Limit(bytes), burst), rate.NewLimiter(rate.Limit(bytes), burst)
	return p
}

// take waits until n bytes may pass.
func take(ctx context.Context, l *rate.Limiter, n int) error {
	for n > 0 {
		part := min(n, l.Burst())
		if err := l.WaitN(ctx, part); err != nil {
			return err
		}
		n -= part
	}
	return nil
}

// paceKey tells rules with a bandwidth apart. The same rule keeps its pace over changes of configuration.
type paceKey struct {
	rule   ingressconf.Service
	bytes  int64
	host   string
	path   string
	remote bool
}

// paces returns those of c's rules, nil for rules without a bound, with those of old where they are the same.
func (h *Handler) paces(c *ingressconf.Config, remote bool, old *rules) (list []*pace, all map[paceKey]*pace) {
	list, all = make([]*pace, c.Len()), map[paceKey]*pace{}
	for i, t := range c.Targets() {
		if t.Bandwidth == 0 {
			continue
		}
		k := paceKey{t.Service, t.Bandwidth, t.Rule.Hostname, t.Rule.Path, remote}
		if all[k] == nil && old != nil {
			all[k] = old.paced[k]
		}
		if all[k] == nil {
			all[k] = newPace(t.Bandwidth, h.metrics.overBandwidth)
		}
		list[i] = all[k]
	}
	return list, all
}

// ahead is what a service may send ahead, in bytes; 0: any amount.
func (p *pace) ahead() int {
	if p == nil {
		return 0
	}
	return p.window
}

// conn returns c at the pace. What a service sends waits in the service's own socket, not in the tunnel.
func (p *pace) conn(c tunnel.Conn) tunnel.Conn {
	if p == nil {
		return c
	}
	paced := &pacedConn{Conn: c, pace: p}
	paced.ctx, paced.cancel = context.WithCancel(context.Background())
	return paced
}

// pacedConn is a connection to a service. Deadlines bound its reads and writes, not its turn.
type pacedConn struct {
	tunnel.Conn
	pace   *pace
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
}

// Read implements net.Conn.
func (c *pacedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b[:min(len(b), c.pace.chunk)])
	if take(c.ctx, c.pace.toVisitor, n) != nil {
		return 0, net.ErrClosed
	}
	return n, err
}

// Write implements net.Conn.
func (c *pacedConn) Write(b []byte) (n int, err error) {
	for {
		part := b[n:min(len(b), n+c.pace.chunk)]
		if take(c.ctx, c.pace.toService, len(part)) != nil {
			return n, net.ErrClosed
		}
		m, err := c.Conn.Write(part)
		if n += m; err != nil || n == len(b) {
			return n, err
		}
	}
}

// Close implements net.Conn.
func (c *pacedConn) Close() error {
	c.cancel()
	return c.Conn.Close()
}

// Reset implements tunnel.Resetter.
func (c *pacedConn) Reset(why tunnel.Result) {
	c.cancel()
	if r, ok := c.Conn.(tunnel.Resetter); ok {
		r.Reset(why)
		return
	}
	c.Conn.Close() //nolint:errcheck // it is cut
}

// A Lane passes one direction of a flow of packets on at its rule's pace. Packets that would wait for longer than a moment
// are dropped and counted. Pass is for one goroutine.
type Lane struct {
	limit   *rate.Limiter // nil: no bound
	pace    *pace
	send    func([]byte) error
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	waiting [][]byte
	held    int // their bytes
	busy    bool
	err     error // of send
}

func (p *pace) lane(limit *rate.Limiter, send func([]byte) error) *Lane {
	l := &Lane{limit: limit, pace: p, send: send}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// Pass sends a packet, now or in a moment. It does not keep b. An error is that of send, of this packet or an earlier one.
func (l *Lane) Pass(b []byte) error {
	if l.limit == nil {
		return l.send(b)
	}
	l.mu.Lock()
	switch {
	case l.err != nil:
		defer l.mu.Unlock()
		return l.err
	case !l.busy && len(b) <= l.limit.Burst() && l.limit.AllowN(time.Now(), len(b)):
		l.mu.Unlock()
		return l.send(b)
	case len(l.waiting) > 0 && l.held+len(b) > l.pace.queue || len(l.waiting) >= maxQueued:
		l.mu.Unlock()
		l.pace.dropped.Inc()
		return nil
	}
	l.waiting, l.held = append(l.waiting, slices.Clone(b)), l.held+len(b)
	if !l.busy {
		l.busy = true
		l.running.Go(l.drain)
	}
	l.mu.Unlock()
	return nil
}

// drain sends what waits until nothing does.
func (l *Lane) drain() {
	for {
		l.mu.Lock()
		if len(l.waiting) == 0 || l.err != nil {
			l.waiting, l.held, l.busy = nil, 0, false
			l.mu.Unlock()
			return
		}
		b := l.waiting[0]
		l.waiting[0], l.waiting, l.held = nil, l.waiting[1:], l.held-len(b)
		l.mu.Unlock()
		err := take(l.ctx, l.limit, len(b))
		if err == nil {
			err = l.send(b)
		}
		if err != nil {
			l.mu.Lock()
			l.err = err
			l.mu.Unlock()
		}
	}
}

// Close gives up what waits, and waits until nothing is left running.
func (l *Lane) Close() {
	l.cancel()
	l.running.Wait()
}
