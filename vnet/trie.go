package vnet

import (
	"math/bits"
	"net/netip"
	"slices"
)

// The trie of one address family of one virtual network.
//
// A node looks at one octet of the address. It holds the routes whose prefix ends inside that octet, and below it, by
// the octet's value, further nodes or single routes. Both levels of compression keep it shallow: a subtree with one
// route is that route alone (a leaf), and octets that all routes below have in common are skipped (the node's depth).
// Every node therefore holds at least two routes or subtrees, and the shape depends on the set of routes only, not on
// the order in which they came.
//
// Nodes are never changed once a Table holds them. A change copies the nodes from the root to the place of change, at
// most one for each octet of the address, and shares all others.

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

// octet returns the i-th octet, 0 to 15.
func (k key) octet(i int) uint {
	if i < 8 {
		return uint(k.hi>>(56-8*i)) & 0xff
	}
	return uint(k.lo>>(120-8*i)) & 0xff
}

// common returns the number of leading bits that k and o share, 0 to 128.
func (k key) common(o key) int {
	if d := k.hi ^ o.hi; d != 0 {
		return bits.LeadingZeros64(d)
	}
	return 64 + bits.LeadingZeros64(k.lo^o.lo)
}

// bitset holds the numbers 0 to 255.
type bitset [4]uint64

func (s *bitset) has(i uint) bool { return s[i>>6&3]&(1<<(i&63)) != 0 }
func (s *bitset) add(i uint)      { s[i>>6&3] |= 1 << (i & 63) }
func (s *bitset) del(i uint)      { s[i>>6&3] &^= 1 << (i & 63) }

// rank returns how many members are less than i: the place of i in the slice that the set describes.
func (s *bitset) rank(i uint) int {
	n := bits.OnesCount64(s[i>>6&3] & (1<<(i&63) - 1))
	for w := range i >> 6 & 3 {
		n += bits.OnesCount64(s[w])
	}
	return n
}

// A tree is a subtree: empty, one route, or a node.
type tree struct {
	node *node
	leaf *Route
}

type node struct {
	key   key // the octets before depth are those of every route below; the others do not count
	depth int // which octet the node looks at, 0 to 15
	// A prefix that ends after l (0 to 7) bits of the octet, with value v, has the index 1<<l | v, 1 to 255.
	ends   bitset
	nexts  bitset // by the octet's value
	routes []*Route
	trees  []tree
}

// endIndex returns the index in ends of a prefix of n bits that ends inside the node's octet.
func (n *node) endIndex(k key, prefixBits int) uint {
	l := uint(prefixBits - 8*n.depth)
	return 1<<l | k.octet(n.depth)>>(8-l)
}

// lookup returns the route with the longest prefix that holds a, or nil. k is a's key.
func (t tree) lookup(a netip.Addr, k key) *Route {
	var best *Route
	for t.node != nil {
		n := t.node
		if n.key.common(k) < 8*n.depth {
			return best
		}
		octet := k.octet(n.depth)
		if len(n.routes) > 0 {
			for i := (256 | octet) >> 1; i > 0; i >>= 1 {
				if n.ends.has(i) {
					best = n.routes[n.ends.rank(i)]
					break
				}
			}
		}
		if !n.nexts.has(octet) {
			return best
		}
		t = n.trees[n.nexts.rank(octet)]
	}
	if t.leaf != nil && t.leaf.Prefix.Contains(a) {
		return t.leaf
	}
	return best
}

// get returns the route with exactly this prefix, or nil.
func (t tree) get(p netip.Prefix) *Route {
	k := keyOf(p.Addr())
	for t.node != nil {
		n := t.node
		if n.key.common(k) < 8*n.depth || p.Bits() < 8*n.depth {
			return nil
		}
		if p.Bits() < 8*n.depth+8 {
			if i := n.endIndex(k, p.Bits()); n.ends.has(i) {
				return n.routes[n.ends.rank(i)]
			}
			return nil
		}
		octet := k.octet(n.depth)
		if !n.nexts.has(octet) {
			return nil
		}
		t = n.trees[n.nexts.rank(octet)]
	}
	if t.leaf != nil && t.leaf.Prefix == p {
		return t.leaf
	}
	return nil
}

