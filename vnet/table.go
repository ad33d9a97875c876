package vnet

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"unique"
)

// A Table is an immutable set of routes. Its methods may be called by any number of goroutines at once; look-ups take
// no lock and allocate nothing. The zero value and nil hold no route. Keep the current table in an atomic pointer and
// replace it by what [Table.With] and [Table.Without] return: a change costs a few microseconds however many routes
// there are, since the new table shares the rest with the old one.
type Table struct {
	nets dict[*network]
	n    int
}

// network holds the routes of one virtual network.
type network struct {
	v4, v6 tree
	exact  dict[*Route]
	below  dict[*Route] // "*." routes, by what follows the "*."
	n      int
}

// names returns where a canonical host name's route stands, and under which key.
func (w *network) names(host string) (*dict[*Route], string) {
	if name, ok := strings.CutPrefix(host, "*."); ok {
		return &w.below, name
	}
	return &w.exact, host
}

// family returns where the routes of the address's family stand.
func (w *network) family(a netip.Addr) *tree {
	if a.Is4() {
		return &w.v4
	}
	return &w.v6
}

func (w *network) get(r Route) *Route {
	if r.Host != "" {
		names, name := w.names(r.Host)
		found, _ := names.get(name)
		return found
	}
	return w.family(r.Prefix.Addr()).get(r.Prefix)
}

func (w *network) add(r *Route, fresh bool) {
	if r.Host != "" {
		names, name := w.names(r.Host)
		*names = names.with(name, r, fresh)
	} else {
		t := w.family(r.Prefix.Addr())
		*t = t.insert(r, fresh)
	}
	w.n++
}

// Build returns a table of routes, each in canonical form. It returns the first error: [ErrInvalid], or [ErrOverlap]
// naming both routes.
func Build(routes []Route) (*Table, error) {
	t := &Table{}
	for _, r := range routes {
		r, err := r.Canonical()
		if err != nil {
			return nil, err
		}
		w, ok := t.nets.get(string(r.VNet))
		if !ok {
			w = &network{}
			t.nets = t.nets.with(string(r.VNet), w, true)
		}
		if other := w.get(r); other != nil {
			return nil, overlap(r, *other)
		}
		w.add(intern(r), true)
		t.n++
	}
	return t, nil
}

// intern copies r to the heap, with the identifiers that many routes share held once.
func intern(r Route) *Route {
	r.VNet = unique.Make(r.VNet).Value()
	r.Tunnel = unique.Make(r.Tunnel).Value()
	return &r
}

func overlap(r, other Route) error {
	return fmt.Errorf("vnet: add %s: %w: %s; delete that one first, or use another virtual network", r, ErrOverlap, other)
}

// network returns the routes of a virtual network, or nil.
func (t *Table) network(v ID) *network {
	if t == nil {
		return nil
	}
	w, _ := t.nets.get(string(v))
	return w
}

// Len returns the number of routes.
func (t *Table) Len() int {
	if t == nil {
		return 0
	}
	return t.n
}

// LenOf returns the number of routes of one virtual network.
func (t *Table) LenOf(v ID) int {
	if w := t.network(v); w != nil {
		return w.n
	}
	return 0
}

// With returns a table that holds r too. Errors are [ErrInvalid], or [ErrOverlap] naming both routes.
func (t *Table) With(r Route) (*Table, error) {
	r, err := r.Canonical()
	if err != nil {
		return nil, err
	}
	next, w := &Table{}, &network{}
	if t != nil {
		*next = *t
	}
	if old := t.network(r.VNet); old != nil {
		if other := old.get(r); other != nil {
			return nil, overlap(r, *other)
		}
		*w = *old
	}
	p := intern(r)
	w.add(p, false)
	next.nets = next.nets.with(string(p.VNet), w, false)
	next.n++
	return next, nil
}

// Without returns a table that does not hold the route with r's network and prefix or host name; r's other fields do
// not count. Errors are [ErrInvalid], or [ErrNotFound].
func (t *Table) Without(r Route) (*Table, error) {
	r, err := r.canonicalKey()
	if err != nil {
		return nil, err
	}
	old := t.network(r.VNet)
	if old == nil || old.get(r) == nil {
		return nil, fmt.Errorf("vnet: delete %s in vnet %q: %w", r.Destination(), r.VNet, ErrNotFound)
	}
	next := &Table{nets: t.nets, n: t.n - 1}
	if old.n == 1 {
		next.nets = next.nets.without(string(r.VNet))
		return next, nil
	}
	w := *old
	w.n--
	if r.Host != "" {
		names, name := w.names(r.Host)
		*names = names.without(name)
	} else {
		f := w.family(r.Prefix.Addr())
		*f = f.remove(r.Prefix)
	}
	next.nets = next.nets.with(string(r.VNet), &w, false)
	return next, nil
}

