package edge

import (
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
)

// published is what the control plane says.
type published struct {
	pools []spec.PoolConfig
	ports []spec.PortConfig
	zones []zone.Config
}

// A Fault is something published that is out of service because it is wrong, or a port that cannot be opened.
type Fault struct {
	Kind string `json:"kind"` // "pool", "port" or "zone"
	Name string `json:"name"`
	Text string `json:"text"`
}

// Publish puts what the control plane says beside the configuration file: pools, public ports and zones. It takes effect
// for the next request; what is in flight goes on with what it began with. One that is bad is left out, and the rest is
// taken: the error names each, and so does [Server.Faults]. The file wins where both use a name or a host.
func (s *Server) Publish(pools []spec.PoolConfig, ports []spec.PortConfig, zones []zone.Config) error {
	s.reload.Lock()
	defer s.reload.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	old := s.published
	s.heard = true
	s.published = published{slices.Clone(pools), slices.Clone(ports), slices.Clone(zones)}
	if reflect.DeepEqual(old.zones, s.published.zones) {
		s.applyPools(&s.file)
	} else if err := s.install(s.file, s.fileZones); err != nil {
		s.published = old
		return fmt.Errorf("edge: %w", err)
	}
	var errs []error
	for _, f := range s.faults {
		errs = append(errs, fmt.Errorf("%s %q: %s", f.Kind, f.Name, f.Text))
	}
	return errors.Join(errs...)
}

// Faults lists what is out of service, and why.
func (s *Server) Faults() []Fault {
	s.reload.Lock()
	list := slices.Clone(s.faults)
	s.reload.Unlock()
	for _, f := range s.forward.Faults() {
		list = append(list, Fault{"port", f.Name, f.Text})
	}
	return list
}

// Pools describes all pools as this edge sees them.
func (s *Server) Pools() []balance.PoolHealth { return s.balancer.Health() }

// fault notes that something published is left out. The caller holds s.reload.
func (s *Server) fault(kind, name string, errs ...error) {
	text := errors.Join(errs...).Error()
	s.faults = append(s.faults, Fault{kind, name, text})
	s.log.Warn("published configuration is at fault", "kind", kind, "name", name, "err", text)
}

// withPublished returns the zones of the file with those published beside them. The caller holds s.reload.
func (s *Server) withPublished(cfg *Config, file []*zone.Zone) []*zone.Zone {
	s.faults = slices.DeleteFunc(s.faults, func(f Fault) bool { return f.Kind == "zone" })
	hasGroup := func(name string) bool {
		return slices.ContainsFunc(cfg.KeyServers, func(k KeyServer) bool { return k.Name == name })
	}
	more, faults, warnings := zone.CompileBeside(file, s.published.zones, hasGroup)
	for i := range s.published.zones {
		if errs := faults[i]; len(errs) > 0 {
			s.fault("zone", s.published.zones[i].Name, errs...)
		}
	}
	for _, w := range warnings {
		s.log.Warn("published configuration", "remark", w)
	}
	return append(file[:len(file):len(file)], more...)
}

// applyPools puts pools and ports in place. The caller holds s.reload.
func (s *Server) applyPools(cfg *Config) {
	s.faults = slices.DeleteFunc(s.faults, func(f Fault) bool { return f.Kind != "zone" })
	pools := s.mergedPools(cfg)
	if err := s.balancer.Set(pools); err != nil { // each was checked
		s.log.Error("pools not replaced", "err", err)
		return
	}
	for _, g := range s.groups {
		g.follow(s.balancer)
	}
	if err := s.forward.Set(s.mergedPorts(cfg)); err != nil { // likewise
		s.log.Error("ports not replaced", "err", err)
	}
	if s.heard {
		s.missingPools(cfg)
	}
}

// missingPools notes the pools that are named and do not exist. What names them stays in service for everything else.
func (s *Server) missingPools(cfg *Config) {
	check := func(pool, user, name, effect string) {
		if pool != "" && !s.balancer.Has(pool) {
			s.fault("pool", pool, fmt.Errorf("%s %q names it, and there is no sound pool of this name: %s", user, name, effect))
		}
	}
	for _, zones := range [][]zone.Config{cfg.Zones, s.published.zones} {
		for i := range zones {
			for _, o := range zones[i].Origins {
				check(o.Pool, "zone", zones[i].Name, "requests for it are answered with 503")
			}
		}
	}
	for _, k := range cfg.KeyServers {
		check(k.Pool, "key server group", k.Name, "it has no servers")
	}
	for _, p := range cfg.Ports {
		check(p.Pool, "port", p.Name, "its connections are refused")
	}
}

// mergedPools returns the pools of the file, those that key server groups make, and those published that are sound.
func (s *Server) mergedPools(cfg *Config) []spec.PoolConfig {
	pools := slices.Clone(cfg.Pools)
	for i := range cfg.KeyServers {
		if k := &cfg.KeyServers[i]; k.Monitor != nil {
			pools = append(pools, k.ownPool())
		}
	}
	own := len(pools)
	for _, p := range s.published.pools {
		if slices.ContainsFunc(pools[:own], func(o spec.PoolConfig) bool { return o.Name == p.Name }) {
			s.fault("pool", p.Name, errors.New("the configuration file has a pool of this name; rename one"))
			continue
		}
		pools = append(pools, p)
	}
	for { // a pool that is left out may leave others without what they refer to
		bad := spec.CheckPools(pools)
		n := len(pools)
		kept := pools[:0:0]
		for i, p := range pools {
			if errs := bad[i]; len(errs) > 0 && i >= own {
				s.fault("pool", p.Name, errs...)
				continue
			}
			kept = append(kept, p)
		}
		if pools = kept; len(pools) == n {
			return pools
		}
	}
}

// mergedPorts returns the ports of the file and those published that are sound.
func (s *Server) mergedPorts(cfg *Config) []spec.PortConfig {
	ports := slices.Clone(cfg.Ports)
	for i := range s.published.ports {
		p := &s.published.ports[i]
		errs := p.Validate()
		if slices.ContainsFunc(ports, func(o spec.PortConfig) bool { return o.Name == p.Name }) {
			errs = append(errs, errors.New("the configuration file, or a port before it, has this name; rename one"))
		}
		if p.Pool != "" && !s.balancer.Has(p.Pool) {
			errs = append(errs, fmt.Errorf("pool: there is no sound pool %q", p.Pool))
		}
		if len(errs) > 0 {
			s.fault("port", p.Name, errs...)
			continue
		}
		ports = append(ports, *p)
	}
	return ports
}

// followPools keeps the key server groups' servers in the order of their health, until the server is closed.
func (s *Server) followPools() {
	for {
		changed := s.balancer.Changed()
		if now := s.now.Load(); now != nil {
			for _, g := range now.groups {
				g.follow(s.balancer)
			}
		}
		select {
		case <-changed:
		case <-s.ctx.Done():
			return
		}
	}
}
