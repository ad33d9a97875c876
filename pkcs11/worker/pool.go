package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// Pool is a token served by workers, a [signer.Backend] and a [signer.Capacitor]. All methods may be called from several goroutines
// at once.
type Pool struct {
	cfg    Config
	module string // the module's path
	log    *slog.Logger
	name   string // the token's, set by Open

	logins logins
	starts chan struct{} // held by whoever starts a worker: one at a time
	behind atomic.Int32  // processes that cannot be killed
	ready  atomic.Pointer[[]*proc]

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // of supervisors
	slots  []*seat

	mu       sync.Mutex    // guards what follows
	changed  chan struct{} // closed, and replaced, when workers come, go, or stop coming
	closed   bool
	pin      pkcs11.PIN
	readings int // of the PIN
	kills    map[string]int64
	keys     map[keyless.SKI]*key
	numbers  uint32 // of keys

	retries sync.Mutex // held by Retry
	closing sync.Once
}

// Stats is what is known of a pool's workers.
type Stats struct {
	Workers  []WorkerStats
	Restarts int64            // workers started in place of others
	Kills    map[string]int64 // workers that ended before they were told to, by reason: see Reasons
}

// WorkerStats is what is known of one worker.
type WorkerStats struct {
	PID       int    // 0 if there is no process now
	State     string // StateStarting, StateReady, StateDraining, StateWaiting or StateRefused
	InFlight  int    // operations that it holds
	Restarts  int64
	LastError string // why the process before ended or did not start; "" if none did
}

// States of a worker.
const (
	StateStarting = "starting"
	StateReady    = "ready"
	StateDraining = "draining" // finishes what it holds
	StateWaiting  = "waiting"  // for the next start
	StateRefused  = "refused"  // the token refused the PIN: nothing happens before Retry
)

// Reasons lists the keys of Stats.Kills: "deadline" (the module held an operation too long), "silent" (the worker said nothing, or did not
// leave when told to), "start" (it was not ready in time, or failed to start), "crash" (a signal ended it), "exit" (it left by itself),
// "device" (the device failed, or nothing worked for a while) and "protocol" (it sent what makes no sense, or reads nothing).
func Reasons() []string {
	return []string{"deadline", "silent", "start", "crash", "exit", "device", "protocol"}
}

// Open starts the first worker and, once it is logged in, the others. A wrong PIN costs one try: pkcs11.ErrPINIncorrect. ctx bounds
// Open only. The caller must call Close.
func Open(ctx context.Context, cfg Config) (*Pool, error) {
	p, err := open(ctx, cfg)
	if err != nil {
		return nil, named(err)
	}
	return p, nil
}

func open(ctx context.Context, cfg Config) (*Pool, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	for _, err := range cfg.Token.Check() {
		return nil, err
	}
	module, err := cfg.Token.ModulePath()
	if err != nil {
		return nil, err
	}
	pin, err := cfg.Token.ReadPIN()
	if err != nil {
		return nil, err
	}
	p := &Pool{
		cfg: cfg, module: module, log: cfg.Logger.With("token", nameOf(&cfg.Token.URI)), starts: make(chan struct{}, 1),
		changed: make(chan struct{}), pin: pin, kills: map[string]int64{}, keys: map[keyless.SKI]*key{},
	}
	p.ready.Store(new([]*proc))
	p.ctx, p.cancel = context.WithCancel(context.Background())
	for range cfg.Workers {
		p.slots = append(p.slots, &seat{state: StateStarting, kick: make(chan chan error)})
	}
	first, err := p.start(ctx, p.slots[0])
	if err != nil {
		p.cancel()
		return nil, err
	}
	p.name = first.name
	for i, s := range p.slots {
		w := first
		if i > 0 {
			w = nil
		}
		p.wg.Go(func() { p.supervise(s, w) })
	}
	p.wg.Go(p.watch)
	return p, nil
}

// nameOf is what the token is called before it has said its name.
func nameOf(u *pkcs11.URI) string {
	switch {
	case u.Token != "":
		return u.Token
	case u.Serial != "":
		return "serial " + u.Serial
	}
	return "slot-id " + u.SlotID
}

// confineRequest is what each worker is told first.
func (p *Pool) confineRequest() *confineRequest {
	s := &p.cfg.Sandbox
	return &confineRequest{Mode: s.Mode, ReadPaths: s.ReadPaths, WritePaths: s.WritePaths, Network: s.Network, MaxMemory: s.MaxMemory,
		MaxFiles: s.MaxFiles, Module: p.module}
}

// openRequest is what each worker is told when it is confined.
func (p *Pool) openRequest() *openRequest {
	t := &p.cfg.Token
	u := t.URI
	u.PINSource, u.ModuleName, u.ModulePath = "", "", ""
	return &openRequest{Mode: p.cfg.Sandbox.Mode, Network: p.cfg.Sandbox.Network, URI: u.String(), Module: p.module, Sessions: t.Sessions,
		AllowExtractable: t.AllowExtractable, AllowFinalTry: t.AllowFinalTry, Deadline: p.cfg.Deadline, KeepAlive: p.cfg.KeepAlive}
}

