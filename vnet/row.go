package vnet

import (
	"cmp"
	"math/bits"
	"slices"
	"unsafe"
)

// An entry is a prefix and the number of where it leads.
type entry struct {
	key  key
	way  way
	bits uint8
}

// holds reports whether the prefix holds the address k.
func (e *entry) holds(k key) bool { return k.common(e.key) >= int(e.bits) }

// order sorts rows: the longest prefix first, so that the first that holds an address is the one.
func (e entry) order(o entry) int {
	return cmp.Or(cmp.Compare(o.bits, e.bits), cmp.Compare(e.key.hi, o.key.hi), cmp.Compare(e.key.lo, o.key.lo))
}

// fewMax is how many routes stand in a row before they become a node.
const fewMax = 32

// packed is an entry of IPv4 in eight bytes: the address in the upper 32 bits, then the way, then in six bits the
// prefix's length.
type packed uint64

func (p packed) entry() entry {
	return entry{key{hi: uint64(p) &^ (1<<32 - 1)}, way(p>>6) & maxWay, uint8(p & 63)}
}

func (e *entry) pack() packed { return packed(e.key.hi | uint64(e.way)<<6 | uint64(e.bits)) }

// A row holds up to fewMax entries in order, of IPv4 packed. The zero value is empty. It is a slice of known length, taken
// apart so that a node has room for sixteen; its address is kept as unsafe.Pointer, because in the same place a node
// may hold the address of another.
type row struct {
	first unsafe.Pointer // to the first packed or entry
	n     uint8
	four  bool
}

func newRow(entries []entry, four bool) row {
	if len(entries) == 0 {
		return row{}
	}
	if !four {
		plain := make([]entry, len(entries)) // with no room to spare, which Clone may leave
		copy(plain, entries)
		return row{unsafe.Pointer(unsafe.SliceData(plain)), uint8(len(entries)), false}
	}
	short := make([]packed, len(entries))
	for i := range entries {
		short[i] = entries[i].pack()
	}
	return row{unsafe.Pointer(unsafe.SliceData(short)), uint8(len(entries)), true}
}

func (r row) packed() []packed { return unsafe.Slice((*packed)(r.first), r.n) }
func (r row) plain() []entry   { return unsafe.Slice((*entry)(r.first), r.n) }

// entries returns the row's entries, in a slice with room for one more that is the caller's.
func (r row) entries() []entry {
	all := make([]entry, 0, fewMax+1)
	if !r.four {
		return append(all, r.plain()...)
	}
	for _, p := range r.packed() {
		all = append(all, p.entry())
	}
	return all
}

// lookup returns the first entry that holds k.
func (r row) lookup(k key) (entry, bool) {
	if r.four {
		for _, p := range r.packed() {
			if bits.LeadingZeros64(uint64(p)^k.hi|1<<31) >= int(p&63) {
				return p.entry(), true
			}
		}
		return entry{}, false
	}
	plain := r.plain()
	for i := range plain {
		if e := &plain[i]; e.holds(k) {
			return *e, true
		}
	}
	return entry{}, false
}

// insert returns a row with e in its place, as a slice, since it may be too long for a row.
func (r row) insert(e entry) []entry {
	all := r.entries()
	at, _ := slices.BinarySearchFunc(all, e, entry.order)
	return slices.Insert(all, at, e)
}
