package vnet

import (
	"cmp"
	"math/bits"
	"net/netip"
	"slices"
	"unsafe"
)

// The trie of one address family of one virtual network.
//
// What a look-up costs in a large table is the memory that it fetches, line by line, each only when the one before has
// said where. So the trie is small, and few of the lines on a path are far: a subtree of up to fewMax routes is one row
// of them; above the rows stand nodes, few enough for a cache. A node looks at four bits of the address. It holds the
// routes whose prefix ends inside them, and sixteen subtrees. Bits that all routes below have in common are skipped (the
// node's depth). A subtree is a node if and only if it has more than fewMax routes, so the shape depends on the set of
// routes only, not on the order in which they came.
//
// Nodes and rows are never changed once a Table holds them. A change copies the nodes from the root to the place of
// change, and one row, and shares all others.

// key is an address as a big-endian number, left-aligned: an IPv4 address has its four octets in the top of hi.
type key struct{ hi, lo uint64 }

func keyOf(a netip.Addr) key {
	if a.Is4() {
		b := a.As4()
		return key{hi: uint64(b[0])<<56 | uint64(b[1])<<48 | uint64(b[2])<<40 | uint64(b[3])<<32}
	}
	b := a.As16()
	var k key
	for i := range 8 {
		k.hi = k.hi<<8 | uint64(b[i])
		k.lo = k.lo<<8 | uint64(b[8+i])
	}
	return k
}

// addr is the address of which k is the key.
func (k key) addr(four bool) netip.Addr {
	if four {
		return netip.AddrFrom4([4]byte{byte(k.hi >> 56), byte(k.hi >> 48), byte(k.hi >> 40), byte(k.hi >> 32)})
	}
	var b [16]byte
	for i := range 8 {
		b[i] = byte(k.hi >> (56 - 8*i))
		b[8+i] = byte(k.lo >> (56 - 8*i))
	}
	return netip.AddrFrom16(b)
}

// nibble returns the i-th group of four bits, 0 to 31.
func (k key) nibble(i int) uint {
	if i < 16 {
		return uint(k.hi>>(60-4*uint(i))) & 15
	}
	return uint(k.lo>>(124-4*uint(i))) & 15
}

// common returns the number of leading bits that k and o share, 0 to 128.
func (k key) common(o key) int {
	if d := k.hi ^ o.hi; d != 0 {
		return bits.LeadingZeros64(d)
	}
	return 64 + bits.LeadingZeros64(k.lo^o.lo)
}

// A tree is a subtree: a node, or up to fewMax routes in a row.
type tree struct {
	node *node
	few  row
}

func (t tree) len() int {
	if t.node != nil {
		return int(t.node.n)
	}
	return int(t.few.n)
}

// entries returns the routes that stand at the tree's root, in order.
func (t tree) entries() []entry {
	if t.node != nil {
		return t.node.row()
	}
	return t.few.entries()
}

// A node takes three lines of a cache, the first of which tells where to go on.
type node struct {
	key   key                // the bits before depth are those of every route below; the others do not count
	best  uint64             // for each value of the nibble four bits: the index of the longest prefix that holds it, or 0
	lens  [16]uint8          // of the rows; isNode for subtrees that are nodes
	n     uint32             // routes in the subtree
	ends  uint16             // the indexes in use, see index
	depth uint8              // which nibble the node looks at, 0 to 31
	four  bool               // whether rows below are of IPv4
	subs  [16]unsafe.Pointer // to the rows' first entries, or to nodes
	ended *entry             // the first of the routes that end here, by index
}

const isNode = 0xff

// tree returns the subtree for a value of the nibble.
func (n *node) tree(nibble uint) tree {
	if n.lens[nibble] == isNode {
		return tree{node: (*node)(n.subs[nibble])}
	}
	return tree{few: row{n.subs[nibble], n.lens[nibble], n.four}}
}

