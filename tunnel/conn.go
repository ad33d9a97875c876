package tunnel

import (
	"net"
	"strconv"
	"sync/atomic"
)

// flowAddr is a flow's destination as a net.Addr.
type flowAddr struct {
	host string
	port uint16
}

func (a flowAddr) Network() string { return "tunnel" }
func (a flowAddr) String() string  { return net.JoinHostPort(a.host, strconv.Itoa(int(a.port))) }

// flowConn is an open flow. It implements Conn.
type flowConn struct {
	stream
	s             *session // which counts the flow until it is closed or reset
	local, remote net.Addr

	closed  atomic.Bool
	writing atomic.Int32 // Writes under way
}

// Write writes to the flow. Close from another goroutine makes it return.
func (c *flowConn) Write(p []byte) (int, error) {
	c.writing.Add(1)
	defer c.writing.Add(-1)
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	c.s.expect()
	return c.stream.Write(p)
}

// CloseWrite ends the sending direction cleanly.
func (c *flowConn) CloseWrite() error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	c.closeWrite()
	return nil
}

// Close gives up both directions. What was written is still delivered; if a Write is under way, the flow is cut
// instead, so that the part that was sent cannot pass for the whole. Calls after the first do nothing.
func (c *flowConn) Close() error {
	if !c.closed.CompareAndSwap(false, true) {
		return nil
	}
	if c.writing.Load() > 0 {
		c.abortWrite(ResultClosed)
	} else {
		c.closeWrite()
	}
	c.abortRead(ResultClosed)
	c.s.endFlow()
	return nil
}

// Reset cuts both directions; the peer's reads and writes fail with a *FlowError of this result. After Close it does
// nothing.
func (c *flowConn) Reset(r Result) {
	if !c.closed.CompareAndSwap(false, true) {
		return
	}
	c.abortWrite(r)
	c.abortRead(r)
	c.s.endFlow()
}

// Draining implements Drainer.
func (c *flowConn) Draining() <-chan struct{} { return c.s.drainCh }

func (c *flowConn) LocalAddr() net.Addr  { return c.local }
func (c *flowConn) RemoteAddr() net.Addr { return c.remote }
