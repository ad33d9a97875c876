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
	remote map[tunnel.Resetter]place // open connections of rules from the edge
}

// A place is what a permit is asked about: an address, and the name that led to it, if one did.
type place struct {
	name string
	to   netip.AddrPort
}

// originConn is a connection to an origin over TCP.
type originConn struct {
	*net.TCPConn
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

// dial connects to t's service at a pace, and says there who visits if the rule wants that.
func (d *dialer) dial(ctx context.Context, t *ingressconf.Target, remote bool, visitor netip.AddrPort, p *pace) (tunnel.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, t.Origin.ConnectTimeout)
	defer cancel()
	conn, err := d.connect(ctx, t.Service, remote, p.ahead())
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", t.Service, err)
	}
	if err := announce(conn, t.Origin.ProxyProtocol, visitor); err != nil {
		conn.Close()
		return nil, fmt.Errorf("announce the visitor to %s: %w", t.Service, err)
	}
	return p.conn(conn), nil
}

func (d *dialer) connect(ctx context.Context, s ingressconf.Service, remote bool, window int) (tunnel.Conn, error) {
	if s.Scheme == ingressconf.Unix {
		if remote { // refused when the rules came; looked at again because nothing else stands before a socket
			return nil, ErrDenied
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", s.Path)
		if err != nil {
			return nil, err
		}
		return conn.(*net.UnixConn), nil
	}
	conn, err := d.dialNet(ctx, "tcp", s, remote, window)
	if err != nil {
		return nil, err
	}
	c := &originConn{TCPConn: conn.(*net.TCPConn), forget: func() {}}
	if remote {
		c.forget = func() { d.drop(c) }
		if !d.keep(c, place{nameOf(s), c.RemoteAddr().(*net.TCPAddr).AddrPort()}) {
			c.TCPConn.Close()
			return nil, ErrDenied
		}
	}
	return c, nil
}

// dialPacket connects a socket to a service.
func (d *dialer) dialPacket(ctx context.Context, s ingressconf.Service, remote bool) (*PacketOrigin, error) {
	conn, err := d.dialNet(ctx, "udp", s, remote, 0)
	if err != nil {
		return nil, err
	}
	o := &PacketOrigin{UDPConn: conn.(*net.UDPConn), to: conn.RemoteAddr().(*net.UDPAddr).AddrPort(), forget: func() {}}
	if remote {
		o.forget = func() { d.drop(o) }
		if !d.keep(o, place{nameOf(s), o.to}) {
			o.UDPConn.Close()
			return nil, ErrDenied
		}
	}
	return o, nil
}

// nameOf is the service's host if it is a name.
func nameOf(s ingressconf.Service) string {
	if _, err := netip.ParseAddr(s.Host); err != nil {
		return s.Host
	}
	return ""
}

// dialNet connects to a service over TCP or UDP, a remote rule's where the permit lets it. window, unless 0, is what the service
// may send ahead.
func (d *dialer) dialNet(ctx context.Context, network string, s ingressconf.Service, remote bool, window int) (net.Conn, error) {
	nd := net.Dialer{Resolver: d.resolver}
	nd.ControlContext = func(_ context.Context, _, address string, raw syscall.RawConn) error {
		if remote {
			to, err := netip.ParseAddrPort(address)
			if err != nil || !d.permitted(nameOf(s), to) {
				return ErrDenied
			}
		}
		if window > 0 {
			holdLittle(raw, window)
		}
		return nil
	}
	return nd.DialContext(ctx, network, s.Addr())
}

func (d *dialer) permitted(name string, to netip.AddrPort) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.permittedLocked(name, to)
}

func (d *dialer) permittedLocked(name string, to netip.AddrPort) bool {
	return d.permit != nil && d.permit.Addr(name, netip.AddrPortFrom(to.Addr().Unmap(), to.Port()))
}

// keep remembers c, which leads to p, if the permit that holds at that moment lets it be. From then on it may be reset. drop is
// to be called at its end.
func (d *dialer) keep(c tunnel.Resetter, p place) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.permittedLocked(p.name, p.to) {
		return false
	}
	if d.remote == nil {
		d.remote = map[tunnel.Resetter]place{}
	}
	d.remote[c] = p
	return true
}

func (d *dialer) drop(c tunnel.Resetter) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.remote, c)
}

// setPermit replaces the permit and cuts what it does not let be.
func (d *dialer) setPermit(p Permit) int {
	d.mu.Lock()
	d.permit = p
	var bad []tunnel.Resetter
	for c, at := range d.remote {
		if !d.permittedLocked(at.name, at.to) {
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