// Name returns the token's label, or its serial if it has none.
func (p *Pool) Name() string { return p.name }

// Check reports whether a worker is there, the token answers and the login stands.
func (p *Pool) Check(ctx context.Context) error {
	if _, _, err := p.do(ctx, &request{typ: frameCheck}); err != nil {
		return named(fmt.Errorf("check token %s: %w", p.name, err))
	}
	return nil
}

// Close ends the workers after what they hold, and waits for that. Operations that come later return pkcs11.ErrClosed.
func (p *Pool) Close() error {
	p.closing.Do(func() {
		p.mu.Lock()
		p.closed = true
		p.notifyLocked()
		p.mu.Unlock()
		p.cancel()
	})
	p.wg.Wait()
	return nil
}

// Capacity is how many operations the workers that are ready do at once, 0 if none is ready.
func (p *Pool) Capacity() int {
	n := 0
	for _, w := range *p.ready.Load() {
		n += w.sessions
	}
	return n
}

// Workers is how many workers are ready.
func (p *Pool) Workers() int { return len(*p.ready.Load()) }

// Stats returns what is known of the workers.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := Stats{Kills: maps.Clone(p.kills)}
	for _, s := range p.slots {
		ws := WorkerStats{State: s.state, Restarts: s.restarts, LastError: s.lastError}
		if s.proc != nil {
			ws.PID, ws.InFlight = s.proc.cmd.Process.Pid, int(s.proc.inFlight.Load())
		}
		st.Restarts += s.restarts
		st.Workers = append(st.Workers, ws)
	}
	return st
}

// moveWait is how long an operation waits for a worker that is being started when none is ready.
const moveWait = 2 * time.Second

// pick returns the worker that has the least to do. If none is ready and one is being started, it waits for it.
func (p *Pool) pick(ctx context.Context) (*proc, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	for deadline := (time.Time{}); ; {
		ready := *p.ready.Load()
		var best *proc
		least := int32(maxInFlight)
		for _, w := range ready {
			if n := w.inFlight.Load(); n < least {
				best, least = w, n
			}
		}
		if best != nil {
			return best, nil
		}
		if len(ready) > 0 {
			return nil, fmt.Errorf("%w: each worker holds %d operations", signer.ErrOverloaded, maxInFlight)
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(moveWait)
		}
		if err := p.await(ctx, deadline); err != nil {
			return nil, err
		}
	}
}

// await waits until the workers have changed. It fails at once if no worker is being started, or only such as did not start the last
// time: another home may do it meanwhile.
func (p *Pool) await(ctx context.Context, deadline time.Time) error {
	p.mu.Lock()
	changed, closed, coming := p.changed, p.closed, false
	err := p.logins.denial()
	for _, s := range p.slots {
		switch s.state {
		case StateStarting, StateReady, StateDraining: // a worker that drains is replaced at once, unless the pool closes
			coming = coming || !s.failing
		}
		if err == nil && s.lastError != "" {
			err = errors.New(s.lastError)
		}
	}
	p.mu.Unlock()
	if closed {
		return pkcs11.ErrClosed
	}
	left := time.Until(deadline)
	if len(*p.ready.Load()) > 0 {
		return nil
	}
	if !coming || left <= 0 {
		if err == nil {
			return errGone
		}
		return fmt.Errorf("%w: %w", errGone, err)
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// notifyLocked wakes those who wait for a worker.
func (p *Pool) notifyLocked() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// offer makes a worker one that is picked, unless it is gone already.
func (p *Pool) offer(w *proc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead || w.isSick {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	next := append(slices.Clone(*p.ready.Load()), w)
	p.ready.Store(&next)
	p.notifyLocked()
}

// withdraw makes sure that a worker is not picked any more.
func (p *Pool) withdraw(w *proc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := slices.DeleteFunc(slices.Clone(*p.ready.Load()), func(o *proc) bool { return o == w })
	p.ready.Store(&next)
}

// watch ends workers that hold operations and say nothing.
func (p *Pool) watch() {
	limit := p.cfg.Deadline + max(p.cfg.Deadline/2, silence)
	tick := time.NewTicker(min(limit/4, time.Second))
	defer tick.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-tick.C:
		}
		for _, w := range *p.ready.Load() {
			if err := w.backlog(); err != nil {
				w.kill("protocol", err)
			} else if quiet := w.quiet(); quiet > limit {
				w.kill("silent", fmt.Errorf("it held operations and said nothing for %v", quiet.Round(time.Millisecond)))
			}
		}
	}
}

// silence is how much longer than the deadline a worker with work may say nothing, at least. It says something four times a second.
const silence = time.Second

// quiet is how long the worker has held operations without a word.
func (w *proc) quiet() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.pending) == 0 {
		return 0
	}
	return time.Duration(sinceStart() - max(w.busy, w.heard.Load()))
}
