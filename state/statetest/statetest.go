// Package statetest is the suite that every engine of package state passes.
package statetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/state"
)

// Engine is a kind of store under test.
type Engine struct {
	// Open opens the store that lives in dir, which is empty at first. Opening the same directory again, after Close,
	// finds what was stored. It fails the test on an error.
	Open func(t testing.TB, dir string) state.Store
}

// patience bounds the wait for something that must happen.
const patience = 30 * time.Second

// Run runs the suite against an engine.
func Run(t *testing.T, e Engine) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, s state.Store)
	}{
		{"read and write", testReadWrite},
		{"list", testList},
		{"values are copied", testCopies},
		{"revisions", testRevisions},
		{"conditions", testConditions},
		{"invalid input", testInvalid},
		{"context", testContext},
		{"counter of many writers", testCounter},
		{"watch", testWatch},
		{"watch of the future", testWatchFuture},
		{"watch joins list", testWatchJoinsList},
		{"slow watcher", testSlowWatcher},
		{"watch ends", testWatchEnds},
		{"follow", testFollow},
		{"follow stops on error", testFollowError},
		{"close", testClose},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := e.Open(t, t.TempDir())
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			c.run(t, s)
		})
	}
	t.Run("reopen", func(t *testing.T) { testReopen(t, e) })
}

func mustTxn(t testing.TB, s state.Store, conds []state.Cond, ops ...state.Op) state.Revision {
	t.Helper()
	rev, err := s.Txn(t.Context(), conds, ops)
	if err != nil {
		t.Fatalf("Txn(%v): %v", conds, err)
	}
	return rev
}

func mustGet(t testing.TB, s state.Store, key string) state.Entry {
	t.Helper()
	e, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatalf("Get(%q): %v", key, err)
	}
	return e
}

func mustList(t testing.TB, s state.Store, prefix string) ([]state.Entry, state.Revision) {
	t.Helper()
	entries, rev, err := s.List(t.Context(), prefix)
	if err != nil {
		t.Fatalf("List(%q): %v", prefix, err)
	}
	return entries, rev
}

func mustWatch(t testing.TB, ctx context.Context, s state.Store, prefix string, after state.Revision) <-chan state.Event {
	t.Helper()
	events, err := s.Watch(ctx, prefix, after)
	if err != nil {
		t.Fatalf("Watch(%q, %d): %v", prefix, after, err)
	}
	return events
}

// next returns the next event; ok is false if the watch has ended.
func next(t testing.TB, events <-chan state.Event) (ev state.Event, ok bool) {
	t.Helper()
	select {
	case ev, ok = <-events:
		return ev, ok
	case <-time.After(patience):
		t.Fatal("no event came")
		return ev, false
	}
}

func keysOf(entries []state.Entry) string {
	var keys []string
	for _, e := range entries {
		keys = append(keys, e.Key)
	}
	return strings.Join(keys, " ")
}

func testReadWrite(t *testing.T, s state.Store) {
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, state.ErrNotFound) {
		t.Fatalf("Get of nothing: got %v, want ErrNotFound", err)
	}
	for _, value := range [][]byte{[]byte("one"), {}, nil, {0, 255, 10}, bytes.Repeat([]byte("x"), state.MaxValueLen)} {
		rev := mustTxn(t, s, nil, state.Put("a", value))
		e := mustGet(t, s, "a")
		if e.Key != "a" || !bytes.Equal(e.Value, value) || e.Revision != rev {
			t.Errorf("got entry %q with %d bytes at %d, want %d bytes at %d", e.Key, len(e.Value), e.Revision, len(value), rev)
		}
	}
	long := strings.Repeat("k", state.MaxKeyLen)
	mustTxn(t, s, nil, state.Put(long, []byte("v")))
	mustGet(t, s, long)
	mustTxn(t, s, nil, state.Delete("a"))
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("Get after Delete: got %v, want ErrNotFound", err)
	}
}

func testList(t *testing.T, s state.Store) {
	if entries, _ := mustList(t, s, ""); len(entries) != 0 {
		t.Fatalf("new store has %q", keysOf(entries))
	}
	for _, key := range []string{"route/b", "route/a", "route", "route/a/x", "routes/z", "vnet/ü", "a"} {
		mustTxn(t, s, nil, state.Put(key, []byte(key)))
	}
	for _, c := range []struct{ prefix, want string }{
		{"", "a route route/a route/a/x route/b routes/z vnet/ü"},
		{"route/", "route/a route/a/x route/b"},
		{"route", "route route/a route/a/x route/b routes/z"},
		{"vnet/ü", "vnet/ü"},
		{"zz", ""},
	} {
		entries, _ := mustList(t, s, c.prefix)
		if got := keysOf(entries); got != c.want {
			t.Errorf("List(%q): got %q, want %q", c.prefix, got, c.want)
		}
		for _, e := range entries {
			if string(e.Value) != e.Key {
				t.Errorf("List(%q): key %q has value %q", c.prefix, e.Key, e.Value)
			}
		}
	}
}

