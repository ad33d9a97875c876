package control

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// deviceEvery is about how often a device is asked for its report, deviceBusy how often one that is updating, and
	// deviceNever how often a connector is asked again that runs on none.
	deviceEvery = time.Minute
	deviceBusy  = 15 * time.Second
	deviceNever = 10 * time.Minute
	// deviceSoon keeps the sessions of one process from asking one after the other.
	deviceSoon = 5 * time.Second
	// deviceTimeout bounds one answer.
	deviceTimeout = 5 * time.Second
	// deviceLook is how often it is looked who is due.
	deviceLook = time.Second
	// maxPolls bounds the devices that are asked at a time, and maxSlowPolls those of them that did not answer in time before:
	// they cannot keep the others waiting.
	maxPolls, maxSlowPolls = 64, 8
)

// firstReports is when a connector without a report is asked again: its agent may start later than it does.
var firstReports = [...]time.Duration{5 * time.Second, 10 * time.Second, 20 * time.Second}

// polled is how far a process has been told what its device is to do.
type polled struct {
	directive fleet.Directive // that it was told last
	asked     time.Time
	next      time.Time // when it is asked again
	empty     int       // answers in a row without a report
	failures  int       // in a row
	waiting   bool      // in a lane, or being asked
	fresh     bool      // it got a session since it was last looked for
}

// A lane is processes to be asked, by so many workers at a time.
type lane struct {
	queue   []processKey
	workers int
	limit   int
}

// A poller asks devices how they are.
type poller struct {
	due     chan struct{}
	results *prometheus.CounterVec

	mu      sync.Mutex // guards the fields below
	procs   map[processKey]*polled
	changed bool // directives may have changed
	lanes   [2]lane
}

func newPoller() *poller {
	return &poller{due: make(chan struct{}, 1), procs: map[processKey]*polled{}, lanes: [2]lane{{limit: maxPolls}, {limit: maxSlowPolls}},
		results: newPollResults()}
}

// mark asks for a look at all directives. It never blocks.
func (p *poller) mark() {
	p.mu.Lock()
	p.changed = true
	p.mu.Unlock()
	p.wake()
}

// up notes that a process has a new main session. It never blocks.
func (p *poller) up(k processKey) {
	p.mu.Lock()
	t := p.procs[k]
	if t == nil {
		t = &polled{}
		p.procs[k] = t
	}
	t.fresh = true
	if at := t.asked.Add(deviceSoon); at.Before(t.next) {
		t.next = at
	}
	p.mu.Unlock()
	p.wake()
}

func (p *poller) wake() {
	select {
	case p.due <- struct{}{}:
	default:
	}
}

// runPolls asks devices until ctx ends.
func (c *Control) runPolls(ctx context.Context) {
	var workers sync.WaitGroup
	defer workers.Wait()
	tick, sweep := time.NewTicker(deviceLook), time.NewTicker(deviceEvery)
	defer tick.Stop()
	defer sweep.Stop()
	for {
		c.queuePolls(time.Now())
		c.polls.start(func(l *lane) {
			workers.Go(func() { c.work(ctx, l) })
		})
		select {
		case <-ctx.Done():
			return
		case <-c.polls.due:
		case <-tick.C:
		case <-sweep.C:
			c.sweepPolls()
		}
	}
}

// queuePolls puts those into the lanes that are due. Those whose directive has changed come first.
func (c *Control) queuePolls(now time.Time) {
	p := c.polls
	p.mu.Lock()
	defer p.mu.Unlock()
	changed := p.changed
	p.changed = false
	var first, then [2][]processKey
	for k, t := range p.procs {
		if t.waiting {
			continue
		}
		at := 0
		if t.failures > 0 {
			at = 1
		}
		switch {
		case changed && !t.asked.IsZero() && t.empty == 0 && c.directive(k) != t.directive:
			first[at] = append(first[at], k)
		case !now.Before(t.next):
			then[at] = append(then[at], k)
		default:
			continue
		}
		t.waiting = true
	}
	for i := range p.lanes {
		l := &p.lanes[i]
		l.queue = append(append(first[i], l.queue...), then[i]...)
	}
}

