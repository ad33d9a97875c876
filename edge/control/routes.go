package control

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strings"

	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/vnet"
)

// RouteSpec names a route: a Prefix or a Host, in VNet (name or id; empty is the default), to Tunnel (name or id).
type RouteSpec struct {
	VNet    string `json:"vnet,omitempty"`
	Prefix  string `json:"prefix,omitempty"`
	Host    string `json:"host,omitempty"`
	Tunnel  string `json:"tunnel,omitempty"`
	Comment string `json:"comment,omitempty"`
}

// target returns the route's canonical prefix or host.
func (s RouteSpec) target() (Route, error) {
	var r Route
	switch {
	case (s.Prefix == "") == (s.Host == ""):
		return r, refusal(CodeInvalid, "give one of the two", "a route has either a prefix or a host name")
	case s.Host != "":
		h, err := canonicalHost(s.Host)
		r.Host = h
		return r, err
	}
	p, err := parsePrefix(s.Prefix)
	r.Prefix = p.String()
	return r, err
}

// AddRoute creates a route. The same prefix or host twice in one network is [ErrExists]; nested prefixes are not.
func (c *Control) AddRoute(ctx context.Context, s RouteSpec) (RouteView, error) {
	r, err := s.target()
	if err != nil {
		return RouteView{}, err
	}
	if err := checkComment(s.Comment); err != nil {
		return RouteView{}, err
	}
	if err := need("the tunnel of a route", s.Tunnel); err != nil {
		return RouteView{}, err
	}
	r.Comment, r.Created = s.Comment, c.now()
	var view RouteView
	err = c.change(ctx, func(m *model) ([]state.Op, error) {
		v, err := m.vnetLocked(s.VNet)
		if err != nil {
			return nil, err
		}
		t, err := m.tunnelLocked(s.Tunnel)
		if err != nil {
			return nil, err
		}
		r.VNet, r.Tunnel = v.ID, t.ID
		key := routeKey(r)
		if old, ok := m.routes[key]; ok {
			return nil, refusal(CodeExists, "delete that route first, or add this one in another virtual network",
				"virtual network %q already has the route %s", v.Name, m.routeViewLocked(old))
		}
		if len(m.routes) >= maxRoutes {
			return nil, refusal(CodeLimit, "delete some", "there are %d routes, which is the limit", maxRoutes)
		}
		view = RouteView{Route: r, VNetName: v.Name, TunnelName: t.Name}
		return []state.Op{put(key, r)}, nil
	})
	return view, err
}

// DeleteRoute deletes the route with the prefix or host of s in the network of s. Its tunnel is not looked at.
func (c *Control) DeleteRoute(ctx context.Context, s RouteSpec) (RouteView, error) {
	r, err := s.target()
	if err != nil {
		return RouteView{}, err
	}
	var view RouteView
	err = c.change(ctx, func(m *model) ([]state.Op, error) {
		v, err := m.vnetLocked(s.VNet)
		if err != nil {
			return nil, err
		}
		r.VNet = v.ID
		key := routeKey(r)
		old, ok := m.routes[key]
		if !ok {
			return nil, refusal(CodeNotFound, "'route list' shows those that there are", "virtual network %q has no route %s", v.Name, r.Target())
		}
		view = m.routeViewLocked(old)
		return []state.Op{state.Delete(key)}, nil
	})
	return view, err
}

// Routes returns the routes of the network ref (name or id), or of all networks if ref is empty, sorted by network,
// then prefixes by address, then hosts.
func (c *Control) Routes(ref string) ([]RouteView, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	if ref != "" {
		v, err := m.vnetLocked(ref)
		if err != nil {
			return nil, err
		}
		return m.routeViewsLocked(m.routesOfVNet[v.ID]), nil
	}
	list := make([]RouteView, 0, len(m.routes))
	for _, r := range m.routes {
		list = append(list, m.routeViewLocked(r))
	}
	sortRoutes(list)
	return list, nil
}

// FindHost answers which tunnel has host, an address, a prefix or a name. Chosen is for the network ref (name or id;
// empty is the default); the rest of the answer is over all networks.
func (c *Control) FindHost(host, ref string) (RouteAnswer, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	v, err := m.vnetLocked(ref)
	if err != nil {
		return RouteAnswer{}, err
	}
	a := RouteAnswer{Query: clip(host), VNetName: v.Name, Everywhere: []RouteView{}, Overlaps: []RouteView{}}
	table := m.table.Load()
	p, err := parsePrefix(host)
	if err == nil {
		m.answerPrefixLocked(&a, table, v, p)
		return a, nil
	}
	if strings.Contains(host, "/") {
		return a, err
	}
	name, err := canonicalHost(host)
	if err != nil {
		return a, err
	}
	if r, ok := table.LookupHost(v.ID, name); ok {
		a.Chosen = m.viewOfLocked(r)
	}
	for _, r := range table.WhoHost(name) {
		a.Everywhere = append(a.Everywhere, *m.viewOfLocked(r))
	}
	return a, nil
}