// Get returns the route with exactly r's network and prefix or host name.
func (t *Table) Get(r Route) (Route, bool) {
	r, err := r.canonicalKey()
	if err != nil {
		return Route{}, false
	}
	if w := t.network(r.VNet); w != nil {
		if found := w.get(r); found != nil {
			return *found, true
		}
	}
	return Route{}, false
}

// Lookup returns the route of network v with the longest prefix that holds a. An IPv4-mapped IPv6 address is the IPv4
// address it means. An address with a zone has no route.
func (t *Table) Lookup(v ID, a netip.Addr) (Route, bool) {
	w := t.network(v)
	if w == nil || !a.IsValid() || a.Zone() != "" {
		return Route{}, false
	}
	a = a.Unmap()
	if r := w.family(a).lookup(a, keyOf(a)); r != nil {
		return *r, true
	}
	return Route{}, false
}

// LookupHost returns the route of network v for a host name: the exact one, or else the "*." route with the longest
// name above it. The name may be in any form that [CanonicalHost] takes; in canonical form, nothing is allocated.
func (t *Table) LookupHost(v ID, host string) (Route, bool) {
	w := t.network(v)
	if w == nil {
		return Route{}, false
	}
	if checkHost(host) != "" || !plain(host) {
		var err error
		if host, err = CanonicalHost(host); err != nil || host[0] == '*' {
			return Route{}, false
		}
	}
	if r, ok := w.exact.get(host); ok {
		return *r, true
	}
	for w.below.root != nil {
		_, above, ok := strings.Cut(host, ".")
		if !ok {
			break
		}
		if r, ok := w.below.get(above); ok {
			return *r, true
		}
		host = above
	}
	return Route{}, false
}

// Who answers which tunnels have this address: for each virtual network the route that [Table.Lookup] finds, the
// longest prefix first.
func (t *Table) Who(a netip.Addr) []Route {
	var found []Route
	for v := range t.Networks() {
		if r, ok := t.Lookup(v, a); ok {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, compareLongest)
	return found
}

// WhoHost answers which tunnels have this host name: for each virtual network the route that [Table.LookupHost] finds,
// the longest name first.
func (t *Table) WhoHost(host string) []Route {
	var found []Route
	for v := range t.Networks() {
		if r, ok := t.LookupHost(v, host); ok {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, func(a, b Route) int {
		if len(a.Host) != len(b.Host) {
			return len(b.Host) - len(a.Host)
		}
		return Compare(a, b)
	})
	return found
}

// Overlaps returns every route, of any virtual network, whose prefix holds p or lies in it, the longest first. An
// invalid prefix overlaps nothing.
func (t *Table) Overlaps(p netip.Prefix) []Route {
	if t == nil || !p.IsValid() {
		return nil
	}
	p, err := CanonicalPrefix(p.Masked())
	if err != nil {
		return nil
	}
	var found []Route
	t.nets.all(func(_ string, w *network) bool {
		return w.family(p.Addr()).overlapping(p, func(r Route) bool {
			found = append(found, r)
			return true
		})
	})
	slices.SortFunc(found, compareLongest)
	return found
}

// Networks yields the virtual networks that have a route, in no order.
func (t *Table) Networks() iter.Seq[ID] {
	return func(yield func(ID) bool) {
		if t != nil {
			t.nets.all(func(v string, _ *network) bool { return yield(ID(v)) })
		}
	}
}

// All yields every route, in no order. See [Compare] for one.
func (t *Table) All() iter.Seq[Route] {
	return func(yield func(Route) bool) {
		if t != nil {
			t.nets.all(func(_ string, w *network) bool { return w.all(yield) })
		}
	}
}

// Of yields every route of one virtual network, in no order.
func (t *Table) Of(v ID) iter.Seq[Route] {
	return func(yield func(Route) bool) {
		if w := t.network(v); w != nil {
			w.all(yield)
		}
	}
}

func (w *network) all(yield func(Route) bool) bool {
	return w.v4.all(yield) && w.v6.all(yield) &&
		w.exact.all(func(_ string, r *Route) bool { return yield(*r) }) &&
		w.below.all(func(_ string, r *Route) bool { return yield(*r) })
}
