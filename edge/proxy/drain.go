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
}

// leavingDrains returns conn such that it does not hold up a drain while it is idle in t's pool.
func leavingDrains(conn net.Conn, t *http.Transport) net.Conn {
	flow, ok := conn.(tunnel.Conn)
	d, drains := conn.(tunnel.Drainer)
	if !ok || !drains {
		return conn
	}
	p := &pooled{Conn: flow, closed: make(chan struct{})}
	go p.watch(d.Draining(), t) // ends with the connection, which the transport closes
	return p
}

// Close implements [net.Conn].
func (p *pooled) Close() error {
	p.once.Do(func() { close(p.closed) })
	return p.Conn.Close()
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