func (m *model) answerPrefixLocked(a *RouteAnswer, table *vnet.Table, v VNet, p netip.Prefix) {
	asked := p
	if p.IsSingleIP() {
		if r, ok := table.Lookup(v.ID, p.Addr()); ok {
			a.Chosen = m.viewOfLocked(r)
			asked = r.Prefix
		}
		for _, r := range table.Who(p.Addr()) {
			a.Everywhere = append(a.Everywhere, *m.viewOfLocked(r))
		}
	} else {
		m.answerCoversLocked(a, table, v, p)
	}
	for _, r := range table.Overlaps(asked) {
		view := m.viewOfLocked(r)
		if a.Chosen == nil || view.VNet != a.Chosen.VNet || view.Prefix != a.Chosen.Prefix {
			a.Overlaps = append(a.Overlaps, *view)
		}
	}
	sortRoutes(a.Overlaps)
}

// answerCoversLocked finds, for each network, the longest prefix that covers all of p.
func (m *model) answerCoversLocked(a *RouteAnswer, table *vnet.Table, v VNet, p netip.Prefix) {
	best := map[vnet.ID]vnet.Route{}
	for _, r := range table.Overlaps(p) {
		if have, ok := best[r.VNet]; r.Prefix.Bits() <= p.Bits() && (!ok || r.Prefix.Bits() > have.Prefix.Bits()) {
			best[r.VNet] = r
		}
	}
	for id, r := range best {
		view := m.viewOfLocked(r)
		a.Everywhere = append(a.Everywhere, *view)
		if id == v.ID {
			a.Chosen = view
		}
	}
	sortRoutes(a.Everywhere)
}

// viewOfLocked returns the record behind a route of the table.
func (m *model) viewOfLocked(r vnet.Route) *RouteView {
	rec := Route{VNet: r.VNet, Host: r.Host, Tunnel: r.Tunnel, Comment: r.Comment}
	if r.Host == "" {
		rec.Prefix = r.Prefix.String()
	}
	if stored, ok := m.routes[routeKey(rec)]; ok {
		rec = stored
	}
	view := m.routeViewLocked(rec)
	return &view
}

func (m *model) routeViewLocked(r Route) RouteView {
	return RouteView{Route: r, VNetName: m.vnets[r.VNet].Name, TunnelName: m.tunnels[r.Tunnel].Name}
}

// String names the route, for messages: "10.0.0.0/8 to tunnel "plant" (main site)".
func (v RouteView) String() string {
	s := v.Target() + " to tunnel \"" + v.TunnelName + "\""
	if v.Comment != "" {
		s += " (" + v.Comment + ")"
	}
	return s
}

func (m *model) routeViewsLocked(keys set) []RouteView {
	list := make([]RouteView, 0, len(keys))
	for k := range keys {
		list = append(list, m.routeViewLocked(m.routes[k]))
	}
	sortRoutes(list)
	return list
}

// routeUsersLocked describes routes that keep something in use.
func (m *model) routeUsersLocked(keys set) []string {
	views := m.routeViewsLocked(keys)
	users := make([]string, 0, len(views))
	for _, v := range views {
		users = append(users, "route "+v.String()+" in virtual network \""+v.VNetName+"\"")
	}
	return clipUsers(users)
}

// maxUsers bounds the list in an [ErrInUse].
const maxUsers = 50

func sortRoutes(list []RouteView) {
	slices.SortFunc(list, func(a, b RouteView) int {
		if d := cmp.Compare(a.VNetName, b.VNetName); d != 0 {
			return d
		}
		if a.Host != "" || b.Host != "" {
			return cmp.Compare(a.Host, b.Host) // prefixes, whose host is empty, come first
		}
		pa, _ := netip.ParsePrefix(a.Prefix)
		pb, _ := netip.ParsePrefix(b.Prefix)
		if d := pa.Addr().Compare(pb.Addr()); d != 0 {
			return d
		}
		return cmp.Compare(pa.Bits(), pb.Bits())
	})
}
