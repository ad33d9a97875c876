package signer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// HedgeConfig says when a second home is asked because the first takes long. The zero value turns hedging off.
type HedgeConfig struct {
	// Percentile is the share of operations, such as 0.95, that the home answers sooner than a second one is asked. Outside of
	// the range between 0 and 1 there is no hedging.
	Percentile float64
	// Budget is the share of operations for which a second home may be asked; 0 is 0.05.
	Budget float64
	// Min is the shortest time after which a second home is asked.
	Min time.Duration
}

func (c HedgeConfig) withDefaults() HedgeConfig {
	if !(c.Percentile > 0 && c.Percentile < 1) {
		c.Percentile = 0
	}
	if !(c.Budget > 0) {
		c.Budget = 0.05
	}
	c.Budget = min(c.Budget, 1)
	c.Min = max(c.Min, time.Microsecond)
	return c
}

const (
	// A hedge costs hedgePrice; each operation earns its share of it, up to hedgeSavings.
	hedgePrice   = 1 << 20
	hedgeSavings = 10 * hedgePrice
	// Every so many results the delay is computed anew.
	hedgeRefresh = 32
)

// errHedged is the cause with which an operation ends that another home has answered meanwhile.
var errHedged = errors.New("signer: another home answered first")

// A hedger holds what a lane knows of hedging. Its fields are atomic, because they are read without the lane's lock.
type hedger struct {
	config HedgeConfig // not changed after NewLane
	delays [keyClasses]atomic.Int64
	budget atomic.Int64
	asked  atomic.Uint64
	won    atomic.Uint64
}

// after returns how long to wait for the home before another is asked; 0 is for ever. What waits for so long without a budget that the
// home seems to hang is hedged free of charge.
func (h *hedger) after(class keyClass) (d time.Duration, free bool) {
	if h.budget.Load() < hedgePrice {
		return h.late(class), true
	}
	return time.Duration(h.delays[class].Load()), false
}

// late returns after how long a home seems to hang; 0 if that is not known.
func (h *hedger) late(class keyClass) time.Duration {
	d := time.Duration(h.delays[class].Load())
	if d == 0 {
		return 0
	}
	return max(lateDelays*d, minLate)
}

// hangs reports whether a home that kept an operation for so long seems to hang.
func (h *hedger) hangs(class keyClass, took time.Duration) bool {
	d := h.late(class)
	return d > 0 && took >= d
}

// A home that keeps an operation for lateDelays times as long as it takes before another home is asked, and for minLate at least,
// seems to hang.
const (
	lateDelays = 20
	minLate    = 100 * time.Millisecond
)

// overdue reports whether an operation that was given up had taken longer than most. Leaving it out would make the home seem
// faster than it is. One that had only begun says nothing.
func (h *hedger) overdue(class keyClass, stay time.Duration) bool {
	d := h.delays[class].Load()
	return d > 0 && stay >= time.Duration(d)
}

// take pays for a hedge, if the budget allows one.
func (h *hedger) take() bool {
	for {
		b := h.budget.Load()
		if b < hedgePrice {
			return false
		}
		if h.budget.CompareAndSwap(b, b-hedgePrice) {
			return true
		}
	}
}

// earn adds the share of one operation to the budget.
func (h *hedger) earn() {
	if h.config.Percentile == 0 || h.budget.Load() >= hedgeSavings {
		return
	}
	h.budget.Add(int64(h.config.Budget * hedgePrice))
}

// noteLocked takes the time in which an operation was answered, or after which it was given up because another home had answered.
func (l *Lane) noteLocked(class keyClass, stay, now time.Duration) {
	h := &l.latency[class]
	h.add(stay, now)
	l.hedges.earn()
	if c := l.hedges.config; c.Percentile > 0 && h.count() >= enough && h.n%hedgeRefresh == 0 {
		l.hedges.delays[class].Store(int64(max(h.percentile(c.Percentile), c.Min)))
	}
}

// flights counts the goroutines of hedged operations.
type flights struct {
	mu   sync.Mutex
	n    int
	done chan struct{} // closed when n gets to 0; nil while nobody waits
}

func (f *flights) goes(fn func()) {
	f.mu.Lock()
	f.n++
	f.mu.Unlock()
	go func() {
		defer f.ends()
		fn()
	}()
}

func (f *flights) ends() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n--; f.n == 0 && f.done != nil {
		close(f.done)
		f.done = nil
	}
}

func (f *flights) wait() {
	f.mu.Lock()
	if f.n == 0 {
		f.mu.Unlock()
		return
	}
	if f.done == nil {
		f.done = make(chan struct{})
	}
	done := f.done
	f.mu.Unlock()
	<-done
}

