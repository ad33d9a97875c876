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
	front [frontPlaces]*network
	nets  dict[*network]
	ways  ways
	n     int
}

// frontPlaces is how many networks a look-up may find without the dictionary: each in the one place that the end of its id
// gives, where the last one set stands.
const frontPlaces = 128

func frontPlace(v ID) uint32 {
	if len(v) < 2 {
		return 0
	}
	return (uint32(v[len(v)-1]) | uint32(v[len(v)-2])<<8) * 0x9e3779b1 >> 25
}

// network holds the routes of one virtual network.
type network struct {
	id     ID
	v4, v6 tree
	exact  dict[way]
	below  dict[way] // "*." routes; the "*." of their keys does not count
	n      int
}

func newNetwork(v ID) *network {
	w := &network{id: unique.Make(v).Value()} // not the part of a longer text that a caller may have given
	w.below.cut = len("*.")
	return w
}

// names returns where a canonical host name's route stands, and under which key.
func (w *network) names(host string) (*dict[way], string) {
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

// prefixRoute returns the route of an entry of v4, if four is set, or v6.
func (t *Table) prefixRoute(w *network, e entry, four bool) Route {
	texts := t.ways.get(e.way)
	return Route{VNet: w.id, Prefix: netip.PrefixFrom(e.key.addr(four), int(e.bits)), Tunnel: texts.tunnel, Comment: texts.comment}
}

func (t *Table) hostRoute(w *network, e *dictEntry[way]) Route {
	texts := t.ways.get(e.val)
	return Route{VNet: w.id, Host: e.key, Tunnel: texts.tunnel, Comment: texts.comment}
}

// get returns the route of a canonical key, and its way.
func (t *Table) get(r Route) (Route, way, bool) {
	w := t.network(r.VNet)
	if w == nil {
		return Route{}, 0, false
	}
	if r.Host != "" {
		names, name := w.names(r.Host)
		if e := names.get(name); e != nil {
			return t.hostRoute(w, e), e.val, true
		}
		return Route{}, 0, false
	}
	a := r.Prefix.Addr()
	e, ok := w.family(a).get(keyOf(a), uint8(r.Prefix.Bits()))
	if !ok {
		return Route{}, 0, false
	}
	return t.prefixRoute(w, e, a.Is4()), e.way, true
}

// Build returns a table of routes, each in canonical form. It returns the first error: [ErrInvalid], or [ErrOverlap]
// naming both routes.
func Build(routes []Route) (*Table, error) {
	if t := build(routes); t != nil {
		return t, nil
	}
	var t *Table // one by one, to find the first error
	for _, r := range routes {
		var err error
		if t, err = t.With(r); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// build returns the table of all routes, or nil if anything is wrong with one.
func build(routes []Route) *Table {
	t := &Table{n: len(routes)}
	type family struct {
		w    *network
		four bool
	}
	prefixes := map[family][]entry{}
	for _, r := range routes {
		r, err := r.Canonical()
		if err != nil {
			return nil
		}
		x, err := t.ways.hold(r.Tunnel, r.Comment, true)
		if err != nil {
			return nil
		}
		w := t.network(r.VNet)
		if w == nil {
			w = newNetwork(r.VNet)
			t.set(w, true)
		}
		w.n++
		if r.Host == "" {
			a := r.Prefix.Addr()
			f := family{w, a.Is4()}
			prefixes[f] = append(prefixes[f], entry{keyOf(a), x, uint8(r.Prefix.Bits())})
			continue
		}
		names, name := w.names(r.Host)
		if names.get(name) != nil {
			return nil
		}
		*names = names.with(r.Host, x, true)
	}
	for f, entries := range prefixes {
		slices.SortFunc(entries, byKey)
		for i := 1; i < len(entries); i++ {
			if byKey(entries[i-1], entries[i]) == 0 {
				return nil
			}
		}
		if f.four {
			f.w.v4 = newTree(entries, true)
		} else {
			f.w.v6 = newTree(entries, false)
		}
	}
	return t
}

func overlap(r, other Route) error {
	return fmt.Errorf("vnet: add %s: %w: %s; delete that one first, or use another virtual network", r, ErrOverlap, other)
}

// network returns the routes of a virtual network, or nil.
func (t *Table) network(v ID) *network {
	if t == nil {
		return nil
	}
	if w := t.front[frontPlace(v)&(frontPlaces-1)]; w != nil && w.id == v {
		return w
	}
	if e := t.nets.get(string(v)); e != nil {
		return e.val
	}
	return nil
}

// set puts a network in the place of the one of its id. Nobody else may see t yet, and with fresh set, its dictionary neither.
func (t *Table) set(w *network, fresh bool) {
	t.front[frontPlace(w.id)] = w
	t.nets = t.nets.with(string(w.id), w, fresh)
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
	next := &Table{}
	if t != nil {
		*next = *t
	}
	w := newNetwork(r.VNet)
	if old := t.network(r.VNet); old != nil {
		if other, _, ok := t.get(r); ok {
			return nil, overlap(r, other)
		}
		*w = *old
	}
	x, err := next.ways.hold(r.Tunnel, r.Comment, false)
	if err != nil {
		return nil, err
	}
	if r.Host != "" {
		names, _ := w.names(r.Host)
		*names = names.with(r.Host, x, false)
	} else {
		a := r.Prefix.Addr()
		f := w.family(a)
		*f = f.insert(entry{keyOf(a), x, uint8(r.Prefix.Bits())}, a.Is4())
	}
	w.n++
	next.set(w, false)
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
	_, x, ok := t.get(r)
	if !ok {
		return nil, fmt.Errorf("vnet: delete %s in vnet %q: %w", r.Destination(), r.VNet, ErrNotFound)
	}
	next := new(Table)
	*next = *t
	next.n--
	next.ways.drop(x)
	if old.n == 1 {
		if at := &next.front[frontPlace(r.VNet)]; *at == old {
			*at = nil
		}
		next.nets = next.nets.without(string(r.VNet))
		return next, nil
	}
	w := *old
	w.n--
	if r.Host != "" {
		names, name := w.names(r.Host)
		*names = names.without(name)
	} else {
		a := r.Prefix.Addr()
		f := w.family(a)
		*f = f.remove(keyOf(a), uint8(r.Prefix.Bits()))
	}
	next.set(&w, false)
	return next, nil
}

// Get returns the route with exactly r's network and prefix or host name.
func (t *Table) Get(r Route) (Route, bool) {
	r, err := r.canonicalKey()
	if err != nil {
		return Route{}, false
	}
	found, _, ok := t.get(r)
	return found, ok
}

// Lookup returns the route of network v with the longest prefix that holds a. An IPv4-mapped IPv6 address is the IPv4
// address it means. An address with a zone has no route.
func (t *Table) Lookup(v ID, a netip.Addr) (Route, bool) {
	w := t.network(v)
	if w == nil {
		return Route{}, false
	}
	if e, ok := w.lookup(a); ok {
		return t.prefixRoute(w, e, a.Is4() || a.Is4In6()), true
	}
	return Route{}, false
}

// LookupTunnel returns the tunnel of the route that [Table.Lookup] finds. It costs less, and is for the path of traffic.
func (t *Table) LookupTunnel(v ID, a netip.Addr) (tunnel string, ok bool) {
	w := t.network(v)
	if w == nil {
		return "", false
	}
	if e, ok := w.lookup(a); ok {
		return t.ways.get(e.way).tunnel, true
	}
	return "", false
}

// lookup returns the entry with the longest prefix that holds a.
func (w *network) lookup(a netip.Addr) (entry, bool) {
	if a.Is4() {
		return w.v4.lookup(keyOf(a))
	}
	if a.Is4In6() {
		return w.v4.lookup(keyOf(a.Unmap()))
	}
	if a.Zone() != "" || !a.IsValid() {
		return entry{}, false
	}
	return w.v6.lookup(keyOf(a))
}

// LookupHost returns the route of network v for a host name: the exact one, or else the "*." route with the longest
// name above it. The name may be in any form that [CanonicalHost] takes; in canonical form, nothing is allocated.
func (t *Table) LookupHost(v ID, host string) (Route, bool) {
	w := t.network(v)
	if w == nil {
		return Route{}, false
	}
	if !canonical(host) {
		var err error
		if host, err = CanonicalHost(host); err != nil || host[0] == '*' {
			return Route{}, false
		}
	}
	if e := w.exact.get(host); e != nil {
		return t.hostRoute(w, e), true
	}
	for !w.below.empty() {
		_, above, ok := strings.Cut(host, ".")
		if !ok {
			break
		}
		if e := w.below.get(above); e != nil {
			return t.hostRoute(w, e), true
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
	four := p.Addr().Is4()
	t.nets.root.all(func(net *dictEntry[*network]) bool {
		w := net.val
		return w.family(p.Addr()).overlapping(keyOf(p.Addr()), uint8(p.Bits()), func(e entry) bool {
			found = append(found, t.prefixRoute(w, e, four))
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
			t.nets.root.all(func(e *dictEntry[*network]) bool { return yield(e.val.id) })
		}
	}
}

// All yields every route, in no order. See [Compare] for one.
func (t *Table) All() iter.Seq[Route] {
	return func(yield func(Route) bool) {
		if t != nil {
			t.nets.root.all(func(e *dictEntry[*network]) bool { return t.all(e.val, yield) })
		}
	}
}

// Of yields every route of one virtual network, in no order.
func (t *Table) Of(v ID) iter.Seq[Route] {
	return func(yield func(Route) bool) {
		if w := t.network(v); w != nil {
			t.all(w, yield)
		}
	}
}

func (t *Table) all(w *network, yield func(Route) bool) bool {
	prefixes := func(four bool) func(entry) bool {
		return func(e entry) bool { return yield(t.prefixRoute(w, e, four)) }
	}
	names := func(e *dictEntry[way]) bool { return yield(t.hostRoute(w, e)) }
	return w.v4.all(prefixes(true)) && w.v6.all(prefixes(false)) && w.exact.root.all(names) && w.below.root.all(names)
}
