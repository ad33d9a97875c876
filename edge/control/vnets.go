package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/vnet"
)

// Bounds on the number of records.
const (
	maxVNets      = 4096
	maxTunnels    = 1 << 17
	maxConnectors = 1 << 18
	maxRoutes     = 1 << 20
	maxTokens     = 1 << 14
)

// defaultName is the name, and the id, of the network that exists from the first start. The id is the one that is not
// random, so that a connector's allow-list can name that network wherever it dials.
const defaultName = "default"

// AddVNet creates a virtual network and, if isDefault, makes it the default one.
func (c *Control) AddVNet(ctx context.Context, name, comment string, isDefault bool) (VNetView, error) {
	if err := checkName("virtual network", name); err != nil {
		return VNetView{}, err
	}
	if err := checkComment(comment); err != nil {
		return VNetView{}, err
	}
	v := VNet{ID: vnet.ID(newID("vn")), Name: name, Comment: comment, Created: c.now()}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if id, ok := m.vnetNames[name]; ok {
			return nil, refusal(CodeExists, "choose another name, or use that one", "there is a virtual network %q already (%s)", name, id)
		}
		if len(m.vnets) >= maxVNets {
			return nil, refusal(CodeLimit, "delete some", "there are %d virtual networks, which is the limit", maxVNets)
		}
		ops := []state.Op{put(prefixVNet+string(v.ID), v)}
		if isDefault {
			ops = append(ops, state.Put(keyDefaultVNet, []byte(v.ID)))
		}
		return ops, nil
	})
	return VNetView{VNet: v, Default: isDefault}, err
}

// A VNetChange is what to change of a virtual network; zero fields stay.
type VNetChange struct {
	Comment  *string `json:"comment,omitempty"`
	Default  bool    `json:"default,omitempty"`   // make it the default one
	MaxFlows *int    `json:"max_flows,omitempty"` // 0: no bound
}

// SetVNet changes the network ref, a name or id.
func (c *Control) SetVNet(ctx context.Context, ref string, change VNetChange) (VNetView, error) {
	if err := errors.Join(need("a virtual network", ref), checkChange(change.Comment, change.MaxFlows)); err != nil {
		return VNetView{}, err
	}
	err := c.change(ctx, func(m *model) (ops []state.Op, err error) {
		old, err := m.vnetLocked(ref)
		if err != nil {
			return nil, err
		}
		v := old
		assign(&v.Comment, change.Comment)
		assign(&v.MaxFlows, change.MaxFlows)
		if v != old {
			ops = append(ops, put(prefixVNet+string(v.ID), v))
		}
		if change.Default && v.ID != m.defaultVNet {
			ops = append(ops, state.Put(keyDefaultVNet, []byte(v.ID)))
		}
		return ops, nil
	})
	if err != nil {
		return VNetView{}, err
	}
	d, err := c.VNet(ref)
	return d.VNetView, err
}

// maxMaxFlows bounds what a bound may be.
const maxMaxFlows = 1 << 24

func checkChange(comment *string, maxFlows *int) error {
	if comment != nil {
		if err := checkComment(*comment); err != nil {
			return err
		}
	}
	if maxFlows != nil && (*maxFlows < 0 || *maxFlows > maxMaxFlows) {
		return refusal(CodeInvalid, fmt.Sprintf("use 1 to %d, or 0 for no bound", maxMaxFlows), "%d is no bound on flows", *maxFlows)
	}
	return nil
}

func assign[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

// VNets returns all virtual networks, sorted by name.
func (c *Control) VNets() []VNetView {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	list := make([]VNetView, 0, len(m.vnets))
	for _, v := range m.vnets {
		list = append(list, m.vnetViewLocked(v))
	}
	slices.SortFunc(list, func(a, b VNetView) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

func (m *model) vnetViewLocked(v VNet) VNetView {
	return VNetView{VNet: v, Default: v.ID == m.defaultVNet, Routes: len(m.routesOfVNet[v.ID])}
}

// VNet returns the network ref, a name or id, with its routes. An empty ref is the default network.
func (c *Control) VNet(ref string) (VNetDetail, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	v, err := m.vnetLocked(ref)
	if err != nil {
		return VNetDetail{}, err
	}
	return VNetDetail{VNetView: m.vnetViewLocked(v), RouteList: m.routeViewsLocked(m.routesOfVNet[v.ID])}, nil
}

// DeleteVNet deletes the network ref, a name or id. A network in use is refused with [ErrInUse] unless force, which
// deletes its routes too. The default network is never deleted, nor one that a pool, a port, a zone or the configuration
// names.
func (c *Control) DeleteVNet(ctx context.Context, ref string, force bool) error {
	if err := need("a virtual network", ref); err != nil {
		return err
	}
	return c.deleteAll(ctx, func(m *model) (ops []state.Op, last state.Op, err error) {
		v, err := m.vnetLocked(ref)
		if err != nil {
			return nil, last, err
		}
		if v.ID == m.defaultVNet {
			return nil, last, refusal(CodeDefaultVNet, "make another network the default first, with 'vnet set NAME --default'",
				"virtual network %q is the default one", v.Name)
		}
		users := append(m.vnetUsersLocked(v), c.localUsers(ThingVNet, v.Name, string(v.ID))...)
		if err := inUse("virtual network", v.Name, "change these first; --force does not override them", users); err != nil {
			return nil, last, err
		}
		keys := m.routesOfVNet[v.ID]
		if len(keys) > 0 && !force {
			return nil, last, &Error{Code: CodeInUse, Users: m.routeUsersLocked(keys), Message: "virtual network \"" + v.Name + "\" is in use:",
				Remedy: "delete these first, or use --force to delete them with it"}
		}
		return deletes(keys), state.Delete(prefixVNet + string(v.ID)), nil
	})
}

// deleteAll deletes what decide returns, then last. It takes as many transactions as that needs, each decided anew; if
// it fails midway, the record of last is still there and the call can be made again.
func (c *Control) deleteAll(ctx context.Context, decide func(m *model) (ops []state.Op, last state.Op, err error)) error {
	for more := true; more; {
		err := c.change(ctx, func(m *model) ([]state.Op, error) {
			ops, last, err := decide(m)
			if err != nil {
				return nil, err
			}
			if more = len(ops) >= maxOps; more {
				return ops[:maxOps], nil
			}
			return append(ops, last), nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func deletes(keys set) []state.Op {
	ops := make([]state.Op, 0, len(keys)+1)
	for k := range keys {
		ops = append(ops, state.Delete(k))
	}
	return ops
}

func need(what, ref string) error {
	if ref == "" {
		return refusal(CodeInvalid, "give its name or id", "%s must be named", what)
	}
	return nil
}
