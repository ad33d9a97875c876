package etcd

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/keyhaven/keyhaven/state"
)

// Bounds of what waits for one watcher. Beyond them it has fallen behind.
const (
	maxQueueEvents = 16384
	maxQueueBytes  = 32 << 20
)

// Watch implements state.Store. A watch outlives the loss of members; if the cluster loses its leader, or the memory of
// what comes next, it ends with an error event.
func (s *store) Watch(ctx context.Context, prefix string, after state.Revision) (<-chan state.Event, error) {
	// What a listing at this revision would be told holds for a watch: compacted, or not reached yet.
	if _, err := s.get(ctx, s.prefix, clientv3.WithRev(max(int64(after), 1)), clientv3.WithCountOnly()); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, state.ErrClosed
	}
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	stop := context.AfterFunc(s.life, cancel)
	out := make(chan state.Event)
	q := &queue{maxEvents: s.queueEvents, maxBytes: s.queueBytes, grown: make(chan struct{}, 1)}
	from, end := s.span(prefix)
	in := s.c.Watch(ctx, from, clientv3.WithRange(end), clientv3.WithRev(int64(after)+1))
	s.watchers.Go(func() {
		s.receive(ctx, in, q)
		for range in { // until the client has let go of it; cancel follows
		}
	})
	s.watchers.Go(func() {
		q.deliver(ctx, out)
		stop()
		cancel()
	})
	return out, nil
}

// receive moves events from the client, whose own queue has no bound, to q until the watch ends.
func (s *store) receive(ctx context.Context, in clientv3.WatchChan, q *queue) {
	for r := range in {
		if err := r.Err(); err != nil {
			q.end(s.watchError(ctx, err))
			return
		}
		s.saw(r.Header)
		for _, ev := range r.Events {
			e := state.Event{Entry: s.entry(ev.Kv), Deleted: ev.Type == clientv3.EventTypeDelete}
			if e.Deleted {
				e.Value = nil
			}
			if !q.add(e) {
				return
			}
		}
	}
	q.end(s.watchError(ctx, errors.New("the watch ended")))
}

func (s *store) watchError(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, rpctypes.ErrCompacted), errors.Is(err, rpctypes.ErrFutureRev):
		return state.ErrCompacted
	}
	return fmt.Errorf("%w: etcd at %s: %w", state.ErrUnavailable, s.where, err)
}

// A queue holds events until the reader takes them.
type queue struct {
	maxEvents, maxBytes int
	grown               chan struct{} // holds a value when there is something new

	mu     sync.Mutex
	events []state.Event
	bytes  int
	over   bool
	err    error // with over: the last word, nil for none
}

// add reports false if the reader has fallen behind; then what it has not taken is dropped.
func (q *queue) add(e state.Event) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.bytes += len(e.Key) + len(e.Value)
	q.events = append(q.events, e)
	ok := len(q.events) <= q.maxEvents && q.bytes <= q.maxBytes
	if !ok {
		q.events, q.over, q.err = nil, true, state.ErrCompacted
	}
	q.wakeLocked()
	return ok
}

func (q *queue) end(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.over {
		q.over, q.err = true, err
	}
	q.wakeLocked()
}

func (q *queue) wakeLocked() {
	select {
	case q.grown <- struct{}{}:
	default:
	}
}

// take returns what is there, and whether more may come.
func (q *queue) take() (events []state.Event, over bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	events, q.events, q.bytes = q.events, nil, 0
	return events, q.over, q.err
}

// deliver hands events to out until the queue or ctx ends, and closes out.
func (q *queue) deliver(ctx context.Context, out chan<- state.Event) {
	defer close(out)
	send := func(e state.Event) bool {
		select {
		case out <- e:
			return true
		case <-ctx.Done():
			return false
		}
	}
	for {
		events, over, err := q.take()
		for _, e := range events {
			if !send(e) {
				return
			}
		}
		if over {
			if err != nil {
				send(state.Event{Err: err})
			}
			return
		}
		select {
		case <-q.grown:
		case <-ctx.Done():
			return
		}
	}
}
