package admin

import (
	"context"
	"strconv"
	"time"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/state"
)

// Status returns how the edge is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return ask[Status](ctx, c, request{method: get, path: path("status")})
}

// VNets returns all virtual networks.
func (c *Client) VNets(ctx context.Context) ([]control.VNetView, error) {
	return ask[[]control.VNetView](ctx, c, request{method: get, path: path("vnets")})
}

// VNet returns one network, by name or id.
func (c *Client) VNet(ctx context.Context, ref string) (control.VNetDetail, error) {
	return ask[control.VNetDetail](ctx, c, request{method: get, path: path("vnets", ref)})
}

// AddVNet creates a network.
func (c *Client) AddVNet(ctx context.Context, name, comment string, isDefault bool) (control.VNetView, error) {
	return ask[control.VNetView](ctx, c, request{method: post, path: path("vnets"), in: vnetRequest{name, comment, isDefault}})
}

// SetVNet changes a network.
func (c *Client) SetVNet(ctx context.Context, ref string, change control.VNetChange) (control.VNetView, error) {
	return ask[control.VNetView](ctx, c, request{method: patch, path: path("vnets", ref), in: change})
}

// DeleteVNet deletes a network; with force, its routes too.
func (c *Client) DeleteVNet(ctx context.Context, ref string, force bool) error {
	return c.call(ctx, request{method: del, path: path("vnets", ref), query: forceQuery(force)}, &nothing{})
}

// Tunnels returns all tunnels.
func (c *Client) Tunnels(ctx context.Context) ([]control.TunnelView, error) {
	return ask[[]control.TunnelView](ctx, c, request{method: get, path: path("tunnels")})
}

// Tunnel returns one tunnel, by name or id.
func (c *Client) Tunnel(ctx context.Context, ref string) (control.TunnelDetail, error) {
	return ask[control.TunnelDetail](ctx, c, request{method: get, path: path("tunnels", ref)})
}

// AddTunnel creates a tunnel.
func (c *Client) AddTunnel(ctx context.Context, name, comment string) (control.TunnelView, error) {
	return ask[control.TunnelView](ctx, c, request{method: post, path: path("tunnels"), in: tunnelRequest{name, comment}})
}

// SetTunnel changes a tunnel.
func (c *Client) SetTunnel(ctx context.Context, ref string, change control.TunnelChange) (control.TunnelView, error) {
	return ask[control.TunnelView](ctx, c, request{method: patch, path: path("tunnels", ref), in: change})
}

// DeleteTunnel deletes a tunnel; with force, its routes, connectors and join tokens too.
func (c *Client) DeleteTunnel(ctx context.Context, ref string, force bool) error {
	return c.call(ctx, request{method: del, path: path("tunnels", ref), query: forceQuery(force)}, &nothing{})
}

// CreateToken makes a join token. A ttl of zero is the default.
func (c *Client) CreateToken(ctx context.Context, ref string, ttl time.Duration) (control.JoinGrant, error) {
	var in tokenRequest
	if ttl != 0 {
		in.TTL = ttl.String()
	}
	return ask[control.JoinGrant](ctx, c, request{method: post, path: path("tunnels", ref, "tokens"), in: in})
}

// Tokens returns all join tokens, or those of one tunnel, without their secrets.
func (c *Client) Tokens(ctx context.Context, tunnelRef string) ([]control.TokenView, error) {
	return ask[[]control.TokenView](ctx, c, request{method: get, path: path("tokens"), query: optional("tunnel", tunnelRef)})
}

// RevokeToken makes a join token worthless.
func (c *Client) RevokeToken(ctx context.Context, id string) (control.TokenView, error) {
	return ask[control.TokenView](ctx, c, request{method: del, path: path("tokens", id)})
}

// Cleanup removes connectors that are gone and join tokens that nobody can use.
func (c *Client) Cleanup(ctx context.Context, s control.CleanupSpec) ([]control.Cleaned, error) {
	in := cleanupRequest{Tunnel: s.Tunnel, DryRun: s.DryRun}
	if s.Unseen != 0 {
		in.Unseen = s.Unseen.String()
	}
	return ask[[]control.Cleaned](ctx, c, request{method: post, path: path("cleanup"), in: in})
}

// Connectors returns all connectors, or those of one tunnel.
func (c *Client) Connectors(ctx context.Context, tunnelRef string) ([]control.ConnectorView, error) {
	return ask[[]control.ConnectorView](ctx, c, request{method: get, path: path("connectors"), query: optional("tunnel", tunnelRef)})
}

// RevokeConnector revokes a connector.
func (c *Client) RevokeConnector(ctx context.Context, name string) (control.ConnectorView, error) {
	return ask[control.ConnectorView](ctx, c, request{method: post, path: path("connectors", name, "revoke"), in: nothing{}})
}

// Routes returns all routes, or those of one network.
func (c *Client) Routes(ctx context.Context, vnetRef string) ([]control.RouteView, error) {
	return ask[[]control.RouteView](ctx, c, request{method: get, path: path("routes"), query: optional("vnet", vnetRef)})
}

// AddRoute creates a route.
func (c *Client) AddRoute(ctx context.Context, s control.RouteSpec) (control.RouteView, error) {
	return ask[control.RouteView](ctx, c, request{method: post, path: path("routes"), in: s})
}

// DeleteRoute deletes the route with the prefix or host of s in the network of s.
func (c *Client) DeleteRoute(ctx context.Context, s control.RouteSpec) (control.RouteView, error) {
	q := optional("vnet", s.VNet)
	if s.Prefix != "" {
		q.Set("prefix", s.Prefix)
	}
	if s.Host != "" {
		q.Set("host", s.Host)
	}
	return ask[control.RouteView](ctx, c, request{method: del, path: path("routes"), query: q})
}

