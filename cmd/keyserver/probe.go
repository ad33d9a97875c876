package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

const (
	// probeTimeout bounds one probe signature.
	probeTimeout = 5 * time.Second
	// probeRate bounds probe signatures over all homes, in a second.
	probeRate = 20
	// probeAgain is how much sooner than others a home is asked again that failed.
	probeAgain = 12
	// probeTick is how often the prober looks for what is due.
	probeTick = 100 * time.Millisecond
)

// A probeID is one key in one home.
type probeID struct {
	ski  keyless.SKI
	home string
}

// A probeResult is what the last probe of a key in a home said.
type probeResult struct {
	Err  error // nil: it signed
	At   time.Time
	Took time.Duration
	due  time.Time
}

// A prober has each key sign in each of its homes at an interval, past the clients' queues, so that /readyz tells what is so
// and not what is hoped.
type prober struct {
	registry *signer.Registry
	logger   *slog.Logger
	limit    *rate.Limiter
	beat     atomic.Int64 // when run last looked around, Unix time in nanoseconds

	mu       sync.Mutex // guards the rest
	interval time.Duration
	results  map[probeID]probeResult
	busy     map[string]bool // homes that are being asked
	news     chan struct{}   // closed, and replaced, when a result came
}

func newProber(r *signer.Registry, interval time.Duration, logger *slog.Logger) *prober {
	return &prober{registry: r, logger: logger, interval: interval, limit: rate.NewLimiter(probeRate, probeRate),
		results: map[probeID]probeResult{}, busy: map[string]bool{}, news: make(chan struct{})}
}

// set changes the interval and has everything probed anew.
func (p *prober) set(interval time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.interval = interval
	for id, r := range p.results {
		r.due = time.Time{}
		p.results[id] = r
	}
}

// A target is what a probe asks.
type target struct {
	probeID
	entry *signer.Entry
	index int // of the home
}

func targetsOf(e *signer.Entry) []target {
	t := make([]target, len(e.Homes))
	for i, h := range e.Homes {
		t[i] = target{probeID{e.SKI, homeName(h)}, e, i}
	}
	return t
}

// homeName is what operators call the place of a home.
func homeName(h signer.Home) string {
	if h.Lane != nil {
		return h.Lane.Name()
	}
	return h.Key.Info().Home
}

