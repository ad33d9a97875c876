package signer

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var (
	p256Alg = Algorithm{ECDSA, crypto.SHA256}
	zeros   = make([]byte, 32)
)

// scriptKey is a Key in a home of that name whose answers the test gives, in virtual time.
type scriptKey struct {
	Key
	home  string
	calls atomic.Int64
	sign  func(ctx context.Context) error
}

func (k *scriptKey) Info() KeyInfo { return KeyInfo{Home: k.home} }
func (k *scriptKey) Sign(ctx context.Context, alg Algorithm, input []byte) ([]byte, error) {
	k.calls.Add(1)
	if err := k.sign(ctx); err != nil {
		return nil, err
	}
	return []byte(k.home), nil
}

// takes answers after d, or when the context ends.
func takes(d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func fails(err error) func(context.Context) error {
	return func(context.Context) error { return err }
}

func script(t testing.TB, home string, sign func(context.Context) error) *scriptKey {
	return &scriptKey{Key: memoryKey(t, "p256"), home: home, sign: sign}
}

// entryOf returns the one key with these homes, and its registry.
func entryOf(t testing.TB, homes ...Home) (*Entry, *Registry) {
	t.Helper()
	r := NewRegistry()
	if err := r.Replace(homes); err != nil {
		t.Fatal(err)
	}
	if len(r.Entries()) != 1 {
		t.Fatalf("got %d keys, want one with several homes", len(r.Entries()))
	}
	return r.Entries()[0], r
}

func signOnce(t testing.TB, e *Entry) (Outcome, error) {
	_, out, err := e.Sign(t.Context(), Caller{}, p256Alg, zeros)
	return out, err
}

func TestLoadIsSpreadByWeightAndCapacity(t *testing.T) {
	tests := []struct {
		name                 string
		capacity1, capacity2 int
		weight1, weight2     int
		priority2            int
		parallel             int
		least1, most1        int // of parallel, in the first home
	}{
		{"alike", 10, 10, 0, 0, 0, 10, 5, 5},
		{"weights", 20, 20, 3, 1, 0, 20, 15, 15},
		{"capacities", 15, 5, 1, 1, 0, 20, 15, 15},
		{"lower class first", 10, 10, 1, 1000, 1, 20, 20, 20},
		{"alike, one at a time", 10, 10, 0, 0, 0, 1, 0, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				one, two := script(t, "one", takes(time.Second)), script(t, "two", takes(time.Second))
				e, _ := entryOf(t,
					Home{Key: one, Weight: tt.weight1, Lane: NewLane(LaneConfig{Capacity: tt.capacity1})},
					Home{Key: two, Weight: tt.weight2, Priority: tt.priority2, Lane: NewLane(LaneConfig{Capacity: tt.capacity2})})
				for range tt.parallel {
					go signOnce(t, e)
					synctest.Wait() // so that each sees the load of those before
				}
				s1, s2 := e.Homes[0].Lane.Stats(), e.Homes[1].Lane.Stats()
				if got := s1.InFlight + s1.Waiting; got < tt.least1 || got > tt.most1 {
					t.Errorf("got %d and %d, want %d to %d of %d in the first", got, s2.InFlight+s2.Waiting, tt.least1, tt.most1, tt.parallel)
				}
				time.Sleep(5 * time.Second)
			})
		})
	}
}

func TestIdleHomesShareByWeight(t *testing.T) {
	one, two := script(t, "one", fails(nil)), script(t, "two", fails(nil))
	e, _ := entryOf(t, Home{Key: one, Weight: 3}, Home{Key: two})
	for range 4000 {
		if _, err := signOnce(t, e); err != nil {
			t.Fatal(err)
		}
	}
	if n := one.calls.Load(); n < 2800 || n > 3200 { // seven standard deviations
		t.Errorf("got %d of 4000 in the home of weight 3 beside 1", n)
	}
}