// FindHost asks which tunnel has an address, a prefix or a name.
func (c *Client) FindHost(ctx context.Context, host, vnetRef string) (control.RouteAnswer, error) {
	q := optional("vnet", vnetRef)
	q.Set("host", host)
	return ask[control.RouteAnswer](ctx, c, request{method: get, path: path("routes", "lookup"), query: q})
}

// Pools returns all pools.
func (c *Client) Pools(ctx context.Context) ([]control.Pool, error) {
	return ask[[]control.Pool](ctx, c, request{method: get, path: path("pools")})
}

// Pool returns one pool.
func (c *Client) Pool(ctx context.Context, name string) (control.Pool, error) {
	return ask[control.Pool](ctx, c, request{method: get, path: path("pools", name)})
}

// CreatePool adds a pool.
func (c *Client) CreatePool(ctx context.Context, p spec.PoolConfig) (control.Pool, error) {
	return ask[control.Pool](ctx, c, request{method: post, path: path("pools"), in: p})
}

// SetPool replaces a pool that still has a revision, if that is not zero.
func (c *Client) SetPool(ctx context.Context, p spec.PoolConfig, ifRevision state.Revision) (control.Pool, error) {
	return ask[control.Pool](ctx, c, request{method: put, path: path("pools", p.Name), in: p, ifRevision: ifRevision})
}

// SetEndpoint changes an endpoint of a pool, by name or address.
func (c *Client) SetEndpoint(ctx context.Context, pool, label string, change control.EndpointChange) (control.Pool, error) {
	return ask[control.Pool](ctx, c, request{method: patch, path: path("pools", pool, "endpoints", label), in: change})
}

// DeletePool deletes a pool that nothing uses.
func (c *Client) DeletePool(ctx context.Context, name string) error {
	return c.call(ctx, request{method: del, path: path("pools", name)}, &nothing{})
}

// PoolHealth returns how the edge sees all pools, or the one named.
func (c *Client) PoolHealth(ctx context.Context, pool string) ([]balance.PoolHealth, error) {
	return ask[[]balance.PoolHealth](ctx, c, request{method: get, path: path("pool-health"), query: optional("pool", pool)})
}

// Ports returns all public ports.
func (c *Client) Ports(ctx context.Context) ([]control.Port, error) {
	return ask[[]control.Port](ctx, c, request{method: get, path: path("ports")})
}

// Port returns one public port.
func (c *Client) Port(ctx context.Context, name string) (control.Port, error) {
	return ask[control.Port](ctx, c, request{method: get, path: path("ports", name)})
}

// CreatePort adds a public port.
func (c *Client) CreatePort(ctx context.Context, p spec.PortConfig) (control.Port, error) {
	return ask[control.Port](ctx, c, request{method: post, path: path("ports"), in: p})
}

// SetPort replaces a port that still has a revision, if that is not zero.
func (c *Client) SetPort(ctx context.Context, p spec.PortConfig, ifRevision state.Revision) (control.Port, error) {
	return ask[control.Port](ctx, c, request{method: put, path: path("ports", p.Name), in: p, ifRevision: ifRevision})
}

// DeletePort deletes a public port.
func (c *Client) DeletePort(ctx context.Context, name string) error {
	return c.call(ctx, request{method: del, path: path("ports", name)}, &nothing{})
}

// Zones returns the zones of the store.
func (c *Client) Zones(ctx context.Context) ([]control.Zone, error) {
	return ask[[]control.Zone](ctx, c, request{method: get, path: path("zones")})
}

// Zone returns one zone of the store.
func (c *Client) Zone(ctx context.Context, name string) (control.Zone, error) {
	return ask[control.Zone](ctx, c, request{method: get, path: path("zones", name)})
}

// CreateZone adds a zone.
func (c *Client) CreateZone(ctx context.Context, z zone.Config) (control.Zone, error) {
	return ask[control.Zone](ctx, c, request{method: post, path: path("zones"), in: z})
}

// SetZone replaces a zone that still has a revision, if that is not zero.
func (c *Client) SetZone(ctx context.Context, z zone.Config, ifRevision state.Revision) (control.Zone, error) {
	return ask[control.Zone](ctx, c, request{method: put, path: path("zones", z.Name), in: z, ifRevision: ifRevision})
}

// DeleteZone deletes a zone.
func (c *Client) DeleteZone(ctx context.Context, name string) error {
	return c.call(ctx, request{method: del, path: path("zones", name)}, &nothing{})
}

// Edges returns the edges of the installation.
func (c *Client) Edges(ctx context.Context) ([]control.EdgeView, error) {
	return ask[[]control.EdgeView](ctx, c, request{method: get, path: path("edges")})
}

// RemoveEdge keeps an edge out of the installation.
func (c *Client) RemoveEdge(ctx context.Context, name string) (control.EdgeView, error) {
	return ask[control.EdgeView](ctx, c, request{method: post, path: path("edges", name, "remove"), in: nothing{}})
}

// RestoreEdge takes back RemoveEdge.
func (c *Client) RestoreEdge(ctx context.Context, name string) (control.EdgeView, error) {
	return ask[control.EdgeView](ctx, c, request{method: post, path: path("edges", name, "restore"), in: nothing{}})
}

// Flows returns up to limit open flows of the edge, oldest first, those of a network and a tunnel where they are not
// empty. A limit of zero is the default, 1000.
func (c *Client) Flows(ctx context.Context, vnetRef, tunnelRef string, limit int) (FlowList, error) {
	q := optional("vnet", vnetRef)
	if tunnelRef != "" {
		q.Set("tunnel", tunnelRef)
	}
	if limit != 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	return ask[FlowList](ctx, c, request{method: get, path: path("flows"), query: q})
}
