package state

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Layout of the file: bucket "data" maps a key to the revision of its last change (8 bytes, big endian) and its value;
// bucket "meta" holds "format" (one byte) and "revision" (8 bytes, big endian).
var (
	dataBucket  = []byte("data")
	metaBucket  = []byte("meta")
	formatKey   = []byte("format")
	revisionKey = []byte("revision")
)

const (
	boltFormat = 1
	// lockTimeout is how long OpenBolt waits for another process to let go of the file.
	lockTimeout = time.Second
	// listCheckEvery is after how many entries a long List looks at its context.
	listCheckEvery = 1024
)

type boltStore struct {
	db      *bbolt.DB
	history *history

	commit sync.Mutex // orders commits and their entry into the history

	mu       sync.Mutex // guards closed, and watchers.Add against Close
	closed   bool
	closing  chan struct{}
	watchers sync.WaitGroup
	closeErr error
	done     chan struct{} // closed when Close has finished
}

// OpenBolt opens the store in a bbolt file, which is made with mode 0600, its directory with mode 0700, if it is missing.
// A file that group or others may read is refused. Each transaction is on disk when Txn returns. While one process has the
// file open, others get ErrInUse.
func OpenBolt(path string) (Store, error) {
	s, err := openBolt(path, maxHistoryEvents, maxHistoryBytes)
	if err != nil {
		return nil, err // not a nil *boltStore in an interface
	}
	return s, nil
}

func openBolt(path string, historyEvents, historyBytes int) (*boltStore, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("state: open store: %w", err)
	}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case err != nil:
		return nil, fmt.Errorf("state: open store: %w", err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("state: open %q: not a regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("state: open %q: it has mode %04o and is open to others; run: chmod 600 %s", path, info.Mode().Perm(), path)
	default:
		err = checkWhole(path, info.Size())
	}
	var db *bbolt.DB
	if err == nil {
		db, err = openFile(path, &bbolt.Options{Timeout: lockTimeout, FreelistType: bbolt.FreelistMapType})
	}
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("%w: %s; stop that process, or change the state through its admin socket", ErrInUse, path)
	}
	if err != nil {
		return nil, fmt.Errorf("state: open %q: %w; restore it from a backup, or move it away to start empty", path, err)
	}
	rev, err := prepareBolt(db)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("state: open %q: %w", path, err), db.Close())
	}
	return &boltStore{
		db:      db,
		history: newHistory(rev, historyEvents, historyBytes),
		closing: make(chan struct{}),
		done:    make(chan struct{}),
	}, nil
}

// checkWhole reports whether a file of this size lacks pages at its end: the library would end the process when it meets
// one that is missing.
func checkWhole(path string, size int64) error {
	if size == 0 { // as good as new
		return nil
	}
	db, err := openFile(path, &bbolt.Options{Timeout: lockTimeout, ReadOnly: true})
	if err != nil {
		return err
	}
	err = db.View(func(tx *bbolt.Tx) error {
		if want := tx.Size(); size < want {
			return fmt.Errorf("it is cut short, at %d bytes of %d", size, want)
		}
		return nil
	})
	return errors.Join(err, db.Close())
}

// openFile is bbolt.Open with an error for damage over which the library panics.
func openFile(path string, o *bbolt.Options) (db *bbolt.DB, err error) {
	defer func() {
		if damage := recover(); damage != nil {
			db, err = nil, fmt.Errorf("it is damaged: %v", damage)
		}
	}()
	return bbolt.Open(path, 0o600, o)
}

// prepareBolt makes the buckets of a new file, checks those of an old one and returns the revision.
func prepareBolt(db *bbolt.DB) (rev Revision, err error) {
	err = db.Update(func(tx *bbolt.Tx) error {
		meta, data := tx.Bucket(metaBucket), tx.Bucket(dataBucket)
		if meta == nil && data == nil {
			if meta, err = tx.CreateBucket(metaBucket); err != nil {
				return err
			}
			if _, err = tx.CreateBucket(dataBucket); err != nil {
				return err
			}
			if err = meta.Put(formatKey, []byte{boltFormat}); err != nil {
				return err
			}
			return putRevision(tx, 0)
		}
		if meta == nil || data == nil {
			return errors.New("it is not a store of this program")
		}
		if f := meta.Get(formatKey); !bytes.Equal(f, []byte{boltFormat}) {
			return fmt.Errorf("it has format %v, this program knows format %d; use the release that wrote it", f, boltFormat)
		}
		rev, err = getRevision(tx)
		return err
	})
	return rev, err
}

func getRevision(tx *bbolt.Tx) (Revision, error) {
	b := tx.Bucket(metaBucket).Get(revisionKey)
	if len(b) != 8 {
		return 0, errors.New("state: the store's revision is damaged; restore the file from a backup")
	}
	return Revision(binary.BigEndian.Uint64(b)), nil
}

func putRevision(tx *bbolt.Tx, rev Revision) error {
	return tx.Bucket(metaBucket).Put(revisionKey, binary.BigEndian.AppendUint64(nil, uint64(rev)))
}

func recordRevision(key string, record []byte) (Revision, error) {
	if len(record) < 8 {
		return 0, fmt.Errorf("state: the entry of key %q is damaged; restore the file from a backup", key)
	}
	return Revision(binary.BigEndian.Uint64(record)), nil
}

