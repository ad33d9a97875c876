// Package state is the control plane's store: a small ordered map with revisions, transactions that compare and swap, and
// watches. One engine is embedded, a bbolt file for one host; package etcd has the one that several edges share. Package
// statetest holds the suite that every engine passes.
package state

import (
	"context"
	"errors"
	"fmt"
	"unicode/utf8"
)

// Limits that every engine enforces.
const (
	MaxKeyLen   = 1024    // bytes in a key
	MaxValueLen = 1 << 20 // bytes in a value
	MaxTxnOps   = 120     // operations in a transaction, and likewise conditions; etcd takes 128, of which its engine needs one
)

var (
	// ErrNotFound says that there is no entry with this key.
	ErrNotFound = errors.New("state: not found")
	// ErrConflict says that a condition of a transaction did not hold, so that nothing was changed. Read again and retry.
	ErrConflict = errors.New("state: conflict")
	// ErrCompacted says that the changes after a revision are no longer, or never were, in the store's memory. List again
	// and watch from the revision that List returns.
	ErrCompacted = errors.New("state: history is compacted")
	// ErrInvalid says that a key, a value or a transaction breaks the rules; nothing was changed.
	ErrInvalid = errors.New("state: invalid")
	// ErrClosed says that the store is closed.
	ErrClosed = errors.New("state: store is closed")
	// ErrInUse says that another process has the store open.
	ErrInUse = errors.New("state: in use by another process")
	// ErrUnavailable says that the store cannot be reached now. Nothing is wrong with the request; try again later.
	ErrUnavailable = errors.New("state: the store is unavailable")
)

// Revision orders the transactions that changed the store. It rises with each, by one or, where an engine is shared with
// others, by more, and never falls, not even over a restart. No entry has revision zero.
type Revision uint64

// Entry is a key with its value.
type Entry struct {
	Key   string
	Value []byte
	// Revision is that of the transaction that last wrote the key.
	Revision Revision
}

// Cond is a condition of a transaction: the entry's revision is still the given one. Revision zero: there is no entry.
type Cond struct {
	Key      string
	Revision Revision
}

// Unchanged returns the condition that e has not changed since it was read.
func (e Entry) Unchanged() Cond { return Cond{Key: e.Key, Revision: e.Revision} }

// Absent returns the condition that there is no entry with this key.
func Absent(key string) Cond { return Cond{Key: key} }

// Op is a change that a transaction makes. Make it with Put or Delete.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Put returns the operation that writes a value, which the store copies.
func Put(key string, value []byte) Op { return Op{Key: key, Value: value} }

// Delete returns the operation that removes an entry. If there is none it changes nothing.
func Delete(key string) Op { return Op{Key: key, Delete: true} }

// Event is a change seen by a watch.
type Event struct {
	// Entry is the new entry. After a deletion it has the key, no value, and the revision of the deletion.
	Entry
	Deleted bool
	// Err, if not nil, is why the watch ends: this is its last event and carries nothing else. ErrCompacted: the watcher
	// was too slow and has missed changes. ErrUnavailable: the store cannot be followed for now.
	Err error
}

// Store is an ordered map from keys to values. Keys are 1 to MaxKeyLen bytes of UTF-8 without control characters, ordered
// by their bytes; values have at most MaxValueLen bytes. All methods are safe for concurrent use, end early with the
// context's error, return ErrClosed after Close, and ErrUnavailable, within seconds, while a distant store does not answer.
// What a reader sees is committed and durable.
type Store interface {
	// Get returns one entry or ErrNotFound. The value belongs to the caller.
	Get(ctx context.Context, key string) (Entry, error)

	// List returns the entries whose keys start with prefix, ordered by key, and the revision of the store at which they
	// were read, all at one moment. The values belong to the caller. The empty prefix is the whole store.
	List(ctx context.Context, prefix string) ([]Entry, Revision, error)

	// Txn makes all changes if all conditions hold, and otherwise none, and returns the revision of the store after it.
	// A condition that does not hold is ErrConflict. A key may appear once among the operations and once among the
	// conditions; breaking that, or a limit, is ErrInvalid. A transaction that changes nothing leaves the revision.
	// After another error than these, and than the context's before the commit, it is unknown whether the changes were
	// made: read again.
	Txn(ctx context.Context, conds []Cond, ops []Op) (Revision, error)

	// Watch delivers every change to keys that start with prefix made after a revision, in the order in which they were
	// made; changes of one transaction follow one another and share its revision. With the revision of List nothing is
	// lost or repeated between the two. If the store does not remember that far back, or has not reached that revision,
	// it is ErrCompacted. Values are shared with other watchers and must not be changed.
	//
	// The store remembers a bounded history for all watchers together. A watcher that falls behind it gets one event
	// with Err set to ErrCompacted, and then the channel is closed: it must List again. The channel is closed with no such
	// event when ctx ends or the store is closed. No watcher ever delays a transaction.
	Watch(ctx context.Context, prefix string, after Revision) (<-chan Event, error)

	// Close ends all watches, waits for them and releases the store. It is idempotent.
	Close() error
}