// run probes until ctx ends. Homes are asked side by side, the keys of one home one after the other.
func (p *prober) run(ctx context.Context) error {
	tick := time.NewTicker(probeTick)
	defer tick.Stop()
	var asking sync.WaitGroup
	defer asking.Wait()
	for {
		p.beat.Store(time.Now().UnixNano())
		for home, targets := range p.due(time.Now()) {
			asking.Go(func() {
				defer p.done(home)
				for _, t := range targets {
					if !p.probe(ctx, t) {
						return
					}
				}
			})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// due returns what is to be probed now, by home, and forgets what is not there any more.
func (p *prober) due(now time.Time) map[string][]target {
	p.mu.Lock()
	defer p.mu.Unlock()
	due := map[string][]target{}
	known := make(map[probeID]bool, len(p.results))
	for _, e := range p.registry.Entries() {
		for _, t := range targetsOf(e) {
			known[t.probeID] = true
			if !p.busy[t.home] && !now.Before(p.results[t.probeID].due) {
				due[t.home] = append(due[t.home], t)
			}
		}
	}
	for id := range p.results {
		if !known[id] {
			delete(p.results, id)
		}
	}
	for home := range due {
		p.busy[home] = true
	}
	return due
}

func (p *prober) done(home string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.busy, home)
}

// probe asks for one signature and reports whether the home may be asked for the next.
func (p *prober) probe(ctx context.Context, t target) bool {
	if p.limit.Wait(ctx) != nil {
		return false
	}
	start := time.Now()
	limited, cancel := context.WithTimeout(ctx, probeTimeout)
	err := t.entry.Probe(limited, t.index)
	timedOut := limited.Err() != nil
	cancel()
	if ctx.Err() != nil {
		return false
	}
	p.keep(t.probeID, probeResult{Err: err, At: start, Took: time.Since(start)})
	return !timedOut // a home that does not answer is not asked for its other keys in this round
}

// keep stores a result and tells who waits. A change is logged.
func (p *prober) keep(id probeID, r probeResult) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, known := p.results[id]
	pause := p.interval
	if r.Err != nil {
		pause = max(p.interval/probeAgain, min(time.Second, p.interval))
	}
	r.due = time.Now().Add(jitter(pause))
	p.results[id] = r
	switch {
	case r.Err != nil && (!known || before.Err == nil):
		p.logger.Warn("a key does not sign in a home", "key_ski", id.ski.String(), "home", id.home, "err", r.Err)
	case r.Err == nil && known && before.Err != nil:
		p.logger.Info("a key signs again in a home", "key_ski", id.ski.String(), "home", id.home)
	}
	close(p.news)
	p.news = make(chan struct{})
}

// all returns the results of all keys in all homes there are; those that have none yet are pending.
func (p *prober) all() (results map[probeID]probeResult, pending []target, news <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	results = map[probeID]probeResult{}
	for _, e := range p.registry.Entries() {
		for _, t := range targetsOf(e) {
			if r, ok := p.results[t.probeID]; ok {
				results[t.probeID] = r
			} else {
				pending = append(pending, t)
			}
		}
	}
	return results, pending, p.news
}

// A verdict tells which keys can sign.
type verdict struct {
	failing  []error // keys that sign nowhere
	degraded []error // homes in which keys do not sign that do elsewhere
	signs    map[keyless.SKI]bool
}

// verdict returns what the last probes said, and waits for the first of each key until ctx ends.
func (p *prober) verdict(ctx context.Context) verdict {
	var (
		results map[probeID]probeResult
		pending []target
	)
	for {
		var news <-chan struct{}
		if results, pending, news = p.all(); len(pending) == 0 {
			break
		}
		select {
		case <-news:
			continue
		case <-ctx.Done():
		}
		break
	}
	v := verdict{signs: map[keyless.SKI]bool{}}
	now := time.Now()
	p.mu.Lock()
	stale := 2*p.interval + time.Minute
	p.mu.Unlock()
	for _, e := range p.registry.Entries() {
		var faults []error
		for _, t := range targetsOf(e) {
			r, ok := results[t.probeID]
			switch age := now.Sub(r.At); {
			case !ok:
				faults = append(faults, fmt.Errorf("key %v in %s: was not probed yet", e, t.home))
			case r.Err != nil:
				faults = append(faults, fmt.Errorf("key %v in %s: %w (%v ago)", e, t.home, r.Err, age.Round(time.Second)))
			case age > stale:
				faults = append(faults, fmt.Errorf("key %v in %s: was not probed for %v", e, t.home, age.Round(time.Second)))
			}
		}
		if len(faults) == len(e.Homes) {
			v.failing = append(v.failing, faults...)
		} else {
			v.degraded = append(v.degraded, faults...)
			v.signs[e.SKI] = true
		}
	}
	return v
}

// errNotOpen is joined by the places that are not open while their keys may be asked for.
var errNotOpen = errors.New("is not open")

// unserved returns what is wrong with places, if a rule names a key that cannot sign without them. Which keys a place holds is not known
// before it is open, so that a rule for every key asks for every place.
func (s *server) unserved(v verdict) (errs []error) {
	named, every := true, false
	for _, rule := range s.current.Load().cfg.Clients {
		for _, name := range rule.Keys {
			every = every || name == "*"
			named = named && (name == "*" || slices.ContainsFunc(s.keys.registry.ByName(name), func(e *signer.Entry) bool { return v.signs[e.SKI] }))
		}
	}
	for _, p := range s.keys.present() {
		if p.backend == nil && (every || !named) {
			errs = append(errs, fmt.Errorf("%s %s %w: %w", p.kind, p.name, errNotOpen, p.err))
		}
		for _, err := range p.faults {
			if !named {
				errs = append(errs, fmt.Errorf("%s %s: %w", p.kind, p.name, err))
			}
		}
	}
	return errs
}
