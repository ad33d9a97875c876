package slot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
)

// errPower is what everything ends with after the power went.
var errPower = errors.New("the power is gone")

// A loss says what of the writes that were not synced reaches the medium when the power goes, and what of the one that it
// goes in.
type loss struct {
	name  string
	keep  func(rng *rand.Rand) bool // of an unsynced sector
	begin int                       // bytes of the last sector that are new, from its begin; negative: from its end
}

// losses are the ways to lose power that each point is tried with.
var losses = []loss{
	{"nothing unsynced", func(*rand.Rand) bool { return false }, 0},
	{"all unsynced", func(*rand.Rand) bool { return true }, 0},
	{"some unsynced", func(r *rand.Rand) bool { return r.IntN(2) == 0 }, sector},
	{"only the last", func(*rand.Rand) bool { return false }, sector},
	{"begin torn", func(*rand.Rand) bool { return true }, sector / 2},
	{"end torn", func(*rand.Rand) bool { return true }, -sector / 2},
	{"begin torn, some unsynced", func(r *rand.Rand) bool { return r.IntN(2) == 0 }, 37},
	{"end torn, nothing unsynced", func(*rand.Rand) bool { return false }, -sector + 37},
}

// A disk is a card in memory that loses power in its cut-th operation: writing a sector, or syncing.
type disk struct {
	medium []byte
	cache  map[int64][]byte // sectors that are written and not synced
	ops    int
	cut    int // 0: never
	loss   loss
	dead   bool
}

func (d *disk) clone(cut int, l loss) *disk {
	return &disk{medium: bytes.Clone(d.medium), cache: map[int64][]byte{}, cut: cut, loss: l}
}

func (d *disk) writeSector(n int64, b []byte) error {
	if d.dead {
		return errPower
	}
	if d.ops++; d.ops == d.cut {
		d.lose(n, b)
		return errPower
	}
	d.cache[n] = bytes.Clone(b)
	return nil
}

// lose makes the medium what it is after the power went while b was written to sector n.
func (d *disk) lose(n int64, b []byte) {
	d.dead = true
	rng := rand.New(rand.NewPCG(uint64(d.cut), 1))
	for _, k := range slices.Sorted(maps.Keys(d.cache)) {
		if d.loss.keep(rng) {
			copy(d.medium[k*sector:], d.cache[k])
		}
	}
	d.cache = nil
	switch from := len(b) + d.loss.begin; {
	case b == nil: // the power went in a sync
	case d.loss.begin >= 0:
		copy(d.medium[n*sector:], b[:d.loss.begin])
	default:
		copy(d.medium[n*sector:][from:len(b)], b[from:])
	}
}

func (d *disk) sync() error {
	if d.dead {
		return errPower
	}
	if d.ops++; d.ops == d.cut {
		d.lose(0, nil)
		return errPower
	}
	for k, b := range d.cache {
		copy(d.medium[k*sector:], b)
	}
	clear(d.cache)
	return nil
}

func (d *disk) readSector(n int64) ([]byte, error) {
	if d.dead {
		return nil, errPower
	}
	if b, ok := d.cache[n]; ok {
		return b, nil
	}
	return d.medium[n*sector:][:sector], nil
}

// A part is a partition of a disk.
type part struct {
	d          *disk
	start, len int64
	writable   bool
	fault      *fault
}

// A fault makes one call of a partition fail.
type fault struct {
	write, sync, read, drop error
	flip                    int64 // a bit that changes when it is written there; 0: none
}

func (p part) Size() (int64, error) { return p.len, nil }
func (p part) Close() error         { return nil }

func (p part) Drop() error {
	if p.fault != nil && p.fault.drop != nil {
		return p.fault.drop
	}
	return nil
}

func (p part) Sync() error {
	if p.fault != nil && p.fault.sync != nil {
		return p.fault.sync
	}
	return p.d.sync()
}

func (p part) ReadAt(b []byte, off int64) (int, error) {
	if p.fault != nil && p.fault.read != nil {
		return 0, p.fault.read
	}
	n := 0
	for n < len(b) {
		if off >= p.len {
			return n, io.EOF
		}
		s, err := p.d.readSector((p.start + off) / sector)
		if err != nil {
			return n, err
		}
		k := copy(b[n:], s[off%sector:])
		n, off = n+k, off+int64(k)
	}
	return n, nil
}

