// Package fatimage puts files into the configuration partition of a Keyhaven image, or of a card: a FAT16 file system, of which
// it knows the top directory. It needs no privilege and no help of the operating system.
package fatimage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"
)

// A Device is an image or a card.
type Device interface {
	io.ReaderAt
	io.WriterAt
}

// ErrNoFAT says that there is no FAT16 file system where one should be.
var ErrNoFAT = errors.New("no FAT16 file system")

// MaxFile bounds a file that is read or written, in bytes.
const MaxFile = 1 << 20

const (
	sector    = 512
	entrySize = 32
	endMark   = 0xfff8 // and above: the end of a chain
)

// A Volume is a FAT16 file system. It is for one caller at a time.
type Volume struct {
	dev     Device
	start   int64 // of the file system on the device, as are all that follow
	cluster int64 // bytes of a cluster
	fats    []int64
	fatSize int64
	root    int64
	rootLen int
	data    int64  // of cluster 2
	count   uint16 // of clusters
	label   string
}

// Open reads the head of the file system that begins at start. Everything in it that later reads and writes rely on is checked.
func Open(dev Device, start int64) (*Volume, error) {
	b := make([]byte, sector)
	if _, err := dev.ReadAt(b, start); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoFAT, err)
	}
	u16 := func(i int) int64 { return int64(binary.LittleEndian.Uint16(b[i:])) }
	total := u16(19)
	if total == 0 {
		total = int64(binary.LittleEndian.Uint32(b[32:]))
	}
	perCluster, reserved, fats, entries, fatSectors := int64(b[13]), u16(14), int64(b[16]), u16(17), u16(22)
	rootStart := reserved + fats*fatSectors
	dataStart := rootStart + (entries*entrySize+sector-1)/sector
	switch {
	case b[510] != 0x55 || b[511] != 0xaa || u16(11) != sector:
		return nil, ErrNoFAT
	case perCluster == 0 || perCluster&(perCluster-1) != 0 || reserved == 0 || fats < 1 || fats > 2 || entries == 0 || fatSectors == 0 || fatSectors > 256 || total <= dataStart:
		return nil, fmt.Errorf("%w: its head makes no sense", ErrNoFAT)
	}
	clusters := (total - dataStart) / perCluster
	if clusters < 4085 || clusters >= 65525 || (clusters+2)*2 > fatSectors*sector {
		return nil, fmt.Errorf("%w: it has %d clusters", ErrNoFAT, clusters)
	}
	v := &Volume{dev: dev, start: start, cluster: perCluster * sector, fatSize: fatSectors * sector, root: start + rootStart*sector,
		rootLen: int(entries * entrySize), data: start + dataStart*sector, count: uint16(clusters), label: strings.TrimRight(string(b[43:54]), " ")}
	for i := range fats {
		v.fats = append(v.fats, start+(reserved+i*fatSectors)*sector)
	}
	return v, nil
}

// Label is the volume's label in its head.
func (v *Volume) Label() string { return v.label }

// A table is the file allocation table: for each cluster the next one.
type table []byte

func (t table) get(c uint16) uint16    { return binary.LittleEndian.Uint16(t[2*int(c):]) }
func (t table) set(c uint16, n uint16) { binary.LittleEndian.PutUint16(t[2*int(c):], n) }

func (v *Volume) readTable() (table, error) {
	t := make(table, v.fatSize)
	_, err := v.dev.ReadAt(t, v.fats[0])
	return t, err
}

// writeTable writes what differs from old.
func (v *Volume) writeTable(t, old table) error {
	for at := 0; at < len(t); at += sector {
		if slices.Equal(t[at:at+sector], old[at:at+sector]) {
			continue
		}
		for _, start := range v.fats {
			if _, err := v.dev.WriteAt(t[at:at+sector], start+int64(at)); err != nil {
				return err
			}
		}
	}
	return nil
}

// chain returns the clusters from first on. A chain that leaves the volume or runs in a circle is an error.
func (v *Volume) chain(t table, first uint16) (list []uint16, err error) {
	for c := first; c < endMark; c = t.get(c) {
		if c < 2 || int(c) >= int(v.count)+2 || len(list) > int(v.count) {
			return nil, errors.New("the file system is damaged: a file's chain of clusters leads nowhere; write the image anew")
		}
		list = append(list, c)
	}
	return list, nil
}

func (v *Volume) at(c uint16) int64 { return v.data + int64(c-2)*v.cluster }

// An entry is a file of the top directory.
type entry struct {
	name        string // long, or as the short one is shown
	first, last int    // of its records, in the directory; last is the short one
	cluster     uint16
	size        uint32
	attr        byte
}

const (
	attrVolume  = 0x08
	attrDir     = 0x10
	attrArchive = 0x20
	attrLong    = 0x0f
)

func (v *Volume) readRoot() ([]byte, error) {
	dir := make([]byte, v.rootLen)
	_, err := v.dev.ReadAt(dir, v.root)
	return dir, err
}

