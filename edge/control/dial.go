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

// A Query says where a flow shall go, and for whom. Either VNet, Host and Port name a destination, or Tunnel the ingress
// of a tunnel, whose connectors then choose the service by Host and Port.
type Query struct {
	// VNet is the virtual network, by name or id; empty is the default one. With Local it is the id.
	VNet string
	// Host is an address or a name; with Tunnel, the name that the visitor asked for.
	Host string
	// Port is the destination's; with Tunnel, the one that the visitor came to.
	Port uint16
	// Visitor is on whose behalf the flow is opened. It may be zero.
	Visitor netip.AddrPort
	// Class says what the flow is like, for the choice of its carrier.
	Class tunnel.FlowClass
	// Carrier is the one to prefer where there is a choice. Empty: what Class asks for.
	Carrier tunnel.Carrier
	// Tunnel is a tunnel's name or id: the flow goes to its ingress and VNet has no meaning.
	Tunnel string
	// Service is "http", "tcp" or, for packets, "udp", with Tunnel.
	Service string
	// Resolver sends the flow to the name server of the site that Host has its route to, or, with Tunnel, of that tunnel's
	// site, in place of Host and Port. The connector must permit it.
	Resolver bool
	// Connector is the name of the only connector that may carry the flow; empty: any of the tunnel's.
	Connector string
	// Local keeps the flow from being forwarded to another edge, as when it came from one.
	Local bool
}

// A plan is what the routes answer to a query.
type plan struct {
	q      Query
	flow   tunnel.Flow // what to open; the caller sets Kind where it is not TCP
	tunnel string      // id
}

// plan finds the tunnel for q.
func (c *Control) plan(q Query) (plan, error) {
	p := plan{q: q, flow: tunnel.Flow{Kind: tunnel.KindTCP, Port: q.Port, Visitor: q.Visitor, Class: q.Class, Connector: q.Connector}}
	if q.Tunnel == "" {
		var err error
		if p.flow.VNet, p.tunnel, p.flow.Host, err = c.resolve(q); q.Resolver {
			p.toResolver()
		}
		return p, err
	}
	c.model.mu.RLock()
	t, err := c.model.tunnelLocked(q.Tunnel)
	c.model.mu.RUnlock()
	if err != nil {
		return p, err
	}
	p.tunnel = t.ID
	if q.Resolver {
		network, err := c.network(q)
		p.flow.VNet = network.ID
		p.toResolver()
		return p, err
	}
	p.flow.Kind, p.flow.Host, p.flow.Service, p.flow.Tunnel = tunnel.KindIngress, q.Host, q.Service, t.ID
	return p, nil
}

// toResolver makes p's flow one to the site's name server. Another edge, which does not see what had the route, is told the
// tunnel.
func (p *plan) toResolver() {
	p.flow.Host, p.flow.Port, p.flow.Tunnel = resolverHost, resolverPort, p.tunnel
}

// destination names where the flow goes, for people.
func (p plan) destination() string {
	if p.q.Tunnel != "" {
		return fmt.Sprintf("%s port %d at the ingress of tunnel %s", p.flow.Host, p.flow.Port, p.q.Tunnel)
	}
	return fmt.Sprintf("%s port %d in %s", p.flow.Host, p.flow.Port, p.flow.VNet)
}

// network finds the network of q. What another edge forwards names it by its id alone: a name may have gone to another
// network since.
func (c *Control) network(q Query) (VNet, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	if !q.Local {
		return m.vnetLocked(q.VNet)
	}
	if v, ok := m.vnets[vnet.ID(q.VNet)]; ok {
		return v, nil
	}
	return VNet{}, refusal(CodeNotFound, "", "there is no virtual network with the id %q", clip(q.VNet))
}

// resolve finds the network, the tunnel that has q's host there, and the form of the host to ask the connector for.
func (c *Control) resolve(q Query) (v vnet.ID, tunnelID, canonical string, err error) {
	m, host := c.model, q.Host
	network, err := c.network(q)
	if err != nil {
		return "", "", "", err
	}
	var ok bool
	if a, aerr := netip.ParseAddr(host); aerr == nil && a.Zone() == "" {
		a = a.Unmap()
		canonical = a.String()
		tunnelID, ok = m.table.Load().LookupTunnel(network.ID, a)
	} else if canonical, err = canonicalHost(host); err != nil {
		return "", "", "", err
	} else {
		var r vnet.Route
		r, ok = m.table.Load().LookupHost(network.ID, canonical)
		tunnelID = r.Tunnel
	}
	if !ok {
		return "", "", "", refusal(CodeNoRoute, "add one with 'route add'", "virtual network %q has no route to %s", network.Name, canonical)
	}
	return network.ID, tunnelID, canonical, nil
}

