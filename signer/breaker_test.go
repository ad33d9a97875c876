package signer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestBreakerOpensAndRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		lane := NewLane(LaneConfig{Name: "hsm", Capacity: 10, Breaker: BreakerConfig{Failures: 3, MaxOpen: 4 * time.Second},
			Logger: slog.New(slog.NewTextHandler(&log, nil))})
		k := script(t, "hsm", fails(ErrUnavailable))
		e, _ := entryOf(t, Home{Key: k, Lane: lane})
		// Failures that are not in succession do not open it.
		for range 3 {
			signOnce(t, e)
			signOnce(t, e)
			k.sign = fails(nil)
			signOnce(t, e)
			k.sign = fails(ErrUnavailable)
		}
		if s := lane.Stats(); s.Breaker != "closed" || s.Opened != 0 {
			t.Fatalf("got %+v, want closed", s)
		}
		for range 3 {
			signOnce(t, e)
		}
		for i, open := range []time.Duration{1, 2, 4, 4} {
			open *= time.Second
			calls := k.calls.Load()
			time.Sleep(open*4/5 - time.Millisecond)
			if _, err := signOnce(t, e); !errors.Is(err, ErrUnavailable) || k.calls.Load() != calls || lane.Stats().Breaker != "open" {
				t.Fatalf("opening %d: the home was asked within %v", i, open*4/5)
			}
			time.Sleep(open/5 + 2*time.Millisecond)
			if i == 3 {
				break
			}
			signOnce(t, e)
			if k.calls.Load() != calls+1 {
				t.Fatalf("opening %d: the home was asked %d times after %v, want once", i, k.calls.Load()-calls, open)
			}
		}
		// The trial is one operation, however many come.
		k.sign = takes(time.Second)
		calls := k.calls.Load()
		for range 10 {
			go signOnce(t, e)
		}
		synctest.Wait()
		if s := lane.Stats(); s.Breaker != "half-open" || s.InFlight != 1 || k.calls.Load() != calls+1 {
			t.Fatalf("got %+v and %d calls, want one trial", s, k.calls.Load()-calls)
		}
		time.Sleep(2 * time.Second)
		for range 10 {
			go signOnce(t, e)
		}
		synctest.Wait()
		if s := lane.Stats(); s.Breaker != "closed" || s.InFlight != 10 || s.Opened != 1 {
			t.Fatalf("got %+v, want all let in after a trial that went well", s)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		wantIdle(t, lane)
		if got := log.String(); strings.Count(got, "left alone") != 1 || strings.Count(got, "well again") != 1 || !strings.Contains(got, "home=hsm") {
			t.Errorf("got log %s", got)
		}
	})
}

// TestTrialThatIsAbandoned has the caller of the trial go away: the next operation is the trial.
func TestTrialThatIsAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lane := NewLane(LaneConfig{Breaker: BreakerConfig{Failures: 1}})
		k := script(t, "hsm", fails(ErrUnavailable))
		e, _ := entryOf(t, Home{Key: k, Lane: lane})
		signOnce(t, e)
		time.Sleep(time.Second)
		k.sign = takes(time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Millisecond, cancel)
		e.Sign(ctx, Caller{}, p256Alg, zeros)
		if s := lane.Stats(); s.Breaker != "half-open" || s.InFlight != 0 {
			t.Fatalf("got %+v, want half-open and nobody in the home", s)
		}
		if _, err := signOnce(t, e); err != nil || lane.Stats().Breaker != "closed" {
			t.Errorf("got %v and %s, want the next trial to close the breaker", err, lane.Stats().Breaker)
		}
		wantIdle(t, lane)
	})
}

// TestLateAnswersDoNotCount has operations answer that were begun before the breaker opened.
func TestLateAnswersDoNotCount(t *testing.T) {
	b := breaker{config: BreakerConfig{Failures: 1}.withDefaults()}
	b.record(ill, false, 0)
	b.record(well, false, 0)
	if ok, _ := b.admit(0); ok || b.state != open {
		t.Errorf("got %v, want an open breaker", b.state)
	}
	if ok, trial := b.admit(time.Second); !ok || !trial {
		t.Fatal("no trial after a second")
	}
	b.record(ill, false, time.Second)
	if b.state != halfOpen || !b.trial {
		t.Errorf("got %v, want the trial to go on", b.state)
	}
	if change := b.record(well, true, time.Second); change != hasClosed {
		t.Errorf("got %v", b.state)
	}
}

func TestProbe(t *testing.T) {
	for label := range testKeys() {
		e, _ := entryOf(t, Home{Key: memoryKey(t, label)}, Home{Key: memoryKey(t, label), Lane: NewLane(LaneConfig{})})
		for home := -1; home < 2; home++ {
			if err := e.Probe(t.Context(), home); err != nil {
				t.Errorf("%s, home %d: %v", label, home, err)
			}
		}
		if err := e.Probe(t.Context(), 2); !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v for a home that is not there", err)
		}
	}
}

func TestProbeTellsTheBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &faultyKey{Key: memoryKey(t, "p256"), home: "hsm", healthy: true, err: ErrUnavailable}
		lane := NewLane(LaneConfig{})
		e, _ := entryOf(t, Home{Key: k, Lane: lane}, Home{Key: memoryKey(t, "p256")})
		if err := e.Probe(t.Context(), 1); err != nil {
			t.Error(err)
		}
		for range 5 {
			if err := e.Probe(t.Context(), -1); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "hsm") {
				t.Errorf("got %v, want ErrUnavailable of the home", err)
			}
		}
		if s := lane.Stats(); s.Breaker != "open" {
			t.Fatalf("got %+v after failed probes", s)
		}
		k.err = nil
		if err := e.Probe(t.Context(), 0); err != nil || lane.Stats().Breaker != "closed" {
			t.Errorf("got %v and %s, want a good probe to close the breaker at once", err, lane.Stats().Breaker)
		}
	})
	// A signature that does not verify is a failure too.
	k := &constKey{Key: memoryKey(t, "p256"), sig: []byte("no signature")}
	lane := NewLane(LaneConfig{Breaker: BreakerConfig{Failures: 1}})
	e, _ := entryOf(t, Home{Key: k, Lane: lane})
	if err := e.Probe(t.Context(), 0); err == nil || lane.Stats().Breaker != "open" {
		t.Errorf("got %v and %s for a wrong signature", err, lane.Stats().Breaker)
	}
}

func TestProbeOfPanickingKey(t *testing.T) {
	k := script(t, "hsm", func(context.Context) error { panic("fault") })
	e, _ := entryOf(t, Home{Key: k, Lane: NewLane(LaneConfig{})})
	if err := e.Probe(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "fault") {
		t.Errorf("got %v, want an error of the panic", err)
	}
}

func TestMissingKeyLeavesOthersAlone(t *testing.T) {
	gone := fmt.Errorf("%w: %w", ErrNotFound, ErrUnavailable)
	lane := NewLane(LaneConfig{})
	e, _ := entryOf(t, Home{Key: script(t, "hsm", fails(gone)), Lane: lane}, Home{Key: script(t, "spare", fails(nil)), Priority: 1})
	for range 20 {
		if out, err := signOnce(t, e); err != nil || out.Home != "spare" {
			t.Errorf("got %q, %v, want the other home", out.Home, err)
		}
		if err := e.Probe(t.Context(), 0); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
	}
	if s := lane.Stats(); s.Breaker != "closed" || s.Failed != 0 {
		t.Errorf("got %+v, want the place open for its other keys", s)
	}
}
