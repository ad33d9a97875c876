package state

import (
	"context"
	"sort"
	"strings"
	"sync"
)

// Bounds of the history that watchers read from. When one is reached, the oldest transactions are forgotten, and
// watchers that have not read them yet end with ErrCompacted.
const (
	maxHistoryEvents = 8192
	maxHistoryBytes  = 32 << 20
)

// watchBatch is how many events a watcher takes from the history at a time.
const watchBatch = 64

// history holds the latest changes, for all watchers together. Each watcher reads at its own pace from its own position,
// so that it needs no queue and cannot delay a writer.
type history struct {
	maxEvents, maxBytes int

	mu        sync.Mutex
	events    []Event       // consecutive, oldest first
	first     uint64        // position of events[0], counted from the opening of the store
	bytes     int           // of keys and values in events
	compacted Revision      // changes up to and including this revision may be forgotten
	latest    Revision      // of the store
	grown     chan struct{} // closed and replaced when events are added
	closed    bool
}

func newHistory(latest Revision, maxEvents, maxBytes int) *history {
	return &history{maxEvents: maxEvents, maxBytes: maxBytes, compacted: latest, latest: latest, grown: make(chan struct{})}
}

// add appends the events of one transaction, which all have the given revision.
func (h *history) add(rev Revision, events []Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed { // a transaction that was under way when the store was closed; nobody watches any more
		return
	}
	h.latest = rev
	h.events = append(h.events, events...)
	for _, ev := range events {
		h.bytes += eventSize(ev)
	}
	drop := 0
	for drop < len(h.events) && (len(h.events)-drop > h.maxEvents || h.bytes > h.maxBytes) {
		h.bytes -= eventSize(h.events[drop])
		h.compacted = h.events[drop].Revision
		drop++
	}
	clear(h.events[:drop])
	h.events = h.events[drop:]
	h.first += uint64(drop)
	close(h.grown)
	h.grown = make(chan struct{})
}

func eventSize(ev Event) int { return len(ev.Key) + len(ev.Value) }

// close wakes every watcher for the last time.
func (h *history) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.closed = true
		close(h.grown)
	}
}

// position returns where the changes after a revision begin.
func (h *history) position(after Revision) (uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return 0, ErrClosed
	}
	if after < h.compacted || after > h.latest {
		return 0, ErrCompacted
	}
	i := sort.Search(len(h.events), func(i int) bool { return h.events[i].Revision > after })
	return h.first + uint64(i), nil
}

// read copies events from pos on into buf. With none there it returns a channel that is closed when it is worth asking
// again.
func (h *history) read(pos uint64, buf []Event) (n int, grown <-chan struct{}, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return 0, nil, ErrClosed
	}
	if pos < h.first {
		return 0, nil, ErrCompacted
	}
	return copy(buf, h.events[pos-h.first:]), h.grown, nil
}

// watch sends the events under prefix from pos on until ctx ends, the store is closed, or the history has moved on
// beyond what the reader has taken. It closes out.
func (h *history) watch(ctx context.Context, prefix string, pos uint64, out chan<- Event, closing <-chan struct{}) {
	defer close(out)
	send := func(ev Event) bool {
		select {
		case out <- ev:
			return true
		case <-ctx.Done():
		case <-closing:
		}
		return false
	}
	buf := make([]Event, watchBatch)
	for {
		n, grown, err := h.read(pos, buf)
		if err == ErrCompacted {
			send(Event{Err: ErrCompacted})
		}
		if err != nil {
			return
		}
		for _, ev := range buf[:n] {
			if strings.HasPrefix(ev.Key, prefix) && !send(ev) {
				return
			}
		}
		pos += uint64(n)
		clear(buf[:n])
		if n > 0 {
			continue
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return
		case <-closing:
			return
		}
	}
}
