package signer

import (
	"container/heap"
	"strings"
	"time"
)

// Bounds of what a lane remembers of its callers. Server names are chosen by clients.
const (
	maxPeers = 1024 // clients with a flow of their own; the rest shares one
	maxSNIs  = 256  // the same for the server names of one client
	maxName  = 255  // of a server name, in bytes; longer ones that begin alike share a flow
)

// A waiter is an operation in a lane's queue.
type waiter struct {
	flow       *flow         // of the SNI
	prev, next *waiter       // in the flow
	cost       time.Duration // expected service time
	class      keyClass
	deadline   time.Duration // on the clock of the lane; 0 is none
	queued     bool
	patience   time.Duration // how long it waits although the home has no capacity
	from       time.Duration // when service began
	err        error         // why it was refused while it waited
	ready      chan struct{} // holds a value once the waiter was granted a place or refused
}

// A flow has a share of its parent's service: the lane's queue is the root, its children are the clients, and theirs the server names. Only the latter hold
// waiters. Among the children with waiters the next one served is that with the smallest virtual time, which is the service time it had; one that comes
// anew starts where the others are (start-time fair queueing). A flow has no lock of its own.
type flow struct {
	parent *flow
	name   string
	vtime  time.Duration // within the parent
	queued int
	work   time.Duration // expected service time of all that is queued
	index  int           // in the parent's heap; -1 if nothing is queued

	// Of a flow with children.
	clock    time.Duration // virtual time at which children begin
	children map[string]*flow
	shared   *flow    // for names beyond max
	max      int      // children
	active   flowHeap // those with waiters
	idle     flowList // the others, those that were served the longest ago first; without shared

	head, tail *waiter // of a flow without children
	prev, next *flow   // in the parent's idle
}

func newRoot() flow { return flow{index: -1, max: maxPeers} }

// find returns the flow of a caller, and makes it if need be.
func (f *flow) find(c Caller) *flow {
	sni := c.SNI[:min(len(c.SNI), maxName)]
	return f.child(c.Peer, maxSNIs).child(sni, 0)
}

func (f *flow) child(name string, grandchildren int) *flow {
	if c := f.children[name]; c != nil {
		return c
	}
	if len(f.children) >= f.max {
		if f.idle.first == nil {
			if f.shared == nil {
				f.shared = &flow{parent: f, max: grandchildren, index: -1}
			}
			return f.shared
		}
		f.forget(f.idle.first)
	}
	if f.children == nil {
		f.children = map[string]*flow{}
	}
	c := &flow{parent: f, name: strings.Clone(name), max: grandchildren, index: -1} // a clone, as a request may be much larger
	f.children[c.name] = c
	f.idle.push(c)
	return c
}

func (f *flow) forget(c *flow) {
	f.idle.remove(c)
	delete(f.children, c.name)
}

// reset forgets all flows. Nothing may be queued.
func (f *flow) reset() {
	if f.children != nil || f.shared != nil {
		*f = flow{index: -1, max: f.max}
	}
}

// push puts a waiter at the end of its flow.
func (f *flow) push(w *waiter) {
	w.queued, w.prev, w.next = true, f.tail, nil
	if f.tail == nil {
		f.head = w
	} else {
		f.tail.next = w
	}
	f.tail = w
	for ; f != nil; f = f.parent {
		f.queued++
		f.work += w.cost
		if p := f.parent; p != nil && f.index < 0 {
			p.idle.remove(f)
			f.vtime = max(f.vtime, p.clock)
			heap.Push(&p.active, f)
		}
	}
}

// remove takes a waiter out of its flow, wherever it stands.
func (f *flow) remove(w *waiter) {
	if w.prev == nil {
		f.head = w.next
	} else {
		w.prev.next = w.next
	}
	if w.next == nil {
		f.tail = w.prev
	} else {
		w.next.prev = w.prev
	}
	w.queued, w.prev, w.next = false, nil, nil
	for ; f != nil; f = f.parent {
		f.queued--
		f.work -= w.cost
		if p := f.parent; p != nil && f.queued == 0 {
			heap.Remove(&p.active, f.index)
			if p.shared != f {
				p.idle.push(f)
			}
		}
	}
}