// trialDelayLocked returns how long the trial of a breaker may take before the home counts as failing still.
func (l *Lane) trialDelayLocked(class keyClass) time.Duration {
	d := l.latency[class].percentile(.99)
	if d == 0 {
		d = defaultTrialDelay
	}
	return max(d, l.hedges.config.Min)
}

const defaultTrialDelay = 100 * time.Millisecond

// hedgeAfter returns how long to wait for a home before another is asked; 0 if there is no other, or no hedging. The trial of a
// breaker is hedged in any case, and free of charge, so that no operation is lost to a home that hangs still.
func (e *Entry) hedgeAfter(o *keyUse, home int, asked uint64, now time.Duration) (after time.Duration, free bool) {
	l := e.Homes[home].Lane
	if l == nil || len(e.Homes) < 2 {
		return 0, false
	}
	if free = l.opens.Load() != 0; free {
		l.mu.Lock()
		after = l.trialDelayLocked(e.class)
		l.mu.Unlock()
	} else {
		after, free = l.hedges.after(e.class)
	}
	if after == 0 {
		return 0, false
	}
	if next, _ := e.next(o, asked, now); next < 0 {
		return 0, false
	}
	return after, free
}

// answer is what a home made of a hedged operation.
type answer struct {
	home   int
	result []byte
	out    Outcome
	err    error
}

// A race is an operation that may be in several homes at once.
type race struct {
	e       *Entry
	ctx     context.Context // ends with the race
	caller  Caller
	op      keyUse
	asked   uint64
	pending int
	answers chan answer
}

// start asks a home.
func (r *race) start(home int) {
	r.asked |= 1 << home
	r.pending++
	r.e.flights.goes(func() {
		a := answer{home: home}
		a.result, a.err = r.e.Homes[home].ask(r.ctx, r.caller, &r.op, r.e.class, 0, &a.out)
		if p, ok := errors.AsType[*panicked](a.err); ok { // nobody else may hear of it if another home answers
			r.e.Homes[home].Lane.fault(p)
		}
		r.answers <- a
	})
}

// another asks one more home, if there is one, and reports whether there was.
func (r *race) another() bool {
	next, _ := r.e.next(&r.op, r.asked, laneTime())
	if next >= 0 {
		r.start(next)
	}
	return next >= 0
}

// race asks a home, and another one if the first has not answered in time. The first result wins. It returns when the context ends, while homes that do
// not obey theirs may be at work still; hence the copy of the input. asked holds the homes that are not to be asked any more, and is returned with
// those that were; out tells what became of the operation so far. If free is set, asking another home costs nothing of the first one's budget.
func (e *Entry) race(ctx context.Context, c Caller, o keyUse, home int, asked uint64, after time.Duration, free bool, out *Outcome) ([]byte, uint64, error) {
	o.input = slices.Clone(o.input)
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(errHedged)
	r := &race{e: e, ctx: inner, caller: c, op: o, asked: asked, answers: make(chan answer, len(e.Homes))}
	r.start(home)
	timer := time.NewTimer(after)
	defer timer.Stop()

	first := &e.Homes[home].Lane.hedges
	var failure error
	for r.pending > 0 {
		select {
		case a := <-r.answers:
			r.pending--
			out.Tries += a.out.Tries
			out.Waited += a.out.Waited
			// An error that is final says more than that of a home that is away.
			if a.err == nil || failure == nil || errors.Is(failure, ErrUnavailable) {
				out.Home, out.Took, failure = a.out.Home, a.out.Took, a.err
			}
			if a.err == nil {
				if out.Hedged && a.home != home {
					first.won.Add(1)
				}
				out.Tries += r.pending
				return a.result, r.asked, nil
			}
			if errors.Is(a.err, errNoCapacity) {
				r.asked &^= 1 << a.home // it was not
			}
			if r.pending == 0 && movesOn(ctx, failure) && r.another() {
				e.Homes[a.home].failedOver()
			}
		case <-timer.C:
			if next, _ := e.next(&r.op, r.asked, laneTime()); next >= 0 && !free && !first.take() {
				// Others have spent the budget meanwhile.
				free = true
				timer.Reset(first.late(e.class))
			} else if next >= 0 {
				first.asked.Add(1)
				out.Hedged = true
				r.start(next)
			}
		case <-ctx.Done():
			out.Home = e.Homes[home].name
			out.Tries += r.pending
			return nil, r.asked, fmt.Errorf("signer: no answer from %s: %w", out.Home, ctx.Err())
		}
	}
	return nil, r.asked, failure
}
