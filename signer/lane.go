package signer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// LaneConfig is what a [Lane] works with. The Lane keeps a copy.
type LaneConfig struct {
	// Name is what operators call the place, as [Backend] has it.
	Name string
	// Capacity is how many operations the home does at once; below 1 it is 1. To a fast home more are sent, at most four times as many, so that
	// it need not wait for the next one. See [Lane.SetCapacity].
	Capacity int
	// Queue is how many operations wait at most; 0 is 1024, below 0 none. When it is full, the newest operation of the longest flow is
	// refused, which may be the one that comes.
	Queue int
	// Breaker says when the home counts as failed.
	Breaker BreakerConfig
	// Hedge says when a second home is asked.
	Hedge HedgeConfig
	// Logger is told when the home fails, throttles and recovers; nil discards.
	Logger *slog.Logger
}

const defaultQueue = 1024

// A Lane is the way into one place that holds keys: a token, a Transit mount, or all file keys. All keys of the place share one
// lane, and it outlives reloads. Make one with [NewLane]; all methods may be called from several goroutines at once. It has no goroutines.
//
// Operations that find the home busy wait. Each client has the same share of the home's time, and within it each server name, so that
// one that asks for more than its share waits for itself. An operation that would not be done before its deadline is refused at once.
type Lane struct {
	config LaneConfig

	// For choosing among lanes, written with mu held.
	load  atomic.Int64 // operations in the home and in the queue
	room  atomic.Int64 // operations that are sent to the home at once; 0 while it has no capacity
	void  atomic.Int64 // when capacity was lost, on the clock of all lanes; valid while room is 0
	opens atomic.Int64 // when the home may be asked: 0 is now, otherwise on the clock; see notNow

	hedges    hedger
	failovers atomic.Uint64

	mu       sync.Mutex // guards all below
	capacity int
	limit    float64       // what a throttling home takes; from 1 to capacity
	cut      time.Duration // when limit was lowered last
	inFlight int
	root     flow
	breaker  breaker
	cost     [keyClasses]average // service time
	mean     average             // service time of all
	latency  [keyClasses]latency // queue and service
	service  latency
	ahead    int           // operations sent ahead; see roomLocked
	finished int           // results since paceFrom
	paceFrom time.Duration // when the present window began
	spare    *waiter       // for reuse, linked by next
	counts   LaneStats
}

// notNow is the value of Lane.opens while nothing may be asked until something happens.
const notNow = math.MaxInt64

// errNoCapacity ends operations in a home that takes none, so that they go to another one. If there is none, they wait.
var errNoCapacity = fmt.Errorf("there is no capacity now: %w", ErrUnavailable)

// errOpen ends operations that a home's breaker keeps out.
var errOpen = fmt.Errorf("the breaker is open after failures: %w", ErrUnavailable)

// epoch is the zero of that clock.
var epoch = time.Now()

// laneTime is the time on the clock of all lanes.
func laneTime() time.Duration { return time.Since(epoch) }

// NewLane returns a lane that is idle and takes the home to be well.
func NewLane(c LaneConfig) *Lane {
	c.Name, c.Capacity = valid(c.Name), max(c.Capacity, 1)
	switch {
	case c.Queue == 0:
		c.Queue = defaultQueue
	case c.Queue < 0:
		c.Queue = 0
	}
	c.Breaker = c.Breaker.withDefaults()
	c.Hedge = c.Hedge.withDefaults()
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Lane{config: c, capacity: c.Capacity, limit: float64(c.Capacity), root: newRoot(), breaker: breaker{config: c.Breaker}}
	l.hedges.config, l.cut = c.Hedge, laneTime()
	l.paceFrom = l.cut
	l.publishLocked()
	return l
}

// Name returns what operators call the place.
func (l *Lane) Name() string { return l.config.Name }