func TestFailoverIsAtOnceAndFinalErrorsStay(t *testing.T) {
	away := fmt.Errorf("token: %w", ErrUnavailable)
	refuses := errors.New("no such mechanism")
	tests := []struct {
		name         string
		one, two     error
		want         error
		calls1       int64
		calls2       int64
		failovers    uint64
		answeredFrom string
	}{
		{"first answers", nil, nil, nil, 1, 0, 0, "one"},
		{"first away", away, nil, nil, 1, 1, 1, "two"},
		{"both away", away, away, ErrUnavailable, 1, 1, 1, "two"},
		{"first refuses", refuses, nil, refuses, 1, 0, 0, "one"},
		{"first away, second refuses", away, refuses, refuses, 1, 1, 1, "two"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				one, two := script(t, "one", fails(tt.one)), script(t, "two", fails(tt.two))
				e, _ := entryOf(t, Home{Key: one, Lane: NewLane(LaneConfig{})}, Home{Key: two, Priority: 1, Lane: NewLane(LaneConfig{})})
				start := time.Now()
				out, err := signOnce(t, e)
				if !errors.Is(err, tt.want) || time.Since(start) != 0 {
					t.Errorf("got %v after %v, want %v at once", err, time.Since(start), tt.want)
				}
				if one.calls.Load() != tt.calls1 || two.calls.Load() != tt.calls2 || e.Homes[0].Lane.Stats().Failovers != tt.failovers {
					t.Errorf("got %d and %d calls, %d counted", one.calls.Load(), two.calls.Load(), e.Homes[0].Lane.Stats().Failovers)
				}
				if out.Home != tt.answeredFrom || out.Tries != int(tt.calls1+tt.calls2) {
					t.Errorf("got %+v, want home %s", out, tt.answeredFrom)
				}
			})
		})
	}
}

func TestThrottledHomeIsAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		busyUntil := time.Now().Add(500 * time.Millisecond)
		one := script(t, "one", func(context.Context) error {
			if time.Now().Before(busyUntil) {
				return fmt.Errorf("429: %w", ErrThrottled)
			}
			return nil
		})
		two := script(t, "two", fails(nil))
		lane := NewLane(LaneConfig{Capacity: 16})
		e, _ := entryOf(t, Home{Key: one, Lane: lane}, Home{Key: two, Priority: 1})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, out, err := e.Sign(ctx, Caller{}, p256Alg, zeros)
		if err != nil || out.Home != "one" || two.calls.Load() != 0 || out.Tries < 2 || out.Waited < 400*time.Millisecond {
			t.Errorf("got %+v and %v, want the same home, later", out, err)
		}
		s := lane.Stats()
		if s.Throttled != uint64(out.Tries-1) || s.Limit >= 16 || s.Breaker != "closed" || s.Failovers != 0 {
			t.Errorf("got %+v, want a lower limit and nothing else", s)
		}
		for range 400 {
			signOnce(t, e)
		}
		if s := lane.Stats(); s.Limit != 16 {
			t.Errorf("got limit %d after many results, want all of the capacity", s.Limit)
		}
		wantIdle(t, lane)
	})
}

func TestThrottledForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := script(t, "one", fails(ErrThrottled)), script(t, "two", fails(nil))
		lane := NewLane(LaneConfig{Capacity: 16})
		e, _ := entryOf(t, Home{Key: one, Lane: lane}, Home{Key: two, Priority: 1})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, out, err := e.Sign(ctx, Caller{}, p256Alg, zeros)
		if !errors.Is(err, ErrThrottled) || !errors.Is(err, ErrDeadline) || errors.Is(err, ErrUnavailable) || two.calls.Load() != 0 {
			t.Errorf("got %v, want ErrThrottled and ErrDeadline from the one home", err)
		}
		if ctx.Err() != nil || out.Waited < time.Second || lane.Stats().Limit != 1 {
			t.Errorf("got %+v and limit %d: want tries until shortly before the deadline", out, lane.Stats().Limit)
		}
		// Without a deadline there is an end too, and the caller can end it.
		if _, err := signOnce(t, e); !errors.Is(err, ErrThrottled) {
			t.Errorf("got %v without a deadline, want ErrThrottled at last", err)
		}
		wantIdle(t, lane)
	})
}

