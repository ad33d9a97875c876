package vnet

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// oracle answers the same questions as a Table by looking at every route.
type oracle []Route

func (o oracle) lookup(v ID, a netip.Addr) (best Route, ok bool) {
	for _, r := range o {
		if r.VNet == v && r.Host == "" && r.Prefix.Contains(a) && (!ok || r.Prefix.Bits() > best.Prefix.Bits()) {
			best, ok = r, true
		}
	}
	return best, ok
}

func (o oracle) lookupHost(v ID, host string) (best Route, ok bool) {
	for _, r := range o {
		below, wild := strings.CutPrefix(r.Host, "*")
		matches := r.Host == host || wild && strings.HasSuffix(host, below)
		if r.VNet == v && r.Host != "" && matches && (!ok || r.Host == host || best.Host != host && len(r.Host) > len(best.Host)) {
			best, ok = r, true
		}
	}
	return best, ok
}

func (o oracle) overlaps(p netip.Prefix) []Route {
	var found []Route
	for _, r := range o {
		if r.Host == "" && r.Prefix.Overlaps(p) {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, compareLongest)
	return found
}

// world makes random routes and questions that nest, touch and repeat often.
type world struct{ *rand.Rand }

func (w world) vnet() ID { return ID(fmt.Sprintf("v%d", w.IntN(3))) }

func (w world) addr() netip.Addr {
	narrow := func(b []byte) { // few values per octet, so that addresses share long beginnings
		for i := range b {
			b[i] = []byte{0, 1, 128, 255, byte(w.IntN(256))}[w.IntN(5)]
		}
	}
	if w.IntN(2) == 0 {
		var b [4]byte
		narrow(b[:])
		return netip.AddrFrom4(b)
	}
	var b [16]byte
	b[0] = 0xfd
	at := w.IntN(16) // zeros but for a few octets, so that the trie skips many
	narrow(b[max(1, at-2):max(1, at)])
	narrow(b[14:])
	return netip.AddrFrom16(b)
}

func (w world) prefix() netip.Prefix {
	a := w.addr()
	p, err := a.Prefix(w.IntN(a.BitLen() + 1))
	if err != nil {
		panic(err)
	}
	return p
}

func (w world) host() string {
	var labels []string
	for range 1 + w.IntN(3) {
		labels = append(labels, []string{"a", "b", "c"}[w.IntN(3)])
	}
	return strings.Join(append(labels, "example"), ".")
}

func (w world) route() Route {
	r := Route{VNet: w.vnet(), Tunnel: fmt.Sprintf("t%d", w.IntN(100))}
	if w.IntN(3) == 0 {
		r.Comment = fmt.Sprintf("comment %d", w.IntN(10))
	}
	if w.IntN(4) > 0 {
		r.Prefix = w.prefix()
	} else if r.Host = w.host(); w.IntN(2) == 0 {
		r.Host = "*." + r.Host
	}
	return r
}

func sameKey(a, b Route) bool { return a.VNet == b.VNet && a.Prefix == b.Prefix && a.Host == b.Host }

// compare asks table and oracle the same random questions.
func (w world) compare(t *testing.T, table *Table, o oracle) {
	t.Helper()
	if table.Len() != len(o) {
		t.Fatalf("Len: got %d, want %d", table.Len(), len(o))
	}
	for range 20 {
		v, a, p, host := w.vnet(), w.addr(), w.prefix(), w.host()
		if len(o) > 0 && w.IntN(2) == 0 { // near a route that is there
			if r := o[w.IntN(len(o))]; r.Host == "" {
				v, a = r.VNet, r.Prefix.Addr()
				p = netip.PrefixFrom(a, max(0, r.Prefix.Bits()-w.IntN(3))).Masked()
			}
		}
		got, ok := table.Lookup(v, a)
		want, wantOK := o.lookup(v, a)
		if got != want || ok != wantOK {
			t.Fatalf("Lookup(%s, %s): got %v %v, want %v %v", v, a, got, ok, want, wantOK)
		}
		if tunnel, ok := table.LookupTunnel(v, a); tunnel != want.Tunnel || ok != wantOK {
			t.Fatalf("LookupTunnel(%s, %s): got %q %v, want %q %v", v, a, tunnel, ok, want.Tunnel, wantOK)
		}
		got, ok = table.LookupHost(v, host)
		want, wantOK = o.lookupHost(v, host)
		if got != want || ok != wantOK {
			t.Fatalf("LookupHost(%s, %s): got %v %v, want %v %v", v, host, got, ok, want, wantOK)
		}
		if got, want := table.Overlaps(p), o.overlaps(p); !slices.Equal(got, want) {
			t.Fatalf("Overlaps(%s): got %v, want %v", p, got, want)
		}
	}
	checkWays(t, table, o)
	got, want := slices.SortedFunc(table.All(), Compare), slices.SortedFunc(slices.Values(o), Compare)
	if !slices.Equal(got, want) {
		t.Fatalf("All: got %v, want %v", got, want)
	}
}

// checkWays expects a way with so many users for each tunnel of routes without a comment, one for each route with one,
// and all others to be free for use.
func checkWays(t *testing.T, table *Table, o oracle) {
	t.Helper()
	want := map[via]int{}
	for _, r := range o {
		want[via{r.Tunnel, r.Comment}]++
	}
	got, free := map[via]int{}, 0
	if table == nil {
		return
	}
	for x := range way(len(table.ways.chunks) * wayChunk) {
		if w := table.ways.get(x); w.users > 0 {
			got[via{w.tunnel, w.comment}] += int(w.users)
		} else {
			free++
		}
	}
	if !maps.Equal(got, want) {
		t.Fatalf("ways: got %v, want %v", got, want)
	}
	for x := table.ways.free; x != 0; x = table.ways.get(x - 1).next {
		if free--; free < 0 {
			break
		}
	}
	if free != 0 {
		t.Fatalf("ways: the list of free ones lacks %d", free)
	}
}

type via struct{ tunnel, comment string }

// TestAgainstOracle changes a table at random and compares it with the oracle; tables of before must stay as they
// were, and the trie's shape must depend on the routes only.
func TestAgainstOracle(t *testing.T) {
	for s := range uint64(12) {
		t.Run(fmt.Sprint("seed ", s), func(t *testing.T) {
			t.Parallel()
			w := world{rand.New(rand.NewPCG(s, 1))}
			type version struct {
				table *Table
				o     oracle
			}
			var now version
			var past []version
			for step := range 1500 {
				r := w.route()
				shrink := step%600 > 400
				if shrink && len(now.o) > 0 {
					r = now.o[w.IntN(len(now.o))]
				}
				at := slices.IndexFunc(now.o, func(x Route) bool { return sameKey(x, r) })
				next := version{o: slices.Clone(now.o)}
				var err error
				if at < 0 {
					next.o = append(next.o, r)
					next.table, err = now.table.With(r)
				} else {
					next.o = slices.Delete(next.o, at, at+1)
					next.table, err = now.table.Without(r)
				}
				if err != nil {
					t.Fatal(err)
				}
				now = next
				if step%50 == 0 {
					w.compare(t, now.table, now.o)
					past = append(past, now)
				}
				if step%300 == 299 {
					checkShape(t, w, now.table, now.o)
				}
			}
			for _, v := range past {
				w.compare(t, v.table, v.o)
			}
		})
	}
}

// checkShape builds the same routes anew in another order and expects the very same tries.
func checkShape(t *testing.T, w world, table *Table, o oracle) {
	t.Helper()
	shuffled := slices.Clone(o)
	w.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	built := mustBuild(t, shuffled...)
	for v := range built.Networks() {
		a, b := table.network(v), built.network(v)
		if !sameShape(a.v4, b.v4) || !sameShape(a.v6, b.v6) {
			t.Fatalf("network %s: the trie's shape depends on the order of changes", v)
		}
	}
}

// sameShape compares subtrees but for the ways, whose numbers tell the order of changes.
func sameShape(a, b tree) bool {
	if a.len() != b.len() || (a.node == nil) != (b.node == nil) {
		return false
	}
	alike := func(x, y entry) bool { return x.order(y) == 0 }
	if a.node == nil {
		x, y := a.block, b.block
		same := slices.EqualFunc(x.appendTo(nil), y.appendTo(nil), alike)
		x.first, y.first = nil, nil
		return same && x == y
	}
	x, y := a.node, b.node
	if x.depth != y.depth || x.skips(y.key) || x.ends != y.ends || x.best != y.best || x.four != y.four || !slices.EqualFunc(x.ended, y.ended, alike) {
		return false
	}
	for i := range x.subs {
		if !sameShape(x.subs[i], y.subs[i]) {
			return false
		}
	}
	return true
}

// TestDense fills a table with neighbours, one by one, so that there are nodes at the depths of single addresses and of
// many names, and empties it again.
func TestDense(t *testing.T) {
	var routes []Route
	for i := range 3000 {
		a := [16]byte{0: 0xfd, 13: byte(i % 7), 14: byte(i >> 8), 15: byte(i)}
		routes = append(routes,
			Route{VNet: "v", Tunnel: "six", Prefix: netip.PrefixFrom(netip.AddrFrom16(a), 128)},
			Route{VNet: "v", Tunnel: "four", Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 32)},
			Route{VNet: "v", Tunnel: "name", Host: fmt.Sprintf("host-%d.example", i)})
	}
	rand.Shuffle(len(routes), func(i, j int) { routes[i], routes[j] = routes[j], routes[i] })
	has := func(table *Table, r Route) bool {
		if r.Host != "" {
			found, ok := table.LookupHost("v", r.Host)
			return ok && found == r
		}
		tunnel, ok := table.LookupTunnel("v", r.Prefix.Addr())
		return ok && tunnel == r.Tunnel
	}
	table, built := (*Table)(nil), mustBuild(t, routes...)
	for i, r := range routes {
		next, err := table.With(r)
		if err != nil {
			t.Fatal(err)
		}
		if table = next; !has(table, r) || !has(built, r) {
			t.Fatalf("%s is not found", r)
		}
		if i%3 == 0 && i < len(routes)-1 && has(table, routes[len(routes)-1]) {
			t.Fatalf("%s is found before it is there", routes[len(routes)-1])
		}
	}
	if !sameShape(table.network("v").v6, built.network("v").v6) || !sameShape(table.network("v").v4, built.network("v").v4) {
		t.Error("the trie's shape depends on the order of changes")
	}
	full := table
	for _, r := range routes {
		next, err := table.Without(r)
		if err != nil {
			t.Fatal(err)
		}
		if table = next; has(table, r) || !has(full, r) {
			t.Fatalf("%s: got %v after its deletion and %v before, want false and true", r, has(table, r), has(full, r))
		}
	}
	if table.Len() != 0 {
		t.Errorf("Len of the emptied table: got %d, want 0", table.Len())
	}
}
