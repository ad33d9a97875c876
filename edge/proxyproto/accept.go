package proxyproto

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"
)

// headerBuffer holds a header with room for what follows it in one packet. Longer headers of version 2, up to the 4 KiB that
// the decoder allows, are read in parts.
const headerBuffer = 1 << 10

// A Trust is the load balancers whose headers are believed.
type Trust []netip.Prefix

// ParseTrust reads prefixes. None trusts nobody.
func ParseTrust(prefixes []string) (Trust, error) {
	var t Trust
	for _, s := range prefixes {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("%q is not a prefix such as 192.0.2.0/24; one address is a /32 or /128", s)
		}
		t = append(t, p)
	}
	return t, nil
}

// Has reports whether a is one of the load balancers.
func (t Trust) Has(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	for _, p := range t {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// Accept reads the header of a connection from a load balancer, which must come within the timeout, and returns the
// connection with the visitor's addresses. A header of a load balancer's own check (LOCAL) leaves the addresses as they
// are. Without a valid header it is an error, and conn is the caller's to close.
func Accept(conn net.Conn, timeout time.Duration) (net.Conn, error) {
	if err := conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return nil, err
	}
	r := bufio.NewReaderSize(conn, headerBuffer)
	h, err := proxyproto.Read(r)
	if err != nil {
		return nil, fmt.Errorf("proxyproto: header from %s: %w", conn.RemoteAddr(), err)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	c := &accepted{Conn: conn, rest: r, remote: conn.RemoteAddr(), local: conn.LocalAddr()}
	if h.Command.IsLocal() {
		return c, nil
	}
	src, dst, ok := h.TCPAddrs()
	if !ok || src.AddrPort().Addr().IsUnspecified() {
		return nil, fmt.Errorf("proxyproto: header from %s: no address of a visitor over TCP", conn.RemoteAddr())
	}
	c.remote, c.local = src, dst
	return c, nil
}

// accepted is a connection whose header was read.
type accepted struct {
	net.Conn
	rest          *bufio.Reader // nil once it is empty
	remote, local net.Addr
}

// Read implements [net.Conn].
func (c *accepted) Read(p []byte) (int, error) {
	if c.rest == nil {
		return c.Conn.Read(p)
	}
	if n := c.rest.Buffered(); n > 0 {
		return c.rest.Read(p[:min(len(p), n)])
	}
	c.rest = nil
	return c.Conn.Read(p)
}

// RemoteAddr returns the visitor's address.
func (c *accepted) RemoteAddr() net.Addr { return c.remote }

// LocalAddr returns the address that the visitor dialled.
func (c *accepted) LocalAddr() net.Addr { return c.local }

// CloseWrite ends the sending direction.
func (c *accepted) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Lazily returns conn such that its header is read when it is first used: by the goroutine that serves it, not by the one
// that accepts.
func Lazily(conn net.Conn, timeout time.Duration) net.Conn {
	return &lazy{Conn: conn, timeout: timeout}
}

type lazy struct {
	net.Conn
	timeout time.Duration
	once    sync.Once
	in      net.Conn
	err     error
}

func (l *lazy) open() (net.Conn, error) {
	l.once.Do(func() { l.in, l.err = Accept(l.Conn, l.timeout) })
	return l.in, l.err
}

// Read implements [net.Conn].
func (l *lazy) Read(p []byte) (int, error) {
	in, err := l.open()
	if err != nil {
		return 0, err
	}
	return in.Read(p)
}

// RemoteAddr returns the visitor's address, or the load balancer's after a bad header.
func (l *lazy) RemoteAddr() net.Addr {
	if in, err := l.open(); err == nil {
		return in.RemoteAddr()
	}
	return l.Conn.RemoteAddr()
}
