package vnet

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"sync/atomic"
	"unsafe"
)

// key is an address as a big-endian number, left-aligned: an IPv4 address has its four octets in the top of hi.
type key struct{ hi, lo uint64 }

func keyOf(a netip.Addr) key {
	if a.Is4() {
		b := a.As4()
		return key{hi: uint64(binary.BigEndian.Uint32(b[:])) << 32}
	}
	b := a.As16()
	return key{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

// addr is the address of which k is the key.
func (k key) addr(four bool) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], k.hi)
	if four {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	binary.BigEndian.PutUint64(b[8:], k.lo)
	return netip.AddrFrom16(b)
}

// from returns the 64 bits of k from bit i, 0 to 127, on. Behind the last there are zeros. It is written so that shifts
// need no care for counts beyond 63.
func (k key) from(i uint8) uint64 {
	if i < 64 {
		return k.hi<<(i&63) | k.lo>>1>>(^i&63)
	}
	return k.lo << (i & 63)
}

// nibble returns the i-th group of four bits, 0 to 31.
func (k key) nibble(i uint8) uint { return uint(k.from(4*i) >> 60) }

// common returns the number of leading bits that k and o share, 0 to 128. It does not branch on what they are.
func (k key) common(o key) int {
	hi, lo := bits.LeadingZeros64(k.hi^o.hi), bits.LeadingZeros64(k.lo^o.lo)
	return hi + lo&-(hi>>6)
}

// An entry is a prefix and the number of where it leads.
type entry struct {
	key  key
	way  way
	bits uint8
}

// order sorts entries: the longest prefix first, so that the first that holds an address is the one.
func (e entry) order(o entry) int {
	return cmp.Or(cmp.Compare(o.bits, e.bits), cmp.Compare(e.key.hi, o.key.hi), cmp.Compare(e.key.lo, o.key.lo))
}

// before is order as a quick yes or no.
func (e *entry) before(o *entry) bool {
	if e.bits != o.bits {
		return e.bits > o.bits
	}
	return e.key.hi < o.key.hi || e.key.hi == o.key.hi && e.key.lo < o.key.lo
}

// A word is what a look-up reads of an entry: some bits of the address, left-aligned behind a zero, then the way, then in
// six bits by how many bits to shift the address so that only those remain which must be alike. IPv4 has all 32 bits of
// the address there. IPv6 has keyBits6 bits, from the block's depth on, and between way and shift the prefix's length.
type word uint64

const (
	keyBits6  = 25
	wayBits   = 24
	wayShift4 = 6
	wayShift6 = 14
)

// A word that is zero is no entry, nor is one with this shift: it is in a line's last slot and holds the number of the
// line in which the bucket goes on. Both differ from every address, by a bit that the shifts of entries remove.
const linkShift = 1

// holds returns 1 if the word holds the address k, as far as it tells, or 0. It has no branch.
func (w word) holds(k uint64) uint64 { return ((uint64(w)^k)>>(w&63) - 1) >> 63 }

// isEntry tells entries from other words.
func (w word) isEntry() bool { return w&63 > linkShift }

// next returns the number of the line in which the bucket of a line with this last slot goes on, or 0.
func (w word) next() uint {
	if w&63 != linkShift {
		return 0
	}
	return uint(w >> wayShift4)
}

const (
	blockMax   = 512 // most routes of a block
	clusterMax = 32  // most routes of a block in one 32nd of its addresses
	slots      = 8   // entries of a line
	maxFork    = 7   // most bits that tell buckets apart: half the slots of blockMax routes' buckets are in use
)

// A line is a part of a block that is fetched at once. An IPv4 line has no keys.
type (
	line4 [slots]word
	line6 struct {
		line4
		keys [slots]key
	}
)

// holding returns a bit for each slot whose word holds the address k. It takes each alike, without a branch: a processor
// that had guessed wrong where the search ends could not go on with what comes after the look-up while it waits for far
// memory.
func (l *line4) holding(k uint64) uint64 {
	return l[0].holds(k) | l[1].holds(k)<<1 | l[2].holds(k)<<2 | l[3].holds(k)<<3 |
		l[4].holds(k)<<4 | l[5].holds(k)<<5 | l[6].holds(k)<<6 | l[7].holds(k)<<7
}

