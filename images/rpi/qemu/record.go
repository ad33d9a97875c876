package qemu

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// An Op is something that a guest told its disk to do.
type Op struct {
	Off   int64
	Data  []byte // what was written at Off
	FUA   bool   // this write alone is to survive a power cut once it is done
	Flush bool   // nothing is written; all before is to survive a power cut
	At    time.Time
}

// A Record is what was done to a disk since it was begun, in order. Its methods are safe for concurrent use.
type Record struct {
	before *Disk
	mu     sync.Mutex // guards the fields below
	ops    []Op
	safe   *Disk // as the first safeN operations left it; nil: before
	safeN  int
}

// Record begins a record, in the place of an earlier one.
func (d *Disk) Record() *Record {
	r := &Record{before: d.Clone()}
	d.mu.Lock()
	d.record = r
	d.mu.Unlock()
	return r
}

func (r *Record) add(op Op) {
	op.At = time.Now()
	r.mu.Lock()
	r.ops = append(r.ops, op)
	r.mu.Unlock()
}

// Ops returns what was done so far.
func (r *Record) Ops() []Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ops[:len(r.ops):len(r.ops)]
}

// A Cut says what a power cut after some operation leaves of those that were not yet flushed.
type Cut int

const (
	// Kept leaves all of them: the card was as fast as the host.
	Kept Cut = iota
	// Lost leaves none of them: the card's cache lost everything.
	Lost
	// Torn leaves some, by chance, and of one only some sectors: the card wrote in an order of its own.
	Torn
)

func (c Cut) String() string { return [...]string{"kept", "lost", "torn"}[c] }

// At returns the disk as a power cut after the first n operations leaves it. Equal seeds tear alike.
func (r *Record) At(n int, cut Cut, seed uint64) (*Disk, error) {
	ops := r.Ops()
	if n < 0 || n > len(ops) {
		return nil, fmt.Errorf("qemu: the record has %d operations, not %d", len(ops), n)
	}
	flushed := 0 // operations before this one survive
	for i, op := range ops[:n] {
		if op.Flush {
			flushed = i + 1
		}
	}
	d, err := r.through(flushed)
	if err != nil {
		return nil, err
	}
	chance := rand.New(rand.NewPCG(seed, uint64(n)))
	for i, op := range ops[flushed:n] {
		b := op.Data
		if !op.FUA {
			switch {
			case cut == Lost:
				continue
			case cut == Torn && flushed+i == n-1:
				b = b[:512*chance.IntN(len(b)/512+1)]
			case cut == Torn && chance.IntN(2) == 0:
				continue
			}
		}
		if err := d.put(b, op.Off); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// through returns the disk after the first n operations. It goes on from the last such call if it can, so that rising
// numbers cost little.
func (r *Record) through(n int) (*Disk, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.safe == nil || r.safeN > n {
		r.safe, r.safeN = r.before.Clone(), 0
	}
	for ; r.safeN < n; r.safeN++ {
		if err := r.safe.put(r.ops[r.safeN].Data, r.ops[r.safeN].Off); err != nil {
			return nil, err
		}
	}
	return r.safe.Clone(), nil
}
