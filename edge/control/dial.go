package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

// maxAttempts bounds how many sessions one flow is tried on.
const maxAttempts = 4

// DialContext opens a TCP flow to host, an address or a name, and port, in the network ref (name or id; empty is the
// default), for visitor, which may be zero. The flow goes over the session of the route's tunnel that has the fewest
// flows; if it cannot be opened there before the connector has accepted it, over another. When the routes change, flows
// that they would send elsewhere or nowhere go on, and are [tunnel.Drainer]s that ask to leave. Errors are [ErrNotFound] (no
// such network), [ErrInvalid], [ErrNoRoute], [ErrTunnelDown], the context's, or a [*tunnel.FlowError]. The connection is
// a [tunnel.Conn].
func (c *Control) DialContext(ctx context.Context, ref, host string, port uint16, visitor netip.AddrPort) (net.Conn, error) {
	conn, err := c.dial(ctx, ref, host, port, visitor)
	c.dials.WithLabelValues(dialResult(err)).Inc()
	return conn, err
}

func (c *Control) dial(ctx context.Context, ref, host string, port uint16, visitor netip.AddrPort) (net.Conn, error) {
	v, tunnelID, host, err := c.resolve(ref, host)
	if err != nil {
		return nil, err
	}
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.cfg.DialTimeout)
		defer cancel()
	}
	var failed error
	var tried [maxAttempts]*live
	for n := range maxAttempts {
		l := c.reg.pick(tunnelID, tried[:n])
		if l == nil {
			break
		}
		tried[n] = l
		conn, err := c.open(ctx, l, v, host, port, visitor)
		if err == nil {
			f := c.flows.add(conn, ref, host, tunnelID)
			if _, now, _, err := c.resolve(ref, host); err != nil || now != tunnelID { // changed before reroute could see it
				f.expel()
			}
			return f, nil
		}
		failed = err
		if !elsewhere(ctx, err) {
			break
		}
		c.log.Debug("flow tried on another session", "peer", l.s.Peer().String(), "err", err)
	}
	if failed != nil {
		return nil, fmt.Errorf("control: open a flow to %s port %d in %s: %w", host, port, v, failed)
	}
	return nil, c.down(tunnelID)
}

func (c *Control) open(ctx context.Context, l *live, v vnet.ID, host string, port uint16, visitor netip.AddrPort) (tunnel.Conn, error) {
	f := tunnel.Flow{Kind: tunnel.KindTCP, VNet: v, Host: host, Port: port, Visitor: visitor}
	if t, ok := ctx.Deadline(); ok {
		f.Deadline = max(time.Until(t), time.Millisecond)
	}
	conn, err := l.s.Open(ctx, f)
	if err != nil {
		return nil, err // not conn, which would be an interface that holds nil
	}
	return conn, nil
}

// elsewhere reports whether a flow that failed with err may be tried on another session: the session failed, and the
// destination has not answered.
func elsewhere(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	e, ok := errors.AsType[*tunnel.FlowError](err)
	if !ok {
		return true
	}
	return e.Retriable() || e.Result == tunnel.ResultSessionLost || e.Result == tunnel.ResultInternal
}

// resolve finds the network, the tunnel that has host there, and the form of host to ask the connector for.
func (c *Control) resolve(ref, host string) (v vnet.ID, tunnelID, canonical string, err error) {
	m := c.model
	m.mu.RLock()
	network, err := m.vnetLocked(ref)
	m.mu.RUnlock()
	if err != nil {
		return "", "", "", err
	}
	var r vnet.Route
	var ok bool
	if a, aerr := netip.ParseAddr(host); aerr == nil && a.Zone() == "" {
		a = a.Unmap()
		canonical = a.String()
		r, ok = m.table.Load().Lookup(network.ID, a)
	} else if canonical, err = canonicalHost(host); err != nil {
		return "", "", "", err
	} else {
		r, ok = m.table.Load().LookupHost(network.ID, canonical)
	}
	if !ok {
		return "", "", "", refusal(CodeNoRoute, "add one with 'route add'", "virtual network %q has no route to %s", network.Name, canonical)
	}
	return network.ID, r.Tunnel, canonical, nil
}

// down says why no session of the tunnel could be used.
func (c *Control) down(tunnelID string) error {
	c.model.mu.RLock()
	name := c.model.tunnels[tunnelID].Name
	c.model.mu.RUnlock()
	if len(c.reg.of(tunnelID)) > 0 {
		return refusal(CodeTunnelDown, "try again shortly", "every session of tunnel %q is draining", name)
	}
	return refusal(CodeTunnelDown, "start its connector", "tunnel %q has no session", name)
}