// A block holds up to blockMax routes in lines of slots entries, sorted into buckets by the bits that follow those which
// all routes have in common. A bucket is a line, whose place follows from the address alone, so that a look-up fetches
// that line and no other; few buckets have more entries, and go on in lines behind all buckets. A route too short for
// one bucket, a wide one, stands behind those; each bucket in it ends with a copy of it, unless a longer wide one holds
// the bucket too. The zero value is empty.
type block struct {
	first unsafe.Pointer // to the first line4 or line6
	n     uint16         // routes
	lines uint16         // before the wide routes
	depth uint8          // bits before those that tell buckets apart
	fork  uint8          // how many those are, 0 to maxFork
	wide  uint8          // wide routes
	four  bool           // whether lines are of IPv4
}

// newBlock makes the block of routes, in any order. It returns false if they do not fit: if they are too many, or too
// many close together. Then they do not fit with more routes either, so that the trie's shape depends on the set only.
func newBlock(routes []entry, four bool) (block, bool) {
	if len(routes) == 0 || len(routes) > blockMax {
		return block{}, len(routes) == 0
	}
	b := block{n: uint16(len(routes)), depth: uint8(shared(routes)), four: four}
	b.fork = uint8(bits.Len(uint(len(routes)-1) / (slots / 2)))
	var clusters [32]uint8
	for i := range routes {
		if e := &routes[i]; e.bits >= b.depth+5 {
			at := e.key.from(b.depth) >> 59
			if clusters[at]++; clusters[at] > clusterMax {
				return block{}, false
			}
		}
	}
	b.fill(routes)
	return b, true
}

// shared returns how many bits all prefixes have in common.
func shared(routes []entry) int {
	n := 128
	for i := range routes {
		n = min(n, routes[0].key.common(routes[i].key), int(routes[i].bits))
	}
	return n
}

// bucket returns the number of the bucket for an address.
func (b *block) bucket(k key) uint { return uint(k.from(b.depth) >> 1 >> (^b.fork & 63)) }

// isWide reports whether a prefix of so many bits is too short for one bucket.
func (b *block) isWide(prefixBits uint8) bool { return prefixBits < b.depth+b.fork }

// place returns a route's bucket. The place of wide routes is behind all.
func (b *block) place(e *entry) uint {
	if b.isWide(e.bits) {
		return 1 << b.fork
	}
	return b.bucket(e.key)
}

// fill makes the lines for routes.
func (b *block) fill(routes []entry) {
	var starts, ends [1<<maxFork + 1]int // of each bucket among the sorted routes, then of the wide ones
	for i := range routes {
		ends[b.place(&routes[i])]++
	}
	from := 0
	for at, n := range ends {
		starts[at], ends[at] = from, from
		from += n
	}
	var sorted [blockMax]entry
	for i := range routes {
		e := &routes[i]
		at := b.place(e)
		to := ends[at]
		for ends[at]++; to > starts[at] && e.before(&sorted[to-1]); to-- {
			sorted[to] = sorted[to-1]
		}
		sorted[to] = *e
	}
	buckets := uint(1) << b.fork
	wide := sorted[starts[buckets]:ends[buckets]]
	var copies [1 << maxFork]*entry
	for i := len(wide) - 1; i >= 0; i-- { // the shortest first
		rest := b.depth + b.fork - wide[i].bits
		for at := range uint(1) << rest {
			copies[b.bucket(wide[i].key)>>rest<<rest+at] = &wide[i]
		}
	}
	lines := int(buckets)
	for at := range buckets {
		n := ends[at] - starts[at]
		if copies[at] != nil {
			n++
		}
		lines += max(n-2, 0) / (slots - 1) // all lines of a bucket but the last hold a link
	}
	b.wide, b.lines = uint8(len(wide)), uint16(lines)
	b.makeLines(lines + (len(wide)+slots-1)/slots)
	more := buckets
	for at := range buckets {
		more = b.putBucket(at, sorted[starts[at]:ends[at]], copies[at], more)
	}
	for i := range wide {
		b.put(uint(lines)*slots+uint(i), &wide[i])
	}
}

// putBucket stores a bucket and the copy of a wide route behind it, if there is one. If its line is too short, it goes
// on in the line more. It returns the next line that is not in use.
func (b *block) putBucket(at uint, bucket []entry, wide *entry, more uint) uint {
	to := at * slots
	put := func(e *entry, last bool) {
		if to%slots == slots-1 && !last {
			b.words(to / slots)[slots-1] = word(more<<wayShift4 | linkShift)
			to = more * slots
			more++
		}
		b.put(to, e)
		to++
	}
	for i := range bucket {
		put(&bucket[i], wide == nil && i == len(bucket)-1)
	}
	if wide != nil {
		put(wide, true)
	}
	return more
}

