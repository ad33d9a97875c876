package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/state"
)

const (
	// reconnectPause is the wait between attempts to reach a cluster that is away.
	reconnectPause = time.Second
	// cacheEvery is how often the file is written, at most.
	cacheEvery = 30 * time.Second
	// lastLook bounds the reading of what changed just before the store is closed.
	lastLook = 2 * time.Second
)

// A cached is a store that keeps a copy of everything, in memory and in a file. While the cluster is away it answers reads
// from the copy, and refuses changes; watches go on when it is back. With the file it opens without the cluster.
type cached struct {
	cfg Config
	log *slog.Logger

	life context.Context // ends with Close
	end  context.CancelFunc
	jobs sync.WaitGroup
	once sync.Once
	err  error // of Close

	mu     sync.Mutex // guards the fields below, and jobs.Go against Close
	closed bool
	s      *store        // nil until the cluster was reached
	up     chan struct{} // closed when s is set
	copy   *snapshot     // nil until something was read
	dirty  bool          // the file is older than the copy
	awayAt time.Time     // when the cluster last did not answer
}

// openCached opens a cluster with a cache. It succeeds without the cluster if the file is there.
func openCached(cfg Config) (*cached, error) {
	c := &cached{cfg: cfg, log: cfg.Logger, up: make(chan struct{})}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	s, err := open(cfg, maxQueueEvents, maxQueueBytes)
	switch {
	case err == nil:
		c.s = s
		close(c.up)
	case errors.Is(err, state.ErrUnavailable):
		var cerr error
		var written time.Time
		if c.copy, written, cerr = readCache(cfg.Cache, cfg.prefix()); cerr != nil {
			return nil, fmt.Errorf("%w; and there is no cache to start from: %w", err, cerr)
		}
		c.log.Warn("etcd is away; starting from the cache, without what was changed later", "path", cfg.Cache,
			"written", written.UTC().Format(time.RFC3339), "err", err)
	default:
		return nil, err
	}
	c.life, c.end = context.WithCancel(context.Background())
	c.jobs.Go(c.run)
	return c, nil
}

// run reaches the cluster, keeps the copy up to date and writes the file, until Close.
func (c *cached) run() {
	for c.current() == nil {
		if s, err := open(c.cfg, maxQueueEvents, maxQueueBytes); err == nil {
			c.mu.Lock()
			c.s = s
			close(c.up)
			c.mu.Unlock()
			c.log.Info("etcd is back")
			break
		}
		if !c.pause(reconnectPause) {
			return
		}
	}
	var writing sync.WaitGroup
	writing.Go(c.keepFile)
	for c.life.Err() == nil {
		state.Follow(c.life, c.current(), "", c.reset, c.apply) //nolint:errcheck // it is tried again
		c.pause(reconnectPause)
	}
	writing.Wait()
	c.catchUp()
	c.writeFile()
}

// catchUp reads what changed a moment before the store is closed, and what the watch has not told of.
func (c *cached) catchUp() {
	s := c.current()
	c.mu.Lock()
	behind := c.copy == nil || int64(c.copy.rev) < s.seen.Load()
	c.mu.Unlock()
	if !behind {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), lastLook)
	defer cancel()
	if entries, rev, err := s.List(ctx, ""); err == nil {
		c.reset(entries, rev) //nolint:errcheck // it has none
	}
}

// pause waits; it reports false when the store is closed.
func (c *cached) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-c.life.Done():
		return false
	}
}

func (c *cached) current() *store {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.s
}

func (c *cached) reset(entries []state.Entry, rev state.Revision) error {
	s := &snapshot{rev: rev, entries: make(map[string]state.Entry, len(entries))}
	for _, e := range entries {
		s.entries[e.Key] = e
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.copy, c.dirty = s, true
	return nil
}

func (c *cached) apply(e state.Event) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.Deleted {
		delete(c.copy.entries, e.Key)
	} else {
		c.copy.entries[e.Key] = e.Entry
	}
	c.copy.rev = e.Revision
	c.dirty = c.dirty || !c.volatile(e.Key)
	return nil
}

func (c *cached) volatile(key string) bool {
	for _, p := range c.cfg.Volatile {
		if strings.HasPrefix(key, p) {
			return true
		}
	}
	return false
}

// keepFile writes the file when something changed, soon after the first reading.
func (c *cached) keepFile() {
	for wait := reconnectPause; c.pause(wait); wait = cacheEvery {
		c.writeFile()
	}
}

