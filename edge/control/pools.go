package control

import (
	"context"
	"fmt"
	"slices"

	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/state"
)

// Pools returns all pools, sorted by name.
func (c *Control) Pools() []Pool { return poolShelf.list(c) }

// Pool returns the pool name.
func (c *Control) Pool(name string) (Pool, error) { return poolShelf.read(c, name) }

// CreatePool adds a pool. What it refers to, networks, connectors and other pools, must exist.
func (c *Control) CreatePool(ctx context.Context, p spec.PoolConfig) (Pool, error) {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if err := m.checkPoolLocked(p); err != nil {
			return nil, err
		}
		return poolShelf.create(m, p, c.now())
	})
	return c.poolAfter(p.Name, err)
}

// SetPool replaces the pool with p's name. If ifRevision is not zero, the pool must still have that revision, else
// [ErrStale].
func (c *Control) SetPool(ctx context.Context, p spec.PoolConfig, ifRevision state.Revision) (Pool, error) {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if _, err := poolShelf.at(m, p.Name, ifRevision); err != nil {
			return nil, err
		}
		if err := m.checkPoolLocked(p); err != nil {
			return nil, err
		}
		return poolShelf.replace(m, p, ifRevision, c.now())
	})
	return c.poolAfter(p.Name, err)
}

func (c *Control) poolAfter(name string, err error) (Pool, error) {
	if err != nil {
		return Pool{}, err
	}
	c.log.Info("pool changed", "pool", name)
	return c.Pool(name)
}

// An EndpointChange is what to change of an endpoint; nil fields stay.
type EndpointChange struct {
	Disabled *bool    `json:"disabled,omitempty"`
	Drain    *bool    `json:"drain,omitempty"`
	Weight   *float64 `json:"weight,omitempty"` // 0 to 1
}

// SetEndpoint changes the endpoint of a pool with a label, its name or address, in one small transaction.
func (c *Control) SetEndpoint(ctx context.Context, pool, label string, change EndpointChange) (Pool, error) {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		old, err := poolShelf.get(m, pool)
		if err != nil {
			return nil, err
		}
		p := old.Config
		p.Endpoints = slices.Clone(p.Endpoints)
		i := slices.IndexFunc(p.Endpoints, func(e spec.Endpoint) bool { return e.Label() == label })
		if i < 0 {
			return nil, refusal(CodeNotFound, fmt.Sprintf("'pool info %s' shows those that there are", pool), "pool %q has no endpoint %q", pool, clip(label))
		}
		change.apply(&p.Endpoints[i])
		if err := poolShelf.faulty(pool, p.Validate()); err != nil {
			return nil, err
		}
		return poolShelf.replace(m, p, 0, c.now())
	})
	return c.poolAfter(pool, err)
}

func (e EndpointChange) apply(to *spec.Endpoint) {
	if e.Disabled != nil {
		to.Disabled = *e.Disabled
	}
	if e.Drain != nil {
		to.Drain = *e.Drain
	}
	if e.Weight != nil {
		w := *e.Weight
		to.Weight = &w
	}
}

// DeletePool deletes the pool name. One that a pool, a port, a zone or the configuration uses is [ErrInUse].
func (c *Control) DeletePool(ctx context.Context, name string, ifRevision state.Revision) error {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if _, err := poolShelf.at(m, name, ifRevision); err != nil {
			return nil, err
		}
		users := append(m.poolUsersLocked(name), c.localUsers(ThingPool, name, name)...)
		if err := inUse("pool", name, "change these first", users); err != nil {
			return nil, err
		}
		return []state.Op{state.Delete(prefixPool + name)}, nil
	})
	if err == nil {
		c.log.Info("pool deleted", "pool", name)
	}
	return err
}

// checkPoolLocked validates p and what it refers to.
func (m *model) checkPoolLocked(p spec.PoolConfig) error {
	pools := []spec.PoolConfig{p}
	for name, old := range m.pools {
		if name != p.Name {
			pools = append(pools, old.Config)
		}
	}
	faults := spec.CheckPools(pools)[0]
	for i, e := range p.Endpoints {
		at := fmt.Sprintf("endpoints[%d]", i)
		faults = append(faults, field(at+".vnet", m.refersVNetLocked(e.VNet))...)
		faults = append(faults, field(at+".connector", m.refersConnectorLocked(e.Connector))...)
	}
	return poolShelf.faulty(p.Name, faults)
}

func (m *model) refersVNetLocked(ref string) error {
	if ref == "" {
		return nil
	}
	_, err := m.vnetLocked(ref)
	return err
}

func (m *model) refersTunnelLocked(ref string) error {
	if ref == "" {
		return nil
	}
	_, err := m.tunnelLocked(ref)
	return err
}

func (m *model) refersPoolLocked(name string) error {
	if name == "" {
		return nil
	}
	_, err := poolShelf.get(m, name)
	return err
}

// refersConnectorLocked finds a connector by name or id.
func (m *model) refersConnectorLocked(ref string) error {
	if ref == "" {
		return nil
	}
	k, ok := m.connectors[ref]
	if !ok {
		for _, c := range m.connectors {
			if c.ID == ref {
				k, ok = c, true
				break
			}
		}
	}
	switch {
	case !ok:
		return refusal(CodeNotFound, "'connector list' shows those that there are", "there is no connector %q", clip(ref))
	case !k.Revoked.IsZero():
		return refusal(CodeRevoked, "name another, or none", "connector %q has been revoked", clip(ref))
	}
	return nil
}

// usersLocked describes the pools, ports and zones that a test finds.
func (m *model) usersLocked(pool func(*spec.PoolConfig) bool, port func(*spec.PortConfig) bool, z func(*Zone) bool) (users []string) {
	for name, p := range m.pools {
		if pool(&p.Config) {
			users = append(users, fmt.Sprintf("pool %q", name))
		}
	}
	for name, p := range m.ports {
		if port(&p.Config) {
			users = append(users, fmt.Sprintf("port %q", name))
		}
	}
	for name, v := range m.zones {
		if z(&v) {
			users = append(users, fmt.Sprintf("zone %q", name))
		}
	}
	slices.Sort(users)
	return users
}

func (m *model) poolUsersLocked(name string) []string {
	return m.usersLocked(
		func(p *spec.PoolConfig) bool { return p.Next == name || slices.Contains(p.Members, name) },
		func(p *spec.PortConfig) bool { return p.Pool == name },
		func(z *Zone) bool { return originsHave(z, func(o *origin) bool { return o.Pool == name }) })
}

func (m *model) vnetUsersLocked(v VNet) []string {
	uses := func(ref string) bool { return ref == v.Name || ref == string(v.ID) }
	return m.usersLocked(
		func(p *spec.PoolConfig) bool {
			return slices.ContainsFunc(p.Endpoints, func(e spec.Endpoint) bool { return uses(e.VNet) })
		},
		func(p *spec.PortConfig) bool { return uses(p.VNet) },
		func(z *Zone) bool { return originsHave(z, func(o *origin) bool { return uses(o.VNet) }) })
}

func (m *model) tunnelReferrersLocked(t Tunnel) []string {
	uses := func(ref string) bool { return ref == t.Name || ref == t.ID }
	return m.usersLocked(
		func(*spec.PoolConfig) bool { return false },
		func(p *spec.PortConfig) bool { return uses(p.Tunnel) },
		func(z *Zone) bool { return originsHave(z, func(o *origin) bool { return uses(o.Tunnel) }) })
}
