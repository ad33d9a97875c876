package edge

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// A tracker counts what is in flight and waits for it to end. The zero value is ready.
type tracker struct {
	mu    sync.Mutex
	n     int
	empty chan struct{} // closed and dropped when n falls to zero; nil if nobody waits
}

func (t *tracker) begin() {
	t.mu.Lock()
	t.n++
	t.mu.Unlock()
}

func (t *tracker) end() {
	t.mu.Lock()
	if t.n--; t.n == 0 && t.empty != nil {
		close(t.empty)
		t.empty = nil
	}
	t.mu.Unlock()
}

// wait returns when nothing is in flight, or with the context's error.
func (t *tracker) wait(ctx context.Context) error {
	t.mu.Lock()
	if t.n == 0 {
		t.mu.Unlock()
		return nil
	}
	if t.empty == nil {
		t.empty = make(chan struct{})
	}
	empty := t.empty
	t.mu.Unlock()
	select {
	case <-empty:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A rate allows a number of events in each second. It may err by a few under contention.
type rate struct {
	limit          uint32
	secondAndCount atomic.Uint64
}

func (r *rate) allow(now time.Time) bool {
	second := uint64(now.Unix()) << 32
	old := r.secondAndCount.Load()
	if old&^0xffff_ffff != second {
		old = second
	}
	if uint32(old) >= r.limit {
		return false
	}
	r.secondAndCount.Store(old + 1)
	return true
}