// SetCapacity changes how many operations the home does at once. Those that are in it stay. With 0 the home takes none: operations go to
// other homes, and without any they wait for a second, as for a token whose worker is replaced. After that the home is away, and they fail at once.
func (l *Lane) SetCapacity(n int) {
	n = max(n, 0)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.limit >= float64(l.capacity) || l.limit > float64(n) {
		l.limit = float64(max(n, 1))
	}
	if n == 0 && l.capacity > 0 {
		l.void.Store(int64(laneTime()))
	}
	l.capacity = n
	if n == 0 {
		l.refuseAllLocked(errNoCapacity)
	}
	l.dispatchLocked(laneTime())
	l.publishLocked()
}

// A place is what an operation holds while it is in the home.
type place struct {
	class keyClass
	trial bool
	asked time.Duration // when it came
	from  time.Duration // when service began
	w     *waiter       // nil if it did not wait
}

// acquire waits for a place in the home; with patience also for one that has no capacity, for so long. Its error is ErrOverloaded, ErrDeadline,
// ErrUnavailable or the context's. A place must be given back with release.
func (l *Lane) acquire(ctx context.Context, c Caller, class keyClass, patience time.Duration, now time.Duration) (place, error) {
	p := place{class: class, asked: now, from: now}
	l.mu.Lock()
	var w *waiter
	err := l.admitLocked(&p, patience > 0, now)
	switch {
	case err != nil:
		l.counts.Refused.Open++
	case p.trial, l.root.queued == 0 && l.inFlight < l.roomLocked():
		l.inFlight++
	default:
		if w, err = l.enqueueLocked(ctx, c, class, now); err == nil {
			w.patience = patience
		}
	}
	l.publishLocked()
	l.mu.Unlock()
	if err != nil {
		return p, fmt.Errorf("signer: %s: %w", l.config.Name, err)
	}
	if w != nil {
		return l.wait(ctx, p, w)
	}
	return p, nil
}

// admitLocked reports why the home cannot be asked, and whether the operation is its breaker's trial.
func (l *Lane) admitLocked(p *place, patient bool, now time.Duration) error {
	switch {
	case l.capacity == 0 && l.breaker.state != closed:
		return errOpen
	case l.capacity == 0 && !patient:
		return errNoCapacity
	}
	ok, trial := l.breaker.admit(now)
	if p.trial = trial; !ok {
		return errOpen
	}
	return nil
}

// enqueueLocked puts an operation into the queue, or refuses it or another one.
func (l *Lane) enqueueLocked(ctx context.Context, c Caller, class keyClass, now time.Duration) (*waiter, error) {
	f := l.root.find(c)
	cost := l.costLocked(class)
	var until time.Duration
	if t, ok := ctx.Deadline(); ok {
		left := time.Until(t)
		until = now + left
		if l.measuredLocked(class) && l.expectedLocked(f, cost)+cost > left {
			l.counts.Refused.Deadline++
			return nil, ErrDeadline
		}
	}
	if l.root.queued >= l.config.Queue {
		surplus := l.root.surplus(f)
		if surplus == nil {
			l.counts.Refused.Overloaded++
			return nil, ErrOverloaded
		}
		l.counts.Refused.Overloaded++
		surplus.flow.remove(surplus)
		surplus.end(ErrOverloaded)
	}
	w := l.spare
	if w == nil {
		w = &waiter{ready: make(chan struct{}, 1)}
	} else {
		l.spare = w.next
	}
	w.flow, w.cost, w.class, w.deadline, w.err, w.next = f, cost, class, until, nil, nil
	f.push(w)
	return w, nil
}

// expectedLocked estimates how long an operation of that cost would wait in the flow.
func (l *Lane) expectedLocked(f *flow, cost time.Duration) time.Duration {
	return (f.ahead(cost) + l.mean.get()) / time.Duration(max(l.roomLocked(), 1))
}

// end wakes a waiter that is not queued any more.
func (w *waiter) end(err error) {
	w.err = err
	w.ready <- struct{}{}
}

