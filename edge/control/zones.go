package control

import (
	"context"
	"fmt"
	"slices"

	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/state"
)

type origin = zone.Origin

func originsHave(z *Zone, test func(*origin) bool) bool {
	return slices.ContainsFunc(z.Config.Origins, func(o origin) bool { return test(&o) })
}

// Zones returns all zones of the store, sorted by name; those of configuration files are not among them.
func (c *Control) Zones() []Zone { return zoneShelf.list(c) }

// Zone returns the zone name.
func (c *Control) Zone(name string) (Zone, error) { return zoneShelf.read(c, name) }

// CreateZone adds a zone. Its certificates are in it, since a file would be there on one edge and not on the others. Its
// key server group must be in this edge's configuration, and what its origins lead to must exist.
func (c *Control) CreateZone(ctx context.Context, z zone.Config) (Zone, error) {
	if err := c.checkZone(z); err != nil {
		return Zone{}, err
	}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if err := m.checkZoneLocked(z); err != nil {
			return nil, err
		}
		return zoneShelf.create(m, z, c.now())
	})
	return c.zoneAfter(z.Name, err)
}

// SetZone replaces the zone with z's name; ifRevision is as for [Control.SetPool].
func (c *Control) SetZone(ctx context.Context, z zone.Config, ifRevision state.Revision) (Zone, error) {
	if err := c.checkZone(z); err != nil {
		return Zone{}, err
	}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if _, err := zoneShelf.at(m, z.Name, ifRevision); err != nil {
			return nil, err
		}
		if err := m.checkZoneLocked(z); err != nil {
			return nil, err
		}
		return zoneShelf.replace(m, z, ifRevision, c.now())
	})
	return c.zoneAfter(z.Name, err)
}

func (c *Control) zoneAfter(name string, err error) (Zone, error) {
	if err != nil {
		return Zone{}, err
	}
	c.log.Info("zone changed", "zone", name)
	return c.Zone(name)
}

// DeleteZone deletes the zone name. Nothing refers to zones; its visitors are refused from then on.
func (c *Control) DeleteZone(ctx context.Context, name string, ifRevision state.Revision) error {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if _, err := zoneShelf.at(m, name, ifRevision); err != nil {
			return nil, err
		}
		return []state.Op{state.Delete(prefixZone + name)}, nil
	})
	if err == nil {
		c.log.Info("zone deleted", "zone", name)
	}
	return err
}

// checkZone validates z by itself.
func (c *Control) checkZone(z zone.Config) error {
	var faults []error
	if z.Certificate != "" || len(z.Certificates) > 0 {
		faults = append(faults, fmt.Errorf("certificate: names a file, which other edges do not have; give certificate_pem"))
	}
	for i, o := range z.Origins {
		if o.TLS.CA != "" {
			faults = append(faults, fmt.Errorf("origins[%d].tls.ca: names a file, which other edges do not have; give ca_pem", i))
		}
	}
	if len(faults) == 0 { // files are not looked at for somebody who may be far away
		zone.Compile("zone", []zone.Config{z}, c.hasKeyServer, func(key, format string, args ...any) {
			faults = append(faults, fmt.Errorf("%s: %s", key[min(len(key), len("zone[0].")):], fmt.Sprintf(format, args...)))
		})
	}
	if err := checkName("zone", z.Name); err != nil {
		faults = append(faults, err)
	}
	return zoneShelf.faulty(z.Name, faults)
}

// checkZoneLocked validates what z refers to, and that its hosts are free of other zones.
func (m *model) checkZoneLocked(z zone.Config) error {
	var faults []error
	for i, o := range z.Origins {
		at := fmt.Sprintf("origins[%d].", i)
		faults = append(faults, field(at+"vnet", m.refersVNetLocked(o.VNet))...)
		faults = append(faults, field(at+"pool", m.refersPoolLocked(o.Pool))...)
		faults = append(faults, field(at+"tunnel", m.refersTunnelLocked(o.Tunnel))...)
	}
	mine := map[string]bool{}
	for _, h := range z.Hosts {
		if p, err := zone.Pattern(h); err == nil {
			mine[p] = true
		}
	}
	for name, other := range m.zones {
		if name == z.Name {
			continue
		}
		for _, h := range other.Config.Hosts {
			if p, err := zone.Pattern(h); err == nil && mine[p] {
				faults = append(faults, fmt.Errorf("hosts: %s belongs to zone %q already; a host belongs to one zone", p, name))
			}
		}
	}
	return zoneShelf.faulty(z.Name, faults)
}
