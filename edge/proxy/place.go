package proxy

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/proxyproto"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A place is where requests of an origin go: the origin's address, an endpoint of its pool, or an ingress. Its connections
// are its own: they are never shared between zones, nor between virtual networks.
type place struct {
	h          *Handler
	up         *zone.Upstream
	query      control.Query // without class and visitor, and without host for an ingress
	addr       string        // host:port in URLs; "" for an ingress, whose connections are kept by requested host
	serverName string        // of TLS, unless the origin's configuration has one
	version    string        // of the PROXY protocol, "" for none
	open       func() func() // counts a connection; nil: nobody counts

	lanes [2]lane // by whether they are for bulk
}

// lane indexes
const (
	laneInteractive = iota
	laneBulk
)

func classOf(lane int) tunnel.FlowClass {
	if lane == laneBulk {
		return tunnel.ClassBulk
	}
	return tunnel.ClassInteractive
}

// A lane is the pool of connections to a place over one class of sessions. Its transport is replaced when a session dies
// or drains under it, since idle and multiplexed connections may lie on that session too.
type lane struct {
	now atomic.Pointer[http.Transport]

	mu  sync.Mutex // guards old
	old []*http.Transport
}

// maxOld is how many replaced transports a lane remembers for [lane.closeIdle]; connections of those before end when they
// have been idle for long enough.
const maxOld = 8

// transport returns the lane's transport.
func (l *lane) transport(p *place, lane int) *http.Transport {
	if t := l.now.Load(); t != nil {
		return t
	}
	t := p.newTransport(lane, nil)
	if !l.now.CompareAndSwap(nil, t) {
		return l.now.Load()
	}
	return t
}

// renew replaces a transport, unless another has done so.
func (l *lane) renew(p *place, lane int, t *http.Transport) {
	if l.now.Load() != t || !l.now.CompareAndSwap(t, p.newTransport(lane, nil)) {
		return
	}
	l.mu.Lock()
	if l.old = append(l.old, t); len(l.old) > maxOld {
		l.old = l.old[1:]
	}
	l.mu.Unlock()
	t.CloseIdleConnections()
}

func (l *lane) closeIdle() {
	if t := l.now.Load(); t != nil {
		t.CloseIdleConnections()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, t := range l.old {
		t.CloseIdleConnections()
	}
}

func (p *place) closeIdle() {
	for i := range p.lanes {
		p.lanes[i].closeIdle()
	}
}

// transportFor returns the connections for a visit.
func (p *place) transportFor(v *visit, lane int) *http.Transport {
	if p.version != "" {
		return v.conn.transport(p, lane, func() *http.Transport { return p.newTransport(lane, v) })
	}
	return p.lanes[lane].transport(p, lane)
}

// renew makes the next request dial anew: t has connections on a session that seems dead or drains.
func (p *place) renew(v *Visitor, lane int, t *http.Transport) {
	if p.version != "" {
		v.drop(p, lane, t)
		return
	}
	p.lanes[lane].renew(p, lane, t)
}

// newTransport returns a pool of connections; those for a visitor are told of it.
func (p *place) newTransport(lane int, visitor *visit) *http.Transport {
	t := p.h.newTransport(p.up)
	if t.TLSClientConfig != nil && t.TLSClientConfig.ServerName == "" {
		t.TLSClientConfig.ServerName = p.serverName
	}
	q := p.query
	q.Class, q.Carrier = classOf(lane), tunnel.Carrier(p.up.Carrier)
	var announce func(context.Context, net.Conn) error
	var owner *Visitor
	if visitor != nil {
		owner = visitor.conn
		src, dst := visitor.remote, visitor.local
		q.Visitor = src
		announce = func(ctx context.Context, conn net.Conn) error {
			return proxyproto.Announce(ctx, conn, p.version, src, dst)
		}
		t.MaxIdleConnsPerHost = perVisitor
	}
	if p.addr == "" {
		t.MaxIdleConns = ingressHosts * max(1, p.h.cfg.IdleConns) // visitors choose the hosts
	}
	t.DialContext = func(ctx context.Context, _, addr string) (net.Conn, error) {
		conn, err := p.dial(ctx, q, addr, announce)
		if err != nil {
			return nil, &dialError{err}
		}
		closed := func() {}
		if p.open != nil {
			closed = p.open()
		}
		return pool(conn, t, func() { p.renew(owner, lane, t) }, closed), nil
	}
	return t
}

const (
	perVisitor   = 8 // idle connections of one visitor's connection to an origin
	ingressHosts = 4 // times as many idle connections to an ingress as to one origin
)

// dial opens a connection and announces the visitor on it, unless announce is nil.
func (p *place) dial(ctx context.Context, q control.Query, addr string, announce func(context.Context, net.Conn) error) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.h.cfg.ConnectTimeout)
	defer cancel()
	if p.addr == "" {
		var err error
		if q.Host, q.Port, err = splitAddr(addr); err != nil {
			return nil, err
		}
	}
	conn, err := p.h.cfg.Dialer.Dial(ctx, q)
	if err != nil || announce == nil {
		return conn, err
	}
	if err := announce(ctx, conn); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// A dialError says that nothing of a request has left: there was no connection.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

func splitAddr(addr string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	ap, err := netip.ParseAddrPort("0.0.0.0:" + text)
	return host, ap.Port(), err
}