func (n *node) set(nibble uint, t tree) {
	if t.node != nil {
		n.subs[nibble], n.lens[nibble] = unsafe.Pointer(t.node), isNode
	} else {
		n.subs[nibble], n.lens[nibble] = t.few.first, t.few.n
	}
}

// at returns the place of an index among the routes that end here.
func (n *node) at(index uint) int { return bits.OnesCount16(n.ends & (1<<index - 1)) }

// row returns the routes that end here, by index.
func (n *node) row() []entry { return unsafe.Slice(n.ended, bits.OnesCount16(n.ends)) }

// index returns the index of a prefix that ends inside the node's nibble: 1<<l | v, 1 to 15, if it ends after l (0 to 3)
// bits with value v.
func (n *node) index(k key, prefixBits uint8) uint {
	l := uint(prefixBits - 4*n.depth)
	return 1<<l | k.nibble(int(n.depth))>>(4-l)
}

// endsHere reports whether a prefix of so many bits, which is not shorter than what the node skips, ends here.
func (n *node) endsHere(prefixBits uint8) bool { return prefixBits < 4*n.depth+4 }

// skips reports whether k lacks the bits that the node skips.
func (n *node) skips(k key) bool { return n.key.common(k) < 4*int(n.depth) }

// lookup returns the entry with the longest prefix that holds k.
func (t tree) lookup(k key) (entry, bool) {
	var best *entry
	n := t.node
	for n != nil {
		if n.skips(k) {
			break
		}
		nibble := k.nibble(int(n.depth)) & 15
		if i := uint(n.best>>(4*nibble)) & 15; i != 0 {
			best = &n.row()[n.at(i)]
		}
		if n.lens[nibble] != isNode {
			t.few = row{n.subs[nibble], n.lens[nibble], n.four}
			break
		}
		n = (*node)(n.subs[nibble])
	}
	if e, ok := t.few.lookup(k); ok {
		return e, true
	}
	if best == nil {
		return entry{}, false
	}
	return *best, true
}

// get returns the entry of exactly this prefix.
func (t tree) get(k key, prefixBits uint8) (entry, bool) {
	for t.node != nil {
		n := t.node
		if n.skips(k) || prefixBits < 4*n.depth {
			return entry{}, false
		}
		if n.endsHere(prefixBits) {
			if i := n.index(k, prefixBits); n.ends&(1<<i) != 0 {
				return n.row()[n.at(i)], true
			}
			return entry{}, false
		}
		t = n.tree(k.nibble(int(n.depth)))
	}
	for _, e := range t.few.entries() {
		if e.key == k && e.bits == prefixBits {
			return e, true
		}
	}
	return entry{}, false
}

// newTree makes the subtree of entries that are sorted by key.
func newTree(sorted []entry, four bool) tree {
	if len(sorted) <= fewMax {
		few := slices.SortedFunc(slices.Values(sorted), entry.order)
		return tree{few: newRow(few, four)}
	}
	first, last := sorted[0].key, sorted[len(sorted)-1].key
	depth := first.common(last)
	for i := range sorted {
		depth = min(depth, int(sorted[i].bits))
	}
	n := &node{key: first, depth: uint8(depth / 4), four: four, n: uint32(len(sorted))}
	for len(sorted) > 0 {
		nibble, rest := sorted[0].key.nibble(int(n.depth)), 1
		for rest < len(sorted) && sorted[rest].key.nibble(int(n.depth)) == nibble {
			rest++
		}
		below := sorted[:rest]
		sorted = sorted[rest:]
		short := slices.IndexFunc(below, func(e entry) bool { return !n.endsHere(e.bits) }) // the shorter come first
		if short < 0 {
			short = len(below)
		}
		for _, e := range below[:short] {
			n.end(e)
		}
		n.set(nibble, newTree(below[short:], four))
	}
	return tree{node: n}
}