// pop takes out the waiter that is next and charges its flow the expected cost. Something must be queued.
func (f *flow) pop() *waiter {
	for len(f.active) > 0 {
		c := f.active[0]
		f.clock = max(f.clock, c.vtime)
		// Two for each one served, so that flows that nobody uses any more do not pile up.
		for range 2 {
			if old := f.idle.first; old != nil && old.vtime <= f.clock {
				f.forget(old)
			}
		}
		f = c
	}
	w := f.head
	f.charge(w.cost)
	f.remove(w)
	// Flows that leave take their service time with them. Others are not to wait for ever while new ones come in their place.
	for ; f.parent != nil; f = f.parent {
		if p := f.parent; f.index < 0 {
			p.clock += w.cost / time.Duration(len(p.active)+1)
		}
	}
	return w
}

// waiters appends all that is queued in the flow and those below it.
func (f *flow) waiters(all []*waiter) []*waiter {
	for _, c := range f.active {
		all = c.waiters(all)
	}
	for w := f.head; w != nil; w = w.next {
		all = append(all, w)
	}
	return all
}

// charge adds service time to what a flow and those above it had.
func (f *flow) charge(d time.Duration) {
	for ; f.parent != nil; f = f.parent {
		f.vtime += d
		if f.index >= 0 {
			heap.Fix(&f.parent.active, f.index)
		}
	}
}

// ahead returns the expected service time of all that is served before a newcomer to the flow of that cost.
func (f *flow) ahead(cost time.Duration) time.Duration {
	own := f.work + cost
	for c := f; c.parent != nil; c = c.parent {
		// While this flow gets its own share, each other gets as much, or all it needs.
		level := own
		for _, g := range c.parent.active {
			if g != c {
				level += min(g.work, own)
			}
		}
		own = level
	}
	return own - cost
}

// longest returns the child with the most waiters, counting one more for the newcomer's, which is preferred among equals.
func (f *flow) longest(newcomer *flow) *flow {
	best := newcomer
	most := 0
	if best != nil {
		most = best.queued + 1
	}
	for _, g := range f.active {
		if g != newcomer && g.queued > most {
			best, most = g, g.queued
		}
	}
	return best
}

// surplus returns the newest waiter of the longest flow below the root f, or nil if that would be a newcomer to the flow sni.
func (f *flow) surplus(sni *flow) *waiter {
	peer := f.longest(sni.parent)
	if peer != sni.parent {
		return peer.longest(nil).tail
	}
	if longest := peer.longest(sni); longest != sni {
		return longest.tail
	}
	return nil
}

// flowHeap implements heap.Interface over virtual times.
type flowHeap []*flow

func (h flowHeap) Len() int           { return len(h) }
func (h flowHeap) Less(i, j int) bool { return h[i].vtime < h[j].vtime }
func (h flowHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *flowHeap) Push(x any) {
	f := x.(*flow)
	f.index = len(*h)
	*h = append(*h, f)
}
func (h *flowHeap) Pop() any {
	last := len(*h) - 1
	f := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	f.index = -1
	return f
}

// flowList is a doubly linked list of flows.
type flowList struct{ first, last *flow }

func (l *flowList) push(f *flow) {
	f.prev, f.next = l.last, nil
	if l.last == nil {
		l.first = f
	} else {
		l.last.next = f
	}
	l.last = f
}

// remove takes a flow out, if it is in the list.
func (l *flowList) remove(f *flow) {
	if f.prev == nil && l.first != f {
		return
	}
	if f.prev == nil {
		l.first = f.next
	} else {
		f.prev.next = f.next
	}
	if f.next == nil {
		l.last = f.prev
	} else {
		f.next.prev = f.prev
	}
	f.prev, f.next = nil, nil
}
