package ingress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/tunnel"
)

// ErrDenied says that a rule from the edge leads where the connector's allow-list does not.
var ErrDenied = errors.New("not permitted by the connector's allow-list")

// dialer connects to origins. Rules from the edge go where the permit says, judged by the address that is connected to.
type dialer struct {
	resolver *net.Resolver

	mu     sync.Mutex // guards the fields below
	permit Permit
	remote map[*originConn]struct{} // open connections of rules from the edge
}

// originConn is a connection to an origin over TCP.
type originConn struct {
	*net.TCPConn
	name   string
	to     netip.AddrPort
	forget func()
}

// Close implements net.Conn.
func (c *originConn) Close() error {
	c.forget()
	return c.TCPConn.Close()
}

// Reset implements tunnel.Resetter.
func (c *originConn) Reset(tunnel.Result) {
	c.SetLinger(0) //nolint:errcheck // then it is a clean close, the best that is left
	c.Close()      //nolint:errcheck // nothing to save
}

// dial connects to t's service, and says there who visits if the rule wants that.
func (d *dialer) dial(ctx context.Context, t *ingressconf.Target, remote bool, visitor netip.AddrPort) (tunnel.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, t.Origin.ConnectTimeout)
	defer cancel()
	conn, err := d.connect(ctx, t.Service, remote)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", t.Service, err)
	}
	if err := announce(conn, t.Origin.ProxyProtocol, visitor); err != nil {
		conn.Close()
		return nil, fmt.Errorf("announce the visitor to %s: %w", t.Service, err)
	}
	return conn, nil
}

func (d *dialer) connect(ctx context.Context, s ingressconf.Service, remote bool) (tunnel.Conn, error) {
	nd := net.Dialer{Resolver: d.resolver}
	if s.Scheme == ingressconf.Unix {
		if remote { // refused when the rules came; looked at again because nothing else stands before a socket
			return nil, ErrDenied
		}
		conn, err := nd.DialContext(ctx, "unix", s.Path)
		if err != nil {
			return nil, err
		}
		return conn.(*net.UnixConn), nil
	}
	name := ""
	if _, err := netip.ParseAddr(s.Host); err != nil {
		name = s.Host
	}
	if remote {
		nd.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error {
			to, err := netip.ParseAddrPort(address)
			if err != nil || !d.permitted(name, to) {
				return ErrDenied
			}
			return nil
		}
	}
	conn, err := nd.DialContext(ctx, "tcp", s.Addr())
	if err != nil {
		return nil, err
	}
	c := &originConn{TCPConn: conn.(*net.TCPConn), name: name, forget: func() {}}
	if remote && !d.keep(c) {
		c.TCPConn.Close()
		return nil, ErrDenied
	}
	return c, nil
}

func (d *dialer) permitted(name string, to netip.AddrPort) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.permittedLocked(name, to)
}

func (d *dialer) permittedLocked(name string, to netip.AddrPort) bool {
	return d.permit != nil && d.permit.Addr(name, netip.AddrPortFrom(to.Addr().Unmap(), to.Port()))
}

// keep remembers c if the permit that holds at that moment lets it be.
func (d *dialer) keep(c *originConn) bool {
	c.to = c.RemoteAddr().(*net.TCPAddr).AddrPort()
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.permittedLocked(c.name, c.to) {
		return false
	}
	if d.remote == nil {
		d.remote = map[*originConn]struct{}{}
	}
	d.remote[c] = struct{}{}
	c.forget = func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.remote, c)
	}
	return true
}

// setPermit replaces the permit and cuts what it does not let be.
func (d *dialer) setPermit(p Permit) int {
	d.mu.Lock()
	d.permit = p
	var bad []*originConn
	for c := range d.remote {
		if !d.permittedLocked(c.name, c.to) {
			bad = append(bad, c)
		}
	}
	d.mu.Unlock()
	for _, c := range bad {
		c.Reset(tunnel.ResultDenied)
	}
	return len(bad)
}

// permits checks whole rules before they are taken.
func (d *dialer) permits(c *ingressconf.Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, t := range c.Targets() {
		s := t.Service
		if !s.Dials() {
			continue
		}
		ok := false
		if a, err := netip.ParseAddr(s.Host); err == nil {
			ok = d.permittedLocked("", netip.AddrPortFrom(a, s.Port))
		} else {
			ok = d.permit != nil && d.permit.Name(s.Host, s.Port)
		}
		if !ok {
			return fmt.Errorf("ingress[%d].service: %s is %w; add it to the list, or remove the rule", i, s, ErrDenied)
		}
	}
	return nil
}

// announceTimeout bounds the write of a PROXY header, which fits into an empty socket's buffer.
const announceTimeout = 5 * time.Second

// announce begins a connection with the PROXY protocol's header, version 1 or 2, that names the visitor; if he is not
// known, with one that says so.
func announce(conn net.Conn, version string, visitor netip.AddrPort) error {
	var v byte
	switch version {
	case "v1":
		v = 1
	case "v2":
		v = 2
	default:
		return nil
	}
	var from, to net.Addr
	if visitor.IsValid() {
		visitor = netip.AddrPortFrom(visitor.Addr().Unmap(), visitor.Port())
		from = net.TCPAddrFromAddrPort(visitor)
		at := netip.IPv6Unspecified() // the origin's address has no meaning for the visitor; its family must be his
		if visitor.Addr().Is4() {
			at = netip.IPv4Unspecified()
		}
		var port uint16
		if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
			ap := a.AddrPort()
			port = ap.Port()
			if remote := ap.Addr().Unmap().WithZone(""); remote.Is4() == visitor.Addr().Is4() {
				at = remote
			}
		}
		to = net.TCPAddrFromAddrPort(netip.AddrPortFrom(at, port))
	}
	header := proxyproto.HeaderProxyFromAddrs(v, from, to)
	if err := conn.SetWriteDeadline(time.Now().Add(announceTimeout)); err != nil {
		return err
	}
	if _, err := header.WriteTo(conn); err != nil {
		return err
	}
	return conn.SetWriteDeadline(time.Time{})
}
