package signer

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// hedgedPair returns a key with a first home that is known to take 10 ms, and a second one that takes 5 ms.
func hedgedPair(t *testing.T, c HedgeConfig) (e *Entry, r *Registry, one, two *scriptKey) {
	t.Helper()
	one, two = script(t, "one", takes(10*time.Millisecond)), script(t, "two", takes(5*time.Millisecond))
	e, r = entryOf(t, Home{Key: one, Lane: NewLane(LaneConfig{Capacity: 64, Hedge: c})},
		Home{Key: two, Priority: 1, Lane: NewLane(LaneConfig{Capacity: 64})})
	for range 320 {
		if out, err := signOnce(t, e); err != nil || out.Home != "one" {
			t.Fatalf("got %+v, %v", out, err)
		}
	}
	return e, r, one, two
}

func wantQuiet(t *testing.T, e *Entry, r *Registry) {
	t.Helper()
	r.Wait()
	for _, h := range e.Homes {
		wantIdle(t, h.Lane)
	}
}

func TestHedgeAfterPercentile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r, one, two := hedgedPair(t, HedgeConfig{Percentile: .95})
		if n := two.calls.Load(); n != 0 {
			t.Errorf("the second home was asked %d times while the first took as long as ever", n)
		}
		cancelled := false
		one.sign = func(ctx context.Context) error {
			<-ctx.Done()
			cancelled = context.Cause(ctx) == errHedged
			return ctx.Err()
		}
		start := time.Now()
		out, err := signOnce(t, e)
		took := time.Since(start)
		if err != nil || out.Home != "two" || !out.Hedged || out.Tries != 2 {
			t.Errorf("got %+v, %v, want the second home's answer", out, err)
		}
		if took < 15*time.Millisecond || took > 17*time.Millisecond {
			t.Errorf("took %v, want what the first usually takes, within an eighth, and the second's time", took)
		}
		wantQuiet(t, e, r)
		if s := e.Homes[0].Lane.Stats(); !cancelled || s.Hedges != 1 || s.HedgesWon != 1 || s.Failed != 0 {
			t.Errorf("got %+v, first home cancelled: %v", s, cancelled)
		}
		// The first may still win.
		one.sign = takes(14 * time.Millisecond)
		if out, err := signOnce(t, e); err != nil || out.Home != "one" || !out.Hedged {
			t.Errorf("got %+v, %v, want the first home's answer", out, err)
		}
		wantQuiet(t, e, r)
		if s := e.Homes[0].Lane.Stats(); s.Hedges != 2 || s.HedgesWon != 1 {
			t.Errorf("got %d hedges and %d won, want 2 and 1", s.Hedges, s.HedgesWon)
		}
		if got := e.Homes[1].Lane.Stats().Latency.P50; got < 5*time.Millisecond {
			t.Errorf("the second home's latency is %v after it was cancelled early, want the 5 ms of its one answer", got)
		}
	})
}

func TestNoHedge(t *testing.T) {
	for _, tt := range []struct {
		name  string
		c     HedgeConfig
		sleep time.Duration
	}{
		{"off", HedgeConfig{}, time.Second},
		{"before the floor", HedgeConfig{Percentile: .95, Min: 2 * time.Second}, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, r, one, two := hedgedPair(t, tt.c)
				one.sign = takes(tt.sleep)
				out, err := signOnce(t, e)
				if err != nil || out.Home != "one" || out.Hedged || two.calls.Load() != 0 {
					t.Errorf("got %+v, %v, %d calls of the second home", out, err, two.calls.Load())
				}
				wantQuiet(t, e, r)
			})
		})
	}
	t.Run("too few results", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			one, two := script(t, "one", takes(time.Millisecond)), script(t, "two", fails(nil))
			e, r := entryOf(t, Home{Key: one, Lane: NewLane(LaneConfig{Hedge: HedgeConfig{Percentile: .5, Budget: 1}})}, Home{Key: two, Priority: 1})
			for i := range enough {
				one.sign = takes(time.Duration(i) * time.Millisecond)
				if out, err := signOnce(t, e); err != nil || out.Hedged {
					t.Fatalf("operation %d: got %+v, %v", i, out, err)
				}
			}
			r.Wait()
		})
	})
}

func TestHedgeBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r, one, two := hedgedPair(t, HedgeConfig{Percentile: .5, Budget: .1})
		one.sign = takes(20 * time.Millisecond)
		before := two.calls.Load()
		for range 200 {
			if _, err := signOnce(t, e); err != nil {
				t.Fatal(err)
			}
		}
		// A tenth of 200, and what was saved up.
		if n := two.calls.Load() - before; n < 28 || n > 31 {
			t.Errorf("the second home was asked %d times in 200, want the budget's 20 and 10 saved", n)
		}
		wantQuiet(t, e, r)
	})
}

// TestHedgeBudgetOfManyAtOnce has more operations take long together than there are hedges saved.
func TestHedgeBudgetOfManyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r, one, two := hedgedPair(t, HedgeConfig{Percentile: .95})
		one.sign = takes(150 * time.Millisecond) // much longer than ever, but not as if it hung
		for range 60 {
			go signOnce(t, e)
		}
		time.Sleep(2 * time.Second)
		if n := two.calls.Load(); n != 10 {
			t.Errorf("the second home was asked %d times, want the 10 that were saved", n)
		}
		wantQuiet(t, e, r)
	})
}

// TestHangingHomeCostsNothing has a home hang for good. When the budget is spent, operations are hedged late and free of charge, until
// the breaker has opened.
func TestHangingHomeCostsNothing(t *testing.T) {
	for name, atOnce := range map[string]int{"one by one": 1, "many at once": 60} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, r, one, _ := hedgedPair(t, HedgeConfig{Percentile: .95})
				one.sign = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
				late := e.Homes[0].Lane.hedges.late(e.class)
				for range 60 / atOnce {
					var all sync.WaitGroup
					for range atOnce {
						all.Go(func() {
							ctx, cancel := context.WithTimeout(t.Context(), time.Second)
							defer cancel()
							start := time.Now()
							if _, out, err := e.Sign(ctx, Caller{}, p256Alg, zeros); err != nil {
								t.Errorf("lost an operation: %v, %+v", err, out)
							} else if took := time.Since(start); took > 2*late {
								t.Errorf("took %v: %+v", took, out)
							}
						})
					}
					all.Wait()
				}
				if got := e.Homes[0].Lane.Stats().Breaker; got != "open" {
					t.Errorf("the breaker is %s", got)
				}
				wantQuiet(t, e, r)
			})
		})
	}
}

// TestTrialsAreHedged has a home hang for good. Its breaker's trials may not cost an operation, though hedging is off.
func TestTrialsAreHedged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r, one, two := hedgedPair(t, HedgeConfig{})
		one.sign = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		lost := 0
		for range 600 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			start := time.Now()
			if _, out, err := e.Sign(ctx, Caller{}, p256Alg, zeros); err != nil {
				lost++
			} else if took := time.Since(start); took > 50*time.Millisecond {
				t.Fatalf("took %v: %+v", took, out)
			}
			cancel()
			time.Sleep(100 * time.Millisecond)
		}
		if lost != 5 {
			t.Errorf("lost %d operations, want the 5 that open the breaker", lost)
		}
		// One minute: trials after 1, 3, 7, 15, 31 and 61 seconds, a little less each.
		if n := one.calls.Load() - 320 - 5; n < 5 || n > 7 {
			t.Errorf("got %d trials in a minute, want six", n)
		}
		two.sign = takes(30 * time.Millisecond)
		one.sign = takes(time.Millisecond)
		time.Sleep(30 * time.Second)
		if out, err := signOnce(t, e); err != nil || out.Home != "one" || e.Homes[0].Lane.Stats().Breaker != "closed" {
			t.Errorf("got %+v, %v, %s, want the home to be back", out, err, e.Homes[0].Lane.Stats().Breaker)
		}
		wantQuiet(t, e, r)
	})
}