// TestThrottleHalvesOnce has sixteen operations throttled that were in the home together.
func TestThrottleHalvesOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answer := error(ErrThrottled)
		one := script(t, "one", func(ctx context.Context) error {
			err := answer
			time.Sleep(10 * time.Millisecond)
			return err
		})
		lane := NewLane(LaneConfig{Capacity: 16})
		e, _ := entryOf(t, Home{Key: one, Lane: lane})
		for range 16 {
			go signOnce(t, e)
		}
		synctest.Wait()
		answer = nil
		time.Sleep(10 * time.Millisecond)
		synctest.Wait()
		if s := lane.Stats(); s.Limit != 8 || s.Throttled != 16 {
			t.Errorf("got limit %d after %d throttled, want half once", s.Limit, s.Throttled)
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		wantIdle(t, lane)
	})
}

func TestEndedContextIsNobodysFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lane := NewLane(LaneConfig{Capacity: 4})
		one, two := script(t, "one", takes(time.Second)), script(t, "two", fails(nil))
		e, _ := entryOf(t, Home{Key: one, Lane: lane}, Home{Key: two, Priority: 1})
		for range 20 {
			signOnce(t, e)
		}
		for range 10 {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(900*time.Millisecond, cancel)
			if _, _, err := e.Sign(ctx, Caller{}, p256Alg, zeros); !errors.Is(err, context.Canceled) {
				t.Fatalf("got %v", err)
			}
			// A deadline that leaves no more time than an operation takes says nothing of the home either.
			ctx, cancel = context.WithTimeout(t.Context(), 900*time.Millisecond)
			if _, _, err := e.Sign(ctx, Caller{}, p256Alg, zeros); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("got %v", err)
			}
			cancel()
		}
		if s := lane.Stats(); s.Breaker != "closed" || s.Failed != 0 || two.calls.Load() != 0 {
			t.Errorf("got %+v, want no failure", s)
		}
		one.sign = takes(time.Hour)
		for i := range 6 {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			_, out, err := e.Sign(ctx, Caller{}, p256Alg, zeros)
			cancel()
			if i < 5 && !errors.Is(err, context.DeadlineExceeded) || i == 5 && (err != nil || out.Home != "two") {
				t.Errorf("operation %d: got %v from %s", i, err, out.Home)
			}
		}
		if s := lane.Stats(); s.Breaker != "open" || s.Failed != 5 {
			t.Errorf("got %+v, want the breaker of a home that hangs to open", s)
		}
		wantIdle(t, lane)
	})
}

func TestNoFailoverAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		one := script(t, "one", func(context.Context) error { cancel(); return ErrUnavailable })
		two := script(t, "two", fails(nil))
		e, _ := entryOf(t, Home{Key: one}, Home{Key: two, Priority: 1})
		if _, _, err := e.Sign(ctx, Caller{}, p256Alg, zeros); err == nil || two.calls.Load() != 0 {
			t.Errorf("got %v and %d calls of the second home for a caller who has gone", err, two.calls.Load())
		}
	})
}

func TestBothHomesOpenFailsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := script(t, "one", fails(ErrUnavailable)), script(t, "two", fails(ErrUnavailable))
		e, _ := entryOf(t, Home{Key: one, Lane: NewLane(LaneConfig{})}, Home{Key: two, Lane: NewLane(LaneConfig{})})
		for range 5 {
			if _, err := signOnce(t, e); !errors.Is(err, ErrUnavailable) {
				t.Fatal(err)
			}
		}
		calls := one.calls.Load() + two.calls.Load()
		out, err := signOnce(t, e)
		if !errors.Is(err, ErrUnavailable) || out.Tries != 0 || out.Home != "" || one.calls.Load()+two.calls.Load() != calls {
			t.Errorf("got %v, %+v: want ErrUnavailable with no home asked", err, out)
		}
		one.sign = nil // would panic if called
		if _, _, err := e.Sign(t.Context(), Caller{}, Algorithm{PKCS1v15, crypto.SHA256}, zeros); !errors.Is(err, ErrUnsupported) {
			t.Errorf("got %v for an algorithm that no home has, want ErrUnsupported", err)
		}
	})
}

