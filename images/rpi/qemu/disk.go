package qemu

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"os"
	"sync"
)

// blockSize is the unit in which a disk keeps what was written to it.
const blockSize = 4096

// A Disk is a card: a base that is never changed, and what was written since, in memory. Its methods are safe for
// concurrent use; disks that were cloned from each other are independent.
type Disk struct {
	base io.ReaderAt
	size int64

	mu     sync.Mutex       // guards the fields below
	blocks map[int64][]byte // by number; never changed in place
	sum    [sha256.Size]byte
	record *Record // nil: not recorded
}

// NewDisk makes a disk of what base holds. size must be a multiple of 4096.
func NewDisk(base io.ReaderAt, size int64) (*Disk, error) {
	if size <= 0 || size%blockSize != 0 {
		return nil, fmt.Errorf("qemu: a disk of %d bytes; it must be a positive multiple of %d", size, blockSize)
	}
	return &Disk{base: base, size: size, blocks: map[int64][]byte{}}, nil
}

// OpenDisk makes a disk of the image in a file, which stays as it is. close closes the file; no clone may be used after it.
func OpenDisk(file string) (d *Disk, close func() error, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err == nil {
		d, err = NewDisk(f, st.Size())
	}
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("%s: %w", file, err)
	}
	return d, f.Close, nil
}

// Size is the disk's size in bytes.
func (d *Disk) Size() int64 { return d.size }

// Clone returns a disk with the same contents, which is not recorded.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &Disk{base: d.base, size: d.size, blocks: maps.Clone(d.blocks), sum: d.sum}
}

// Sum tells disks with the same base apart: two with equal contents have equal sums, whatever was written in between.
func (d *Disk) Sum() [sha256.Size]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sum
}

// Grow makes the disk larger, as if the image had been written to a larger card. The new part holds zeros.
func (d *Disk) Grow(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if size < d.size || size%blockSize != 0 {
		return fmt.Errorf("qemu: a disk of %d bytes cannot grow to %d", d.size, size)
	}
	d.base = padded{d.base, d.size}
	d.size = size
	return nil
}

// padded is a base with zeros behind its end.
type padded struct {
	base io.ReaderAt
	size int64
}

func (p padded) ReadAt(b []byte, off int64) (int, error) {
	n := 0
	if off < p.size {
		var err error
		if n, err = p.base.ReadAt(b[:min(int64(len(b)), p.size-off)], off); err != nil && err != io.EOF {
			return n, err
		}
	}
	clear(b[n:])
	return len(b), nil
}

func (d *Disk) check(off int64, n int) error {
	if off < 0 || off > d.size || int64(n) > d.size-off {
		return fmt.Errorf("qemu: %d bytes at %d are not all on the disk of %d", n, off, d.size)
	}
	return nil
}

// ReadAt reads what lies at off. It fails if that reaches beyond the disk.
func (d *Disk) ReadAt(b []byte, off int64) (int, error) {
	if err := d.check(off, len(b)); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for n := 0; n < len(b); {
		no, in := (off+int64(n))/blockSize, int((off+int64(n))%blockSize)
		if blk, ok := d.blocks[no]; ok {
			n += copy(b[n:], blk[in:])
			continue
		}
		end := n + min(blockSize-in, len(b)-n)
		for next := no + 1; end < len(b); next++ { // as far as nothing was written
			if _, ok := d.blocks[next]; ok {
				break
			}
			end = min(end+blockSize, len(b))
		}
		if _, err := d.base.ReadAt(b[n:end], off+int64(n)); err != nil && err != io.EOF {
			return n, err
		}
		n = end
	}
	return len(b), nil
}

// WriteAt writes b at off. It fails, and writes nothing, if that reaches beyond the disk.
func (d *Disk) WriteAt(b []byte, off int64) (int, error) { return d.write(b, off, false) }

// write is WriteAt; with fua it returns when what was written would survive a power cut.
func (d *Disk) write(b []byte, off int64, fua bool) (int, error) {
	if err := d.check(off, len(b)); err != nil {
		return 0, err
	}
	own := append([]byte(nil), b...)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.record != nil {
		d.record.add(Op{Off: off, Data: own, FUA: fua})
	}
	return len(b), d.putLocked(own, off)
}

// put stores b, which nobody changes any more, without a record.
func (d *Disk) put(b []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.putLocked(b, off)
}

// putLocked stores b, which nobody changes any more.
func (d *Disk) putLocked(b []byte, off int64) error {
	for n := 0; n < len(b); {
		no, in := (off+int64(n))/blockSize, int((off+int64(n))%blockSize)
		part := b[n:min(len(b), n+blockSize-in)]
		old, ok := d.blocks[no]
		if !ok {
			old = make([]byte, blockSize)
			if _, err := d.base.ReadAt(old, no*blockSize); err != nil && err != io.EOF {
				return err
			}
		}
		blk := part
		if len(part) < blockSize {
			blk = append([]byte(nil), old...)
			copy(blk[in:], part)
		}
		d.mixLocked(no, old)
		d.mixLocked(no, blk)
		d.blocks[no] = blk
		n += len(part)
	}
	return nil
}

// mixLocked takes a block's contents into the sum, or out of it. The sum is what all blocks ever touched differ in from
// the base, so that writing the old contents back gives the old sum.
func (d *Disk) mixLocked(no int64, blk []byte) {
	h := sha256.New()
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(no)))
	h.Write(blk)
	for i, b := range h.Sum(nil) {
		d.sum[i] ^= b
	}
}

// flush notes that all that was written before survives a power cut.
func (d *Disk) flush() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.record != nil {
		d.record.add(Op{Flush: true})
	}
}

// A Partition is an entry of the disk's MBR.
type Partition struct {
	Off, Size int64 // in bytes
	Type      byte
}

// Partitions reads the four entries of the MBR. Unused ones have size 0.
func (d *Disk) Partitions() (p [4]Partition, err error) {
	var mbr [512]byte
	if _, err := d.ReadAt(mbr[:], 0); err != nil {
		return p, err
	}
	if mbr[510] != 0x55 || mbr[511] != 0xaa {
		return p, fmt.Errorf("qemu: the disk has no MBR")
	}
	for i := range p {
		e := mbr[446+16*i:]
		p[i] = Partition{Type: e[4], Off: 512 * int64(binary.LittleEndian.Uint32(e[8:])), Size: 512 * int64(binary.LittleEndian.Uint32(e[12:]))}
		if p[i].Size > 0 && d.check(p[i].Off, 0) != nil || p[i].Off+p[i].Size > d.size {
			return p, fmt.Errorf("qemu: partition %d reaches beyond the disk", i+1)
		}
	}
	return p, nil
}

// Partition is the n-th partition, from 1. It is an error if it is not there.
func (d *Disk) Partition(n int) (Partition, error) {
	all, err := d.Partitions()
	if err != nil {
		return Partition{}, err
	}
	if n < 1 || n > 4 || all[n-1].Size == 0 {
		return Partition{}, fmt.Errorf("qemu: the disk has no partition %d", n)
	}
	return all[n-1], nil
}