func (p part) WriteAt(b []byte, off int64) (int, error) {
	switch {
	case !p.writable:
		return 0, errors.New("the partition is open to read only")
	case off%sector != 0 || len(b)%sector != 0 || off+int64(len(b)) > p.len:
		return 0, errors.New("not whole sectors of the partition")
	case p.fault != nil && p.fault.write != nil:
		return 0, p.fault.write
	}
	for i := 0; i < len(b); i += sector {
		s := bytes.Clone(b[i:][:sector])
		if at := off + int64(i); p.fault != nil && p.fault.flip > 0 && at <= p.fault.flip && p.fault.flip < at+sector {
			s[p.fault.flip-at] ^= 1
		}
		if err := p.d.writeSector((p.start+off+int64(i))/sector, s); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

// A card is a machine whose disk is a disk.
type card struct {
	*disk
	current  int
	fault    *fault // of the idle slot
	restarts []string
}

// Sizes of the card's partitions, in bytes.
const (
	configSize = 16 << 10
	slotSize   = 40 << 10
)

// layout returns where a partition is; 0 is the whole disk.
func (c *card) layout(p int) part {
	switch p {
	case 0:
		return part{d: c.disk, len: int64(len(c.medium))}
	case 1:
		return part{d: c.disk, start: 1 << 10, len: configSize, writable: true}
	}
	return part{d: c.disk, start: 1<<10 + configSize + int64(p-PartA)*slotSize, len: slotSize}
}

func (c *card) open(p int, write bool) (device, error) {
	if write && (p == c.current || p < PartA) {
		return nil, os.ErrPermission // mounted, as the kernel would say
	}
	d := c.layout(p)
	d.writable = write
	if p != c.current && p != 0 {
		d.fault = c.fault
	}
	return d, nil
}

func (c *card) config(do func(files) error) error { return do(fatFiles{c.layout(1)}) }

func (c *card) readConfig(name string) ([]byte, error) { return fatFiles{c.layout(1)}.ReadFile(name) }

func (c *card) restart(arg string) error {
	if err := c.sync(); err != nil {
		return err
	}
	c.restarts = append(c.restarts, arg)
	return nil
}

// newCard returns a card with images in its slots and autoboot.txt for def.
func newCard(t testing.TB, a, b []byte, current, def int) *card {
	t.Helper()
	c := &card{disk: &disk{cache: map[int64][]byte{}, medium: make([]byte, 1<<10+configSize+2*slotSize)}, current: current}
	binary.LittleEndian.PutUint32(c.medium[440:], Signature)
	copy(c.medium[510:], "\x55\xaa")
	copy(c.medium[c.layout(1).start:], mkfat(t, configSize, map[string][]byte{"keyhaven.yaml": []byte("# fill me in\n"), autobootFile: autobootText(def)}))
	copy(c.medium[c.layout(PartA).start:], a)
	copy(c.medium[c.layout(PartB).start:], b)
	return c
}

// slots returns Slots over the card, as after a start.
func (c *card) slots() *Slots {
	return &Slots{root: "/nowhere", boot: boot{Disk: "/dev/card", Part: c.current}, m: c, log: quiet, chunk: 8 << 10, unsynced: 24 << 10}
}

// firmware plays the Pi's: it reads autoboot.txt from the medium as that would, without our parser, and returns the
// partition that it starts.
func (c *card) firmware(t testing.TB, tryboot bool) int {
	t.Helper()
	at := c.layout(1)
	b, err := readFAT(bytes.NewReader(c.medium[at.start:][:at.len]), autobootFile, sector)
	if err != nil {
		t.Fatalf("the firmware finds no autoboot.txt: %v", err)
	}
	got, applies := 0, true
	for line := range strings.Lines(string(b)) {
		switch line = strings.TrimSpace(line); {
		case strings.HasPrefix(line, "["):
			applies = line == "[all]" || line == "[tryboot]" && tryboot
		case applies && strings.HasPrefix(line, "boot_partition="):
			got = int(line[len("boot_partition=")] - '0')
		}
	}
	if got != PartA && got != PartB {
		t.Fatalf("the firmware finds no slot in autoboot.txt:\n%s", b)
	}
	return got
}

// slotBytes returns what is in a slot on the medium.
func (c *card) slotBytes(p int) []byte {
	at := c.layout(p)
	return c.medium[at.start:][:at.len]
}

// Where mkfat puts things: one reserved sector, two tables, a directory of 64 entries, clusters of one sector.
const (
	fatTables  = 2
	fatEntries = 64
)

type fatLayout struct{ perTable, table, root, data int64 }

func layoutOf(size int64) fatLayout {
	l := fatLayout{perTable: (size/sector*2 + sector - 1) / sector, table: sector}
	l.root = l.table + fatTables*l.perTable*sector
	l.data = l.root + fatEntries*32
	return l
}

// mkfat makes a small FAT16 file system. Real ones have more clusters; nothing here counts them.
func mkfat(t testing.TB, size int64, content map[string][]byte) []byte {
	t.Helper()
	l, b := layoutOf(size), make([]byte, size)
	copy(b, "\xeb\x3c\x90KEYHAVEN")
	binary.LittleEndian.PutUint16(b[11:], sector)
	b[13] = 1
	binary.LittleEndian.PutUint16(b[14:], 1)
	b[16] = fatTables
	binary.LittleEndian.PutUint16(b[17:], fatEntries)
	binary.LittleEndian.PutUint16(b[19:], uint16(size/sector))
	binary.LittleEndian.PutUint16(b[22:], uint16(l.perTable))
	copy(b[510:], "\x55\xaa")
	d := &disk{medium: b, cache: map[int64][]byte{}}
	f := fatFiles{part{d: d, len: size, writable: true}}
	for _, name := range slices.Sorted(maps.Keys(content)) {
		if err := f.Create(name, content[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.sync(); err != nil {
		t.Fatal(err)
	}
	return b
}

// fatFiles writes files in the top directory of a file system of mkfat, a sector at a time, in about the order in which the
// kernel's vfat does; a cut may change the order of all that is not synced.
type fatFiles struct{ p part }

func (f fatFiles) ReadFile(name string) ([]byte, error) {
	b, err := readFAT(f.p, name, 1<<20)
	if err != nil && !errors.Is(err, errPower) {
		return nil, os.ErrNotExist
	}
	return b, err
}

// edit changes bytes, by whole sectors.
func (f fatFiles) edit(off int64, b []byte) error {
	for len(b) > 0 {
		s := make([]byte, sector)
		if _, err := f.p.ReadAt(s, off/sector*sector); err != nil {
			return err
		}
		n := copy(s[off%sector:], b)
		if _, err := f.p.WriteAt(s, off/sector*sector); err != nil {
			return err
		}
		off, b = off+int64(n), b[n:]
	}
	return nil
}

// entry finds the entry of a name, which follows that of its long name.
func (f fatFiles) entry(name string) (off int64, e []byte) {
	l := layoutOf(f.p.len)
	dir := make([]byte, fatEntries*32)
	if _, err := f.p.ReadAt(dir, l.root); err != nil {
		return 0, nil
	}
	for i := 0; i+64 <= len(dir); i += 32 {
		if dir[i] != 0xe5 && dir[i+11] == 0x0f && longName(longPart(dir[i:][:32])) == name && dir[i+32] != 0xe5 {
			return l.root + int64(i) + 32, dir[i+32:][:32]
		}
	}
	return 0, nil
}

func (f fatFiles) Overwrite(name string, b []byte) error {
	off, e := f.entry(name)
	if e == nil {
		return os.ErrNotExist
	}
	if err := f.edit(layoutOf(f.p.len).data+(int64(binary.LittleEndian.Uint16(e[26:]))-2)*sector, b); err != nil {
		return err
	}
	e[22]++ // its time
	if err := f.edit(off, e); err != nil {
		return err
	}
	return f.p.Sync()
}

func (f fatFiles) setTable(c int64, v uint16) error {
	l := layoutOf(f.p.len)
	for i := range int64(fatTables) {
		if err := f.edit(l.table+i*l.perTable*sector+c*2, binary.LittleEndian.AppendUint16(nil, v)); err != nil {
			return err
		}
	}
	return nil
}

func (f fatFiles) Create(name string, b []byte) error {
	l := layoutOf(f.p.len)
	table := make([]byte, l.perTable*sector)
	if _, err := f.p.ReadAt(table, l.table); err != nil {
		return err
	}
	need := (int64(len(b)) + sector - 1) / sector
	first := int64(2)
	for n := int64(0); n < need; {
		if n++; binary.LittleEndian.Uint16(table[(first+n-1)*2:]) != 0 {
			first, n = first+n, 0
		}
	}
	if old, e := f.entry(name); e != nil {
		e[0] = 0xe5
		if err := f.edit(old, e); err != nil {
			return err
		}
	}
	for i := range need {
		next := uint16(first + i + 1)
		if i == need-1 {
			next = 0xffff
		}
		if err := f.setTable(first+i, next); err != nil {
			return err
		}
	}
	if err := f.addEntry(l, name, first, len(b)); err != nil {
		return err
	}
	if err := f.edit(l.data+(first-2)*sector, append(bytes.Clone(b), make([]byte, need*sector-int64(len(b)))...)); err != nil {
		return err
	}
	return f.p.Sync()
}

// addEntry adds an entry with its long name, of at most 13 characters.
func (f fatFiles) addEntry(l fatLayout, name string, first int64, size int) error {
	dir := make([]byte, fatEntries*32)
	if _, err := f.p.ReadAt(dir, l.root); err != nil {
		return err
	}
	i := 0
	for dir[i] != 0 {
		i += 32
	}
	e := make([]byte, 64)
	e[0], e[11] = 0x41, 0x0f
	u := append(utf16.Encode([]rune(name)), 0)
	at := []int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30}
	for k := range min(len(u), len(at)) {
		binary.LittleEndian.PutUint16(e[at[k]:], u[k])
	}
	copy(e[32:], "FILE"+string(rune('A'+i/64%26))+"~1 BIN")
	e[43] = 0x20
	binary.LittleEndian.PutUint16(e[58:], uint16(first))
	binary.LittleEndian.PutUint32(e[60:], uint32(size))
	return f.edit(l.root+int64(i), e)
}

func (f fatFiles) Replace(old, name string) error {
	from, e := f.entry(old)
	to, target := f.entry(name)
	if e == nil || target == nil {
		return os.ErrNotExist
	}
	freed := int64(binary.LittleEndian.Uint16(target[26:]))
	copy(target[26:], e[26:32]) // cluster and size
	gone := append([]byte{0xe5}, e[1:]...)
	if err := errors.Join(f.edit(to, target), f.edit(from-32, []byte{0xe5}), f.edit(from, gone), f.p.Sync()); err != nil {
		return err
	}
	return errors.Join(f.setTable(freed, 0), f.p.Sync())
}
