package vnet

import (
	"hash/maphash"
	"slices"
)

// A dict is a persistent map from strings: a trie of the strings' hashes, with entries in rows as in the trie of prefixes
// and for the same reason. Like that it is never changed once a Table holds it; a change copies the few nodes on one
// path, and one row. The zero value is empty.
type dict[V any] struct {
	// cut is how many bytes at the beginning of the stored keys do not count. Callers give keys without them, but for
	// with.
	cut  int
	root dictTree[V]
}

// dictTree is a subtree: a node, or a row of entries. It is a node if and only if it has more than dictFew entries and
// bits of the hash are left.
type dictTree[V any] struct {
	node *dictNode[V]
	few  []dictEntry[V]
}

// dictNode has a subtree for each value of four bits of the hash.
type dictNode[V any] struct {
	n     int // entries in the subtree
	trees [1 << dictBits]dictTree[V]
}

type dictEntry[V any] struct {
	hash uint64
	key  string
	val  V
}

const (
	dictFew  = 16 // entries in a row before they become a node
	dictBits = 4  // bits of the hash per level
	hashBits = 64 // bits of the hash in all
)

// seed differs in each process, so that nobody can choose names that collide.
var seed = maphash.MakeSeed()

// hash is a variable for the test of equal hashes.
var hash = func(s string) uint64 { return maphash.String(seed, s) }

func branch(h uint64, shift int) uint64 { return h >> shift & (1<<dictBits - 1) }

// find returns the place of a key in a row, or -1. The hash tells nearly all others apart without a look at their texts.
func (d *dict[V]) find(row []dictEntry[V], h uint64, key string) int {
	for i := range row {
		if e := &row[i]; e.hash == h && e.key[d.cut:] == key {
			return i
		}
	}
	return -1
}

// get returns the entry of a key, or nil.
func (d *dict[V]) get(key string) *dictEntry[V] {
	h, t := hash(key), &d.root
	for shift := 0; t.node != nil; shift += dictBits {
		t = &t.node.trees[branch(h, shift)]
	}
	if i := d.find(t.few, h, key); i >= 0 {
		return &t.few[i]
	}
	return nil
}

func (d *dict[V]) empty() bool { return d.root.node == nil && len(d.root.few) == 0 }

// with returns d with the entry added or replaced. With fresh set, no one else sees d, and its nodes are changed in
// place.
func (d dict[V]) with(key string, val V, fresh bool) dict[V] {
	d.root, _ = d.put(d.root, dictEntry[V]{hash(key[d.cut:]), key, val}, 0, fresh)
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
	if i := d.find(t.few, e.hash, e.key[d.cut:]); i >= 0 {
		row := slices.Clone(t.few)
		row[i] = e
		return dictTree[V]{few: row}, false
	}
	row := make([]dictEntry[V], len(t.few)+1)
	copy(row, t.few)
	row[len(t.few)] = e
	if len(row) <= dictFew || shift >= hashBits {
		return dictTree[V]{few: row}, true
	}
	n := &dictNode[V]{n: len(row)}
	for _, e := range row {
		sub := &n.trees[branch(e.hash, shift)]
		*sub, _ = d.put(*sub, e, shift+dictBits, true)
	}
	return dictTree[V]{node: n}, true
}

// without returns d without the entry, which must be there.
func (d dict[V]) without(key string) dict[V] {
	d.root = d.take(d.root, hash(key), key, 0)
	return d
}

func (d *dict[V]) take(t dictTree[V], h uint64, key string, shift int) dictTree[V] {
	if t.node == nil {
		i := d.find(t.few, h, key)
		return dictTree[V]{few: slices.Concat(t.few[:i], t.few[i+1:])}
	}
	n := *t.node
	n.n--
	sub := &n.trees[branch(h, shift)]
	*sub = d.take(*sub, h, key, shift+dictBits)
	t = dictTree[V]{node: &n}
	if n.n > dictFew {
		return t
	}
	row := make([]dictEntry[V], 0, n.n)
	t.all(func(e *dictEntry[V]) bool {
		row = append(row, *e)
		return true
	})
	return dictTree[V]{few: row}
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
	for i := range t.few {
		if !yield(&t.few[i]) {
			return false
		}
	}
	return true
}
