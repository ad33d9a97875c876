package qemu

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

// tidy removes what the tests of a run have in common.
var tidy = func() {}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		tidy()
		os.Exit(code)
	}))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newDisk has 16 blocks, of which the base's bytes are all 'b'.
func newDisk(t *testing.T) *Disk {
	t.Helper()
	d, err := NewDisk(bytes.NewReader(bytes.Repeat([]byte{'b'}, 16*blockSize)), 16*blockSize)
	must(t, err)
	return d
}

func contents(t *testing.T, d *Disk) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	_, err := d.ReadAt(b, 0)
	must(t, err)
	return b
}

// A disk holds what a slice of bytes would, wherever and however much is written and read.
func TestDiskIsAsASlice(t *testing.T) {
	d := newDisk(t)
	want := contents(t, d)
	chance := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		off := chance.Int64N(d.Size())
		b := make([]byte, chance.Int64N(min(3*blockSize, d.Size()-off)+1))
		for i := range b {
			b[i] = byte(chance.Uint32())
		}
		_, err := d.WriteAt(b, off)
		must(t, err)
		copy(want[off:], b)
		clear(b) // the disk has its own copy
		off = chance.Int64N(d.Size())
		got := make([]byte, chance.Int64N(d.Size()-off+1))
		_, err = d.ReadAt(got, off)
		must(t, err)
		if !bytes.Equal(got, want[off:off+int64(len(got))]) {
			t.Fatalf("%d bytes at %d are not what was written", len(got), off)
		}
	}
}

func TestDiskRefusesWhatLiesBeyondItsEnd(t *testing.T) {
	d := newDisk(t)
	for _, c := range []struct {
		off int64
		n   int
	}{{-1, 1}, {d.Size(), 1}, {d.Size() - 1, 2}, {1 << 62, 1}} {
		if _, err := d.WriteAt(make([]byte, c.n), c.off); err == nil {
			t.Errorf("write of %d at %d: no error", c.n, c.off)
		}
		if _, err := d.ReadAt(make([]byte, c.n), c.off); err == nil {
			t.Errorf("read of %d at %d: no error", c.n, c.off)
		}
	}
	if d.Sum() != [32]byte{} {
		t.Error("a refused write changed the sum")
	}
}

func TestSumTellsContentsNotWays(t *testing.T) {
	write := func(d *Disk, s string, off int64) {
		_, err := d.WriteAt([]byte(s), off)
		must(t, err)
	}
	a, b := newDisk(t), newDisk(t)
	write(a, "one", 5)
	write(a, "two", 3*blockSize-1)
	write(b, "two", 3*blockSize-1)
	write(b, "nothing", 5)
	if a.Sum() == b.Sum() {
		t.Error("different contents, equal sums")
	}
	write(b, "onebbbb", 5)
	if a.Sum() != b.Sum() {
		t.Error("equal contents, different sums")
	}
	write(b, "bbb", 5)
	write(b, "bbb", 3*blockSize-1)
	if b.Sum() != newDisk(t).Sum() {
		t.Error("the base's contents written back give another sum than the base")
	}
}

func TestCloneIsIndependent(t *testing.T) {
	d := newDisk(t)
	c := d.Clone()
	_, err := c.WriteAt([]byte("clone"), 0)
	must(t, err)
	if string(contents(t, d)[:5]) != "bbbbb" || string(contents(t, c)[:5]) != "clone" {
		t.Error("a write to the clone went to the original")
	}
}

func TestGrow(t *testing.T) {
	d := newDisk(t)
	must(t, d.Grow(20*blockSize))
	got := contents(t, d)
	if got[16*blockSize-1] != 'b' || !bytes.Equal(got[16*blockSize:], make([]byte, 4*blockSize)) {
		t.Error("a larger disk does not hold the base and then zeros")
	}
	if d.Grow(blockSize) == nil || d.Grow(20*blockSize+1) == nil {
		t.Error("a disk grew to a size that is smaller or no multiple of a block")
	}
}

