package qemu

import (
	"fmt"
	"math/rand/v2"
	"sync"
)

// An Op is something that a guest told its disk to do.
type Op struct {
	Off   int64
	Data  []byte // what was written at Off
	FUA   bool   // this write alone is to survive a power cut once it is done
	Flush bool   // nothing is written; all before is to survive a power cut
}

// A Record is what was done to a disk since it was begun, in order. Its methods are safe for concurrent use.
type Record struct {
	before *Disk
	mu     sync.Mutex
	ops    []Op
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
	d := r.before.Clone()
	chance := rand.New(rand.NewPCG(seed, uint64(n)))
	for i, op := range ops[:n] {
		b := op.Data
		if i >= flushed && !op.FUA {
			switch {
			case cut == Lost:
				continue
			case cut == Torn && i == n-1:
				b = b[:512*chance.IntN(len(b)/512+1)]
			case cut == Torn && chance.IntN(2) == 0:
				continue
			}
		}
		d.mu.Lock()
		err := d.putLocked(b, op.Off)
		d.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
	return d, nil
}
