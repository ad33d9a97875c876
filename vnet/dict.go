package vnet

import (
	"hash/maphash"
	"math/bits"
	"slices"
)

// A dict is a persistent map from strings: a trie of the strings' hashes above small hash tables, as the trie of prefixes
// stands above blocks and for the same reasons. Like that it is never changed once a Table holds it; a change copies the
// few nodes on one path, and one hash table. The zero value is empty.
type dict[V any] struct {
	// cut is how many bytes at the beginning of the stored keys do not count. Callers give keys without them, but for
	// with.
	cut  int
	root dictTree[V]
}

// dictTree is a subtree: a node, or a hash table. It is a node if and only if it has more than dictFew entries and bits of
// the hash are left.
//
// The hash table has 1<<fork places and some behind them. An entry stands in the place that bits of its hash give, or
// behind in the next that was free. A look-up reads window places at once; the last window of each table is free.
type dictTree[V any] struct {
	node  *dictNode[V]
	table []dictEntry[V]
	n     uint32
	fork  uint8
}

// dictNode has a subtree for each value of four bits of the hash.
type dictNode[V any] struct {
	n     int // entries in the subtree
	trees [1 << dictBits]dictTree[V]
}

// dictEntry is a place of a hash table. It is free if the hash is zero.
type dictEntry[V any] struct {
	hash uint64
	key  string
	val  V
}

const (
	dictFew  = 256 // entries in a hash table before they become a node
	dictBits = 4   // bits of the hash per level
	hashBits = 60  // bits of the hash in all
	window   = 4
)

// seed differs in each process, so that nobody can choose names that collide.
var seed = maphash.MakeSeed()

// hash is a variable for the test of equal hashes.
var hash = func(s string) uint64 { return maphash.String(seed, s) }

// hashOf returns the hash as entries have it: not zero, and without the highest bit.
func hashOf(s string) uint64 { return hash(s)>>4<<1 | 1 }

// branch returns which subtree a hash belongs to, shift bits behind the first.
func branch(h uint64, shift int) uint64 { return h >> (shift + 1) & (1<<dictBits - 1) }

// home returns the place of a hash in t's table.
func (t *dictTree[V]) home(h uint64, shift int) int {
	return int(h >> ((shift + 1) & 63) & (1<<(t.fork&63) - 1))
}

// is returns 1 if the entry has this hash, or 0. It has no branch, see line4.holding.
func (e *dictEntry[V]) is(h uint64) uint64 { return ((e.hash ^ h) - 1) >> 63 }

// find returns the entry of a key in t's table, or nil. The hash tells nearly all others apart without a look at their
// texts.
func (d *dict[V]) find(t *dictTree[V], h uint64, shift int, key string) *dictEntry[V] {
	for table := t.table[min(t.home(h, shift), len(t.table)):]; len(table) >= window; table = table[window:] {
		w := (*[window]dictEntry[V])(table)
		for found := w[0].is(h) | w[1].is(h)<<1 | w[2].is(h)<<2 | w[3].is(h)<<3; found != 0; found &= found - 1 {
			if e := &w[bits.TrailingZeros64(found)&(window-1)]; e.key[d.cut:] == key {
				return e
			}
		}
		if w[window-1].hash == 0 {
			break
		}
	}
	return nil
}

// get returns the entry of a key, or nil.
func (d *dict[V]) get(key string) *dictEntry[V] {
	h, t, shift := hashOf(key), &d.root, 0
	for ; t.node != nil; shift += dictBits {
		t = &t.node.trees[branch(h, shift)]
	}
	return d.find(t, h, shift, key)
}

func (d *dict[V]) empty() bool { return d.root.node == nil && d.root.n == 0 }

// with returns d with the entry added or replaced. With fresh set, no one else sees d, and it is changed in place.
func (d dict[V]) with(key string, val V, fresh bool) dict[V] {
	d.root, _ = d.put(d.root, dictEntry[V]{hashOf(key[d.cut:]), key, val}, 0, fresh)
	return d
}

