package connector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

const (
	// maxAddrs bounds how many permitted addresses of one name are tried.
	maxAddrs = 8
	// attemptDelay is how long one attempt has before the next address is tried beside it (RFC 8305, section 5).
	attemptDelay = 250 * time.Millisecond
)

// A Resolver resolves host names. *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// errDenied says that the allow-list does not permit a destination.
var errDenied = errors.New("not permitted by the allow-list")

// dialer connects flows to their destinations.
type dialer struct {
	resolver Resolver
	names    *nameServers // of single networks; nil: none
	net      net.Dialer
}

// target is a destination as the edge asked for it: an address, or a name in canonical form.
type target struct {
	vnet vnet.ID
	addr netip.Addr // valid: no name
	name string
	port uint16
	echo bool // an ICMP flow; port is anyPort

	servers []netip.AddrPort // of a flow to ResolverHost, which configuration permits
}

func (t target) permitted(allow *Allow, to netip.AddrPort) bool {
	if t.echo {
		return allow.Echo(t.vnet, t.name, to.Addr())
	}
	if len(t.servers) > 0 {
		return slices.Contains(t.servers, to)
	}
	if t.name != "" {
		return allow.Host(t.vnet, t.name, to)
	}
	return allow.Addr(t.vnet, to)
}

// parseTarget reads a flow's destination. What is neither an address nor a host name is denied, not guessed at.
func parseTarget(f tunnel.Flow) (target, error) {
	t := target{vnet: f.VNet, port: f.Port}
	if a, err := netip.ParseAddr(f.Host); err == nil {
		if a.Zone() != "" {
			return t, fmt.Errorf("address with a zone: %w", errDenied)
		}
		t.addr = a.Unmap()
		return t, nil
	}
	name, err := vnet.CanonicalHost(f.Host)
	if err != nil {
		return t, fmt.Errorf("%w: %w", errDenied, err)
	}
	if name[0] == '*' {
		return t, fmt.Errorf("pattern in place of a host name: %w", errDenied)
	}
	t.name = name
	return t, nil
}

// dial resolves t where needed and connects to one of the addresses that allow permits, exactly as it was checked.
func (d *dialer) dial(ctx context.Context, allow *Allow, t target) (*net.TCPConn, error) {
	addrs, err := d.locate(ctx, allow, t)
	if err != nil {
		return nil, err
	}
	return d.connect(ctx, addrs)
}

// locate resolves t where needed and returns the addresses that allow permits, in the order in which to try them.
func (d *dialer) locate(ctx context.Context, allow *Allow, t target) ([]netip.AddrPort, error) {
	if len(t.servers) > 0 {
		return t.servers, nil
	}
	if t.name == "" {
		to := netip.AddrPortFrom(t.addr, t.port)
		if !t.permitted(allow, to) {
			return nil, errDenied
		}
		return []netip.AddrPort{to}, nil
	}
	if !allow.resolvable(t.vnet, t.name, t.port) {
		return nil, errDenied
	}
	addrs, err := d.resolverOf(t.vnet).LookupNetIP(ctx, "ip", t.name)
	if err != nil {
		return nil, fmt.Errorf("resolve: %w", err)
	}
	var permitted []netip.AddrPort
	for _, a := range addrs {
		if to := netip.AddrPortFrom(a.Unmap(), t.port); t.permitted(allow, to) {
			permitted = append(permitted, to)
		}
	}
	if len(permitted) == 0 {
		if len(addrs) == 0 {
			return nil, &net.DNSError{Err: "no address", Name: t.name, IsNotFound: true}
		}
		return nil, fmt.Errorf("none of the %d addresses of the name: %w", len(addrs), errDenied)
	}
	return interleave(permitted), nil
}

// resolverOf is what resolves the names of a network's flows.
func (d *dialer) resolverOf(v vnet.ID) Resolver {
	if r, ok := d.names.resolver(v); ok {
		return r
	}
	return d.resolver
}

