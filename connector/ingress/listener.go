package ingress

import (
	"context"
	"net"
	"sync"

	"github.com/keyhaven/keyhaven/tunnel"
)

// listener hands flows to the HTTP server as connections.
type listener struct {
	next chan *flowConn
	done chan struct{}
	once sync.Once
}

func newListener() *listener {
	return &listener{next: make(chan *flowConn), done: make(chan struct{})}
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.next:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return flowsAddr{} }

type flowsAddr struct{}

func (flowsAddr) Network() string { return "tunnel" }
func (flowsAddr) String() string  { return "ingress" }

// flowConn is a flow that carries requests.
type flowConn struct {
	tunnel.Conn
	flow tunnel.Flow
	once sync.Once
	over chan struct{}
}

// Close implements net.Conn.
func (c *flowConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.over) })
	return err
}

// reset ends the flow so that nobody takes a part for the whole.
func (c *flowConn) reset(why tunnel.Result) {
	if r, ok := c.Conn.(tunnel.Resetter); ok {
		r.Reset(why)
	}
	c.Close() //nolint:errcheck // it is cut
}

type connKey struct{}

// ServeFlow serves the requests of a flow, HTTP/1.1 or HTTP/2 without TLS, until the flow or ctx ends, and closes it.
func (h *Handler) ServeFlow(ctx context.Context, conn tunnel.Conn, f tunnel.Flow) {
	c := &flowConn{Conn: conn, flow: f, over: make(chan struct{})}
	if !h.enter(c) {
		c.reset(tunnel.ResultDraining)
		return
	}
	defer h.leave(c)
	select {
	case h.conns.next <- c:
	case <-c.over: // by Close
		return
	case <-ctx.Done():
		c.reset(tunnel.ResultCancelled)
		return
	}
	select {
	case <-c.over:
	case <-ctx.Done():
		c.reset(tunnel.ResultCancelled)
	}
}

func (h *Handler) enter(c *flowConn) bool {
	h.flowsMu.Lock()
	defer h.flowsMu.Unlock()
	if h.flows == nil {
		return false
	}
	h.flows[c] = struct{}{}
	h.served.Add(1)
	return true
}

func (h *Handler) leave(c *flowConn) {
	h.flowsMu.Lock()
	delete(h.flows, c)
	h.flowsMu.Unlock()
	h.served.Done()
}

// cutFlows resets every flow, also those that net/http has let go of, and lets no more in.
func (h *Handler) cutFlows() {
	h.flowsMu.Lock()
	flows := h.flows
	h.flows = nil
	h.flowsMu.Unlock()
	for c := range flows {
		c.reset(tunnel.ResultDraining)
	}
}
