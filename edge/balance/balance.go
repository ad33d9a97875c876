package balance

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/tunnel"
)

var (
	// ErrNoPool says that there is no pool of the name.
	ErrNoPool = errors.New("balance: there is no such pool")
	// ErrNoEndpoint says that no endpoint of the pool, nor of those that take over for it, can be used.
	ErrNoEndpoint = errors.New("balance: no endpoint of the pool can be used")
)

// A Dialer reaches endpoints through the tunnel.
type Dialer interface {
	Dial(ctx context.Context, q control.Query) (net.Conn, error)
	Echo(ctx context.Context, q control.Query, e tunnel.EchoRequest) (tunnel.EchoReply, error)
}

// A Config is what a [Balancer] needs.
type Config struct {
	// Dialer carries the probes. Required.
	Dialer Dialer
	// Key authenticates affinity cookies, 32 bytes. Edges that share visitors share it. If nil, it is random, and cookies
	// are good at this balancer alone.
	Key []byte
	// Logger gets changes of health. If nil, they are discarded.
	Logger *slog.Logger
	// Registry gets the metrics. If nil, they are not collected.
	Registry prometheus.Registerer
}

// A Balancer picks endpoints. It is safe for concurrent use.
type Balancer struct {
	cfg Config
	log *slog.Logger

	now     atomic.Pointer[table]
	changed atomic.Pointer[chan struct{}] // closed and replaced when the table or the health of something changes

	mu      sync.Mutex // guards the rest
	ctx     context.Context
	running sync.WaitGroup // monitors
}

// A table is what one configuration compiles to. What is in it but the states is immutable.
type table struct {
	generation uint64
	pools      map[string]*pool
	order      []*pool
}

// New returns a balancer without pools.
func New(cfg Config) (*Balancer, error) {
	if cfg.Dialer == nil {
		return nil, errors.New("balance: a dialer is required")
	}
	if cfg.Key == nil {
		cfg.Key = make([]byte, keySize)
		_, _ = rand.Read(cfg.Key) // never fails
	}
	if len(cfg.Key) != keySize {
		return nil, fmt.Errorf("balance: the key has %d bytes, not %d", len(cfg.Key), keySize)
	}
	b := &Balancer{cfg: cfg, log: cfg.Logger}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	b.now.Store(&table{})
	ch := make(chan struct{})
	b.changed.Store(&ch)
	if cfg.Registry != nil {
		if err := cfg.Registry.Register(collector{b}); err != nil {
			return nil, fmt.Errorf("balance: %w", err)
		}
	}
	return b, nil
}

// Close takes the metrics out of the registry.
func (b *Balancer) Close() {
	if b.cfg.Registry != nil {
		b.cfg.Registry.Unregister(collector{b})
	}
}

// Run runs the monitors until ctx ends, and returns when they have ended.
func (b *Balancer) Run(ctx context.Context) error {
	b.mu.Lock()
	b.ctx = ctx
	for _, p := range b.now.Load().order {
		for _, e := range p.endpoints {
			b.watchLocked(p, e)
		}
	}
	b.mu.Unlock()
	<-ctx.Done()
	b.mu.Lock()
	b.ctx = nil // no monitor begins from here on
	b.mu.Unlock()
	b.running.Wait()
	return nil
}

// Set replaces all pools; the next Pick follows it. Pools that are wrong must not be there, see [spec.CheckPools]: with one
// of them nothing changes.
func (b *Balancer) Set(pools []spec.PoolConfig) error {
	for i, errs := range spec.CheckPools(pools) {
		return fmt.Errorf("balance: pool %q: %w", pools[i].Name, errors.Join(errs...))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.now.Load()
	next := &table{generation: old.generation + 1, pools: make(map[string]*pool, len(pools))}
	for i := range pools {
		p := b.compile(pools[i], old.pools[pools[i].Name])
		next.pools[p.cfg.Name] = p
		next.order = append(next.order, p)
	}
	for _, p := range next.order {
		p.link(next)
	}
	for _, p := range next.order {
		p.index(p.byID, map[*pool]bool{})
	}
	b.now.Store(next)
	b.watchAllLocked(old, next)
	b.wake()
	return nil
}

// Has reports whether there is a pool of the name.
func (b *Balancer) Has(name string) bool { return b.now.Load().pools[name] != nil }

// Generation changes with each Set.
func (b *Balancer) Generation() uint64 { return b.now.Load().generation }

// Changed returns a channel that is closed when the pools, or the health of an endpoint, change.
func (b *Balancer) Changed() <-chan struct{} { return *b.changed.Load() }

// wake tells those who wait on Changed.
func (b *Balancer) wake() {
	next := make(chan struct{})
	close(*b.changed.Swap(&next))
}