// What a power cut leaves: three writes, a flush after the first.
func TestRecordAt(t *testing.T) {
	d := newDisk(t)
	_, err := d.WriteAt([]byte("before"), 0)
	must(t, err)
	r := d.Record()
	write := func(c byte, off int64, fua bool) {
		_, err := d.write(bytes.Repeat([]byte{c}, 2*blockSize), off, fua)
		must(t, err)
	}
	write('1', 1*blockSize, false)
	d.flush()
	write('2', 4*blockSize, true)
	write('3', 8*blockSize, false)
	for _, c := range []struct {
		n    int
		cut  Cut
		want string // first bytes of the blocks 0, 1, 4, 8
	}{
		{0, Kept, "bbbb"}, {1, Kept, "b1bb"}, {1, Lost, "bbbb"}, {2, Lost, "b1bb"}, {3, Lost, "b12b"}, {4, Lost, "b12b"}, {4, Kept, "b123"},
	} {
		disk, err := r.At(c.n, c.cut, 0)
		must(t, err)
		all := contents(t, disk)
		if got := string([]byte{all[0], all[blockSize], all[4*blockSize], all[8*blockSize]}); got != c.want {
			t.Errorf("after %d operations, %v: got %q, want %q", c.n, c.cut, got, c.want)
		}
	}
	if _, err := r.At(5, Kept, 0); err == nil {
		t.Error("a state after more operations than there were")
	}
	torn := map[[32]byte]bool{}
	for seed := range uint64(20) {
		disk, err := r.At(4, Torn, seed)
		must(t, err)
		again, err := r.At(4, Torn, seed)
		must(t, err)
		if disk.Sum() != again.Sum() {
			t.Fatal("one seed, two states")
		}
		all := contents(t, disk)
		if all[blockSize] != '1' || all[4*blockSize] != '2' {
			t.Error("a torn state lost what was flushed")
		}
		torn[disk.Sum()] = true
	}
	if len(torn) < 5 {
		t.Errorf("20 seeds tear in %d ways", len(torn))
	}
}

func TestPartitions(t *testing.T) {
	d := newDisk(t)
	if _, err := d.Partitions(); err == nil {
		t.Error("a disk without MBR has partitions")
	}
	mbr := make([]byte, 512)
	mbr[510], mbr[511] = 0x55, 0xaa
	copy(mbr[446:], []byte{0, 0, 0, 0, 0xe, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0})
	_, err := d.WriteAt(mbr, 0)
	must(t, err)
	p, err := d.Partition(1)
	must(t, err)
	if want := (Partition{Off: 4096, Size: 8192, Type: 0xe}); p != want {
		t.Errorf("got %+v, want %+v", p, want)
	}
	for _, n := range []int{0, 2, 5} {
		if _, err := d.Partition(n); err == nil {
			t.Errorf("partition %d is there", n)
		}
	}
	mbr[446+15] = 0x80 // a size of a terabyte
	_, err = d.WriteAt(mbr, 0)
	must(t, err)
	if _, err := d.Partition(1); err == nil {
		t.Error("a partition beyond the disk's end was taken")
	}
}

func TestExtractAndStore(t *testing.T) {
	d := newDisk(t)
	mbr := make([]byte, 512)
	mbr[510], mbr[511] = 0x55, 0xaa
	copy(mbr[446:], []byte{0, 0, 0, 0, 0xe, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0})
	_, err := d.WriteAt(mbr, 0)
	must(t, err)
	file := filepath.Join(t.TempDir(), "p1")
	fat, err := Extract(d, 1, file)
	must(t, err)
	b, err := os.ReadFile(file)
	must(t, err)
	if !bytes.Equal(b, bytes.Repeat([]byte{'b'}, 8192)) {
		t.Fatal("the copy is not the partition")
	}
	b[5000] = 'X'
	must(t, os.WriteFile(file, b, 0o600))
	r := d.Record()
	must(t, fat.Store(d, 1))
	if ops := r.Ops(); len(ops) != 1 || ops[0].Off != 8192 || contents(t, d)[4096+5000] != 'X' {
		t.Errorf("%d writes for one changed block", len(ops))
	}
}
