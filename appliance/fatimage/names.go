package fatimage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf16"
)

// longAt are the places of a long name's letters in its record.
var longAt = [13]int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30}

func copyLong(to []uint16, r []byte) {
	for i, at := range longAt {
		to[i] = binary.LittleEndian.Uint16(r[at:])
	}
}

func longName(units []uint16) string {
	for i, u := range units {
		if u == 0 {
			units = units[:i]
			break
		}
	}
	return string(utf16.Decode(units))
}

// shortName is a short name as systems show it: the bits of byte 12 stand for small letters.
func shortName(r []byte) string {
	base, ext := strings.TrimRight(string(r[:8]), " "), strings.TrimRight(string(r[8:11]), " ")
	if r[12]&0x08 != 0 {
		base = strings.ToLower(base)
	}
	if r[12]&0x10 != 0 {
		ext = strings.ToLower(ext)
	}
	if ext == "" {
		return base
	}
	return base + "." + ext
}

// checksum is that of a short name, by which its long one is known to be its.
func checksum(short []byte) (sum byte) {
	for _, c := range short[:11] {
		sum = sum>>1 | sum<<7
		sum += c
	}
	return sum
}

// place adds the records of a file to a directory.
func place(dir []byte, name string, cluster uint16, size uint32, when time.Time) error {
	units := utf16.Encode([]rune(name))
	if len(units) == 0 || len(units) > 255 || strings.TrimRight(name, ". ") != name || strings.ContainsAny(name, `\/:*?"<>|`) || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' }) {
		return fmt.Errorf("%q is no name for a file", name)
	}
	short, err := alias(dir, name)
	if err != nil {
		return err
	}
	n := (len(units) + 12) / 13
	at, err := room(dir, n+1)
	if err != nil {
		return err
	}
	sum := checksum(short)
	for i := n; i > 0; i-- {
		longRecord(dir[at:at+entrySize], units, i, i == n, sum)
		at += entrySize
	}
	r := dir[at : at+entrySize]
	clear(r)
	copy(r, short)
	r[11] = attrArchive
	date, clock := stamp(when)
	for _, f := range []struct {
		at int
		v  uint16
	}{{14, clock}, {16, date}, {18, date}, {22, clock}, {24, date}, {26, cluster}} {
		binary.LittleEndian.PutUint16(r[f.at:], f.v)
	}
	binary.LittleEndian.PutUint32(r[28:], size)
	return nil
}

// longRecord is the i-th part of a long name, from 1.
func longRecord(r []byte, units []uint16, i int, last bool, sum byte) {
	clear(r)
	r[0], r[11], r[13] = byte(i), attrLong, sum
	if last {
		r[0] |= 0x40
	}
	for j, at := range longAt {
		u := uint16(0xffff)
		switch k := 13*(i-1) + j; {
		case k < len(units):
			u = units[k]
		case k == len(units):
			u = 0
		}
		binary.LittleEndian.PutUint16(r[at:], u)
	}
}

// room returns where n free records lie side by side. The record that ends the directory stays one.
func room(dir []byte, n int) (int, error) {
	run := 0
	for i := 0; i+entrySize <= len(dir); i += entrySize {
		if dir[i] == 0 {
			start := i - run*entrySize
			end := start + n*entrySize
			if end > len(dir) {
				break
			}
			if end < len(dir) && end > i {
				dir[end] = 0
			}
			return start, nil
		}
		if run++; dir[i] != 0xe5 {
			run = 0
		}
		if run == n {
			return i - (n-1)*entrySize, nil
		}
	}
	return 0, errors.New("the top directory of the configuration partition is full; delete files that do not belong there")
}

// alias makes a short name that no file has.
func alias(dir []byte, name string) ([]byte, error) {
	base, ext := name, ""
	if i := strings.LastIndexByte(name, '.'); i > 0 {
		base, ext = name[:i], name[i+1:]
	}
	keep := func(s string, n int) string {
		s = strings.Map(func(r rune) rune {
			switch {
			case r >= 'a' && r <= 'z':
				return r - 'a' + 'A'
			case r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune("_-$!#%&@", r):
				return r
			case r == ' ' || r == '.':
				return -1
			}
			return '_'
		}, s)
		return s[:min(len(s), n)]
	}
	base, ext = keep(base, 8), keep(ext, 3)
	taken := map[string]bool{}
	for i := 0; i+entrySize <= len(dir) && dir[i] != 0; i += entrySize {
		if dir[i] != 0xe5 && dir[i+11]&0x3f != attrLong {
			taken[string(dir[i:i+11])] = true
		}
	}
	for n := 1; n < 10_000; n++ {
		tail := fmt.Sprintf("~%d", n)
		short := fmt.Sprintf("%-8s%-3s", base[:min(len(base), 8-len(tail))]+tail, ext)
		if !taken[short] {
			return []byte(short), nil
		}
	}
	return nil, errors.New("the configuration partition has too many files of that name")
}

// stamp is a time as FAT has it. What it cannot say is its first day.
func stamp(t time.Time) (date, clock uint16) {
	t = t.UTC()
	if t.Year() < 1980 || t.Year() > 2107 {
		return 1<<5 | 1, 0
	}
	return uint16(t.Year()-1980)<<9 | uint16(t.Month())<<5 | uint16(t.Day()), uint16(t.Hour())<<11 | uint16(t.Minute())<<5 | uint16(t.Second()/2)
}