func decodeRecord(key string, record []byte) (Entry, error) {
	rev, err := recordRevision(key, record)
	if err != nil {
		return Entry{}, err
	}
	return Entry{Key: key, Value: slices.Clone(record[8:]), Revision: rev}, nil
}

func (s *boltStore) Get(ctx context.Context, key string) (e Entry, err error) {
	if err := CheckKey(key); err != nil {
		return Entry{}, err
	}
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		record := tx.Bucket(dataBucket).Get([]byte(key))
		if record == nil {
			return fmt.Errorf("%w: key %q", ErrNotFound, key)
		}
		e, err = decodeRecord(key, record)
		return err
	})
	return e, err
}

func (s *boltStore) List(ctx context.Context, prefix string) (entries []Entry, rev Revision, err error) {
	err = s.view(ctx, func(tx *bbolt.Tx) error {
		if rev, err = getRevision(tx); err != nil {
			return err
		}
		p := []byte(prefix)
		c := tx.Bucket(dataBucket).Cursor()
		for k, v := c.Seek(p); k != nil && bytes.HasPrefix(k, p); k, v = c.Next() {
			e, err := decodeRecord(string(k), v)
			if err != nil {
				return err
			}
			entries = append(entries, e)
			if len(entries)%listCheckEvery == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	return entries, rev, nil
}

func (s *boltStore) view(ctx context.Context, read func(*bbolt.Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return boltError(s.db.View(read))
}

// boltError turns the library's way of saying that the store is closed into ours.
func boltError(err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

func (s *boltStore) Txn(ctx context.Context, conds []Cond, ops []Op) (Revision, error) {
	if err := CheckTxn(conds, ops); err != nil {
		return 0, err
	}
	s.commit.Lock()
	defer s.commit.Unlock()
	if err := ctx.Err(); err != nil { // after the wait for others
		return 0, err
	}
	var rev Revision
	var events []Event
	err := s.db.Update(func(tx *bbolt.Tx) (err error) {
		rev, events, err = apply(tx, conds, ops)
		if err == nil && len(events) == 0 {
			return errNoChange // roll back: nothing to write
		}
		return err
	})
	switch {
	case err == errNoChange:
		return rev, nil
	case err != nil:
		return 0, boltError(err)
	}
	s.history.add(rev, events)
	return rev, nil
}

var errNoChange = errors.New("no change")

// apply checks the conditions and makes the changes inside a transaction of the file.
func apply(tx *bbolt.Tx, conds []Cond, ops []Op) (Revision, []Event, error) {
	data := tx.Bucket(dataBucket)
	rev, err := getRevision(tx)
	if err != nil {
		return 0, nil, err
	}
	for _, c := range conds {
		if err := checkCond(data, c); err != nil {
			return 0, nil, err
		}
	}
	next := rev + 1
	events := make([]Event, 0, len(ops))
	for _, op := range ops {
		key := []byte(op.Key)
		if op.Delete {
			if data.Get(key) == nil {
				continue
			}
			if err := data.Delete(key); err != nil {
				return 0, nil, fmt.Errorf("state: delete key %q: %w", op.Key, err)
			}
			events = append(events, Event{Entry: Entry{Key: op.Key, Revision: next}, Deleted: true})
			continue
		}
		record := append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(op.Value)), uint64(next)), op.Value...)
		if err := data.Put(key, record); err != nil {
			return 0, nil, fmt.Errorf("state: put key %q: %w", op.Key, err)
		}
		events = append(events, Event{Entry: Entry{Key: op.Key, Value: record[8:], Revision: next}})
	}
	if len(events) == 0 {
		return rev, nil, nil
	}
	return next, events, putRevision(tx, next)
}

func checkCond(data *bbolt.Bucket, c Cond) error {
	var have Revision
	if record := data.Get([]byte(c.Key)); record != nil {
		var err error
		if have, err = recordRevision(c.Key, record); err != nil {
			return err
		}
	}
	switch {
	case have == c.Revision:
		return nil
	case c.Revision == 0:
		return fmt.Errorf("%w: key %q exists already", ErrConflict, c.Key)
	case have == 0:
		return fmt.Errorf("%w: key %q is gone", ErrConflict, c.Key)
	default:
		return fmt.Errorf("%w: key %q was changed meanwhile", ErrConflict, c.Key)
	}
}

func (s *boltStore) Watch(ctx context.Context, prefix string, after Revision) (<-chan Event, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// A reader can see a commit that is not in the history yet; with the lock there is none such.
	s.commit.Lock()
	pos, err := s.history.position(after)
	s.commit.Unlock()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	out := make(chan Event)
	s.watchers.Go(func() { s.history.watch(ctx, prefix, pos, out, s.closing) })
	return out, nil
}

func (s *boltStore) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	s.mu.Unlock()
	if !first {
		<-s.done
		return s.closeErr
	}
	close(s.closing)
	s.history.close()
	s.watchers.Wait()
	if err := s.db.Close(); err != nil {
		s.closeErr = fmt.Errorf("state: close: %w", err)
	}
	close(s.done)
	return s.closeErr
}
