package state

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

func openTest(t testing.TB, path string) *boltStore {
	t.Helper()
	s, err := openBolt(path, maxHistoryEvents, maxHistoryBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t testing.TB, s Store, key string, value []byte) Revision {
	t.Helper()
	rev, err := s.Txn(t.Context(), nil, []Op{Put(key, value)})
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func TestBoltModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	path := filepath.Join(dir, "state.db")
	s := openTest(t, path)
	for p, want := range map[string]os.FileMode{path: 0o600, dir: 0o700} {
		info, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s: got mode %04o, want %04o", p, got, want)
		}
	}
	s.Close()
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenBolt(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("mode %04o: got %v, want an error that says chmod 600", mode, err)
		}
	}
}

func TestBoltFiles(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	s := openTest(t, good)
	put(t, s, "a", []byte("x"))
	for i := range 40 {
		put(t, s, fmt.Sprint("filler-", i), make([]byte, 3000))
	}
	s.Close()
	image, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	edit := func(name string, change func(tx *bbolt.Tx) error) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, image, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.Update(change); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct{ path, want string }{
		{write("garbage", []byte(strings.Repeat("not a database ", 4096))), "backup"},
		{write("short", []byte("x")), "backup"},
		{write("cut", image[:4096]), "backup"},
		{write("cut behind the header", image[:8192]), "cut short"},
		{write("cut in the middle", image[:1<<16]), "cut short"},
		{write("zeroed", append(image[:8192:8192], make([]byte, len(image)-8192)...)), "backup"},
		{dir, "not a regular file"},
		{edit("format", func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(formatKey, []byte{9}) }), "format"},
		{edit("revision", func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(revisionKey, []byte{9}) }), "revision is damaged"},
		{edit("foreign", func(tx *bbolt.Tx) error { return tx.DeleteBucket(dataBucket) }), "not a store"},
	} {
		s, err := OpenBolt(c.path)
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", filepath.Base(c.path), err, c.want)
		}
		if s != nil {
			t.Errorf("%s: got a store of type %T beside the error, want nil", filepath.Base(c.path), s)
		}
	}
	record := edit("record", func(tx *bbolt.Tx) error { return tx.Bucket(dataBucket).Put([]byte("a"), []byte("short")) })
	s = openTest(t, record)
	if _, err := s.Get(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("Get of a damaged entry: got %v", err)
	}
	if _, _, err := s.List(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("List with a damaged entry: got %v", err)
	}
	if _, err := s.Txn(t.Context(), []Cond{{"a", 1}}, nil); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("Txn on a damaged entry: got %v", err)
	}
}

func TestBoltWatchAfterReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s := openTest(t, path)
	put(t, s, "a", nil)
	rev := put(t, s, "b", nil)
	s.Close()
	s = openTest(t, path)
	if _, err := s.Watch(t.Context(), "", rev-1); !errors.Is(err, ErrCompacted) {
		t.Errorf("watch of what happened before the restart: got %v, want ErrCompacted", err)
	}
	if _, err := s.Watch(t.Context(), "", rev); err != nil {
		t.Errorf("watch from the current revision: %v", err)
	}
}

