package signer

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// hold takes a place of the lane as the caller and gives it back after d.
func hold(ctx context.Context, l *Lane, c Caller, d time.Duration) error {
	p, err := l.acquire(ctx, c, classP256, 0, laneTime())
	if err != nil {
		return err
	}
	time.Sleep(d)
	l.release(ctx, &p, nil)
	return nil
}

// warm has the lane measure that operations take d.
func warm(t *testing.T, l *Lane, d time.Duration) {
	t.Helper()
	for range measured {
		if err := hold(t.Context(), l, Caller{}, d); err != nil {
			t.Fatal(err)
		}
	}
}

// wantIdle fails if a place or a waiter was lost.
func wantIdle(t *testing.T, l *Lane) {
	t.Helper()
	s := l.Stats()
	if s.InFlight != 0 || s.Waiting != 0 || len(l.root.children) != 0 || l.load.Load() != 0 {
		t.Errorf("got %d in flight, %d waiting, %d flows, load %d; want none", s.InFlight, s.Waiting, len(l.root.children), l.load.Load())
	}
}

func flowsOf(l *Lane, peer string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.root.children[peer]; f != nil {
		return len(f.children)
	}
	return 0
}

func TestLaneRunsCapacityAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{Capacity: 3})
		start := time.Now()
		for range 10 {
			go func() {
				if err := hold(t.Context(), l, Caller{}, time.Second); err != nil {
					t.Error(err)
				}
			}()
		}
		synctest.Wait()
		if s := l.Stats(); s.InFlight != 3 || s.Waiting != 7 {
			t.Errorf("got %d in flight and %d waiting, want 3 and 7", s.InFlight, s.Waiting)
		}
		time.Sleep(3500 * time.Millisecond)
		synctest.Wait()
		l.SetCapacity(5)
		for l.Stats().InFlight > 0 {
			time.Sleep(100 * time.Millisecond)
		}
		if took := time.Since(start); took < 4*time.Second || took > 4200*time.Millisecond {
			t.Errorf("10 operations of 1 s took %v with 3 at once, want 4 s", took)
		}
		wantIdle(t, l)
	})
}

func TestLaneCapacityChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{Capacity: 4})
		errs := make(chan error, 20)
		for range 20 {
			go func() { errs <- hold(t.Context(), l, Caller{}, time.Second) }()
		}
		synctest.Wait()
		for _, step := range []struct{ capacity, inFlight int }{{1, 4}, {6, 6}, {2, 6}} {
			l.SetCapacity(step.capacity)
			synctest.Wait()
			if s := l.Stats(); s.InFlight != step.inFlight || s.Capacity != step.capacity {
				t.Errorf("capacity %d: got %d in flight, want %d", step.capacity, s.InFlight, step.inFlight)
			}
		}
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		if s := l.Stats(); s.InFlight != 2 {
			t.Errorf("got %d in flight after those above the capacity ended, want 2", s.InFlight)
		}
		l.SetCapacity(0)
		synctest.Wait()
		if s := l.Stats(); s.Waiting != 0 || s.Refused.Open != 12 {
			t.Errorf("got %d waiting and %d refused without capacity, want 0 and 12", s.Waiting, s.Refused.Open)
		}
		if err := hold(t.Context(), l, Caller{}, 0); !errors.Is(err, ErrUnavailable) {
			t.Errorf("got %v without capacity, want ErrUnavailable", err)
		}
		if l.ready(laneTime()) {
			t.Error("a lane without capacity is chosen")
		}
		l.SetCapacity(1)
		time.Sleep(time.Second)
		synctest.Wait()
		if err := hold(t.Context(), l, Caller{}, 0); err != nil {
			t.Errorf("got %v with capacity again", err)
		}
		wantIdle(t, l)
	})
}

func TestLaneQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{Name: "hsm", Capacity: 1, Queue: 4})
		type result struct {
			c   Caller
			err error
		}
		results := make(chan result, 20)
		come := func(c Caller) {
			go func() { results <- result{c, hold(t.Context(), l, c, time.Second)} }()
			synctest.Wait()
		}
		greedy, other, third := Caller{"a", "x"}, Caller{"a", "y"}, Caller{"b", "x"}
		for range 5 {
			come(greedy) // one is served, four wait
		}
		come(greedy) // refused itself
		come(third)  // in place of a greedy one
		come(other)  // likewise
		come(other)  // now as many as the greedy ones, so that it is refused itself
		time.Sleep(10 * time.Second)
		got := map[Caller][2]int{}
		for range 9 {
			r := <-results
			n := got[r.c]
			switch {
			case r.err == nil:
				n[0]++
			case errors.Is(r.err, ErrOverloaded):
				n[1]++
			default:
				t.Error(r.err)
			}
			got[r.c] = n
		}
		want := map[Caller][2]int{greedy: {3, 3}, other: {1, 1}, third: {1, 0}}
		for c, n := range want {
			if got[c] != n {
				t.Errorf("%v: got %d served and %d refused, want %v", c, got[c][0], got[c][1], n)
			}
		}
		if n := l.Stats().Refused.Overloaded; n != 4 {
			t.Errorf("counted %d refused, want 4", n)
		}
		wantIdle(t, l)
	})
}

func TestLaneWithoutQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{Queue: -1})
		go hold(t.Context(), l, Caller{}, time.Second)
		synctest.Wait()
		if err := hold(t.Context(), l, Caller{}, 0); !errors.Is(err, ErrOverloaded) {
			t.Errorf("got %v, want ErrOverloaded", err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		wantIdle(t, l)
	})
}

func TestLaneRefusesEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{Capacity: 2})
		warm(t, l, 100*time.Millisecond)
		greedy := Caller{"a", "x"}
		for range 42 { // two in the home; 40 waiting take two seconds
			go hold(t.Context(), l, greedy, 100*time.Millisecond)
		}
		synctest.Wait()
		try := func(c Caller, left time.Duration) (time.Duration, error) {
			ctx, cancel := context.WithTimeout(t.Context(), left)
			defer cancel()
			start := time.Now()
			err := hold(ctx, l, c, 100*time.Millisecond)
			return time.Since(start), err
		}
		if took, err := try(greedy, time.Second); !errors.Is(err, ErrDeadline) || took != 0 {
			t.Errorf("greedy: got %v after %v, want ErrDeadline at once", err, took)
		}
		if took, err := try(Caller{"b", "x"}, 400*time.Millisecond); err != nil {
			t.Errorf("another client: got %v after %v; its turn comes in time", err, took)
		}
		if took, err := try(Caller{"a", "y"}, 400*time.Millisecond); err != nil {
			t.Errorf("another server name: got %v after %v; its turn comes in time", err, took)
		}
		if n := l.Stats().Refused.Deadline; n != 1 {
			t.Errorf("counted %d refused, want 1", n)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		wantIdle(t, l)
	})
}

// TestLaneRefusesTooLate has the home become slower while an operation waits.
func TestLaneRefusesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{})
		warm(t, l, 100*time.Millisecond)
		go hold(t.Context(), l, Caller{}, 950*time.Millisecond)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := hold(ctx, l, Caller{}, time.Second); !errors.Is(err, ErrDeadline) {
			t.Errorf("got %v, want ErrDeadline when the turn came too late", err)
		}
		synctest.Wait()
		wantIdle(t, l)
	})
}

func TestLaneCancelledWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{})
		go hold(t.Context(), l, Caller{}, time.Second)
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 1)
		go func() { errs <- hold(ctx, l, Caller{}, 0) }()
		synctest.Wait()
		cancel()
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want the context's error", err)
		}
		if s := l.Stats(); s.Waiting != 0 || s.InFlight != 1 {
			t.Errorf("got %+v, want nobody waiting", s)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		wantIdle(t, l)
	})
}

func TestFlowsAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{Capacity: 1, Queue: 1 << 20})
		done := make(chan error)
		const n = 3 * maxSNIs
		for i := range n {
			go func() { done <- hold(t.Context(), l, Caller{"a", time.Duration(i).String()}, time.Second) }()
		}
		synctest.Wait()
		l.mu.Lock()
		a := l.root.children["a"]
		flows, shared := len(a.children), 0
		if a.shared != nil {
			shared = a.shared.queued
		}
		l.mu.Unlock()
		if flows != maxSNIs || shared != n-1-maxSNIs {
			t.Fatalf("got %d flows and %d waiting in the shared one, want %d and the rest", flows, shared, maxSNIs)
		}
		for range n {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		wantIdle(t, l)

		// Names that come and go while one is always there leave no more than the bound behind.
		stop := make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				default:
					hold(t.Context(), l, Caller{"b", "always"}, time.Second)
				}
			}
		}()
		for i := range 4 * maxSNIs {
			hold(t.Context(), l, Caller{"a", time.Duration(i).String()}, time.Second)
			if n := flowsOf(l, "a"); n > 8 {
				t.Fatalf("got %d flows of which one is in use", n)
			}
		}
		close(stop)
		<-done
		wantIdle(t, l)
	})
}

func TestLaneUncontendedDoesNotAllocate(t *testing.T) {
	l := NewLane(LaneConfig{Capacity: 2, Hedge: HedgeConfig{Percentile: .95}})
	ctx, c := t.Context(), Caller{"peer", "sni"}
	got := testing.AllocsPerRun(1000, func() {
		p, err := l.acquire(ctx, c, classP256, 0, laneTime())
		if err != nil {
			t.Fatal(err)
		}
		l.release(ctx, &p, nil)
	})
	if got != 0 {
		t.Errorf("got %v allocations, want none", got)
	}
}

func BenchmarkLaneUncontended(b *testing.B) {
	l := NewLane(LaneConfig{Capacity: 2})
	ctx, c := b.Context(), Caller{"peer", "sni"}
	b.ReportAllocs()
	for b.Loop() {
		p, err := l.acquire(ctx, c, classP256, 0, laneTime())
		if err != nil {
			b.Fatal(err)
		}
		l.release(ctx, &p, nil)
	}
}

func BenchmarkLaneContended(b *testing.B) {
	l := NewLane(LaneConfig{Capacity: 2})
	b.ReportAllocs()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		ctx, c := b.Context(), Caller{"peer", "sni"}
		for pb.Next() {
			p, err := l.acquire(ctx, c, classP256, 0, laneTime())
			if err != nil {
				b.Error(err)
				return
			}
			l.release(ctx, &p, nil)
		}
	})
}

func TestCapacityThatGoesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{Capacity: 1})
		l.SetCapacity(0)
		done := make(chan error)
		come := func(c Caller) {
			go func() {
				p, err := l.acquire(t.Context(), c, classP256, time.Hour, laneTime())
				if err == nil {
					l.release(t.Context(), &p, nil)
				}
				done <- err
			}()
			synctest.Wait()
		}
		callers := []Caller{{"a", "1"}, {"a", "2"}, {"b", "1"}}
		for _, c := range callers {
			come(c)
		}
		before := l.root.clock
		for range 10 {
			l.SetCapacity(0)
		}
		for _, c := range callers { // their flows are the same still
			come(c)
		}
		if len(l.root.active) != 2 || flowsOf(l, "a") != 2 || l.root.children["a"].queued != 4 || l.root.clock != before {
			t.Errorf("got %d clients with flows, %d of a, want 2 and 2; clock %v, was %v", len(l.root.active), flowsOf(l, "a"), l.root.clock, before)
		}
		l.SetCapacity(1)
		for range 2 * len(callers) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		wantIdle(t, l)
	})
}

func TestFastHomeIsSentWorkAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLane(LaneConfig{Capacity: 2})
		done := make(chan error)
		come := func(n int) {
			for range n {
				go func() { done <- hold(t.Context(), l, Caller{}, 100*time.Microsecond) }()
			}
			synctest.Wait()
		}
		come(1000)
		for range 1000 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		come(20)
		if s := l.Stats(); s.InFlight != 8 || s.Limit != 2 || s.Capacity != 2 {
			t.Errorf("got %+v, want four times the capacity in flight", s)
		}
		l.SetCapacity(0)
		if s := l.Stats(); s.InFlight != 8 || s.Waiting != 0 || s.Limit != 0 {
			t.Errorf("got %+v, want nothing sent ahead without capacity", s)
		}
		for range 20 {
			<-done
		}
		wantIdle(t, l)
	})
}