// interleave alternates the address families, beginning with the one that the resolver put first (RFC 8305, section 4),
// and drops what is beyond maxAddrs.
func interleave(addrs []netip.AddrPort) []netip.AddrPort {
	var first, second []netip.AddrPort
	for _, a := range addrs {
		if a.Addr().Is4() == addrs[0].Addr().Is4() {
			first = append(first, a)
		} else {
			second = append(second, a)
		}
	}
	out := make([]netip.AddrPort, 0, len(addrs))
	for len(first)+len(second) > 0 && len(out) < maxAddrs {
		if len(first) > 0 {
			out, first = append(out, first[0]), first[1:]
		}
		if len(second) > 0 {
			out, second = append(out, second[0]), second[1:]
		}
	}
	return out[:min(len(out), maxAddrs)]
}

// connect tries the addresses in order, the next one when the last has failed or had attemptDelay, and returns the
// first connection. If all fail, the error is that of the address tried first. Nothing is left running.
func (d *dialer) connect(ctx context.Context, addrs []netip.AddrPort) (*net.TCPConn, error) {
	if len(addrs) == 1 {
		return d.net.DialTCP(ctx, "tcp", netip.AddrPort{}, addrs[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		i    int
		conn *net.TCPConn
		err  error
	}
	outcomes := make(chan outcome) // unbuffered: every attempt is waited for
	errs := make([]error, len(addrs))
	var won *net.TCPConn
	next := time.NewTimer(0)
	defer next.Stop()
	for started, ended := 0, 0; ; {
		select {
		case <-next.C:
			if won != nil || started == len(addrs) {
				continue
			}
			i, to := started, addrs[started]
			go func() {
				conn, err := d.net.DialTCP(ctx, "tcp", netip.AddrPort{}, to)
				outcomes <- outcome{i, conn, err}
			}()
			started++
			next.Reset(attemptDelay)
		case o := <-outcomes:
			ended++
			errs[o.i] = o.err
			switch {
			case o.err == nil && won == nil:
				won = o.conn
				cancel()
			case o.err == nil:
				o.conn.Close()
			case won == nil && ctx.Err() == nil:
				next.Reset(0)
			}
			if ended == started && (won != nil || started == len(addrs) || ctx.Err() != nil) {
				if won != nil {
					return won, nil
				}
				return nil, errs[0]
			}
		}
	}
}

// resultOf maps the error of a dial to what the edge is told.
func resultOf(err error) tunnel.Result {
	if err == nil {
		return tunnel.ResultOK
	}
	if errors.Is(err, errDenied) {
		return tunnel.ResultDenied
	}
	if errors.Is(err, errEchoForbidden) {
		return tunnel.ResultForbidden
	}
	if errors.Is(err, errNoResolver) {
		return tunnel.ResultNoRoute
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return tunnel.ResultNameNotFound
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
		return tunnel.ResultTimedOut
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		if r, ok := errnoResults[errno]; ok {
			return r
		}
	}
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		return tunnel.ResultTimedOut
	}
	return tunnel.ResultInternal
}

var errnoResults = map[syscall.Errno]tunnel.Result{
	syscall.ECONNREFUSED:  tunnel.ResultRefused,
	syscall.ECONNRESET:    tunnel.ResultRefused,
	syscall.ETIMEDOUT:     tunnel.ResultTimedOut,
	syscall.EHOSTUNREACH:  tunnel.ResultNoRoute,
	syscall.ENETUNREACH:   tunnel.ResultNoRoute,
	syscall.EHOSTDOWN:     tunnel.ResultNoRoute,
	syscall.ENETDOWN:      tunnel.ResultNoRoute,
	syscall.EADDRNOTAVAIL: tunnel.ResultNoRoute,
	syscall.EACCES:        tunnel.ResultDenied, // this host's packet filter
	syscall.EPERM:         tunnel.ResultDenied,
	syscall.EMFILE:        tunnel.ResultLimit, // nothing was dialled
	syscall.ENFILE:        tunnel.ResultLimit,
	syscall.ENOBUFS:       tunnel.ResultLimit,
}