// Create writes an entry that must not be there yet, else ErrConflict.
func Create(ctx context.Context, s Store, key string, value []byte) (Revision, error) {
	return s.Txn(ctx, []Cond{Absent(key)}, []Op{Put(key, value)})
}

// Follow keeps a view of the entries under prefix. It calls reset with all of them, then apply for each change in order,
// and reset again whenever it has fallen behind what the store remembers. It blocks until ctx ends, whose cause it
// returns, or the store is closed, or a function or the store returns an error.
func Follow(ctx context.Context, s Store, prefix string, reset func([]Entry, Revision) error, apply func(Event) error) error {
	for {
		entries, rev, err := s.List(ctx, prefix)
		if err != nil {
			return err
		}
		if err := reset(entries, rev); err != nil {
			return err
		}
		err = follow(ctx, s, prefix, rev, apply)
		if !errors.Is(err, ErrCompacted) {
			return err
		}
	}
}

func follow(ctx context.Context, s Store, prefix string, rev Revision, apply func(Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	events, err := s.Watch(ctx, prefix, rev)
	if err != nil {
		cancel()
		return err
	}
	defer func() {
		cancel()
		for range events { // until the watch has ended
		}
	}()
	for ev := range events {
		if ev.Err != nil {
			return ev.Err
		}
		if err := apply(ev); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return ErrClosed
}

// CheckTxn returns ErrInvalid, with what is wrong, for a transaction that no engine may run. Engines call it first.
func CheckTxn(conds []Cond, ops []Op) error {
	if len(conds) > MaxTxnOps || len(ops) > MaxTxnOps {
		return fmt.Errorf("%w: transaction with %d conditions and %d operations; the limit is %d each", ErrInvalid, len(conds), len(ops), MaxTxnOps)
	}
	seen := make(map[string]struct{}, max(len(conds), len(ops)))
	for _, c := range conds {
		if err := CheckKey(c.Key); err != nil {
			return err
		}
		if _, ok := seen[c.Key]; ok {
			return fmt.Errorf("%w: two conditions on key %q", ErrInvalid, c.Key)
		}
		seen[c.Key] = struct{}{}
	}
	clear(seen)
	for _, op := range ops {
		if err := CheckKey(op.Key); err != nil {
			return err
		}
		if _, ok := seen[op.Key]; ok {
			return fmt.Errorf("%w: two operations on key %q", ErrInvalid, op.Key)
		}
		seen[op.Key] = struct{}{}
		if len(op.Value) > MaxValueLen {
			return fmt.Errorf("%w: value of key %q has %d bytes; the limit is %d", ErrInvalid, op.Key, len(op.Value), MaxValueLen)
		}
	}
	return nil
}

// CheckKey returns ErrInvalid, with what is wrong, for a string that is no key.
func CheckKey(key string) error {
	if key == "" {
		return fmt.Errorf("%w: key is empty", ErrInvalid)
	}
	if len(key) > MaxKeyLen {
		return fmt.Errorf("%w: key %q… has %d bytes; the limit is %d", ErrInvalid, key[:40], len(key), MaxKeyLen)
	}
	if !utf8.ValidString(key) {
		return fmt.Errorf("%w: key %q is not UTF-8", ErrInvalid, key)
	}
	for _, r := range key {
		if r < ' ' || r == 0x7f {
			return fmt.Errorf("%w: key %q has a control character", ErrInvalid, key)
		}
	}
	return nil
}
