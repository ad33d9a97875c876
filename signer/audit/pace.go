package audit

import (
	"context"
	"time"
)

// maxPace is the longest that a record waits for others, once the write before it is over.
const maxPace = 5 * time.Millisecond

// gather lets the records of operations in progress join those that wait: while there are any, at most one write is made in a quarter of
// the time that an operation takes, so that durability costs operations a fraction of their time, however dear a write is.
func (w *writer) gather(ctx context.Context) {
	for w.l.inProgress() > 0 {
		left := time.Until(w.lastWrite.Add(w.pace))
		if left <= 0 {
			return
		}
		pace := time.NewTimer(left)
		select {
		case <-pace.C:
		case <-w.l.wake: // perhaps none is in progress any more
		case <-ctx.Done():
			left = 0
		}
		pace.Stop()
		if left == 0 {
			return
		}
	}
}

// paced takes note of a write of n operations that took total together.
func (w *writer) paced(n int, total time.Duration) {
	w.lastWrite = time.Now()
	if n > 0 {
		w.pace = min(total/time.Duration(4*n), maxPace)
	}
}