func TestHedgeErrors(t *testing.T) {
	refuses := errors.New("no such mechanism")
	after := func(d time.Duration, err error) func(context.Context) error {
		return func(ctx context.Context) error {
			if e := takes(d)(ctx); e != nil {
				return e
			}
			return err
		}
	}
	for _, tt := range []struct {
		name     string
		one, two func(context.Context) error
		want     error
		home     string
	}{
		{"first away before a second is asked", fails(ErrUnavailable), takes(time.Second), nil, "two"},
		{"first refuses", fails(refuses), takes(time.Second), refuses, "one"},
		{"first refuses after a second was asked", after(50*time.Millisecond, refuses), takes(time.Second), nil, "two"},
		{"second away", takes(time.Second), fails(ErrUnavailable), nil, "one"},
		{"both away", after(time.Second, ErrUnavailable), fails(ErrUnavailable), ErrUnavailable, "one"},
		{"first refuses, then second away", after(50*time.Millisecond, refuses), after(time.Second, ErrUnavailable), refuses, "one"},
		{"second away, first refuses", after(time.Second, refuses), fails(ErrUnavailable), refuses, "one"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, r, one, two := hedgedPair(t, HedgeConfig{Percentile: .95})
				one.sign, two.sign = tt.one, tt.two
				one.calls.Store(0)
				sig, out, err := e.Sign(t.Context(), Caller{}, p256Alg, zeros)
				if !errors.Is(err, tt.want) || out.Home != tt.home || err == nil && !bytes.Equal(sig, []byte(tt.home)) {
					t.Errorf("got %q, %+v, %v, want %v of %s", sig, out, err, tt.want, tt.home)
				}
				if one.calls.Load() != 1 || two.calls.Load() > 1 {
					t.Errorf("got %d and %d calls, want one each at most", one.calls.Load(), two.calls.Load())
				}
				wantQuiet(t, e, r)
			})
		})
	}
}

// TestHedgedHomeThatDoesNotObey has a home go on after its context ended: the caller does not wait for it, and Wait does. The input is its own.
func TestHedgedHomeThatDoesNotObey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r, one, two := hedgedPair(t, HedgeConfig{Percentile: .95})
		hang := &keepingKey{scriptKey: one}
		e.Homes[0].Key = hang
		input := bytes.Repeat([]byte{7}, 32)
		start := time.Now()
		if _, out, err := e.Sign(t.Context(), Caller{}, p256Alg, input); err != nil || out.Home != "two" {
			t.Fatalf("got %+v, %v", out, err)
		}
		clear(input)
		if time.Since(start) > 50*time.Millisecond {
			t.Errorf("took %v, although the second home answered", time.Since(start))
		}
		two.sign = takes(time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := e.Sign(ctx, Caller{}, p256Alg, input); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 2*time.Second {
			t.Errorf("got %v after %v, want the deadline to hold", err, time.Since(start))
		}
		r.Wait()
		if took := time.Since(start); took < time.Minute {
			t.Errorf("Wait returned after %v, with a goroutine left", took)
		}
		if hang.changed.Load() {
			t.Error("the input changed while a home was at work")
		}
		wantQuiet(t, e, r)
	})
}

// keepingKey signs for a minute, whatever its context says, and looks at its input at the end.
type keepingKey struct {
	*scriptKey
	changed atomic.Bool
}

func (k *keepingKey) Sign(_ context.Context, _ Algorithm, input []byte) ([]byte, error) {
	was := bytes.Clone(input)
	time.Sleep(time.Minute)
	if !bytes.Equal(was, input) {
		k.changed.Store(true)
	}
	return nil, fmt.Errorf("token: %w", ErrUnavailable)
}