// wait returns when the waiter got its place, was refused or has no time or patience left.
func (l *Lane) wait(ctx context.Context, p place, w *waiter) (place, error) {
	p.w = w
	var impatient <-chan time.Time
	if w.patience > 0 {
		timer := time.NewTimer(w.patience)
		defer timer.Stop()
		impatient = timer.C
	}
	for {
		select {
		case <-w.ready:
			return l.granted(ctx, p, w)
		case <-impatient:
			if l.leave(w, true) {
				p.from = laneTime()
				return p, fmt.Errorf("signer: %s: %w", l.config.Name, errNoCapacity)
			}
		case <-ctx.Done():
			if l.leave(w, false) {
				p.from = laneTime()
				return p, fmt.Errorf("signer: waiting for %s: %w", l.config.Name, ctx.Err())
			}
			<-w.ready // there since it left the queue
			return l.granted(ctx, p, w)
		}
	}
}

// leave takes a waiter out of the queue, if it is there still; with stranded set only if the home has no capacity.
func (l *Lane) leave(w *waiter, stranded bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !w.queued || stranded && l.capacity > 0 {
		return false
	}
	w.flow.remove(w)
	l.forgetLocked()
	l.publishLocked()
	return true
}

// granted takes what a waiter was told.
func (l *Lane) granted(ctx context.Context, p place, w *waiter) (place, error) {
	if w.err != nil {
		p.from = laneTime()
		return p, fmt.Errorf("signer: %s: %w", l.config.Name, w.err)
	}
	p.from = w.from
	if ctx.Err() != nil {
		l.withdraw(&p)
		return p, fmt.Errorf("signer: waiting for %s: %w", l.config.Name, ctx.Err())
	}
	return p, nil
}

// withdraw gives a place back that was granted to a waiter and not used.
func (l *Lane) withdraw(p *place) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.inFlight--
	p.w.flow.charge(-p.w.cost)
	l.dispatchLocked(laneTime())
	l.publishLocked()
}

// dispatchLocked lets operations in as long as there is room.
func (l *Lane) dispatchLocked(now time.Duration) {
	for l.root.queued > 0 && l.inFlight < l.roomLocked() {
		w := l.root.pop()
		if w.deadline != 0 && l.measuredLocked(w.class) && now+w.cost > w.deadline {
			w.flow.charge(-w.cost)
			l.counts.Refused.Deadline++
			w.end(ErrDeadline)
			continue
		}
		l.inFlight++
		w.from = now
		w.end(nil)
	}
	l.forgetLocked()
}

// forgetLocked forgets all flows when nobody is there.
func (l *Lane) forgetLocked() {
	if l.root.queued == 0 && l.inFlight == 0 {
		l.root.reset()
	}
}

// refuseAllLocked ends all that waits, but for what waits for capacity. No flow is charged for it.
func (l *Lane) refuseAllLocked(err error) {
	for _, w := range l.root.waiters(nil) {
		if w.patience > 0 && err == errNoCapacity {
			continue
		}
		w.flow.remove(w)
		l.counts.Refused.Open++
		w.end(err)
	}
}

// release gives a place back after the home's answer, and returns how long it was held.
func (l *Lane) release(ctx context.Context, p *place, err error) time.Duration {
	now := laneTime()
	took := now - p.from
	result := err == nil
	throttled := !result && errors.Is(err, ErrThrottled)
	hedged := !result && context.Cause(ctx) == errHedged

	l.mu.Lock()
	v := well
	switch {
	case hedged && p.trial && took >= l.trialDelayLocked(p.class), hedged && l.hedges.hangs(p.class, took):
		v = ill
	case !result && !throttled:
		v = l.verdictLocked(ctx, err, p.class, took)
	}
	l.inFlight--
	if w := p.w; w != nil {
		w.flow.charge(min(took, 8*w.cost) - w.cost) // a home that hangs is not the caller's fault
		w.flow, w.next = nil, l.spare
		l.spare = w
	}
	var t throttleChange
	switch {
	case result:
		l.counts.Done++
		l.paceLocked(now)
		l.measureLocked(p.class, took)
		l.service.add(took, now)
		t = l.creepLocked()
	case throttled:
		l.counts.Throttled++
		t = l.throttleLocked(p.from, now)
	case v == ill:
		l.counts.Failed++
	}
	if stay := now - p.asked; result || hedged && l.hedges.overdue(p.class, stay) {
		l.noteLocked(p.class, stay, now)
	}
	change := l.recordLocked(v, p.trial, now)
	l.dispatchLocked(now)
	l.publishLocked()
	l.mu.Unlock()
	l.log(change, t, err)
	return took
}