// directive decides what the device of a process is to do.
func (c *Control) directive(k processKey) fleet.Directive {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	return c.model.directiveLocked(Connector{ID: k.connector, Tunnel: k.tunnel})
}

// start starts the workers that the lanes need.
func (p *poller) start(worker func(*lane)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.lanes {
		l := &p.lanes[i]
		for range min(l.limit-l.workers, len(l.queue)) { // those that there are, are busy
			l.workers++
			worker(l)
		}
	}
}

// work asks those of a lane, one after the other.
func (c *Control) work(ctx context.Context, l *lane) {
	for {
		p := c.polls
		p.mu.Lock()
		if len(l.queue) == 0 || ctx.Err() != nil {
			l.workers--
			p.mu.Unlock()
			return
		}
		k := l.queue[0]
		l.queue = l.queue[1:]
		p.mu.Unlock()
		c.poll(ctx, k)
	}
}

// poll tells a process what its device is to do, and takes the report.
func (c *Control) poll(ctx context.Context, k processKey) {
	p := c.polls
	p.mu.Lock()
	t := p.procs[k]
	try := t.failures
	t.fresh = false
	p.mu.Unlock()
	l := c.liveOf(k, try)
	if l == nil {
		p.gone(k, t)
		return
	}
	want := c.directive(k)
	b, err := want.Encode()
	var answer []byte
	if err == nil {
		limited, cancel := context.WithTimeout(ctx, deviceTimeout)
		answer, err = l.s.Device(limited, b)
		cancel()
	}
	if ctx.Err() != nil {
		return
	}
	every := deviceEvery
	if err == nil && len(answer) > 0 && c.takeReport(l.connector, answer) {
		every = deviceBusy
	}
	p.answered(t, want, len(answer), every, err)
	if c.directive(k) != want { // it has changed meanwhile
		p.mark()
	}
}

// gone forgets a process without a session, unless it has got one.
func (p *poller) gone(k processKey, t *polled) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t.waiting = false; !t.fresh {
		delete(p.procs, k)
	}
}

// sweepPolls forgets processes without a session, so that what is known does not outgrow what is there.
func (c *Control) sweepPolls() {
	p := c.polls
	p.mu.Lock()
	defer p.mu.Unlock()
	here := map[processKey]bool{}
	for _, l := range c.reg.all() {
		here[l.processKey()] = true
	}
	for k, t := range p.procs {
		if !here[k] && !t.waiting {
			delete(p.procs, k)
		}
	}
}

// liveOf is sessionOf with what is known of the connector.
func (c *Control) liveOf(k processKey, try int) *live {
	s := c.sessionOf(k, try)
	if s == nil {
		return nil
	}
	for _, l := range c.reg.of(k.tunnel) {
		if l.s == s {
			return l
		}
	}
	return nil
}

// answered notes how a process has answered, and when it is asked again: after every, where it has a device.
func (p *poller) answered(t *polled, want fleet.Directive, n int, every time.Duration, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t.waiting, t.asked = false, time.Now()
	wait, result := every, "ok"
	switch {
	case errors.Is(err, tunnel.ErrUnsupported):
		t.failures, t.empty, wait, result = 0, 1, deviceNever, "unsupported"
	case err != nil:
		t.failures++
		wait, result = min(deviceEvery<<min(t.failures-1, 10), 30*time.Minute), "failed"
	case n == 0:
		if t.failures = 0; t.empty < len(firstReports) {
			wait = firstReports[t.empty]
		}
		t.empty, t.directive, result = t.empty+1, want, "no_device"
	default:
		t.failures, t.empty, t.directive = 0, 0, want
	}
	t.next = t.asked.Add(wait - wait/10 + rand.N(wait/5))
	p.results.WithLabelValues(result).Inc()
}

// takeReport keeps what a device says of itself, and reports whether it is updating.
func (c *Control) takeReport(k Connector, encoded []byte) (updating bool) {
	r, err := fleet.ParseReport(encoded)
	if err != nil {
		c.log.Debug("report of a device cannot be read", "peer", k.Name, "bytes", len(encoded))
		c.reported(k, nil)
		return false
	}
	c.reported(k, &r)
	return r.Updating()
}
