package control

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/vnet"
)

// Keys of the store. The network is part of every route's key.
const (
	keyGeneration  = "control/generation"   // moves with every change; value: the schema
	keyDefaultVNet = "control/default-vnet" // id of the default network
	prefixVNet     = "vnets/"               // + id
	prefixTunnel   = "tunnels/"             // + id
	prefixConn     = "connectors/"          // + name
	prefixRoute    = "routes/"              // + vnet id + "/prefix/" or "/host/" + target
	prefixToken    = "tokens/"              // + token id
	prefixSeen     = "seen/"                // + connector name
	prefixPool     = "pools/"               // + name
	prefixPort     = "ports/"               // + name
	prefixZone     = "zones/"               // + name
	prefixConfig   = "configs/"             // + tunnel id
)

// schema is the value of the generation record. A store with another one was written by a version that this one
// does not understand.
const schema = `{"schema":1}`

func routeKey(r Route) string {
	if r.Host != "" {
		return prefixRoute + string(r.VNet) + "/host/" + r.Host
	}
	return prefixRoute + string(r.VNet) + "/prefix/" + r.Prefix
}

type set map[string]struct{}

// A model is the memory's picture of the store. Readers hold mu; the table is read without it.
type model struct {
	mu         sync.RWMutex
	generation state.Revision // of the last transaction that is applied whole
	moved      chan struct{}  // closed, and replaced, when generation moves

	defaultVNet vnet.ID
	vnets       map[vnet.ID]VNet
	vnetNames   map[string]vnet.ID
	tunnels     map[string]Tunnel
	tunnelNames map[string]string
	connectors  map[string]Connector
	tokens      map[string]mtls.JoinRecord
	seen        map[string]seen
	routes      map[string]Route // by key
	pools       map[string]Pool  // by name, as ports and zones
	ports       map[string]Port
	zones       map[string]Zone
	configs     map[string]TunnelConfig // by tunnel id
	rollouts    map[string]Rollout      // by name
	devices     map[string]deviceRecord // by connector name
	removed     map[string]removedEdge  // by name

	routesOfVNet       map[vnet.ID]set // route keys
	routesOfTunnel     map[string]set  // route keys
	connectorsOfTunnel map[string]set  // names
	rolloutOrder       []Rollout       // the newest first; replaced, never changed

	table atomic.Pointer[vnet.Table]
}

func newModel() *model {
	m := &model{moved: make(chan struct{})}
	m.clearLocked()
	return m
}

func (m *model) clearLocked() {
	m.defaultVNet = ""
	m.vnets, m.vnetNames = map[vnet.ID]VNet{}, map[string]vnet.ID{}
	m.tunnels, m.tunnelNames = map[string]Tunnel{}, map[string]string{}
	m.connectors = map[string]Connector{}
	m.tokens = map[string]mtls.JoinRecord{}
	m.seen = map[string]seen{}
	m.routes = map[string]Route{}
	m.configs = map[string]TunnelConfig{}
	m.removed = map[string]removedEdge{}
	m.rollouts, m.rolloutOrder, m.devices = map[string]Rollout{}, nil, map[string]deviceRecord{}
	m.pools, m.ports, m.zones = map[string]Pool{}, map[string]Port{}, map[string]Zone{}
	m.routesOfVNet, m.routesOfTunnel, m.connectorsOfTunnel = map[vnet.ID]set{}, map[string]set{}, map[string]set{}
}

// A delta is one key's new value, nil if it is gone.
type delta struct {
	key   string
	value []byte
	rev   state.Revision // of the transaction that wrote it
}