func testCopies(t *testing.T, s state.Store) {
	value := []byte("abc")
	mustTxn(t, s, nil, state.Put("a", value))
	value[0] = 'X'
	e := mustGet(t, s, "a")
	if string(e.Value) != "abc" {
		t.Fatalf("store holds the caller's slice: got %q", e.Value)
	}
	e.Value[0] = 'Y'
	entries, _ := mustList(t, s, "")
	entries[0].Value[1] = 'Z'
	if got := mustGet(t, s, "a"); string(got.Value) != "abc" {
		t.Fatalf("store gave its own slice away: got %q", got.Value)
	}
}

func testRevisions(t *testing.T, s state.Store) {
	_, rev := mustList(t, s, "")
	step := func(changes bool, conds []state.Cond, ops ...state.Op) state.Revision {
		t.Helper()
		before := rev
		rev = mustTxn(t, s, conds, ops...)
		if _, listed := mustList(t, s, ""); listed != rev || changes != (rev > before) || !changes && rev != before {
			t.Fatalf("got revision %d after %d and listed %d; changes: %v", rev, before, listed, changes)
		}
		return rev
	}
	first := step(true, nil, state.Put("a", nil), state.Put("b", nil))
	second := step(true, nil, state.Put("a", nil)) // the same value is a change
	if a, b := mustGet(t, s, "a"), mustGet(t, s, "b"); a.Revision != second || b.Revision != first {
		t.Errorf("got revisions %d and %d, want %d and %d", a.Revision, b.Revision, second, first)
	}
	step(false, nil, state.Delete("nothing"))
	step(false, nil)
	step(false, []state.Cond{{Key: "a", Revision: second}})
	step(true, nil, state.Delete("a"), state.Delete("nothing"))
	step(true, nil, state.Put("a", nil))
}

func testConditions(t *testing.T, s state.Store) {
	rev, err := state.Create(t.Context(), s, "a", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := state.Create(t.Context(), s, "a", []byte("2")); !errors.Is(err, state.ErrConflict) {
		t.Errorf("Create twice: got %v, want ErrConflict", err)
	}
	a := mustGet(t, s, "a")
	for _, c := range []struct {
		name  string
		conds []state.Cond
	}{
		{"older revision", []state.Cond{{Key: "a", Revision: rev + 1}}},
		{"absent key", []state.Cond{{Key: "b", Revision: rev}}},
		{"present key", []state.Cond{state.Absent("a")}},
		{"one of two", []state.Cond{a.Unchanged(), {Key: "b", Revision: 7}}},
	} {
		got, err := s.Txn(t.Context(), c.conds, []state.Op{state.Put("c", nil), state.Delete("a")})
		if !errors.Is(err, state.ErrConflict) || got != 0 {
			t.Errorf("%s: got %d, %v, want ErrConflict", c.name, got, err)
		}
	}
	if entries, now := mustList(t, s, ""); keysOf(entries) != "a" || now != rev || string(entries[0].Value) != "1" {
		t.Fatalf("refused transactions left %q at %d", keysOf(entries), now)
	}
	mustTxn(t, s, []state.Cond{a.Unchanged(), state.Absent("b")}, state.Put("a", []byte("2")), state.Put("b", nil))
	if _, err := s.Txn(t.Context(), []state.Cond{a.Unchanged()}, []state.Op{state.Put("a", nil)}); !errors.Is(err, state.ErrConflict) {
		t.Errorf("stale condition: got %v, want ErrConflict", err)
	}
	// A key that was deleted and made again is not the one that was read.
	before := mustGet(t, s, "a")
	mustTxn(t, s, nil, state.Delete("a"))
	mustTxn(t, s, nil, state.Put("a", before.Value))
	if _, err := s.Txn(t.Context(), []state.Cond{before.Unchanged()}, []state.Op{state.Delete("a")}); !errors.Is(err, state.ErrConflict) {
		t.Errorf("condition on an earlier life of the key: got %v, want ErrConflict", err)
	}
}

func testInvalid(t *testing.T, s state.Store) {
	many := func(n int) (ops []state.Op) {
		for i := range n {
			ops = append(ops, state.Put("k"+strconv.Itoa(i), nil))
		}
		return ops
	}
	for _, c := range []struct {
		name  string
		conds []state.Cond
		ops   []state.Op
	}{
		{"empty key", nil, []state.Op{state.Put("", nil)}},
		{"empty key in condition", []state.Cond{{}}, nil},
		{"long key", nil, []state.Op{state.Put(strings.Repeat("k", state.MaxKeyLen+1), nil)}},
		{"key is not UTF-8", nil, []state.Op{state.Put("\xff", nil)}},
		{"control character", nil, []state.Op{state.Delete("a\x00b")}},
		{"long value", nil, []state.Op{state.Put("ok", nil), state.Put("a", make([]byte, state.MaxValueLen+1))}},
		{"same key twice", nil, []state.Op{state.Put("a", nil), state.Delete("a")}},
		{"same condition twice", []state.Cond{state.Absent("a"), state.Absent("a")}, nil},
		{"too many operations", nil, many(state.MaxTxnOps + 1)},
	} {
		if _, err := s.Txn(t.Context(), c.conds, c.ops); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", c.name, err)
		}
	}
	if _, err := s.Get(t.Context(), ""); !errors.Is(err, state.ErrInvalid) {
		t.Errorf("Get of the empty key: got %v, want ErrInvalid", err)
	}
	if entries, _ := mustList(t, s, ""); len(entries) != 0 {
		t.Errorf("invalid transactions left %q", keysOf(entries))
	}
	mustTxn(t, s, nil, many(state.MaxTxnOps)...)
}

