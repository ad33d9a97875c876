package dns

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/keyhaven/keyhaven/internal/household"
)

// A gate keeps out who may not ask, and what is too much, before a query is parsed: not even an error is answered, since
// the answer could go to somebody whose address was forged. Connections are taken in from those who may ask, so that
// nobody else can use them up, and at most maxTCPPerSource of one source.
type gate struct {
	allow   []netip.Prefix
	limiter limiter
	denied  func()
	limited func()

	mu    sync.Mutex // guards the field below
	conns map[netip.Addr]int
}

// permits reports whether from may ask at all.
func (g *gate) permits(from netip.Addr) bool {
	if slices.ContainsFunc(g.allow, func(p netip.Prefix) bool { return p.Contains(from) }) {
		return true
	}
	g.denied()
	return false
}

// withinRate counts a query.
func (g *gate) withinRate(from netip.Addr) bool {
	if g.limiter.allow(from, time.Now()) {
		return true
	}
	g.limited()
	return false
}

// enter counts a connection of a source, unless it has as many as it may have.
func (g *gate) enter(from netip.Addr) (leave func(), ok bool) {
	from = household.Of(from)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conns[from] >= maxTCPPerSource {
		g.limited()
		return nil, false
	}
	if g.conns == nil {
		g.conns = map[netip.Addr]int{}
	}
	g.conns[from]++
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.conns[from]--; g.conns[from] == 0 {
			delete(g.conns, from)
		}
	}), true
}

// A gatedReader reads the messages that the gate lets through. A connection that asks too much ends.
type gatedReader struct {
	mdns.Reader
	gate *gate
}

func (r gatedReader) ReadUDP(conn *net.UDPConn, timeout time.Duration) ([]byte, *mdns.SessionUDP, error) {
	for {
		b, session, err := r.Reader.ReadUDP(conn, timeout)
		if err != nil {
			return nil, nil, err
		}
		if from := source(session.RemoteAddr()); r.gate.permits(from) && r.gate.withinRate(from) {
			return b, session, nil
		}
	}
}

func (r gatedReader) ReadTCP(conn net.Conn, timeout time.Duration) ([]byte, error) {
	b, err := r.Reader.ReadTCP(conn, timeout)
	if err == nil && !r.gate.withinRate(source(conn.RemoteAddr())) {
		return nil, errBusy
	}
	return b, err
}

// A gatedListener takes the connections that the gate lets through.
type gatedListener struct {
	net.Listener
	gate *gate
}

// Accept implements [net.Listener].
func (l gatedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := source(conn.RemoteAddr())
		if l.gate.permits(from) {
			if leave, ok := l.gate.enter(from); ok {
				return &gatedConn{conn, leave}, nil
			}
		}
		_ = conn.Close() // nothing was said
	}
}

type gatedConn struct {
	net.Conn
	leave func()
}

// Close implements [net.Conn].
func (c *gatedConn) Close() error {
	c.leave()
	return c.Conn.Close()
}

func source(a net.Addr) netip.Addr {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.UDPAddr:
		ap = a.AddrPort()
	case *net.TCPAddr:
		ap = a.AddrPort()
	}
	return ap.Addr().Unmap().WithZone("")
}

// A limiter lets each source through at a rate, with bursts of a second's worth. The zero value but for rate is ready.
type limiter struct {
	rate float64

	mu      sync.Mutex // guards the field below
	buckets map[netip.Addr]bucket
}

type bucket struct {
	left float64
	at   time.Time
}

// maxSources bounds the sources that are remembered. When there are more, all are forgotten that have been quiet for a second,
// and if that is not enough, all.
const maxSources = 16384

func (l *limiter) allow(from netip.Addr, now time.Time) bool {
	from = household.Of(from)
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.buckets[from]
	if !ok {
		l.makeRoomLocked(now)
		b = bucket{left: l.rate, at: now}
	}
	b.left = min(l.rate, b.left+now.Sub(b.at).Seconds()*l.rate)
	b.at = now
	allowed := b.left >= 1
	if allowed {
		b.left--
	}
	l.buckets[from] = b
	return allowed
}

func (l *limiter) makeRoomLocked(now time.Time) {
	if l.buckets == nil {
		l.buckets = map[netip.Addr]bucket{}
	}
	if len(l.buckets) < maxSources {
		return
	}
	for a, b := range l.buckets {
		if now.Sub(b.at) >= time.Second {
			delete(l.buckets, a)
		}
	}
	if len(l.buckets) >= maxSources {
		clear(l.buckets)
	}
}