// entries lists the directory's files and directories.
func entries(dir []byte) (list []entry) {
	long, first := []uint16(nil), -1
	want, sum := 0, byte(0) // of the long name: how many records are missing, and the checksum of the short one
	for i := 0; i+entrySize <= len(dir); i += entrySize {
		r := dir[i : i+entrySize]
		switch {
		case r[0] == 0:
			return list
		case r[0] == 0xe5:
			want, first = 0, -1
		case r[11]&0x3f == attrLong:
			n := int(r[0] & 0x1f)
			if r[0]&0x40 != 0 && n > 0 {
				want, sum, first, long = n, r[13], i, make([]uint16, 13*n)
			}
			if first < 0 || n != want || n == 0 || r[13] != sum {
				want, first = 0, -1
				continue
			}
			want--
			copyLong(long[13*want:], r)
		case r[11]&attrVolume != 0:
			want, first = 0, -1
		default:
			e := entry{name: shortName(r), first: i, last: i, cluster: binary.LittleEndian.Uint16(r[26:]), size: binary.LittleEndian.Uint32(r[28:]), attr: r[11]}
			if first >= 0 && want == 0 && sum == checksum(r) {
				e.name, e.first = longName(long), first
			}
			list = append(list, e)
			want, first = 0, -1
		}
	}
	return list
}

// find returns a file by its name, in capital or small letters.
func find(dir []byte, name string) (entry, bool) {
	for _, e := range entries(dir) {
		if strings.EqualFold(e.name, name) {
			return e, true
		}
	}
	return entry{}, false
}

// Names lists the files of the top directory.
func (v *Volume) Names() ([]string, error) {
	dir, err := v.readRoot()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries(dir) {
		if e.attr&attrDir == 0 {
			names = append(names, e.name)
		}
	}
	return names, nil
}

// ReadFile returns a file's content. The error is fs.ErrNotExist if there is none.
func (v *Volume) ReadFile(name string) ([]byte, error) {
	dir, err := v.readRoot()
	if err != nil {
		return nil, err
	}
	e, ok := find(dir, name)
	switch {
	case !ok:
		return nil, &fs.PathError{Op: "read", Path: name, Err: fs.ErrNotExist}
	case e.attr&attrDir != 0:
		return nil, fmt.Errorf("%s is a directory", name)
	case e.size > MaxFile:
		return nil, fmt.Errorf("%s is larger than %d bytes", name, MaxFile)
	case e.size == 0:
		return nil, nil
	}
	t, err := v.readTable()
	if err != nil {
		return nil, err
	}
	list, err := v.chain(t, e.cluster)
	if err != nil {
		return nil, err
	}
	need := (int64(e.size) + v.cluster - 1) / v.cluster
	if int64(len(list)) < need {
		return nil, fmt.Errorf("the file system is damaged: %s is shorter than it says", name)
	}
	list = list[:need]
	b := make([]byte, int64(len(list))*v.cluster)
	for i, c := range list {
		if _, err := v.dev.ReadAt(b[int64(i)*v.cluster:][:v.cluster], v.at(c)); err != nil {
			return nil, err
		}
	}
	return b[:e.size], nil
}

// WriteFile makes b the content of the file name, in place of what is there. The new content is on the device before the
// directory names it, and the old one is let go after that.
func (v *Volume) WriteFile(name string, b []byte, when time.Time) error {
	if len(b) > MaxFile {
		return fmt.Errorf("%s is larger than %d bytes", name, MaxFile)
	}
	dir, err := v.readRoot()
	if err != nil {
		return err
	}
	t, err := v.readTable()
	if err != nil {
		return err
	}
	old, had := find(dir, name)
	var gone []uint16
	if had {
		if old.attr&attrDir != 0 {
			return fmt.Errorf("%s is a directory", name)
		}
		if old.cluster != 0 {
			if gone, err = v.chain(t, old.cluster); err != nil {
				return err
			}
		}
		for i := old.first; i <= old.last; i += entrySize {
			dir[i] = 0xe5
		}
	}
	before := slices.Clone(t)
	list, err := v.fill(t, b)
	if err != nil {
		return err
	}
	first := uint16(0)
	if len(list) > 0 {
		first = list[0]
	}
	if err := place(dir, name, first, uint32(len(b)), when); err != nil {
		return err
	}
	if err := v.writeTable(t, before); err != nil {
		return err
	}
	if _, err := v.dev.WriteAt(dir, v.root); err != nil {
		return err
	}
	before = slices.Clone(t)
	for _, c := range gone {
		t.set(c, 0)
		if _, err := v.dev.WriteAt(make([]byte, v.cluster), v.at(c)); err != nil { // it may have held a token
			return err
		}
	}
	return v.writeTable(t, before)
}

// fill writes b to free clusters, and chains them in t.
func (v *Volume) fill(t table, b []byte) (list []uint16, err error) {
	need := int((int64(len(b)) + v.cluster - 1) / v.cluster)
	for c := 2; c < int(v.count)+2 && len(list) < need; c++ {
		if t.get(uint16(c)) == 0 {
			list = append(list, uint16(c))
		}
	}
	if len(list) < need {
		return nil, errors.New("the configuration partition is full; delete what does not belong there")
	}
	for i, c := range list {
		part := make([]byte, v.cluster)
		copy(part, b[int64(i)*v.cluster:])
		if _, err := v.dev.WriteAt(part, v.at(c)); err != nil {
			return nil, err
		}
		next := uint16(0xffff)
		if i+1 < len(list) {
			next = list[i+1]
		}
		t.set(c, next)
	}
	return list, nil
}