// TestQueueMovesOnWhenBreakerOpens has operations wait for a home that fails; the other one does them.
func TestQueueMovesOnWhenBreakerOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := script(t, "one", func(context.Context) error { time.Sleep(time.Second); return ErrUnavailable })
		two := script(t, "two", fails(nil))
		lane := NewLane(LaneConfig{Capacity: 1, Breaker: BreakerConfig{Failures: 1}})
		e, _ := entryOf(t, Home{Key: one, Lane: lane}, Home{Key: two, Priority: 1, Lane: NewLane(LaneConfig{})})
		errs := make(chan error, 10)
		for range 10 {
			go func() {
				out, err := signOnce(t, e)
				if err == nil && out.Home != "two" {
					err = fmt.Errorf("home %s", out.Home)
				}
				errs <- err
			}()
		}
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		for range 10 {
			select {
			case err := <-errs:
				if err != nil {
					t.Error(err)
				}
			default:
				t.Fatal("an operation still waits for a home that failed")
			}
		}
		if one.calls.Load() != 1 {
			t.Errorf("the home that failed was asked %d times", one.calls.Load())
		}
		wantIdle(t, lane)
	})
}

// TestHomeWithoutCapacity has the workers of a home go and come back: what waits goes to another home, or waits on if there is none.
func TestHomeWithoutCapacity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := script(t, "one", takes(100*time.Millisecond)), script(t, "two", takes(100*time.Millisecond))
		first, second := NewLane(LaneConfig{Capacity: 1}), NewLane(LaneConfig{Capacity: 1})
		e, _ := entryOf(t, Home{Key: one, Lane: first}, Home{Key: two, Priority: 1, Lane: second})
		type result struct {
			out Outcome
			err error
		}
		results := make(chan result, 30)
		come := func(n int) {
			for range n {
				go func() {
					ctx, cancel := context.WithTimeout(t.Context(), 1950*time.Millisecond)
					defer cancel()
					_, out, err := e.Sign(ctx, Caller{}, p256Alg, zeros)
					results <- result{out, err}
				}()
			}
			synctest.Wait()
		}
		want := func(one, two int) {
			t.Helper()
			got := map[string]int{}
			for range one + two {
				r := <-results
				if r.err != nil {
					t.Error(r.err)
				}
				got[r.out.Home]++
			}
			if got["one"] != one || got["two"] != two {
				t.Errorf("got %v, want %d and %d", got, one, two)
			}
		}
		come(4)
		first.SetCapacity(0)
		come(1)
		want(1, 4) // one was in the home

		second.SetCapacity(0)
		come(5)
		if s := first.Stats(); s.Waiting != 5 || s.InFlight != 0 {
			t.Errorf("got %+v, want five waiting for capacity", s)
		}
		first.SetCapacity(0)
		time.Sleep(maxVoid / 2)
		first.SetCapacity(2)
		want(5, 0)

		// Patience has an end, after which nobody waits.
		first.SetCapacity(0)
		come(1)
		if r := <-results; !errors.Is(r.err, ErrUnavailable) || r.out.Waited != maxVoid {
			t.Errorf("got %v, %+v", r.err, r.out)
		}
		come(1)
		if r := <-results; !errors.Is(r.err, ErrUnavailable) || r.out.Waited != 0 {
			t.Errorf("got %v, %+v, want a refusal at once", r.err, r.out)
		}
		wantIdle(t, first)
		wantIdle(t, second)
	})
}