// put returns t with e, and whether that is one more.
func (d *dict[V]) put(t dictTree[V], e dictEntry[V], shift int, fresh bool) (_ dictTree[V], more bool) {
	if n := t.node; n != nil {
		if !fresh {
			c := *n
			n = &c
		}
		sub := &n.trees[branch(e.hash, shift)]
		if *sub, more = d.put(*sub, e, shift+dictBits, fresh); more {
			n.n++
		}
		return dictTree[V]{node: n}, more
	}
	if !fresh {
		t.table = slices.Clone(t.table)
	}
	if old := d.find(&t, e.hash, shift, e.key[d.cut:]); old != nil {
		*old = e
		return t, false
	}
	if t.n < dictFew || shift >= hashBits {
		if 4*(t.n+1) > 3<<t.fork || !t.place(e, shift) {
			t = newTable(append(t.entries(), e), shift)
		}
		return t, true
	}
	n := &dictNode[V]{n: int(t.n) + 1}
	for _, e := range append(t.entries(), e) {
		sub := &n.trees[branch(e.hash, shift)]
		*sub, _ = d.put(*sub, e, shift+dictBits, true)
	}
	return dictTree[V]{node: n}, true
}

// newTable makes a hash table.
func newTable[V any](entries []dictEntry[V], shift int) dictTree[V] {
	if len(entries) == 0 {
		return dictTree[V]{}
	}
	fork := bits.Len(uint(len(entries)) * 4 / 3)
	for behind := window; ; behind *= 2 {
		t := dictTree[V]{table: make([]dictEntry[V], 1<<fork+behind+window), fork: uint8(fork)}
		for _, e := range entries {
			if !t.place(e, shift) {
				break
			}
		}
		if int(t.n) == len(entries) {
			return t
		}
	}
}

// place puts e into t's table, which is changed, unless there is no room.
func (t *dictTree[V]) place(e dictEntry[V], shift int) bool {
	for i := t.home(e.hash, shift); i < len(t.table)-window; i++ {
		if t.table[i].hash == 0 {
			t.table[i] = e
			t.n++
			return true
		}
	}
	return false
}

// entries returns the entries of t's table, in a slice that is the caller's.
func (t *dictTree[V]) entries() []dictEntry[V] {
	all := make([]dictEntry[V], 0, t.n+1)
	for _, e := range t.table {
		if e.hash != 0 {
			all = append(all, e)
		}
	}
	return all
}

// without returns d without the entry, which must be there.
func (d dict[V]) without(key string) dict[V] {
	d.root = d.take(d.root, hashOf(key), key, 0)
	return d
}

func (d *dict[V]) take(t dictTree[V], h uint64, key string, shift int) dictTree[V] {
	if t.node == nil {
		rest := slices.DeleteFunc(t.entries(), func(e dictEntry[V]) bool { return e.hash == h && e.key[d.cut:] == key })
		return newTable(rest, shift)
	}
	n := *t.node
	n.n--
	sub := &n.trees[branch(h, shift)]
	*sub = d.take(*sub, h, key, shift+dictBits)
	t = dictTree[V]{node: &n}
	if n.n > dictFew {
		return t
	}
	rest := make([]dictEntry[V], 0, n.n)
	t.all(func(e *dictEntry[V]) bool {
		rest = append(rest, *e)
		return true
	})
	return newTable(rest, shift)
}

// all calls yield for each entry, in no order, until yield returns false. It reports whether it came to the end.
func (t *dictTree[V]) all(yield func(*dictEntry[V]) bool) bool {
	if t.node != nil {
		for i := range t.node.trees {
			if !t.node.trees[i].all(yield) {
				return false
			}
		}
	}
	for i := range t.table {
		if t.table[i].hash != 0 && !yield(&t.table[i]) {
			return false
		}
	}
	return true
}