func TestLatencyPercentiles(t *testing.T) {
	var l latency
	if l.percentiles() != (Percentiles{}) {
		t.Errorf("got %v without results", l.percentiles())
	}
	for i := range 1000 {
		l.add(time.Duration(i+1)*time.Millisecond, 0)
	}
	for q, want := range map[float64]time.Duration{.01: 10, .5: 500, .95: 950, .99: 990, 1: 1000} {
		want *= time.Millisecond
		if got := l.percentile(q); got < want || got > want+want/8 {
			t.Errorf("percentile %v: got %v, want %v and an eighth at most", q, got, want)
		}
	}
	for d := time.Duration(0); d < time.Hour; d += d/50 + 100 {
		i := latencyBucket(d)
		if i > 0 && latencyBound(i-1) > d || i < latencyBuckets-1 && latencyBound(i) <= d {
			t.Fatalf("%v is in the bucket that ends at %v", d, latencyBound(i))
		}
	}
	// Results of long ago are forgotten.
	for i := range time.Duration(400) {
		l.add(time.Microsecond, (i+100)*time.Second)
	}
	if got := l.percentile(.99); got > 10*time.Microsecond {
		t.Errorf("got %v from results of long ago", got)
	}
}

func TestDecryptGoesThroughTheLane(t *testing.T) {
	lane := NewLane(LaneConfig{})
	k := &faultyKey{Key: memoryKey(t, "rsa"), home: "hsm", healthy: true}
	e, _ := entryOf(t, Home{Key: k, Decrypt: true, Lane: lane})
	if _, out, err := e.DecryptRaw(t.Context(), Caller{}, make([]byte, 256)); err != nil || out.Home != "hsm" || out.Tries != 1 || lane.Stats().Done != 1 {
		t.Errorf("got %+v, %v, %+v", out, err, lane.Stats())
	}
	if _, _, err := e.Sign(t.Context(), Caller{}, Algorithm{PSS, crypto.SHA256}, zeros); err != nil || lane.Stats().Done != 2 {
		t.Errorf("got %v", err)
	}
	wantIdle(t, lane)
}

// TestTrialAfterAnAbandonedOneIsHedged has the caller of a trial go away before the home answers.
func TestTrialAfterAnAbandonedOneIsHedged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := script(t, "one", fails(ErrUnavailable)), script(t, "two", takes(time.Millisecond))
		e, r := entryOf(t, Home{Key: one, Lane: NewLane(LaneConfig{Breaker: BreakerConfig{Failures: 1}})}, Home{Key: two, Priority: 1})
		signOnce(t, e)
		time.Sleep(time.Second)
		one.sign = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		for i, want := range []error{context.Canceled, nil} {
			stay := []time.Duration{time.Millisecond, time.Second}[i]
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(stay, cancel)
			if _, out, err := e.Sign(ctx, Caller{}, p256Alg, zeros); !errors.Is(err, want) {
				t.Errorf("got %v, %+v, want %v", err, out, want)
			}
			cancel()
			synctest.Wait()
		}
		if n := one.calls.Load(); n != 3 {
			t.Errorf("the home was asked %d times, want for the failure and both trials", n)
		}
		r.Wait()
	})
}

// TestPanicOfALoserIsTold has a key panic in one home while another home answers.
func TestPanicOfALoserIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r, one, _ := hedgedPair(t, HedgeConfig{Percentile: .95})
		var log bytes.Buffer
		e.Homes[0].Lane.config.Logger = slog.New(slog.NewTextHandler(&log, nil))
		one.sign = func(context.Context) error {
			time.Sleep(14 * time.Millisecond)
			panic("fault in the module")
		}
		if out, err := signOnce(t, e); err != nil || out.Home != "two" {
			t.Errorf("got %+v, %v", out, err)
		}
		wantQuiet(t, e, r)
		if !strings.Contains(log.String(), "fault in the module") {
			t.Errorf("logged %q", log.String())
		}
	})
}
