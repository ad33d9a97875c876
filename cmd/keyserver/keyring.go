package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/pkcs11/worker"
	"github.com/keyhaven/keyhaven/signer"
)

const (
	// Pauses between attempts to open places that are away.
	minPlacePause = time.Second
	maxPlacePause = 30 * time.Second
	// capacityPause is how often lanes learn how many operations their places take.
	capacityPause = 100 * time.Millisecond
)

// A keyring holds the places of the present configuration and keeps the registry in step.
type keyring struct {
	registry *signer.Registry
	logger   *slog.Logger

	change sync.Mutex // held while places are opened and closed; only its holder writes what mu guards
	mu     sync.Mutex // guards those below
	places []*place
	lanes  map[string]lane    // by kind and name
	yield  context.CancelFunc // ends a round of attempts, for a change that cannot wait; nil without one

	beat    atomic.Int64   // when run last looked around, Unix time in nanoseconds
	closing sync.WaitGroup // places that a new configuration does not have

	news chan struct{} // holds a value when places have changed
}

// A lane outlives reloads, unless its configuration changes.
type lane struct {
	config signer.LaneConfig
	*signer.Lane
}

func newKeyring(logger *slog.Logger) *keyring {
	return &keyring{registry: signer.NewRegistry(), logger: logger, lanes: map[string]lane{}, news: make(chan struct{}, 1)}
}

// lane returns the lane of a place, the one that it had if there is one.
func (r *keyring) lane(s *spec, b signer.Backend) *signer.Lane {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := s.kind + " " + s.name
	if l, ok := r.lanes[id]; ok && l.config == s.lane {
		return l.Lane
	}
	c := s.lane
	c.Capacity, c.Logger = capacity(b), r.logger
	l := lane{s.lane, signer.NewLane(c)}
	r.lanes[id] = l
	return l.Lane
}