// verdictLocked judges a home by an error. A caller that went away says nothing of the home. One that ran out of time does if the home had it for much longer than it
// takes.
func (l *Lane) verdictLocked(ctx context.Context, err error, class keyClass, took time.Duration) verdict {
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return noVerdict
	case errors.Is(err, context.DeadlineExceeded), ctx.Err() != nil:
		if took > 0 && (!l.measuredLocked(class) || took >= 2*l.costLocked(class)) {
			return ill
		}
		return noVerdict
	case errors.Is(err, ErrNotFound):
		return noVerdict // the key is gone; who asks for it must not close the place's other keys
	case errors.Is(err, ErrUnavailable):
		return ill
	}
	return noVerdict
}

// observe takes the result of a probe, which held no place.
func (l *Lane) observe(ctx context.Context, class keyClass, took time.Duration, err error) {
	l.mu.Lock()
	v := well
	if err != nil && !errors.Is(err, ErrThrottled) {
		v = l.verdictLocked(ctx, err, class, took)
	}
	change := unchanged
	if v != noVerdict { // else it would end the trial of an operation
		change = l.recordLocked(v, true, laneTime())
	}
	l.publishLocked()
	l.mu.Unlock()
	l.log(change, throttleUnchanged, err)
}

// recordLocked tells the breaker. What waits before a home that turns out to be away goes elsewhere at once.
func (l *Lane) recordLocked(v verdict, trial bool, now time.Duration) breakerChange {
	change := l.breaker.record(v, trial, now)
	if change == hasOpened {
		l.counts.Opened++
		l.refuseAllLocked(errOpen)
	}
	return change
}

// publishLocked tells those who choose among lanes.
func (l *Lane) publishLocked() {
	l.load.Store(int64(l.inFlight + l.root.queued))
	if room := int64(l.roomLocked()); room != l.room.Load() {
		l.room.Store(room)
	}
	opens := int64(0)
	switch b := &l.breaker; {
	case l.capacity == 0, b.state == halfOpen && b.trial:
		opens = notNow
	case b.state != closed:
		opens = int64(b.until) // over when the next operation is the trial
	}
	if opens != l.opens.Load() {
		l.opens.Store(opens)
	}
}

// ready reports whether the home may be asked.
func (l *Lane) ready(now time.Duration) bool {
	opens := l.opens.Load()
	return opens == 0 || opens <= int64(now)
}

func (l *Lane) log(change breakerChange, t throttleChange, err error) {
	switch change {
	case hasOpened:
		l.config.Logger.Warn("the home fails; it is left alone for a while", "home", l.config.Name, "err", err)
	case hasClosed:
		l.config.Logger.Info("the home is well again", "home", l.config.Name)
	}
	switch t {
	case throttleBegan:
		l.config.Logger.Warn("the home throttles; fewer operations are sent at once", "home", l.config.Name, "err", err)
	case throttleEnded:
		l.config.Logger.Info("the home takes its full load again", "home", l.config.Name)
	}
}

// fault tells of a panic. A nil Lane tells nobody.
func (l *Lane) fault(p *panicked) {
	if l != nil {
		l.config.Logger.Error("a key panicked", "home", l.config.Name, "err", p)
	}
}
