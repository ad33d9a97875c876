package control

import (
	"context"
	"fmt"
	"net"

	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/state"
)

// Ports returns all public ports, sorted by name.
func (c *Control) Ports() []Port { return portShelf.list(c) }

// Port returns the port name.
func (c *Control) Port(name string) (Port, error) { return portShelf.read(c, name) }

// CreatePort adds a public port. What it leads to must exist, and no other port may listen there.
func (c *Control) CreatePort(ctx context.Context, p spec.PortConfig) (Port, error) {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if err := m.checkPortLocked(p); err != nil {
			return nil, err
		}
		return portShelf.create(m, p, c.now())
	})
	return c.portAfter(p.Name, err)
}

// SetPort replaces the port with p's name; ifRevision is as for [Control.SetPool].
func (c *Control) SetPort(ctx context.Context, p spec.PortConfig, ifRevision state.Revision) (Port, error) {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if _, err := portShelf.at(m, p.Name, ifRevision); err != nil {
			return nil, err
		}
		if err := m.checkPortLocked(p); err != nil {
			return nil, err
		}
		return portShelf.replace(m, p, ifRevision, c.now())
	})
	return c.portAfter(p.Name, err)
}

func (c *Control) portAfter(name string, err error) (Port, error) {
	if err != nil {
		return Port{}, err
	}
	c.log.Info("port changed", "port", name)
	return c.Port(name)
}

// DeletePort deletes the port name. Nothing refers to ports.
func (c *Control) DeletePort(ctx context.Context, name string, ifRevision state.Revision) error {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if _, err := portShelf.at(m, name, ifRevision); err != nil {
			return nil, err
		}
		return []state.Op{state.Delete(prefixPort + name)}, nil
	})
	if err == nil {
		c.log.Info("port deleted", "port", name)
	}
	return err
}

// checkPortLocked validates p, what it refers to, and that its address is free of other ports.
func (m *model) checkPortLocked(p spec.PortConfig) error {
	faults := p.Validate()
	faults = append(faults, field("vnet", m.refersVNetLocked(p.VNet))...)
	faults = append(faults, field("pool", m.refersPoolLocked(p.Pool))...)
	faults = append(faults, field("tunnel", m.refersTunnelLocked(p.Tunnel))...)
	for name, other := range m.ports {
		if name != p.Name && other.Config.Protocol == p.Protocol && sameListen(other.Config.Listen, p.Listen) {
			faults = append(faults, fmt.Errorf("listen: port %q listens on %s already; choose another", name, other.Config.Listen))
		}
	}
	return portShelf.faulty(p.Name, faults)
}

// sameListen reports whether one process cannot listen on both addresses. Addresses that cannot be read are not its
// matter, nor is port 0, which is any free one.
func sameListen(a, b string) bool {
	hostA, portA, errA := net.SplitHostPort(a)
	hostB, portB, errB := net.SplitHostPort(b)
	if errA != nil || errB != nil || portA != portB || portA == "0" {
		return false
	}
	return anyHost(hostA) || anyHost(hostB) || hostA == hostB
}

func anyHost(h string) bool { return h == "" || h == "0.0.0.0" || h == "::" }
