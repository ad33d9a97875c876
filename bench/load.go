package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// sample is what one run of a load measured.
type sample struct {
	ops      int
	elapsed  time.Duration
	p50, p99 time.Duration
	cpu      time.Duration // of one operation, over all processes of the bench
}

func (s sample) rate() float64 { return float64(s.ops) / s.elapsed.Seconds() }

// maxLatencies bounds what each caller remembers; beyond it, it keeps counting.
const maxLatencies = 1 << 18

// load runs op by callers goroutines for d and measures. The first error ends it. An operation that is under way when d
// ends is waited for, but does not count.
func load(ctx context.Context, callers int, d time.Duration, pids []int, op func(ctx context.Context, caller int) error) (sample, error) {
	spent := cpuTime(pids)
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
	s := sampleOf(slices.Concat(lats...), d)
	s.ops = 0 // all of them, remembered or not
	for _, n := range counts {
		s.ops += n
	}
	if s.ops > 0 {
		s.cpu = (cpuTime(pids) - spent) / time.Duration(s.ops)
	}
	return s, nil
}

func sampleOf(lats []time.Duration, d time.Duration) sample {
	s := sample{elapsed: d, ops: len(lats)}
	if len(lats) > 0 {
		slices.Sort(lats)
		s.p50, s.p99 = lats[len(lats)/2], lats[len(lats)*99/100]
	}
	return s
}

func self() []int { return descendants(os.Getpid()) }

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

// cpuTime is the processor time, user and system, that processes have used. A process that is gone counts nothing.
func cpuTime(pids []int) (sum time.Duration) {
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture that Go runs on
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// The second field is the program's name in parentheses and may hold spaces.
		_, rest, _ := strings.Cut(string(b), ") ")
		fields := strings.Fields(rest)
		for _, i := range []int{11, 12} { // utime and stime, proc(5)
			n, err := strconv.Atoi(fields[i])
			if err == nil {
				sum += time.Duration(n) * tick
			}
		}
	}
	return sum
}

// descendants returns a process and those that it has started, and they.
func descendants(pid int) []int {
	all := []int{pid}
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)) // gone: it has none
	for _, t := range tasks {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		if err != nil {
			continue
		}
		for _, f := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				all = append(all, descendants(child)...)
			}
		}
	}
	return all
}