func TestSingleHomeAllocatesNothingAndStartsNothing(t *testing.T) {
	k := &constKey{Key: memoryKey(t, "p256"), sig: []byte("signature")}
	lane := NewLane(LaneConfig{Capacity: 4, Hedge: HedgeConfig{Percentile: .5, Budget: 1}})
	e, _ := entryOf(t, Home{Key: k, Lane: lane})
	ctx := t.Context()
	if got := testing.AllocsPerRun(1000, func() {
		if _, _, err := e.Sign(ctx, Caller{"peer", "sni"}, p256Alg, zeros); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("got %v allocations, want none", got)
	}
	if e.flights.n != 0 || lane.Stats().Hedges != 0 {
		t.Errorf("a single home was hedged")
	}
	// Nor do two homes without hedging.
	e, _ = entryOf(t, Home{Key: k, Lane: NewLane(LaneConfig{Capacity: 4})}, Home{Key: k, Lane: NewLane(LaneConfig{Capacity: 4})})
	if got := testing.AllocsPerRun(1000, func() { e.Sign(ctx, Caller{"peer", "sni"}, p256Alg, zeros) }); got != 0 {
		t.Errorf("two homes: got %v allocations, want none", got)
	}
}

// constKey always gives the same signature.
type constKey struct {
	Key
	sig []byte
}

func (k *constKey) Supports(Algorithm) bool { return true }
func (k *constKey) Sign(context.Context, Algorithm, []byte) ([]byte, error) {
	return k.sig, nil
}

func BenchmarkEntrySign(b *testing.B) {
	k := &constKey{Key: memoryKey(b, "p256"), sig: []byte("signature")}
	lane := func() *Lane {
		return NewLane(LaneConfig{Capacity: 64, Hedge: HedgeConfig{Percentile: .95}})
	}
	one, _ := entryOf(b, Home{Key: k, Lane: lane()})
	bare, _ := entryOf(b, Home{Key: k})
	two, _ := entryOf(b, Home{Key: k, Lane: NewLane(LaneConfig{Capacity: 64})}, Home{Key: k, Lane: NewLane(LaneConfig{Capacity: 64})})
	hedged, r := entryOf(b, Home{Key: k, Lane: lane()}, Home{Key: k, Lane: lane()})
	defer r.Wait()
	for _, v := range []struct {
		name string
		e    *Entry
	}{{"no lane", bare}, {"one home", one}, {"two homes", two}, {"two homes hedged", hedged}} {
		b.Run(v.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := v.e.Sign(b.Context(), Caller{"peer", "sni"}, p256Alg, zeros); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("key alone", func(b *testing.B) {
		for b.Loop() {
			if _, err := Key(k).Sign(b.Context(), p256Alg, zeros); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// TestHedgedOperationIsPatientToo has all workers of two homes go while an operation waits in one of them.
func TestHedgedOperationIsPatientToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r, one, _ := hedgedPair(t, HedgeConfig{Percentile: .95})
		one.sign = takes(20 * time.Millisecond)
		first, second := e.Homes[0].Lane, e.Homes[1].Lane
		first.SetCapacity(1)
		done := make(chan error, 2)
		for range 2 {
			go func() {
				_, err := signOnce(t, e)
				done <- err
			}()
		}
		synctest.Wait()
		second.SetCapacity(0)
		first.SetCapacity(0)
		time.Sleep(maxVoid / 2)
		first.SetCapacity(1)
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		wantQuiet(t, e, r)
	})
}

// TestPatienceLooksAround has the home come back that nobody waits for.
func TestPatienceLooksAround(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := script(t, "one", takes(time.Millisecond)), script(t, "two", takes(time.Millisecond))
		first, second := NewLane(LaneConfig{}), NewLane(LaneConfig{})
		e, r := entryOf(t, Home{Key: one, Lane: first}, Home{Key: two, Priority: 1, Lane: second})
		first.SetCapacity(0)
		second.SetCapacity(0)
		done := make(chan error, 5)
		for range cap(done) {
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				_, out, err := e.Sign(ctx, Caller{}, p256Alg, zeros)
				if err == nil && (out.Home != "two" || out.Waited < maxVoid/2 || out.Tries != 1) {
					t.Errorf("got %+v", out)
				}
				done <- err
			}()
		}
		time.Sleep(maxVoid / 2)
		second.SetCapacity(1)
		for range cap(done) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if n := first.Stats().Failovers; n != uint64(cap(done)) {
			t.Errorf("got %d fail-overs, want one for each", n)
		}
		wantQuiet(t, e, r)
	})
}

func TestThrottlingOfOneAtATimeIsNotLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		lane := NewLane(LaneConfig{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		e, _ := entryOf(t, Home{Key: script(t, "hsm", fails(ErrThrottled)), Lane: lane})
		if _, err := signOnce(t, e); !errors.Is(err, ErrThrottled) {
			t.Error(err)
		}
		if log.Len() > 0 || lane.Stats().Throttled < 10 {
			t.Errorf("got %d throttled and lines about fewer at once:\n%s", lane.Stats().Throttled, log.String())
		}
	})
}