func (c *cached) writeFile() {
	c.mu.Lock()
	if !c.dirty {
		c.mu.Unlock()
		return
	}
	c.dirty = false
	b := c.copy.encode(c.cfg.prefix())
	c.mu.Unlock()
	if err := writeCache(c.cfg.Cache, b); err != nil {
		c.log.Warn("cache of the state not written; without it no edge starts while etcd is away", "path", c.cfg.Cache, "err", err)
		c.mu.Lock()
		c.dirty = true
		c.mu.Unlock()
	}
}

// read asks the cluster, and the copy if that is away.
func (c *cached) read(ctx context.Context, ask func(*store) error, look func(*snapshot)) error {
	c.mu.Lock()
	s, closed, recent := c.s, c.closed, time.Since(c.awayAt) < reconnectPause
	if closed {
		c.mu.Unlock()
		return state.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		c.mu.Unlock()
		return err
	}
	away := s == nil || recent
	if away && c.copy != nil {
		look(c.copy)
		c.mu.Unlock()
		return nil
	}
	c.mu.Unlock()
	err := error(state.ErrUnavailable)
	if s != nil {
		err = ask(s)
	}
	if !errors.Is(err, state.ErrUnavailable) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.awayAt = time.Now()
	if c.copy == nil {
		return err
	}
	look(c.copy)
	return nil
}

// Get implements state.Store.
func (c *cached) Get(ctx context.Context, key string) (e state.Entry, err error) {
	if err := state.CheckKey(key); err != nil {
		return e, err
	}
	missing := false
	err = c.read(ctx, func(s *store) (err error) {
		e, err = s.Get(ctx, key)
		return err
	}, func(known *snapshot) {
		var ok bool
		e, ok = known.entries[key]
		e.Value = append([]byte(nil), e.Value...)
		missing = !ok
	})
	if err == nil && missing {
		err = fmt.Errorf("%w: key %q", state.ErrNotFound, key)
	}
	return e, err
}

// List implements state.Store.
func (c *cached) List(ctx context.Context, prefix string) (entries []state.Entry, rev state.Revision, err error) {
	err = c.read(ctx, func(s *store) (err error) {
		entries, rev, err = s.List(ctx, prefix)
		return err
	}, func(known *snapshot) { entries, rev = known.list(prefix), known.rev })
	return entries, rev, err
}

// Txn implements state.Store.
func (c *cached) Txn(ctx context.Context, conds []state.Cond, ops []state.Op) (state.Revision, error) {
	if err := state.CheckTxn(conds, ops); err != nil {
		return 0, err
	}
	c.mu.Lock()
	s, closed := c.s, c.closed
	c.mu.Unlock()
	switch {
	case closed:
		return 0, state.ErrClosed
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case s == nil:
		return 0, fmt.Errorf("%w: etcd at %s was not reached yet", state.ErrUnavailable, hosts(c.cfg.Endpoints))
	}
	return s.Txn(ctx, conds, ops)
}

// Watch implements state.Store. While the cluster is away a watch waits for it.
func (c *cached) Watch(ctx context.Context, prefix string, after state.Revision) (<-chan state.Event, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if s := c.current(); s != nil {
		if events, err := s.Watch(ctx, prefix, after); !errors.Is(err, state.ErrUnavailable) {
			return events, err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, state.ErrClosed
	}
	out := make(chan state.Event)
	c.jobs.Go(func() { c.watchLater(ctx, prefix, after, out) })
	return out, nil
}

// watchLater is a watch that begins when the cluster is back.
func (c *cached) watchLater(ctx context.Context, prefix string, after state.Revision, out chan<- state.Event) {
	defer close(out)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(c.life, cancel)
	defer stop()
	send := func(e state.Event) bool {
		select {
		case out <- e:
			return true
		case <-ctx.Done():
			return false
		}
	}
	select {
	case <-c.up:
	case <-ctx.Done():
		return
	}
	for {
		events, err := c.current().Watch(ctx, prefix, after)
		switch {
		case err == nil:
			for e := range events {
				if !send(e) {
					break
				}
			}
			cancel()
			for range events { // until the watch has ended
			}
			return
		case ctx.Err() != nil, errors.Is(err, state.ErrClosed):
			return
		case !errors.Is(err, state.ErrUnavailable):
			send(state.Event{Err: err})
			return
		}
		if !c.pause(reconnectPause) {
			return
		}
	}
}

// Close implements state.Store.
func (c *cached) Close() error {
	c.once.Do(func() {
		c.mu.Lock()
		c.closed = true
		c.mu.Unlock()
		c.end()
		c.jobs.Wait()
		if s := c.current(); s != nil {
			c.err = s.Close()
		}
	})
	return c.err
}