// TestWatchBetweenCommitAndHistory lists when a change is committed but not in the history yet: a watch from the revision
// listed must wait for it and not take it for the future.
func TestWatchBetweenCommitAndHistory(t *testing.T) {
	s := openTest(t, filepath.Join(t.TempDir(), "s"))
	s.commit.Lock()
	var rev Revision
	var events []Event
	err := s.db.Update(func(tx *bbolt.Tx) (err error) {
		rev, events, err = apply(tx, nil, []Op{Put("a", nil)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	listed, watched := make(chan Revision, 1), make(chan error, 1)
	go func() {
		_, rev, _ := s.List(t.Context(), "")
		listed <- rev
		_, err := s.Watch(t.Context(), "", rev)
		watched <- err
	}()
	if got := <-listed; got != rev {
		t.Errorf("listed revision %d, want %d", got, rev)
	}
	for range 1000 {
		runtime.Gosched()
	}
	s.history.add(rev, events)
	s.commit.Unlock()
	if err := <-watched; err != nil {
		t.Errorf("watch from the revision just listed: %v", err)
	}
}

// TestHistoryBounds checks that what is kept for watchers stays within its bounds, and that a transaction is forgotten
// as a whole: no watch may begin in the middle of one.
func TestHistoryBounds(t *testing.T) {
	for _, c := range []struct {
		name              string
		maxEvents, bytes  int
		value             int
		wantOldestAllowed Revision
	}{
		{"events", 10, 1 << 20, 0, 7}, // 10 transactions of 3: the last 3 are whole, the 7th has one event left
		{"bytes", 1 << 20, 3000, 300, 7},
	} {
		s, err := openBolt(filepath.Join(t.TempDir(), "s"), c.maxEvents, c.bytes)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for i := range 10 {
			var ops []Op
			for j := range 3 {
				ops = append(ops, Put(fmt.Sprintf("%d-%d", i, j), make([]byte, c.value)))
			}
			if _, err := s.Txn(t.Context(), nil, ops); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(s.history.events); n > c.maxEvents || s.history.bytes > c.bytes {
			t.Errorf("%s: history holds %d events, %d bytes", c.name, n, s.history.bytes)
		}
		for after := range Revision(11) {
			_, err := s.Watch(t.Context(), "", after)
			if want := after >= c.wantOldestAllowed; (err == nil) != want || err != nil && !errors.Is(err, ErrCompacted) {
				t.Errorf("%s: watch after %d: got %v, want allowed %v", c.name, after, err, want)
			}
		}
	}
}

// TestFollowListsAgain has a follower fall behind a small history.
func TestFollowListsAgain(t *testing.T) {
	s, err := openBolt(filepath.Join(t.TempDir(), "s"), 4, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const last = "k200"
	finished := errors.New("finished")
	resets := 0
	view := map[string]bool{}
	err = Follow(t.Context(), s, "k", func(entries []Entry, _ Revision) error {
		resets++
		clear(view)
		for _, e := range entries {
			view[e.Key] = true
		}
		if view[last] {
			return finished
		}
		put(t, s, "k000", nil)
		return nil
	}, func(ev Event) error {
		view[ev.Key] = true
		if ev.Key == "k000" { // falls behind by more than one batch of a watcher and the whole history
			for i := range 201 {
				put(t, s, fmt.Sprintf("k%03d", i), nil)
			}
		}
		if ev.Key == last {
			return finished
		}
		return nil
	})
	if err != finished || resets < 2 || len(view) != 201 {
		t.Errorf("got %v, %d resets, %d keys; want %v, at least 2 resets, 201 keys", err, resets, len(view), finished)
	}
}

func BenchmarkTxn(b *testing.B) {
	s := openTest(b, filepath.Join(b.TempDir(), "s"))
	b.ReportAllocs()
	for b.Loop() {
		put(b, s, "key", []byte("value"))
	}
}

func BenchmarkGet(b *testing.B) {
	s := openTest(b, filepath.Join(b.TempDir(), "s"))
	put(b, s, "key", []byte("value"))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Get(b.Context(), "key"); err != nil {
			b.Fatal(err)
		}
	}
}

// TestCloseDuringTxn closes the store while a transaction is committed but not told to watchers yet.
func TestCloseDuringTxn(t *testing.T) {
	s := openTest(t, filepath.Join(t.TempDir(), "s"))
	s.commit.Lock()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s.history.add(1, []Event{{Entry: Entry{Key: "a", Revision: 1}}})
	s.commit.Unlock()
	if _, err := s.Txn(t.Context(), nil, []Op{Put("a", nil)}); !errors.Is(err, ErrClosed) {
		t.Errorf("Txn after Close: %v, want ErrClosed", err)
	}
}
