package connector

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// maxBulk is how many bulk sessions there may be to one edge, since indexes have to last.
	maxBulk = 8
	// bulkLook is how often it is looked whether a bulk session is still wanted.
	bulkLook = 5 * time.Second
)

// A bulkSet is the bulk sessions to one edge: as many as the edge asked for, Config.Bulk at most. What is not wanted any
// more ends when it has no flow.
type bulkSet struct {
	e *endpoint

	mu    sync.Mutex // guards the fields below
	want  int
	lines map[int]*bulkLine // by number, from 0
}

type bulkLine struct {
	number int
	wake   chan struct{} // holds a value when the network may be another one
	s      session       // nil while it is dialled
	since  time.Time
}

// set takes the edge's wish. It does not block.
func (b *bulkSet) set(n int) {
	b.mu.Lock()
	b.want = max(0, min(n, b.e.c.cfg.Bulk))
	b.mu.Unlock()
	b.e.c.edges.kick()
}

// start starts what is missing.
func (b *bulkSet) start(ctx, lives context.Context, wg *sync.WaitGroup) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for n := 0; n < maxBulk && len(b.lines) < b.want; n++ {
		if b.lines[n] != nil {
			continue
		}
		if b.lines == nil {
			b.lines = map[int]*bulkLine{}
		}
		l := &bulkLine{number: n, wake: make(chan struct{}, 1), since: time.Now()}
		b.lines[n] = l
		wg.Go(func() { b.keep(ctx, lives, l) })
	}
}

// shed takes l out, and reports that, if there are more sessions than are wanted.
func (b *bulkSet) shed(l *bulkLine) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.lines) <= b.want {
		return false
	}
	delete(b.lines, l.number)
	return true
}

// keep dials a bulk session until one is up, or not wanted any more, and again when it was lost.
func (b *bulkSet) keep(ctx, lives context.Context, l *bulkLine) {
	c := b.e.c
	var pauses backoff
	for left := false; ctx.Err() == nil && !left && !b.shed(l); {
		s, err := b.dial(ctx, l.number)
		if err != nil {
			c.log.Debug("no bulk session", "edge", b.e.name, "err", err)
			select {
			case <-time.After(pauses.next()):
			case <-l.wake:
				pauses.reset()
			case <-ctx.Done():
			}
			continue
		}
		left = b.serve(ctx, lives, l, s)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lines[l.number] == l {
		delete(b.lines, l.number)
	}
}

func (b *bulkSet) dial(ctx context.Context, number int) (session, error) {
	addrs, err := b.e.resolve(ctx)
	if err != nil {
		return nil, err
	}
	reg := b.e.c.registration
	reg.Index, reg.Role = firstBulk+b.e.slot*maxBulk+number, tunnel.RoleBulk
	return b.e.dial(ctx, addrs, number, tunnel.DialConfig{Registration: reg, Carrier: tunnel.CarrierTCP})
}

// serve runs a bulk session until it has ended or is left. It reports whether it was left because there were too many.
func (b *bulkSet) serve(ctx, lives context.Context, l *bulkLine, s session) (left bool) {
	c := b.e.c
	c.begin(s, lives, b.e.name, RoleBulk, firstBulk+b.e.slot*maxBulk+l.number)
	b.show(l, s)
	defer b.show(l, nil)
	tick := time.NewTicker(bulkLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false // the connector drains all sessions
		case <-s.Done():
			return false
		case <-s.Draining():
			return false
		case <-l.wake:
			probe, cancel := while(ctx, s.Done())
			if !answers(probe, s) && ctx.Err() == nil {
				s.Close(tunnel.CloseInternal)
			}
			cancel()
		case <-tick.C:
			if s.Flows() == 0 && b.shed(l) {
				c.retire(s, lives)
				return true
			}
		}
	}
}

func (b *bulkSet) show(l *bulkLine, s session) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l.s, l.since = s, time.Now()
}

// lookAfter has every bulk session prove that it lives.
func (b *bulkSet) lookAfter() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.lines {
		signal(l.wake)
	}
}

func (b *bulkSet) status() (list []SessionStatus) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, n := range slices.Sorted(maps.Keys(b.lines)) {
		l := b.lines[n]
		st := SessionStatus{Edge: b.e.name, Index: firstBulk + b.e.slot*maxBulk + n, Role: RoleBulk, State: StateConnecting, Since: l.since}
		if l.s != nil {
			st.State = StateConnected
			describe(&st, l.s)
		}
		list = append(list, st)
	}
	return list
}

// signal leaves a value in a channel that holds one.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