// DialContext is [Control.Dial] of a TCP flow to host and port in the network ref.
func (c *Control) DialContext(ctx context.Context, ref, host string, port uint16, visitor netip.AddrPort) (net.Conn, error) {
	return c.Dial(ctx, Query{VNet: ref, Host: host, Port: port, Visitor: visitor})
}

// Dial opens a flow of bytes to where q says. It goes over a session of the route's tunnel here, and if there is none, over
// another edge that has one. If it cannot be opened there before the connector has accepted it, or the session does not
// answer for a while, it is tried over others too. When the routes change, flows that they would send elsewhere or
// nowhere go on, and are [tunnel.Drainer]s that ask to leave. Errors are [ErrNotFound] (no such network or tunnel),
// [ErrInvalid], [ErrNoRoute], [ErrTunnelDown], [ErrLimit], the context's, or a [*tunnel.FlowError]. The connection is a
// [tunnel.Conn], a [tunnel.Resetter] and a [Suspecter].
func (c *Control) Dial(ctx context.Context, q Query) (net.Conn, error) {
	f, err := c.dial(ctx, q)
	c.dials.WithLabelValues(dialResult(err)).Inc()
	if err != nil {
		return nil, err // not f, which would be an interface that holds nil
	}
	return f, nil
}

func (c *Control) dial(ctx context.Context, q Query) (*flow, error) {
	ctx, cancel := c.withTimeout(ctx)
	defer cancel()
	p, list, err := c.candidates(q)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, c.down(p)
	}
	r, err := c.reserve(p)
	if err != nil {
		return nil, err
	}
	conn, via, err := race(ctx, list, func(ctx context.Context, k candidate) (tunnel.Conn, error) {
		return c.open(ctx, k, p)
	}, cut)
	if err != nil {
		r.forget()
		return nil, p.failed(err)
	}
	return &flow{Conn: conn, record: c.begin(r, via, conn)}, nil
}

// withTimeout bounds ctx by the default if it has no bound.
func (c *Control) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, has := ctx.Deadline(); has {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, c.cfg.DialTimeout)
}

func (c *Control) open(ctx context.Context, k candidate, p plan) (tunnel.Conn, error) {
	s, err := k.session(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := s.Open(ctx, p.flowNow(ctx))
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// flowNow is p's flow with the time that ctx leaves for it.
func (p plan) flowNow(ctx context.Context) tunnel.Flow {
	f := p.flow
	if t, ok := ctx.Deadline(); ok {
		f.Deadline = max(time.Until(t), time.Millisecond)
	}
	return f
}

// cut gives up a flow that nobody wants any more.
func cut(conn tunnel.Conn) {
	if r, ok := conn.(tunnel.Resetter); ok {
		r.Reset(tunnel.ResultCancelled)
		return
	}
	conn.Close() //nolint:errcheck // nothing to save
}

// failed says that p's flow could not be opened because of err.
func (p plan) failed(err error) error {
	return fmt.Errorf("control: open a flow to %s: %w", p.destination(), err)
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
	switch e.Result {
	case tunnel.ResultSessionLost, tunnel.ResultInternal, tunnel.ResultUnsupported:
		return true
	}
	return e.Retriable()
}

// down says why no session of the plan's tunnel could be used.
func (c *Control) down(p plan) error {
	c.model.mu.RLock()
	name := c.model.tunnels[p.tunnel].Name
	c.model.mu.RUnlock()
	if p.q.Connector != "" {
		return refusal(CodeTunnelDown, "start it", "connector %q of tunnel %q has no session that takes flows", p.q.Connector, name)
	}
	if len(c.reg.of(p.tunnel)) > 0 {
		return refusal(CodeTunnelDown, "try again shortly", "every session of tunnel %q is draining", name)
	}
	return refusal(CodeTunnelDown, "start its connector", "tunnel %q has no session", name)
}
