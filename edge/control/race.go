package control

import (
	"context"
	"sync"
	"time"
)

// hedgeDelay is the least time that a session gets to answer before the flow is tried on another one as well.
const hedgeDelay = 300 * time.Millisecond

// race opens something on the first candidate that can, in their order: on the next one where one fails, and on the next
// one as well where one does not answer within hedgeDelay or four round-trip times. An answer of the destination is final.
// What is opened besides the first is discarded. The error is that of the last attempt. There must be a candidate.
func race[T any](ctx context.Context, list []candidate, open func(context.Context, candidate) (T, error), discard func(T)) (T, candidate, error) {
	r := racing[T]{list: list, open: open, discard: discard}
	if len(list) > 1 {
		var cancel context.CancelFunc
		r.parent = ctx
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		r.cancel = cancel
	} else {
		r.parent, r.cancel = ctx, func() {}
	}
	r.lane(ctx)
	r.lanes.Wait()
	return r.conn, r.via, r.err
}

type racing[T any] struct {
	list    []candidate
	open    func(context.Context, candidate) (T, error)
	discard func(T)
	parent  context.Context
	cancel  context.CancelFunc // ends all lanes
	lanes   sync.WaitGroup     // but the first, which is the caller's

	mu   sync.Mutex // guards the fields below
	next int
	over bool // nothing more is begun
	won  bool
	conn T
	via  candidate
	err  error
}

// lane tries one candidate after the other.
func (r *racing[T]) lane(ctx context.Context) {
	for {
		k, stop, ok := r.take(ctx)
		if !ok {
			return
		}
		conn, err := r.open(ctx, k)
		stop()
		r.settle(k, conn, err)
	}
}

// take hands out the next candidate. If it has not answered in time another lane starts; stop keeps it from that.
func (r *racing[T]) take(ctx context.Context) (k candidate, stop func(), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over || r.next == len(r.list) {
		return k, nil, false
	}
	k = r.list[r.next]
	r.next++
	if r.next == len(r.list) {
		return k, func() {}, true
	}
	r.lanes.Add(1)
	t := time.AfterFunc(max(hedgeDelay, 4*k.rtt()), func() {
		defer r.lanes.Done()
		r.lane(ctx)
	})
	return k, func() {
		if t.Stop() {
			r.lanes.Done()
		}
	}, true
}

func (r *racing[T]) settle(k candidate, conn T, err error) {
	r.mu.Lock()
	late := r.won
	switch {
	case err == nil && !late:
		r.won, r.over, r.conn, r.via, r.err = true, true, conn, k, nil
		r.cancel()
	case err != nil && !r.over:
		r.err = err
		if !elsewhere(r.parent, err) {
			r.over = true
			r.cancel()
		}
	}
	r.mu.Unlock()
	if err == nil && late {
		r.discard(conn)
	}
}
