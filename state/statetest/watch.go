package statetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"

	"github.com/keyhaven/keyhaven/state"
)

func testWatch(t *testing.T, s state.Store) {
	_, start := mustList(t, s, "")
	events := mustWatch(t, t.Context(), s, "r/", start)
	first := mustTxn(t, s, nil, state.Put("r/b", []byte("1")), state.Put("q/a", []byte("1")), state.Put("r/a", []byte("2")))
	mustTxn(t, s, nil, state.Put("q/a", []byte("2")))
	third := mustTxn(t, s, nil, state.Delete("r/b"), state.Delete("r/nothing"))
	late := mustWatch(t, t.Context(), s, "r/", start) // what came before the watch but after the revision
	for _, w := range []<-chan state.Event{events, late} {
		for _, want := range []struct {
			text string
			rev  state.Revision
		}{{"r/b=1", first}, {"r/a=2", first}, {"-r/b", third}} {
			ev, ok := next(t, w)
			if !ok || describe(ev) != want.text || ev.Revision != want.rev || ev.Deleted && ev.Value != nil {
				t.Fatalf("got %s at %d (open %v), want %s at %d", describe(ev), ev.Revision, ok, want.text, want.rev)
			}
		}
	}
	mid := mustWatch(t, t.Context(), s, "", first)
	if ev, _ := next(t, mid); describe(ev) != "q/a=2" {
		t.Errorf("watch after the first transaction: got %s, want q/a=2", describe(ev))
	}
}

func testWatchFuture(t *testing.T, s state.Store) {
	rev := mustTxn(t, s, nil, state.Put("a", nil))
	if _, err := s.Watch(t.Context(), "", rev+1); !errors.Is(err, state.ErrCompacted) {
		t.Errorf("got %v, want ErrCompacted", err)
	}
}

