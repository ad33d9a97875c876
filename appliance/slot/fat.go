package slot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf16"
)

// A fat16 is as much of a FAT16 file system as finding a file in its top directory needs. What it reads may be the rest of
// a write that was cut off, so nothing of it is believed.
type fat16 struct {
	r                       io.ReaderAt
	sectorSize, clusterSize int64
	table, root, data       int64 // where they begin, in bytes
	entries, clusters       int64
}

var errFAT = errors.New("no FAT16 file system")

func openFAT(r io.ReaderAt) (*fat16, error) {
	var b [sector]byte
	if _, err := r.ReadAt(b[:], 0); err != nil {
		return nil, fmt.Errorf("%w: %w", errFAT, err)
	}
	u16 := func(off int) int64 { return int64(binary.LittleEndian.Uint16(b[off:])) }
	size, perCluster, reserved, tables := u16(11), int64(b[13]), u16(14), int64(b[16])
	entries, total, perTable := u16(17), u16(19), u16(22)
	if total == 0 {
		total = int64(binary.LittleEndian.Uint32(b[32:]))
	}
	if b[510] != 0x55 || b[511] != 0xaa || size != 512 && size != 1024 && size != 2048 && size != 4096 || perCluster == 0 ||
		perCluster&(perCluster-1) != 0 || reserved == 0 || tables == 0 || tables > 2 || entries == 0 || perTable == 0 {
		return nil, errFAT
	}
	f := &fat16{r: r, sectorSize: size, clusterSize: size * perCluster, table: reserved * size, entries: entries}
	f.root = f.table + tables*perTable*size
	f.data = f.root + (entries*32+size-1)/size*size
	f.clusters = (total*size - f.data) / f.clusterSize
	if f.clusters < 1 || f.clusters > 65524 || (f.clusters+2)*2 > perTable*size {
		return nil, errFAT
	}
	return f, nil
}

// readFAT reads a file of at most most bytes out of the top directory of a FAT16 file system.
func readFAT(r io.ReaderAt, name string, most int64) ([]byte, error) {
	f, err := openFAT(r)
	if err != nil {
		return nil, err
	}
	first, size, err := f.find(name)
	if err != nil {
		return nil, err
	}
	if size > most {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", name, size, most)
	}
	out := make([]byte, 0, size)
	for c := first; int64(len(out)) < size; {
		if c < 2 || c >= f.clusters+2 {
			return nil, fmt.Errorf("%s: its chain of clusters is broken", name)
		}
		b := make([]byte, min(f.clusterSize, size-int64(len(out))))
		if _, err := r.ReadAt(b, f.data+(c-2)*f.clusterSize); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		out = append(out, b...)
		var next [2]byte
		if _, err := r.ReadAt(next[:], f.table+c*2); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		c = int64(binary.LittleEndian.Uint16(next[:]))
	}
	return out, nil
}

// find looks for a file by its long or short name, without regard to case.
func (f *fat16) find(name string) (first, size int64, err error) {
	dir := make([]byte, f.entries*32)
	if _, err := f.r.ReadAt(dir, f.root); err != nil {
		return 0, 0, fmt.Errorf("read the directory: %w", err)
	}
	var long []uint16
	for ; len(dir) >= 32 && dir[0] != 0; dir = dir[32:] {
		e := dir[:32]
		switch attr := e[11]; {
		case e[0] == 0xe5:
			long = nil
		case attr&0x3f == 0x0f: // part of a long name; the last part comes first
			long = append(longPart(e), long...)
		default:
			if attr&0x18 == 0 && (strings.EqualFold(longName(long), name) || strings.EqualFold(shortName(e), name)) {
				return int64(binary.LittleEndian.Uint16(e[26:])), int64(binary.LittleEndian.Uint32(e[28:])), nil
			}
			long = nil
		}
	}
	return 0, 0, fmt.Errorf("there is no %s", name)
}

func longPart(e []byte) []uint16 {
	var u []uint16
	for _, r := range [][2]int{{1, 11}, {14, 26}, {28, 32}} {
		for i := r[0]; i < r[1]; i += 2 {
			u = append(u, binary.LittleEndian.Uint16(e[i:]))
		}
	}
	return u
}

func longName(u []uint16) string {
	for i, c := range u {
		if c == 0 {
			u = u[:i]
			break
		}
	}
	return string(utf16.Decode(u))
}

func shortName(e []byte) string {
	base, ext := strings.TrimRight(string(e[:8]), " "), strings.TrimRight(string(e[8:11]), " ")
	if ext == "" {
		return base
	}
	return base + "." + ext
}