func (b *block) makeLines(n int) {
	if b.four {
		b.first = unsafe.Pointer(unsafe.SliceData(make([]line4, n)))
	} else {
		b.first = unsafe.Pointer(unsafe.SliceData(make([]line6, n)))
	}
}

func (b *block) line4(i uint) *line4 {
	return (*line4)(unsafe.Add(b.first, i*uint(unsafe.Sizeof(line4{}))))
}
func (b *block) line6(i uint) *line6 {
	return (*line6)(unsafe.Add(b.first, i*uint(unsafe.Sizeof(line6{}))))
}

// words returns the words of a line.
func (b *block) words(i uint) *line4 {
	if b.four {
		return b.line4(i)
	}
	return &b.line6(i).line4
}

// put stores an entry in the i-th slot.
func (b *block) put(i uint, e *entry) {
	if b.four {
		b.line4(i / slots)[i%slots] = word(e.key.hi>>1 | uint64(e.way)<<wayShift4 | uint64(63-e.bits))
		return
	}
	l := b.line6(i / slots)
	l.line4[i%slots] = word(b.top6(e.key) | uint64(e.way)<<wayShift6 | uint64(e.bits)<<6 | uint64(63-min(e.bits-b.depth, keyBits6)))
	l.keys[i%slots] = e.key
}

// top6 returns the bits of an IPv6 address that words hold.
func (b *block) top6(k key) uint64 { return k.from(b.depth) >> (64 - keyBits6) << (63 - keyBits6) }

// at returns the entry in the i-th slot, and whether there is one.
func (b *block) at(i uint) (entry, bool) {
	if b.four {
		w := b.line4(i / slots)[i%slots]
		return w.entry4(), w.isEntry()
	}
	l := b.line6(i / slots)
	return l.entry(i % slots), l.line4[i%slots].isEntry()
}

func (w word) entry4() entry {
	return entry{key{hi: uint64(w) >> 31 << 32}, way(w>>wayShift4) & maxWay, uint8(63 - w&63)}
}

func (l *line6) entry(i uint) entry {
	w := l.line4[i]
	return entry{l.keys[i], way(w>>wayShift6) & maxWay, uint8(w >> 6)}
}

// lookup returns the entry with the longest prefix that holds k.
func (b *block) lookup(k key) (entry, bool) {
	if b.first == nil {
		return entry{}, false
	}
	at := b.bucket(k)
	if b.four {
		for {
			l := b.line4(at)
			if found := l.holding(k.hi>>1 | 1); found != 0 {
				return l[bits.TrailingZeros64(found)&(slots-1)].entry4(), true
			}
			if at = l[slots-1].next(); at == 0 {
				return entry{}, false
			}
		}
	}
	for top := b.top6(k) | 1; ; {
		l := b.line6(at)
		found := l.holding(top)
		// These loads are for the caches: they fetch the keys at the same time as the words.
		atomic.LoadUint64(&l.keys[0].hi)
		atomic.LoadUint64(&l.keys[slots-1].lo)
		for ; found != 0; found &= found - 1 {
			if e := l.entry(uint(bits.TrailingZeros64(found)) & (slots - 1)); k.common(e.key) >= int(e.bits) {
				return e, true
			}
		}
		if at = l.line4[slots-1].next(); at == 0 {
			return entry{}, false
		}
	}
}

// get returns the entry of exactly this prefix.
func (b *block) get(k key, prefixBits uint8) (entry, bool) {
	if b.first == nil {
		return entry{}, false
	}
	is := func(i uint) (entry, bool) {
		e, ok := b.at(i)
		return e, ok && e.key == k && e.bits == prefixBits
	}
	if b.isWide(prefixBits) {
		for i := range uint(b.wide) {
			if e, ok := is(uint(b.lines)*slots + i); ok {
				return e, true
			}
		}
		return entry{}, false
	}
	for at := b.bucket(k); ; {
		for i := range uint(slots) {
			if e, ok := is(at*slots + i); ok {
				return e, true
			}
		}
		if at = b.words(at)[slots-1].next(); at == 0 {
			return entry{}, false
		}
	}
}

// all calls yield for each route until it returns false. It reports whether it came to the end.
func (b *block) all(yield func(entry) bool) bool {
	end := uint(b.lines) * slots
	for i := range end + uint(b.wide) {
		e, ok := b.at(i)
		isCopy := i < end && b.isWide(e.bits)
		if ok && !isCopy && !yield(e) {
			return false
		}
	}
	return true
}

// appendTo appends the block's routes to all.
func (b *block) appendTo(all []entry) []entry {
	b.all(func(e entry) bool {
		all = append(all, e)
		return true
	})
	return all
}