func testContext(t *testing.T, s state.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Txn(ctx, nil, []state.Op{state.Put("a", nil)}); !errors.Is(err, context.Canceled) {
		t.Errorf("Txn: got %v, want context.Canceled", err)
	}
	if _, err := s.Get(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("Get: got %v, want context.Canceled", err)
	}
	if _, _, err := s.List(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("List: got %v, want context.Canceled", err)
	}
	if _, err := s.Watch(ctx, "", 0); !errors.Is(err, context.Canceled) {
		t.Errorf("Watch: got %v, want context.Canceled", err)
	}
	if entries, _ := mustList(t, s, ""); len(entries) != 0 {
		t.Errorf("a cancelled transaction left %q", keysOf(entries))
	}
}

func testCounter(t *testing.T, s state.Store) {
	const writers, each = 4, 20
	mustTxn(t, s, nil, state.Put("n", []byte("0")))
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for done := 0; done < each; {
				e, err := s.Get(t.Context(), "n")
				if err != nil {
					t.Error(err)
					return
				}
				n, _ := strconv.Atoi(string(e.Value))
				_, err = s.Txn(t.Context(), []state.Cond{e.Unchanged()}, []state.Op{state.Put("n", []byte(strconv.Itoa(n+1)))})
				switch {
				case err == nil:
					done++
				case !errors.Is(err, state.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if got := string(mustGet(t, s, "n").Value); got != strconv.Itoa(writers*each) {
		t.Errorf("got %s, want %d: an update was lost", got, writers*each)
	}
}

func testReopen(t *testing.T, e Engine) {
	dir := t.TempDir()
	s := e.Open(t, dir)
	mustTxn(t, s, nil, state.Put("a", []byte("1")), state.Put("b", []byte("2")))
	last := mustTxn(t, s, nil, state.Delete("b"))
	before := mustGet(t, s, "a")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = e.Open(t, dir)
	defer s.Close()
	entries, rev := mustList(t, s, "")
	if keysOf(entries) != "a" || rev != last {
		t.Fatalf("got %q at %d, want %q at %d", keysOf(entries), rev, "a", last)
	}
	if got := mustGet(t, s, "a"); got.Revision != before.Revision || !slices.Equal(got.Value, before.Value) {
		t.Errorf("got %v, want %v", got, before)
	}
	events := mustWatch(t, t.Context(), s, "", rev)
	if got := mustTxn(t, s, []state.Cond{before.Unchanged()}, state.Put("a", []byte("3"))); got <= last {
		t.Errorf("revision after the restart is %d, before it %d", got, last)
	}
	if ev, ok := next(t, events); !ok || ev.Err != nil || string(ev.Value) != "3" {
		t.Errorf("got event %v, want the change", ev)
	}
}

func describe(ev state.Event) string {
	if ev.Err != nil {
		return fmt.Sprintf("error %v", ev.Err)
	}
	if ev.Deleted {
		return "-" + ev.Key
	}
	return ev.Key + "=" + string(ev.Value)
}
