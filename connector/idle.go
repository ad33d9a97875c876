package connector

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// errIdle ends a flow of packets that has carried nothing for long.
var errIdle = errors.New("nothing was carried for long")

// An idle ends a flow of packets that carries nothing.
type idle struct {
	limit time.Duration
	began time.Time
	last  atomic.Int64 // since began

	mu    sync.Mutex // guards the field below
	timer *time.Timer
}

// newIdle calls expire with errIdle once nothing has been touched for limit. stop must be called.
func newIdle(limit time.Duration, expire context.CancelCauseFunc) *idle {
	i := &idle{limit: limit, began: time.Now()}
	i.mu.Lock() // the timer must not be looked at before it is there
	defer i.mu.Unlock()
	i.timer = time.AfterFunc(limit, func() {
		if rest := i.limit - time.Since(i.began) + time.Duration(i.last.Load()); rest > 0 {
			i.mu.Lock()
			defer i.mu.Unlock()
			if i.timer != nil {
				i.timer.Reset(rest)
			}
			return
		}
		expire(errIdle)
	})
	return i
}

func (i *idle) touch() { i.last.Store(int64(time.Since(i.began))) }

func (i *idle) stop() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.timer.Stop()
	i.timer = nil
}