// insert returns t with r in it. The prefix must not be there yet. With fresh set, no one else sees t, and its nodes
// are changed in place.
func (t tree) insert(r *Route, fresh bool) tree {
	k, n := keyOf(r.Prefix.Addr()), t.node
	switch {
	case n == nil && t.leaf == nil:
		return tree{leaf: r}
	case n == nil:
		other := keyOf(t.leaf.Prefix.Addr())
		depth := min(k.common(other), r.Prefix.Bits(), t.leaf.Prefix.Bits()) / 8
		m := &node{key: k, depth: depth}
		m.put(t.leaf, other, true)
		m.put(r, k, true)
		return tree{node: m}
	}
	if depth := min(k.common(n.key), r.Prefix.Bits()) / 8; depth < n.depth {
		m := &node{key: k, depth: depth}
		m.nexts.add(n.key.octet(depth))
		m.trees = []tree{t}
		m.put(r, k, true)
		return tree{node: m}
	}
	if !fresh {
		n = n.clone()
	}
	n.put(r, k, fresh)
	return tree{node: n}
}

// put adds r below n, which is changed in place.
func (n *node) put(r *Route, k key, fresh bool) {
	if r.Prefix.Bits() < 8*n.depth+8 {
		i := n.endIndex(k, r.Prefix.Bits())
		n.routes = slices.Insert(n.routes, n.ends.rank(i), r)
		n.ends.add(i)
		return
	}
	octet := k.octet(n.depth)
	at := n.nexts.rank(octet)
	if n.nexts.has(octet) {
		n.trees[at] = n.trees[at].insert(r, fresh)
		return
	}
	n.trees = slices.Insert(n.trees, at, tree{leaf: r})
	n.nexts.add(octet)
}

func (n *node) clone() *node {
	c := *n
	c.routes = slices.Clone(n.routes)
	c.trees = slices.Clone(n.trees)
	return &c
}

// remove returns t without the route of prefix p, which must be there.
func (t tree) remove(p netip.Prefix) tree {
	if t.node == nil {
		return tree{}
	}
	n, k := t.node.clone(), keyOf(p.Addr())
	if p.Bits() < 8*n.depth+8 {
		i := n.endIndex(k, p.Bits())
		at := n.ends.rank(i)
		n.routes = slices.Delete(n.routes, at, at+1)
		n.ends.del(i)
	} else {
		octet := k.octet(n.depth)
		at := n.nexts.rank(octet)
		if n.trees[at] = n.trees[at].remove(p); n.trees[at] == (tree{}) {
			n.trees = slices.Delete(n.trees, at, at+1)
			n.nexts.del(octet)
		}
	}
	switch {
	case len(n.routes) == 1 && len(n.trees) == 0:
		return tree{leaf: n.routes[0]}
	case len(n.routes) == 0 && len(n.trees) == 1:
		return n.trees[0]
	}
	return tree{node: n}
}

// overlapping calls yield for each route whose prefix holds p or lies in it, until yield returns false. It reports
// whether it came to the end.
func (t tree) overlapping(p netip.Prefix, yield func(Route) bool) bool {
	if t.node == nil {
		return t.leaf == nil || !t.leaf.Prefix.Overlaps(p) || yield(*t.leaf)
	}
	n := t.node
	if n.key.common(keyOf(p.Addr())) < min(8*n.depth, p.Bits()) {
		return true
	}
	for _, r := range n.routes {
		if r.Prefix.Overlaps(p) && !yield(*r) {
			return false
		}
	}
	for _, sub := range n.trees {
		if !sub.overlapping(p, yield) {
			return false
		}
	}
	return true
}

// all calls yield for each route, in no order, until yield returns false. It reports whether it came to the end.
func (t tree) all(yield func(Route) bool) bool {
	if t.node == nil {
		return t.leaf == nil || yield(*t.leaf)
	}
	for _, r := range t.node.routes {
		if !yield(*r) {
			return false
		}
	}
	for _, sub := range t.node.trees {
		if !sub.all(yield) {
			return false
		}
	}
	return true
}