// load replaces the picture with entries, a whole listing of the store at rev. Records that cannot be read are left
// out and returned: what they allowed is then not allowed.
func (m *model) load(entries []state.Entry) (bad []error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clearLocked()
	var gen state.Revision
	routes := make([]vnet.Route, 0, len(entries))
	for _, e := range entries {
		if e.Key == keyGeneration {
			gen = e.Revision
		}
		if err := m.applyLocked(delta{e.Key, e.Value, e.Revision}); err != nil {
			bad = append(bad, err)
		}
	}
	for key, r := range m.routes {
		tr, err := r.tableRoute()
		if err != nil {
			bad = append(bad, fmt.Errorf("control: record %q: %w", key, err))
			continue
		}
		routes = append(routes, tr)
	}
	table, err := vnet.Build(routes)
	if err != nil {
		bad = append(bad, fmt.Errorf("control: build route table: %w", err))
		table, _ = vnet.Build(nil)
	}
	m.table.Store(table)
	m.moveLocked(gen)
	return bad
}

// apply adds the records of one transaction, then moves the generation to gen, if it is not zero.
func (m *model) apply(deltas []delta, gen state.Revision) (bad []error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	table := m.table.Load()
	for _, d := range deltas {
		old, had := m.routes[d.key]
		if err := m.applyLocked(d); err != nil {
			bad = append(bad, err)
		}
		now, has := m.routes[d.key]
		if had == has && old == now {
			continue
		}
		var err error
		if table, err = replace(table, old, had, now, has); err != nil {
			bad = append(bad, fmt.Errorf("control: record %q: %w", d.key, err))
		}
	}
	m.table.Store(table)
	if gen != 0 {
		m.moveLocked(gen)
	}
	return bad
}

func replace(t *vnet.Table, old Route, had bool, now Route, has bool) (*vnet.Table, error) {
	if had {
		tr, err := old.tableRoute()
		if err != nil {
			return t, err
		}
		next, err := t.Without(tr)
		if err != nil {
			return t, err
		}
		t = next
	}
	if !has {
		return t, nil
	}
	tr, err := now.tableRoute()
	if err != nil {
		return t, err
	}
	next, err := t.With(tr)
	if err != nil {
		return t, err
	}
	return next, nil
}

func (m *model) moveLocked(gen state.Revision) {
	m.generation = gen
	close(m.moved)
	m.moved = make(chan struct{})
}

// applyLocked replaces the record d.key. Keys of others are not looked at.
func (m *model) applyLocked(d delta) error {
	switch kind, rest, _ := strings.Cut(d.key, "/"); kind + "/" {
	case "control/":
		if d.key == keyDefaultVNet {
			m.defaultVNet = vnet.ID(d.value)
		}
	case prefixVNet:
		return m.applyVNetLocked(vnet.ID(rest), d)
	case prefixTunnel:
		return m.applyTunnelLocked(rest, d)
	case prefixConn:
		return m.applyConnectorLocked(rest, d)
	case prefixRoute:
		return m.applyRouteLocked(d)
	case prefixToken:
		return applyPlain(m.tokens, rest, d)
	case prefixSeen:
		return applyPlain(m.seen, rest, d)
	case prefixPool:
		return applyStored(m.pools, rest, d)
	case prefixPort:
		return applyStored(m.ports, rest, d)
	case prefixZone:
		return applyStored(m.zones, rest, d)
	case prefixConfig:
		return applyPlain(m.configs, rest, d)
	case prefixRemoved:
		return applyPlain(m.removed, rest, d)
	case prefixRollout:
		return m.applyRolloutLocked(rest, d)
	case prefixDevice:
		return applyPlain(m.devices, rest, d)
	}
	return nil
}

func decode[T any](d delta) (v T, err error) {
	if err = json.Unmarshal(d.value, &v); err != nil {
		err = fmt.Errorf("control: record %q cannot be read: %w", d.key, err)
	}
	return v, err
}

func applyPlain[T any](to map[string]T, name string, d delta) error {
	delete(to, name)
	if d.value == nil {
		return nil
	}
	v, err := decode[T](d)
	if err != nil {
		return err
	}
	to[name] = v
	return nil
}

