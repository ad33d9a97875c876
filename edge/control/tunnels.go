package control

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/keyhaven/keyhaven/state"
)

// AddTunnel creates a tunnel.
func (c *Control) AddTunnel(ctx context.Context, name, comment string) (TunnelView, error) {
	if err := checkName("tunnel", name); err != nil {
		return TunnelView{}, err
	}
	if err := checkComment(comment); err != nil {
		return TunnelView{}, err
	}
	t := Tunnel{ID: newID("tn"), Name: name, Comment: comment, Created: c.now()}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if id, ok := m.tunnelNames[name]; ok {
			return nil, refusal(CodeExists, "choose another name, or use that one", "there is a tunnel %q already (%s)", name, id)
		}
		if len(m.tunnels) >= maxTunnels {
			return nil, refusal(CodeLimit, "delete some", "there are %d tunnels, which is the limit", maxTunnels)
		}
		return []state.Op{put(prefixTunnel+t.ID, t)}, nil
	})
	return TunnelView{Tunnel: t, Status: Inactive}, err
}

// A TunnelChange is what to change of a tunnel; nil fields stay.
type TunnelChange struct {
	Comment  *string `json:"comment,omitempty"`
	MaxFlows *int    `json:"max_flows,omitempty"` // 0: no bound
}

// SetTunnel changes the tunnel ref, a name or id.
func (c *Control) SetTunnel(ctx context.Context, ref string, change TunnelChange) (TunnelView, error) {
	if err := errors.Join(need("a tunnel", ref), checkChange(change.Comment, change.MaxFlows)); err != nil {
		return TunnelView{}, err
	}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		old, err := m.tunnelLocked(ref)
		if err != nil {
			return nil, err
		}
		t := old
		assign(&t.Comment, change.Comment)
		assign(&t.MaxFlows, change.MaxFlows)
		if t == old {
			return nil, nil
		}
		return []state.Op{put(prefixTunnel+t.ID, t)}, nil
	})
	if err != nil {
		return TunnelView{}, err
	}
	d, err := c.Tunnel(ref)
	return d.TunnelView, err
}

// Tunnels returns all tunnels, sorted by name.
func (c *Control) Tunnels() []TunnelView {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	list := make([]TunnelView, 0, len(m.tunnels))
	for _, t := range m.tunnels {
		list = append(list, c.tunnelSummaryLocked(t))
	}
	slices.SortFunc(list, func(a, b TunnelView) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// Tunnel returns the tunnel ref, a name or id, with its connectors and routes.
func (c *Control) Tunnel(ref string) (TunnelDetail, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	t, err := m.tunnelLocked(ref)
	if err != nil {
		return TunnelDetail{}, err
	}
	v, cs := c.tunnelViewLocked(t)
	return TunnelDetail{TunnelView: v, ConnectorList: cs, RouteList: m.routeViewsLocked(m.routesOfTunnel[t.ID])}, nil
}

// tunnelViewLocked sums up t and its connectors.
func (c *Control) tunnelViewLocked(t Tunnel) (TunnelView, []ConnectorView) {
	return c.tunnelSummaryLocked(t), c.connectorViewsLocked(c.model.connectorsOfTunnel[t.ID])
}

// DeleteTunnel deletes the tunnel ref, a name or id. A tunnel in use is refused with [ErrInUse] unless force, which
// deletes its routes, connectors and join tokens too and ends the connectors' sessions. One that a port, a zone or the
// configuration names is never deleted.
func (c *Control) DeleteTunnel(ctx context.Context, ref string, force bool) error {
	if err := need("a tunnel", ref); err != nil {
		return err
	}
	return c.deleteAll(ctx, func(m *model) (ops []state.Op, last state.Op, err error) {
		t, err := m.tunnelLocked(ref)
		if err != nil {
			return nil, last, err
		}
		referrers := append(m.tunnelReferrersLocked(t), c.localUsers(ThingTunnel, t.Name, t.ID)...)
		if err := inUse("tunnel", t.Name, "change these first; --force does not override them", referrers); err != nil {
			return nil, last, err
		}
		users, ops := m.tunnelUsersLocked(t, c.now())
		if len(users) > 0 && !force {
			return nil, last, &Error{Code: CodeInUse, Users: users, Message: "tunnel \"" + t.Name + "\" is in use:",
				Remedy: "delete these routes and revoke these connectors first, or use --force to delete them with it"}
		}
		return ops, state.Delete(prefixTunnel + t.ID), nil
	})
}

// tunnelUsersLocked returns what makes use of t, and what to delete with it, revoked connectors and spent tokens
// included.
func (m *model) tunnelUsersLocked(t Tunnel, now time.Time) (users []string, ops []state.Op) {
	users = m.routeUsersLocked(m.routesOfTunnel[t.ID])
	ops = deletes(m.routesOfTunnel[t.ID])
	names := make([]string, 0, len(m.connectorsOfTunnel[t.ID]))
	for name := range m.connectorsOfTunnel[t.ID] {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if m.connectors[name].Revoked.IsZero() {
			users = append(users, "connector \""+name+"\"")
		}
		ops = append(ops, state.Delete(prefixConn+name))
		if _, ok := m.seen[name]; ok {
			ops = append(ops, state.Delete(prefixSeen+name))
		}
		if _, ok := m.devices[name]; ok {
			ops = append(ops, state.Delete(prefixDevice+name))
		}
	}
	open := 0
	for id, tok := range m.tokens {
		if tok.Tunnel != t.ID {
			continue
		}
		if tok.UsedAt.IsZero() && now.Before(tok.Expires) {
			open++
		}
		ops = append(ops, state.Delete(prefixToken+id))
	}
	if _, ok := m.configs[t.ID]; ok {
		ops = append(ops, state.Delete(prefixConfig+t.ID))
	}
	if open > 0 {
		users = append(users, strconv.Itoa(open)+" join token(s) that can still be used")
	}
	return clipUsers(users), ops
}

func clipUsers(users []string) []string {
	if n := len(users); n > maxUsers {
		return append(users[:maxUsers:maxUsers], "and "+strconv.Itoa(n-maxUsers)+" more")
	}
	return users
}
