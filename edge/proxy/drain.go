package proxy

import (
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// A transport that was retired because one of its connections lies on a session that drains is cleared of idle connections
// at these intervals until that connection is closed. Connections of HTTP/1 close with their last request; the clearings are
// for those of HTTP/2, and for a request that chose the transport just before.
const (
	firstClearing = 100 * time.Millisecond
	lastClearing  = time.Second
)

// A pooled connection takes no new requests when the session that carries it drains, since the drain waits for it.
type pooled struct {
	tunnel.Conn
	once   sync.Once
	closed chan struct{}
	done   func()
}

// pool returns conn, a connection of t, such that it does not hold up a drain: retire is called then, after which no request
// may choose t. Clearing the pool would not be enough, since under load a connection is never idle for long. done is called
// when conn is closed.
func pool(conn net.Conn, t *http.Transport, retire, done func()) net.Conn {
	flow, ok := conn.(tunnel.Conn)
	if !ok {
		return &counted{Conn: conn, done: done}
	}
	p := &pooled{Conn: flow, closed: make(chan struct{}), done: done}
	if d, drains := conn.(tunnel.Drainer); drains {
		go p.watch(d.Draining(), t, retire) // ends with the connection, which the transport closes
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

func (p *pooled) watch(draining <-chan struct{}, t *http.Transport, retire func()) {
	select {
	case <-p.closed:
		return
	case <-draining:
	}
	retire()
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
