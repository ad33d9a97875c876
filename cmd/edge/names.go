package main

import (
	"context"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
)

// What the shell offers.
var (
	vnetNames   = named((*admin.Client).VNets, func(v control.VNetView) string { return v.Name })
	tunnelNames = named((*admin.Client).Tunnels, func(t control.TunnelView) string { return t.Name })
	poolNames   = named((*admin.Client).Pools, func(p control.Pool) string { return p.Config.Name })
	portNames   = named((*admin.Client).Ports, func(p control.Port) string { return p.Config.Name })
	zoneNames   = named((*admin.Client).Zones, func(z control.Zone) string { return z.Config.Name })

	deviceNames  = named(func(c *admin.Client, ctx context.Context) ([]control.DeviceView, error) { return c.Devices(ctx, "") }, func(d control.DeviceView) string { return d.Name })
	rolloutNames = named((*admin.Client).Rollouts, func(r control.RolloutView) string { return r.Config.Name })
)

func connectorNames(ctx context.Context, c *admin.Client, _ []string) (names []string, err error) {
	list, err := c.Connectors(ctx, "")
	for _, k := range list {
		if k.Revoked.IsZero() {
			names = append(names, k.Name)
		}
	}
	return names, err
}

func otherEdges(ctx context.Context, c *admin.Client, _ []string) ([]string, error) {
	return edgesWhere(ctx, c, func(e control.EdgeView) bool { return !e.Here && e.Removed.IsZero() })
}

func removedEdges(ctx context.Context, c *admin.Client, _ []string) ([]string, error) {
	return edgesWhere(ctx, c, func(e control.EdgeView) bool { return !e.Removed.IsZero() })
}

func edgesWhere(ctx context.Context, c *admin.Client, f func(control.EdgeView) bool) (names []string, err error) {
	list, err := c.Edges(ctx)
	for _, e := range list {
		if f(e) {
			names = append(names, e.Name)
		}
	}
	return names, err
}

func tokenIDs(ctx context.Context, c *admin.Client, _ []string) (ids []string, err error) {
	list, err := c.Tokens(ctx, "")
	for _, t := range list {
		if t.Status == control.TokenOpen {
			ids = append(ids, t.ID)
		}
	}
	return ids, err
}

func routePrefixes(ctx context.Context, c *admin.Client, _ []string) (prefixes []string, err error) {
	list, err := c.Routes(ctx, "")
	for _, r := range list {
		if r.Prefix != "" {
			prefixes = append(prefixes, r.Prefix)
		}
	}
	return prefixes, err
}

// endpointNames offers the endpoints of the pool that stands before.
func endpointNames(ctx context.Context, c *admin.Client, args []string) (names []string, err error) {
	p, err := c.Pool(ctx, args[0])
	for i := range p.Config.Endpoints {
		names = append(names, p.Config.Endpoints[i].Label())
	}
	return names, err
}