// insert returns t with e in it, whose prefix must not be there yet.
func (t tree) insert(e entry, four bool) tree {
	n := t.node
	if n == nil {
		few := t.few.insert(e)
		if len(few) <= fewMax {
			return tree{few: newRow(few, four)}
		}
		slices.SortFunc(few, byKey)
		return newTree(few, four)
	}
	if depth := min(e.key.common(n.key), int(e.bits)) / 4; depth < int(n.depth) {
		m := &node{key: e.key, depth: uint8(depth), four: four, n: n.n}
		m.set(n.key.nibble(depth), t)
		m.put(e)
		return tree{node: m}
	}
	n = n.clone()
	n.put(e)
	return tree{node: n}
}

// byKey sorts entries for newTree: by address, and of equal ones the shorter first.
func byKey(a, b entry) int {
	return cmp.Or(cmp.Compare(a.key.hi, b.key.hi), cmp.Compare(a.key.lo, b.key.lo), cmp.Compare(a.bits, b.bits))
}

// put adds e below n, which is changed in place.
func (n *node) put(e entry) {
	n.n++
	if n.endsHere(e.bits) {
		n.end(e)
		return
	}
	nibble := e.key.nibble(int(n.depth))
	n.set(nibble, n.tree(nibble).insert(e, n.four))
}

// end adds e, whose prefix ends here.
func (n *node) end(e entry) {
	i := n.index(e.key, e.bits)
	n.setEnds(n.ends|1<<i, slices.Insert(slices.Clone(n.row()), n.at(i), e))
}

func (n *node) setEnds(ends uint16, ended []entry) {
	n.ends, n.ended, n.best = ends, unsafe.SliceData(ended), 0
	for nibble := range uint(16) {
		for i := (16 | nibble) >> 1; i > 0; i >>= 1 {
			if ends&(1<<i) != 0 {
				n.best |= uint64(i) << (4 * nibble)
				break
			}
		}
	}
}

func (n *node) clone() *node {
	c := *n // rows are replaced, never changed
	return &c
}

// remove returns t without a prefix, which must be there.
func (t tree) remove(k key, prefixBits uint8) tree {
	if t.node == nil {
		few := slices.DeleteFunc(t.few.entries(), func(e entry) bool { return e.key == k && e.bits == prefixBits })
		return tree{few: newRow(few, t.few.four)}
	}
	n := t.node.clone()
	n.n--
	if n.endsHere(prefixBits) {
		i := n.index(k, prefixBits)
		n.setEnds(n.ends&^(1<<i), slices.Delete(slices.Clone(n.row()), n.at(i), n.at(i)+1))
	} else {
		nibble := k.nibble(int(n.depth))
		n.set(nibble, n.tree(nibble).remove(k, prefixBits))
	}
	t = tree{node: n}
	if n.n <= fewMax {
		few := make([]entry, 0, n.n)
		t.all(func(e entry) bool {
			few = append(few, e)
			return true
		})
		slices.SortFunc(few, entry.order)
		return tree{few: newRow(few, n.four)}
	}
	if n.ends == 0 {
		for i := range uint(16) {
			if only := n.tree(i); only.len() == int(n.n) {
				return only
			}
		}
	}
	return t
}

// overlapping calls yield for each entry whose prefix holds the given one or lies in it, until yield returns false. It
// reports whether it came to the end.
func (t tree) overlapping(k key, prefixBits uint8, yield func(entry) bool) bool {
	if n := t.node; n != nil {
		if n.key.common(k) < min(4*int(n.depth), int(prefixBits)) {
			return true
		}
		for i := range uint(16) {
			if !n.tree(i).overlapping(k, prefixBits, yield) {
				return false
			}
		}
	}
	for _, e := range t.entries() {
		if k.common(e.key) >= int(min(e.bits, prefixBits)) && !yield(e) {
			return false
		}
	}
	return true
}

// all calls yield for each entry, in no order, until yield returns false. It reports whether it came to the end.
func (t tree) all(yield func(entry) bool) bool {
	if t.node != nil {
		for i := range uint(16) {
			if !t.node.tree(i).all(yield) {
				return false
			}
		}
	}
	for _, e := range t.entries() {
		if !yield(e) {
			return false
		}
	}
	return true
}
