package proxy

import (
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// The pool of a transport is cleared of idle connections at these intervals while one of its connections lies on a session
// that drains. The first catches what is idle already, the others what becomes idle later.
const (
	firstClearing = 100 * time.Millisecond
	lastClearing  = 5 * time.Second
)

// A pooled connection leaves its transport's pool when the session that carries it drains, since the drain waits for it.
type pooled struct {
	tunnel.Conn
	once   sync.Once
	closed chan struct{}
	done   func()
}

// pool returns conn such that it does not hold up a drain while it is idle in t's pool. done is called when it is closed.
func pool(conn net.Conn, t *http.Transport, done func()) net.Conn {
	flow, ok := conn.(tunnel.Conn)
	if !ok {
		return &counted{Conn: conn, done: done}
	}
	p := &pooled{Conn: flow, closed: make(chan struct{}), done: done}
	if d, drains := conn.(tunnel.Drainer); drains {
		go p.watch(d.Draining(), t) // ends with the connection, which the transport closes
	}
	return p
}

// Close implements [net.Conn].
func (p *pooled) Close() error {
	p.once.Do(func() { close(p.closed); p.done() })
	return p.Conn.Close()
}

// Suspect reports whether the session that carries the connection may be dead.
func (p *pooled) Suspect() bool { return suspect(p.Conn) }

// suspect looks below TLS.
func suspect(conn net.Conn) bool {
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = t.NetConn()
	}
	s, ok := conn.(interface{ Suspect() bool })
	return ok && s.Suspect()
}

func (p *pooled) watch(draining <-chan struct{}, t *http.Transport) {
	select {
	case <-p.closed:
		return
	case <-draining:
	}
	for wait := firstClearing; ; wait = min(2*wait, lastClearing) {
		// It closes idle connections of other sessions too. They are dialled anew when they are needed.
		t.CloseIdleConnections()
		select {
		case <-p.closed:
			return
		case <-time.After(wait):
		}
	}
}

// A counted connection is one that is no flow of a tunnel.
type counted struct {
	net.Conn
	once sync.Once
	done func()
}

// Close implements [net.Conn].
func (c *counted) Close() error {
	c.once.Do(c.done)
	return c.Conn.Close()
}