func (m *model) applyVNetLocked(id vnet.ID, d delta) error {
	if old, ok := m.vnets[id]; ok {
		delete(m.vnets, id)
		delete(m.vnetNames, old.Name)
	}
	if d.value == nil {
		return nil
	}
	v, err := decode[VNet](d)
	if err != nil {
		return err
	}
	m.vnets[id] = v
	m.vnetNames[v.Name] = id
	return nil
}

func (m *model) applyTunnelLocked(id string, d delta) error {
	if old, ok := m.tunnels[id]; ok {
		delete(m.tunnels, id)
		delete(m.tunnelNames, old.Name)
	}
	if d.value == nil {
		return nil
	}
	t, err := decode[Tunnel](d)
	if err != nil {
		return err
	}
	m.tunnels[id] = t
	m.tunnelNames[t.Name] = id
	return nil
}

func (m *model) applyConnectorLocked(name string, d delta) error {
	if old, ok := m.connectors[name]; ok {
		delete(m.connectors, name)
		drop(m.connectorsOfTunnel, old.Tunnel, name)
	}
	if d.value == nil {
		return nil
	}
	c, err := decode[Connector](d)
	if err != nil {
		return err
	}
	m.connectors[name] = c
	add(m.connectorsOfTunnel, c.Tunnel, name)
	return nil
}

func (m *model) applyRouteLocked(d delta) error {
	if old, ok := m.routes[d.key]; ok {
		delete(m.routes, d.key)
		drop(m.routesOfVNet, old.VNet, d.key)
		drop(m.routesOfTunnel, old.Tunnel, d.key)
	}
	if d.value == nil {
		return nil
	}
	r, err := decode[Route](d)
	if err != nil {
		return err
	}
	if routeKey(r) != d.key {
		return fmt.Errorf("control: record %q holds the route of another key", d.key)
	}
	m.routes[d.key] = r
	add(m.routesOfVNet, r.VNet, d.key)
	add(m.routesOfTunnel, r.Tunnel, d.key)
	return nil
}

func add[K comparable](m map[K]set, k K, v string) {
	if m[k] == nil {
		m[k] = set{}
	}
	m[k][v] = struct{}{}
}

func drop[K comparable](m map[K]set, k K, v string) {
	delete(m[k], v)
	if len(m[k]) == 0 {
		delete(m, k)
	}
}

func (r Route) tableRoute() (vnet.Route, error) {
	t := vnet.Route{VNet: r.VNet, Host: r.Host, Tunnel: r.Tunnel, Comment: r.Comment}
	if r.Host == "" {
		p, err := netip.ParsePrefix(r.Prefix)
		if err != nil {
			return t, err
		}
		t.Prefix = p
	}
	return t, nil
}

// vnetLocked finds a network by name or id; "" is the default.
func (m *model) vnetLocked(ref string) (VNet, error) {
	if ref == "" {
		if v, ok := m.vnets[m.defaultVNet]; ok {
			return v, nil
		}
		return VNet{}, refusal(CodeNotFound, "add one with 'vnet add NAME --default'", "there is no default network")
	}
	if id, ok := m.vnetNames[ref]; ok {
		return m.vnets[id], nil
	}
	if v, ok := m.vnets[vnet.ID(ref)]; ok {
		return v, nil
	}
	return VNet{}, refusal(CodeNotFound, "'vnet list' shows those that there are", "there is no virtual network %q", clip(ref))
}

// tunnelLocked finds a tunnel by name or id.
func (m *model) tunnelLocked(ref string) (Tunnel, error) {
	if id, ok := m.tunnelNames[ref]; ok {
		return m.tunnels[id], nil
	}
	if t, ok := m.tunnels[ref]; ok {
		return t, nil
	}
	return Tunnel{}, refusal(CodeNotFound, "'tunnel list' shows those that there are", "there is no tunnel %q", clip(ref))
}

// tunnelIDLocked returns the id of the tunnel ref (name or id), or "" for all of them if ref is empty.
func (m *model) tunnelIDLocked(ref string) (string, error) {
	if ref == "" {
		return "", nil
	}
	t, err := m.tunnelLocked(ref)
	return t.ID, err
}