// testWatchJoinsList lists and watches again and again while others write: each view, made of a list and the events after
// it, must arrive at what the store holds in the end.
func testWatchJoinsList(t *testing.T, s state.Store) {
	const writers, txns, watchers = 3, 40, 6
	const end = "v/end"
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range txns {
				key := fmt.Sprintf("v/%d-%d", w, i%7)
				op := state.Put(key, fmt.Appendf(nil, "%d", i))
				if i%5 == 4 {
					op = state.Delete(key)
				}
				if _, err := s.Txn(t.Context(), nil, []state.Op{op, state.Put("other", nil)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	views := make([]map[string]string, watchers)
	var watching sync.WaitGroup
	for i := range watchers {
		watching.Go(func() {
			view := map[string]string{}
			views[i] = view
			entries, rev, err := s.List(t.Context(), "v/")
			if err != nil {
				t.Error(err)
				return
			}
			for _, e := range entries {
				view[e.Key] = string(e.Value)
			}
			events, err := s.Watch(ctx, "v/", rev)
			if err != nil {
				t.Error(err)
				return
			}
			for {
				ev, ok := <-events
				if !ok || ev.Err != nil || ev.Revision < rev {
					t.Errorf("watch ended or went back: %s at %d after %d", describe(ev), ev.Revision, rev)
					return
				}
				rev = ev.Revision
				if ev.Key == end {
					return
				}
				if ev.Deleted {
					delete(view, ev.Key)
				} else {
					view[ev.Key] = string(ev.Value)
				}
			}
		})
	}
	// Listing and watching at once must always work, at whatever moment between two changes.
	relisted := make(chan struct{})
	go func() {
		defer close(relisted)
		for range 200 {
			_, rev, err := s.List(ctx, "v/")
			if err != nil {
				t.Error(err)
				return
			}
			short, stop := context.WithCancel(ctx)
			if _, err = s.Watch(short, "v/", rev); err != nil {
				t.Errorf("watch from the revision just listed: %v", err)
			}
			stop()
		}
	}()
	writing.Wait()
	<-relisted
	want := map[string]string{}
	entries, _ := mustList(t, s, "v/")
	for _, e := range entries {
		want[e.Key] = string(e.Value)
	}
	mustTxn(t, s, nil, state.Put(end, nil))
	watching.Wait()
	for i, got := range views {
		if !maps.Equal(got, want) {
			t.Errorf("watcher %d: got %v, want %v", i, got, want)
		}
	}
}

// testSlowWatcher does not read while far more changes than a store need remember are made. The watcher may then be given
// all of them, or ErrCompacted; it must not miss one in silence.
func testSlowWatcher(t *testing.T, s state.Store) {
	const txns = 100
	_, start := mustList(t, s, "")
	events := mustWatch(t, t.Context(), s, "", start)
	mustTxn(t, s, nil, state.Put("first", nil))
	if ev, _ := next(t, events); ev.Key != "first" {
		t.Fatalf("got %s, want first", describe(ev))
	}
	var sent []string
	for i := range txns {
		var ops []state.Op
		for j := range state.MaxTxnOps {
			key := fmt.Sprintf("k%03d-%03d", i, j)
			ops = append(ops, state.Put(key, nil))
			sent = append(sent, key)
		}
		mustTxn(t, s, nil, ops...)
	}
	for i, want := range sent {
		ev, ok := next(t, events)
		if !ok {
			t.Fatalf("watch was closed without a word after %d of %d events", i, len(sent))
		}
		if ev.Err != nil {
			if !errors.Is(ev.Err, state.ErrCompacted) {
				t.Errorf("got error event %v, want ErrCompacted", ev.Err)
			}
			if _, ok := next(t, events); ok {
				t.Error("watch goes on after its error event")
			}
			break
		}
		if ev.Key != want {
			t.Fatalf("got %s, want %s: events were lost", describe(ev), want)
		}
	}
	// After the remedy the watch works again.
	_, rev := mustList(t, s, "")
	events = mustWatch(t, t.Context(), s, "", rev)
	mustTxn(t, s, nil, state.Put("z", nil))
	if ev, _ := next(t, events); ev.Key != "z" {
		t.Errorf("got %s, want z", describe(ev))
	}
}

func testWatchEnds(t *testing.T, s state.Store) {
	_, rev := mustList(t, s, "")
	ctx, cancel := context.WithCancel(t.Context())
	idle := mustWatch(t, ctx, s, "", rev)
	cancel()
	if ev, ok := next(t, idle); ok {
		t.Errorf("got %s, want the end", describe(ev))
	}
	// A watcher that never reads does not delay writers or Close.
	stuck := mustWatch(t, t.Context(), s, "", rev)
	mustTxn(t, s, nil, state.Put("a", nil))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if ev, ok := next(t, stuck); ok {
		t.Errorf("got %s after Close, want the end", describe(ev))
	}
	if _, err := s.Watch(t.Context(), "", rev); !errors.Is(err, state.ErrClosed) {
		t.Errorf("Watch after Close: got %v, want ErrClosed", err)
	}
}

func testFollow(t *testing.T, s state.Store) {
	mustTxn(t, s, nil, state.Put("f/a", []byte("1")), state.Put("g", nil))
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	var log []string
	applied := make(chan struct{}, 16)
	done := make(chan error, 1)
	go func() {
		done <- state.Follow(ctx, s, "f/", func(entries []state.Entry, _ state.Revision) error {
			log = append(log, "reset "+keysOf(entries))
			applied <- struct{}{}
			return nil
		}, func(ev state.Event) error {
			log = append(log, describe(ev))
			applied <- struct{}{}
			return nil
		})
	}()
	<-applied
	mustTxn(t, s, nil, state.Put("f/b", []byte("2")))
	<-applied
	mustTxn(t, s, nil, state.Delete("f/a"))
	<-applied
	cancel(cause)
	if err := <-done; err != cause {
		t.Errorf("got %v, want the cause", err)
	}
	if got, want := strings.Join(log, ", "), "reset f/a, f/b=2, -f/a"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func testFollowError(t *testing.T, s state.Store) {
	broken := errors.New("broken")
	err := state.Follow(t.Context(), s, "", func([]state.Entry, state.Revision) error {
		_, err := s.Txn(t.Context(), nil, []state.Op{state.Put("a", nil)})
		return err
	}, func(state.Event) error { return broken })
	if err != broken {
		t.Errorf("got %v, want the function's error", err)
	}
	err = state.Follow(t.Context(), s, "", func([]state.Entry, state.Revision) error { return s.Close() }, nil)
	if !errors.Is(err, state.ErrClosed) {
		t.Errorf("after Close: got %v, want ErrClosed", err)
	}
}

func testClose(t *testing.T, s state.Store) {
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, state.ErrClosed) {
		t.Errorf("Get: got %v, want ErrClosed", err)
	}
	if _, _, err := s.List(t.Context(), ""); !errors.Is(err, state.ErrClosed) {
		t.Errorf("List: got %v, want ErrClosed", err)
	}
	if _, err := s.Txn(t.Context(), nil, []state.Op{state.Put("a", nil)}); !errors.Is(err, state.ErrClosed) {
		t.Errorf("Txn: got %v, want ErrClosed", err)
	}
}
