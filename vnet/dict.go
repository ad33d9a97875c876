package vnet

import (
	"hash/maphash"
	"math/bits"
	"slices"
)

// A dict is a persistent map from strings: a hash array mapped trie. Like the trie of prefixes it is never changed once
// a Table holds it; a change copies the few nodes on one path. The zero value is empty.
type dict[V any] struct {
	root *dictNode[V]
}

// dictNode holds, for each value of five bits of the hash that occurs, one entry or one further node. Below the last
// bits of the hash it holds the entries of equal hash in a row, and used is zero.
type dictNode[V any] struct {
	used  uint32
	slots []dictSlot[V]
}

// dictSlot is a further node, or else an entry.
type dictSlot[V any] struct {
	sub *dictNode[V]
	key string
	val V
}

const (
	dictBits = 5  // bits of the hash per level
	hashBits = 64 // bits of the hash in all
)

// seed differs in each process, so that nobody can choose names that collide.
var seed = maphash.MakeSeed()

// hash is a variable for the test of equal hashes.
var hash = func(s string) uint64 { return maphash.String(seed, s) }

func (n *dictNode[V]) bit(h uint64, shift int) uint32 { return 1 << (h >> shift & (1<<dictBits - 1)) }

func (n *dictNode[V]) rank(bit uint32) int { return bits.OnesCount32(n.used & (bit - 1)) }

func (n *dictNode[V]) find(key string) int {
	return slices.IndexFunc(n.slots, func(s dictSlot[V]) bool { return s.key == key })
}

func (d dict[V]) get(key string) (val V, ok bool) {
	n, h := d.root, hash(key)
	for shift := 0; n != nil; shift += dictBits {
		if shift >= hashBits {
			if i := n.find(key); i >= 0 {
				return n.slots[i].val, true
			}
			return val, false
		}
		bit := n.bit(h, shift)
		if n.used&bit == 0 {
			return val, false
		}
		s := &n.slots[n.rank(bit)]
		if s.sub == nil {
			if s.key == key {
				return s.val, true
			}
			return val, false
		}
		n = s.sub
	}
	return val, false
}

// with returns d with the entry added or replaced. With fresh set, no one else sees d, and its nodes are changed in
// place.
func (d dict[V]) with(key string, val V, fresh bool) dict[V] {
	return dict[V]{d.root.with(key, val, hash(key), 0, fresh)}
}

func (n *dictNode[V]) with(key string, val V, h uint64, shift int, fresh bool) *dictNode[V] {
	entry := dictSlot[V]{key: key, val: val}
	switch {
	case n == nil:
		n = &dictNode[V]{}
	case !fresh:
		n = &dictNode[V]{used: n.used, slots: slices.Clone(n.slots)}
	}
	if shift >= hashBits {
		if i := n.find(key); i >= 0 {
			n.slots[i] = entry
		} else {
			n.slots = append(n.slots, entry)
		}
		return n
	}
	bit := n.bit(h, shift)
	at := n.rank(bit)
	if n.used&bit == 0 {
		n.slots = slices.Insert(n.slots, at, entry)
		n.used |= bit
		return n
	}
	switch s := &n.slots[at]; {
	case s.sub != nil:
		s.sub = s.sub.with(key, val, h, shift+dictBits, fresh)
	case s.key == key:
		s.val = val
	default:
		var sub *dictNode[V]
		sub = sub.with(s.key, s.val, hash(s.key), shift+dictBits, true)
		*s = dictSlot[V]{sub: sub.with(key, val, h, shift+dictBits, true)}
	}
	return n
}

// without returns d without the entry, which must be there.
func (d dict[V]) without(key string) dict[V] {
	return dict[V]{d.root.without(key, hash(key), 0)}
}

func (n *dictNode[V]) without(key string, h uint64, shift int) *dictNode[V] {
	n = &dictNode[V]{used: n.used, slots: slices.Clone(n.slots)}
	if shift >= hashBits {
		i := n.find(key)
		n.slots = slices.Delete(n.slots, i, i+1)
	} else {
		bit := n.bit(h, shift)
		at := n.rank(bit)
		s := &n.slots[at]
		if s.sub != nil {
			s.sub = s.sub.without(key, h, shift+dictBits)
		}
		switch {
		case s.sub == nil:
			n.slots = slices.Delete(n.slots, at, at+1)
			n.used &^= bit
		case len(s.sub.slots) == 1 && s.sub.slots[0].sub == nil:
			*s = s.sub.slots[0] // a node with one entry is that entry
		}
	}
	if len(n.slots) == 0 {
		return nil
	}
	return n
}

// all calls yield for each entry, in no order, until yield returns false. It reports whether it came to the end.
func (d dict[V]) all(yield func(string, V) bool) bool { return d.root.all(yield) }

func (n *dictNode[V]) all(yield func(string, V) bool) bool {
	if n == nil {
		return true
	}
	for i := range n.slots {
		s := &n.slots[i]
		if s.sub != nil {
			if !s.sub.all(yield) {
				return false
			}
		} else if !yield(s.key, s.val) {
			return false
		}
	}
	return true
}
