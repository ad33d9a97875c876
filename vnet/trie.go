package vnet

import (
	"cmp"
	"math/bits"
	"slices"
)

// The trie of one address family of one virtual network.
//
// What a look-up costs in a large table is the memory that it fetches from afar, so there is one such place: the line of a
// block where the route must be. Above the blocks stand nodes, few enough for a cache. A node looks at four bits of the
// address. It holds the routes whose prefix ends inside them, and sixteen subtrees. Bits that all routes below have in
// common are skipped (the node's depth). A subtree is a node if and only if its routes do not fit into a block, so the
// shape depends on the set of routes only, not on the order in which they came.
//
// Nodes and blocks are never changed once a Table holds them. A change copies the nodes from the root to the place of
// change, and one block, and shares all others.

// A tree is a subtree: a node, or a block, or nothing.
type tree struct {
	node  *node
	block block
}

func (t tree) len() int {
	if t.node != nil {
		return int(t.node.n)
	}
	return int(t.block.n)
}

// A node stands above blocks and other nodes.
type node struct {
	key   key     // the bits before depth are those of every route below; the others do not count
	best  uint64  // for each value of the nibble four bits: the index of the longest prefix that holds it, or 0
	n     uint32  // routes in the subtree
	ends  uint16  // the indexes in use, see index
	depth uint8   // which nibble the node looks at, 0 to 31
	four  bool    // whether blocks below are of IPv4
	ended []entry // the routes that end here, by index
	subs  [16]tree
}

// sub returns the subtree where k is, if it is below n at all.
func (n *node) sub(k key) *tree {
	part := k.hi
	if n.depth >= 16 {
		part = k.lo
	}
	return &n.subs[part>>(60-4*n.depth&63)&15]
}

// at returns the place of an index among the routes that end here.
func (n *node) at(index uint) int { return bits.OnesCount16(n.ends & (1<<index - 1)) }

// index returns the index of a prefix that ends inside the node's nibble: 1<<l | v, 1 to 15, if it ends after l (0 to 3)
// bits with value v.
func (n *node) index(k key, prefixBits uint8) uint {
	l := uint(prefixBits - 4*n.depth)
	return 1<<l | k.nibble(n.depth)>>(4-l)
}

// endsHere reports whether a prefix of so many bits, which is not shorter than what the node skips, ends here.
func (n *node) endsHere(prefixBits uint8) bool { return prefixBits < 4*n.depth+4 }

// skips reports whether k lacks the bits that the node skips.
func (n *node) skips(k key) bool { return n.key.common(k) < 4*int(n.depth) }

// lookup returns the entry with the longest prefix that holds k. At first it believes that k has the bits that nodes skip,
// and goes to the block where k then is: a route there that holds k shows that it was right.
func (t *tree) lookup(k key) (entry, bool) {
	sub := t
	for sub.node != nil {
		sub = sub.node.sub(k)
	}
	if e, ok := sub.block.lookup(k); ok {
		return e, true
	}
	return t.lookupAbove(k)
}

// lookupAbove is lookup where no block has a route that holds k.
func (t *tree) lookupAbove(k key) (best entry, ok bool) {
	for n := t.node; n != nil && !n.skips(k); n = n.sub(k).node {
		if i := uint(n.best>>(4*k.nibble(n.depth))) & 15; i != 0 {
			best, ok = n.ended[n.at(i)], true
		}
	}
	return best, ok
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
				return n.ended[n.at(i)], true
			}
			return entry{}, false
		}
		t = n.subs[k.nibble(n.depth)]
	}
	return t.block.get(k, prefixBits)
}

// newTree makes the subtree of entries that are sorted by key.
func newTree(sorted []entry, four bool) tree {
	if b, ok := newBlock(sorted, four); ok {
		return tree{block: b}
	}
	n := &node{key: sorted[0].key, depth: uint8(shared(sorted) / 4), four: four, n: uint32(len(sorted))}
	for len(sorted) > 0 {
		nibble, rest := sorted[0].key.nibble(n.depth), 1
		for rest < len(sorted) && sorted[rest].key.nibble(n.depth) == nibble {
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
		n.subs[nibble] = newTree(below[short:], four)
	}
	return tree{node: n}
}

// insert returns t with e in it, whose prefix must not be there yet.
func (t tree) insert(e entry, four bool) tree {
	n := t.node
	if n == nil {
		var room [blockMax + 1]entry
		routes := append(t.block.appendTo(room[:0]), e)
		if b, ok := newBlock(routes, four); ok {
			return tree{block: b}
		}
		slices.SortFunc(routes, byKey)
		return newTree(routes, four)
	}
	if depth := min(e.key.common(n.key), int(e.bits)) / 4; depth < int(n.depth) {
		m := &node{key: e.key, depth: uint8(depth), four: four, n: n.n}
		m.subs[n.key.nibble(m.depth)] = t
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
	nibble := e.key.nibble(n.depth)
	n.subs[nibble] = n.subs[nibble].insert(e, n.four)
}

// end adds e, whose prefix ends here.
func (n *node) end(e entry) {
	i := n.index(e.key, e.bits)
	n.setEnds(n.ends|1<<i, slices.Insert(slices.Clone(n.ended), n.at(i), e))
}

func (n *node) setEnds(ends uint16, ended []entry) {
	n.ends, n.ended, n.best = ends, ended, 0
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
		var room [blockMax]entry
		rest := slices.DeleteFunc(t.block.appendTo(room[:0]), func(e entry) bool { return e.key == k && e.bits == prefixBits })
		b, _ := newBlock(rest, t.block.four) // fewer fit too
		return tree{block: b}
	}
	n := t.node.clone()
	n.n--
	if n.endsHere(prefixBits) {
		i := n.index(k, prefixBits)
		n.setEnds(n.ends&^(1<<i), slices.Delete(slices.Clone(n.ended), n.at(i), n.at(i)+1))
	} else {
		nibble := k.nibble(n.depth)
		n.subs[nibble] = n.subs[nibble].remove(k, prefixBits)
	}
	t = tree{node: n}
	if n.n <= blockMax {
		routes := make([]entry, 0, n.n)
		t.all(func(e entry) bool {
			routes = append(routes, e)
			return true
		})
		if b, ok := newBlock(routes, n.four); ok {
			return tree{block: b}
		}
	}
	if n.ends == 0 {
		for _, only := range n.subs {
			if only.len() == int(n.n) {
				return only
			}
		}
	}
	return t
}

// overlapping calls yield for each entry whose prefix holds the given one or lies in it, until yield returns false. It
// reports whether it came to the end.
func (t tree) overlapping(k key, prefixBits uint8, yield func(entry) bool) bool {
	check := func(e entry) bool {
		return k.common(e.key) < int(min(e.bits, prefixBits)) || yield(e)
	}
	n := t.node
	if n == nil {
		return t.all(check)
	}
	if n.key.common(k) < min(4*int(n.depth), int(prefixBits)) {
		return true
	}
	for _, sub := range n.subs {
		if !sub.overlapping(k, prefixBits, yield) {
			return false
		}
	}
	return every(n.ended, check)
}

// all calls yield for each entry, in no order, until yield returns false. It reports whether it came to the end.
func (t tree) all(yield func(entry) bool) bool {
	if t.node == nil {
		return t.block.all(yield)
	}
	for _, sub := range t.node.subs {
		if !sub.all(yield) {
			return false
		}
	}
	return every(t.node.ended, yield)
}

func every(entries []entry, yield func(entry) bool) bool {
	for _, e := range entries {
		if !yield(e) {
			return false
		}
	}
	return true
}
