package main

import (
	"context"
	"slices"
	"sync"
	"time"
)

// sample is what one run of a load measured.
type sample struct {
	ops      int
	elapsed  time.Duration
	p50, p99 time.Duration
}

func (s sample) rate() float64 { return float64(s.ops) / s.elapsed.Seconds() }

// maxLatencies bounds what each caller remembers; beyond it, it keeps counting.
const maxLatencies = 1 << 18

// load runs op by callers goroutines for d and measures. The first error ends it. An operation that is under way when d
// ends is waited for, but does not count.
func load(ctx context.Context, callers int, d time.Duration, op func(ctx context.Context, caller int) error) (sample, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	lats := make([][]time.Duration, callers)
	counts := make([]int, callers)
	start := time.Now()
	end := start.Add(d)
	for c := range callers {
		wg.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				if err := op(ctx, c); err != nil {
					cancel(err)
					return
				}
				now := time.Now()
				if now.After(end) {
					return
				}
				counts[c]++
				if len(lats[c]) < maxLatencies {
					lats[c] = append(lats[c], now.Sub(began))
				}
			}
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return sample{}, err
	}
	all := slices.Concat(lats...)
	slices.Sort(all)
	s := sample{elapsed: d}
	for _, n := range counts {
		s.ops += n
	}
	if len(all) > 0 {
		s.p50, s.p99 = all[len(all)/2], all[len(all)*99/100]
	}
	return s, nil
}

// median returns the run with the median rate.
func median(runs []sample) sample {
	slices.SortFunc(runs, func(a, b sample) int {
		switch {
		case a.rate() < b.rate():
			return -1
		case a.rate() > b.rate():
			return 1
		}
		return 0
	})
	return runs[len(runs)/2]
}