// openAll opens places, those of one module one after the other: modules that keep tokens in files disturb each other at their start.
func (r *keyring) openAll(ctx context.Context, specs []*spec) map[*spec]*place {
	groups := map[string][]*spec{}
	for i, s := range specs {
		id := s.module
		if id == "" {
			id = fmt.Sprint(i)
		}
		groups[id] = append(groups[id], s)
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex // guards open
		open = map[*spec]*place{}
	)
	for _, group := range groups {
		wg.Go(func() {
			for _, s := range group {
				p := openPlace(ctx, s, r.lane, r.logger)
				mu.Lock()
				open[s] = p
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return open
}

// start opens all places of a plan. One that does not open is left to run, or to the operator.
func (r *keyring) start(ctx context.Context, specs []*spec) {
	r.replace(ctx, specs)
}

// replace puts the places of a plan in place of the present ones and returns what is wrong with any. Places that the plan has as they
// were stay open, and their keys are looked for again; those that had failed are tried once.
func (r *keyring) replace(ctx context.Context, specs []*spec) (faults []error) {
	defer r.take()()
	old := r.present()
	next, fresh := make([]*place, len(specs)), []*spec(nil)
	for _, s := range specs {
		if i := slices.IndexFunc(old, func(p *place) bool { return p.backend != nil && p.same(s) }); i < 0 {
			fresh = append(fresh, s)
		}
	}
	opened := r.openAll(ctx, fresh)
	if ctx.Err() != nil && len(old) > 0 && !errors.Is(context.Cause(ctx), errOvertaken) { // the server stops: what was opened is not needed, and what failed is no fault
		for _, p := range opened {
			r.closing.Go(func() { r.end(p) })
		}
		return []error{fmt.Errorf("the homes stay as they were: %w", context.Cause(ctx))}
	}
	for i, s := range specs {
		if next[i] = opened[s]; next[i] == nil {
			j := slices.IndexFunc(old, func(p *place) bool { return p.backend != nil && p.same(s) })
			next[i] = old[j].again(ctx, s, r.lane(s, old[j].backend), r.logger)
		} else {
			r.tell(next[i])
		}
	}
	r.set(next)
	for _, p := range old {
		if p.backend == nil || slices.ContainsFunc(next, func(n *place) bool { return n.backend == p.backend }) {
			continue
		}
		// Operations in progress are waited for, perhaps for long: the rest of a new configuration must not be.
		r.closing.Go(func() { r.end(p) })
	}
	return r.faults()
}

// end closes a place that is not used any more.
func (r *keyring) end(p *place) {
	if err := p.close(); err != nil {
		r.logger.Warn("closing a home failed", "home", p.name, "err", err)
	}
}

// take locks places against other changes and returns what unlocks them. A round of attempts gives way.
func (r *keyring) take() (release func()) {
	r.mu.Lock()
	if r.yield != nil {
		r.yield()
	}
	r.mu.Unlock()
	r.change.Lock()
	return r.change.Unlock
}

// set makes places the present ones and fills the registry with their keys. Keys of a place that the registry cannot take are left
// out, and the place says why.
func (r *keyring) set(places []*place) {
	var homes []signer.Home
	for _, p := range places {
		homes = append(homes, p.homes...)
	}
	if r.registry.Replace(homes) != nil {
		homes = homes[:0]
		for i, p := range places {
			more := append(slices.Clone(homes), p.homes...)
			err := signer.NewRegistry().Replace(more)
			if err == nil {
				homes = more
				continue
			}
			without := *p
			without.homes, without.faults = nil, append(slices.Clone(p.faults), err)
			places[i] = &without
			r.logger.Error("the keys of a home are left out", "home", p.name, "config", p.at, "err", err)
		}
		if err := r.registry.Replace(homes); err != nil {
			r.logger.Error("keys cannot be taken in", "err", err)
		}
	}
	r.mu.Lock()
	r.places = places
	for id := range r.lanes {
		if !slices.ContainsFunc(places, func(p *place) bool { return p.kind+" "+p.name == id }) {
			delete(r.lanes, id)
		}
	}
	r.mu.Unlock()
	select {
	case r.news <- struct{}{}:
	default:
	}
}

func (r *keyring) present() []*place {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.places
}

// laneOf returns the lane of a place, or nil.
func (r *keyring) laneOf(p *place) *signer.Lane {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lanes[p.kind+" "+p.name].Lane
}

// tell logs what became of a place that was to be opened.
func (r *keyring) tell(p *place) {
	switch {
	case p.backend != nil && p.kind == kindFiles:
	case p.backend != nil:
		r.logger.Info("home is open", "home", p.name, "keys", len(p.homes))
		for _, err := range p.faults {
			r.logger.Error("a key cannot be used; the others of the home can", "home", p.name, "config", p.at, "err", err)
		}
	case final(p.err):
		r.logger.Error("home cannot be used; correct the cause, then run keyhaven-keyserver token retry, or reload", "home", p.name, "config", p.at, "err", p.err)
	default:
		r.logger.Error("home is away; it is tried again", "home", p.name, "config", p.at, "err", p.err)
	}
}

// faults returns what is wrong with any place, by where the configuration names it.
func (r *keyring) faults() []error {
	var errs []error
	for _, p := range r.present() {
		if p.err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.at, p.err))
		}
		for _, err := range p.faults {
			errs = append(errs, fmt.Errorf("%s: %w", p.at, err))
		}
	}
	return errs
}

// run tries places that are away again, and keeps lanes as wide as their places are, until ctx ends.
func (r *keyring) run(ctx context.Context) error {
	width := time.NewTicker(capacityPause)
	defer width.Stop()
	pause, due := minPlacePause, time.Now().Add(jitter(minPlacePause))
	var round chan bool // holds whether a place came, when a round has ended; nil without one
	for {
		r.beat.Store(time.Now().UnixNano())
		select {
		case <-ctx.Done():
			if round != nil {
				<-round
			}
			return nil
		case <-r.news:
			pause = minPlacePause
		case came := <-round:
			round = nil
			if pause = min(2*pause, maxPlacePause); came {
				pause = minPlacePause
			}
			due = time.Now().Add(jitter(pause))
		case now := <-width.C:
			r.widen()
			if round == nil && now.After(due) && slices.ContainsFunc(r.present(), (*place).away) {
				ended := make(chan bool, 1)
				round = ended
				go func() { ended <- r.tryAgain(ctx) }()
			}
		}
	}
}

func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// widen tells lanes how many operations their places take now.
func (r *keyring) widen() {
	for _, p := range r.present() {
		if l := r.laneOf(p); l != nil && p.backend != nil {
			n := capacity(p.backend)
			if n == 0 && stopped(p.backend) {
				n = 1 // nothing will be ready before an operator acts: operations are not to wait for it, but to be told
			}
			l.SetCapacity(n)
		}
	}
}

// tryAgain opens what is away and reports whether any came back.
func (r *keyring) tryAgain(ctx context.Context) (came bool) {
	r.change.Lock()
	defer r.change.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r.mu.Lock()
	r.yield = cancel
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.yield = nil
		r.mu.Unlock()
	}()
	places := slices.Clone(r.present())
	var specs []*spec
	for _, p := range places {
		if p.away() {
			specs = append(specs, p.spec)
		}
	}
	opened := r.openAll(ctx, specs)
	for i, p := range places {
		next := opened[p.spec]
		switch {
		case next == nil || next.backend == nil && ctx.Err() != nil: // given way, which is no failure of the place
			continue
		case next.away() && next.err.Error() == p.err.Error():
			r.logger.Debug("home is still away", "home", p.name, "err", next.err)
		default:
			r.tell(next)
		}
		places[i] = next
		came = came || next.backend != nil
	}
	r.set(places)
	return came
}

// errNoHome means that no place has the name.
var errNoHome = errors.New("there is no such token")

// retry opens a place that is not open, or has the PIN of an open one read and tried, once.
func (r *keyring) retry(ctx context.Context, name string) error {
	defer r.take()()
	places := slices.Clone(r.present())
	i := slices.IndexFunc(places, func(p *place) bool { return p.name == name && p.kind != kindFiles })
	if i < 0 {
		return errNoHome
	}
	p := places[i]
	if p.backend == nil {
		if p.forget != nil {
			p.forget()
		}
		next := openPlace(ctx, p.spec, r.lane, r.logger)
		if next.backend == nil && ctx.Err() != nil { // as it was: a PIN that was refused is not to be tried by itself now
			return fmt.Errorf("given up: %w", context.Cause(ctx))
		}
		places[i] = next
		r.tell(next)
		r.set(places)
		return next.err
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if err := retry(ctx, p.backend); err != nil {
		return err
	}
	next := &place{spec: p.spec, backend: p.backend}
	if err := next.find(ctx, p.backend, r.lane(p.spec, p.backend)); err != nil {
		return err
	}
	places[i] = next
	r.set(places)
	return nil
}

// close closes all places, after the operations in progress.
func (r *keyring) close() error {
	defer r.take()()
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex // guards errs
		errs []error
	)
	for _, p := range r.present() {
		wg.Go(func() {
			if err := p.close(); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	r.closing.Wait()
	return errors.Join(errs...)
}

// workers returns the process ids of all workers.
func (r *keyring) workers() (pids []int) {
	for _, p := range r.present() {
		if pool, ok := p.backend.(*worker.Pool); ok {
			for _, w := range pool.Stats().Workers {
				if w.PID != 0 {
					pids = append(pids, w.PID)
				}
			}
		}
	}
	return pids
}
