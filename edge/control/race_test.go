package control

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// places are candidates that differ only in their place in the list.
func places(n int) (list []candidate, index func(candidate) int) {
	at := map[*peerEdge]int{}
	for i := range n {
		e := &peerEdge{}
		at[e] = i
		list = append(list, candidate{e: e})
	}
	return list, func(k candidate) int { return at[k.e] }
}

func TestRace(t *testing.T) {
	lost := &tunnel.FlowError{Result: tunnel.ResultSessionLost}
	refused := &tunnel.FlowError{Result: tunnel.ResultRefused, Remote: true}
	type answer struct {
		after time.Duration
		err   error
	}
	never := answer{after: time.Hour}
	for _, tt := range []struct {
		name    string
		answers []answer
		won     int // -1: nobody
		err     error
		took    time.Duration
		tried   int32
	}{
		{"the first at once", []answer{{}, {}}, 0, nil, 0, 1},
		{"the first is slow but in time", []answer{{after: 200 * time.Millisecond}, {}}, 0, nil, 200 * time.Millisecond, 1},
		{"the first is silent", []answer{never, {}}, 1, nil, hedgeDelay, 2},
		{"the first is slower than the second", []answer{{after: 350 * time.Millisecond}, {after: 100 * time.Millisecond}}, 0, nil, 350 * time.Millisecond, 2},
		{"two are silent", []answer{never, never, {}}, 2, nil, 2 * hedgeDelay, 3},
		{"the first fails", []answer{{err: lost}, {}}, 1, nil, 0, 2},
		{"the first fails late", []answer{{after: 100 * time.Millisecond, err: lost}, {}}, 1, nil, 100 * time.Millisecond, 2},
		{"silent, then failing, then good", []answer{never, {err: lost}, {}}, 2, nil, hedgeDelay, 3},
		{"the destination refuses", []answer{{err: refused}, {}}, -1, refused, 0, 1},
		{"the destination refuses beside a silent one", []answer{never, {err: refused}}, -1, refused, hedgeDelay, 2},
		{"all fail", []answer{{err: lost}, {err: lost}}, -1, lost, 0, 2},
		{"one alone is waited for", []answer{{after: 5 * time.Second}}, 0, nil, 5 * time.Second, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				list, index := places(len(tt.answers))
				var tried, discarded, opened atomic.Int32
				start := time.Now()
				got, via, err := race(t.Context(), list, func(ctx context.Context, k candidate) (int, error) {
					tried.Add(1)
					a := tt.answers[index(k)]
					select {
					case <-time.After(a.after):
					case <-ctx.Done():
						return 0, ctx.Err()
					}
					if a.err != nil {
						return 0, a.err
					}
					opened.Add(1)
					return index(k) + 100, nil
				}, func(int) { discarded.Add(1) })
				if tt.won < 0 {
					if !errors.Is(err, tt.err) {
						t.Errorf("error %v, want %v", err, tt.err)
					}
				} else if err != nil || got != tt.won+100 || index(via) != tt.won {
					t.Errorf("got %d over %d, %v, want %d", got, index(via), err, tt.won)
				}
				if took := time.Since(start); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				if tried.Load() != tt.tried {
					t.Errorf("%d tried, want %d", tried.Load(), tt.tried)
				}
				if kept := opened.Load() - discarded.Load(); kept > 1 {
					t.Errorf("%d of %d are kept", kept, opened.Load())
				}
			})
		})
	}
}

// The caller's end is the end of all lanes, and leaves nothing behind.
func TestRaceCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		list, _ := places(3)
		ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
		defer cancel()
		_, _, err := race(ctx, list, func(ctx context.Context, _ candidate) (int, error) {
			<-ctx.Done()
			return 0, &tunnel.FlowError{Result: tunnel.ResultTimedOut, Err: ctx.Err()}
		}, func(int) { t.Error("something was opened") })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
	})
}
