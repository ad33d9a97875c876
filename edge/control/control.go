package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/vnet"
)

// Config is what a [Control] works with.
type Config struct {
	// Store holds the records. Required; the caller closes it, after the Control.
	Store state.Store
	// Authority is the edge operator's, which names connectors. Required.
	Authority *mtls.Authority
	// Edges are the host:port addresses that join tokens and enrolled connectors are told to dial. Without any, no
	// token can be made.
	Edges []string
	// Name is this edge's among those that share the store, and Identity its certificate towards them. Without a name the
	// edge is alone: it tells nobody of itself, and forwards nothing.
	Name     string
	Identity *mtls.Source
	// Listen and Version are what other edges show of this one.
	Listen, Version string
	// BulkCarrier is what bulk flows take where there is a choice: BulkAuto, BulkQUIC or BulkTCP. If empty, BulkAuto.
	BulkCarrier string
	// ConnectorLifetime is the validity of connectors' certificates. If zero, 24h.
	ConnectorLifetime time.Duration
	// DialTimeout bounds a flow's opening if the caller's context has no deadline. If zero, 10s.
	DialTimeout time.Duration
	// Registry gets the metrics. If nil, there are none.
	Registry prometheus.Registerer
	// Logger gets what is decided. If nil, nothing is logged.
	Logger *slog.Logger

	beat time.Duration // between signs of life; tests shorten it
}

// Defaults of [Config].
const (
	defaultConnectorLifetime = 24 * time.Hour
	defaultDialTimeout       = 10 * time.Second
)

// A Control knows and decides. Its methods are safe for concurrent use. Make one with [Open].
type Control struct {
	cfg     Config
	log     *slog.Logger
	model   *model
	reg     *registry
	flows   flows
	bulk    *bulk
	peers   *peers
	status  *statuses
	started time.Time
	publish publisher
	configs pusher
	polls   *poller
	local   atomic.Pointer[Local]

	changing chan struct{} // holds a value while a change is being made
	failing  chan struct{} // holds a value when failures of rollouts are to be counted
	sightLog *sightings
	// deviceLog collects what devices reported.
	deviceLog *deviceLog
	dials     *prometheus.CounterVec
	opened    *prometheus.CounterVec
	packets   *packetNumbers

	cancel context.CancelFunc
	done   sync.WaitGroup
}

// Open reads the store, creates the default network if there is none, and keeps the picture of the store up to date
// until Close. A record that cannot be read makes Open fail.
func Open(ctx context.Context, cfg Config) (*Control, error) {
	if cfg.Store == nil || cfg.Authority == nil || cfg.Name != "" && cfg.Identity == nil {
		return nil, errors.New("control: open: a store and an authority are required, and an identity where the edge has a name")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.ConnectorLifetime == 0 {
		cfg.ConnectorLifetime = defaultConnectorLifetime
	}
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = defaultDialTimeout
	}
	if cfg.beat == 0 {
		cfg.beat = defaultBeat
	}
	c := &Control{cfg: cfg, log: cfg.Logger, model: newModel(), reg: newRegistry(), started: time.Now(),
		changing: make(chan struct{}, 1), sightLog: newSightings(), dials: newDials(), opened: newOpened(), packets: newPacketNumbers(), publish: newPublisher(), configs: newPusher(),
		polls: newPoller(), failing: make(chan struct{}, 1), deviceLog: newDeviceLog()}
	c.bulk, c.status, c.peers = newBulk(cfg.BulkCarrier, c.reg), newStatuses(), newPeers(c)
	if err := c.found(ctx); err != nil {
		return nil, err
	}
	run, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	ready := make(chan error, 1)
	c.done.Go(func() { c.follow(run, ready) })
	c.done.Go(func() { c.recordSightings(run) })
	c.done.Go(func() { c.runPublisher(run) })
	c.done.Go(func() { c.runConfigs(run) })
	c.done.Go(func() { c.runPolls(run) })
	c.done.Go(func() { c.recordDevices(run) })
	c.done.Go(func() { c.watchFailures(run) })
	var err error
	select {
	case err = <-ready:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		cancel()
		c.done.Wait()
		return nil, fmt.Errorf("control: open: %w", err)
	}
	c.done.Go(func() { c.peers.run(run) })
	if cfg.Registry != nil {
		for _, m := range append(c.packets.collectors(), collector{c}, fleetCollector{c}, c.polls.results, c.dials, c.opened) {
			if err := cfg.Registry.Register(m); err != nil {
				return nil, errors.Join(fmt.Errorf("control: open: %w", err), c.Close())
			}
		}
	}
	return c, nil
}

// Close ends the live sessions, those with other edges too, stops and waits. The store stays open.
func (c *Control) Close() error {
	c.peers.close()
	for _, l := range c.reg.all() {
		l.end(endShutdown)
	}
	c.cancel()
	c.done.Wait()
	return nil
}

// found writes the first records into an empty store and refuses a store of another schema.
func (c *Control) found(ctx context.Context) error {
	e, err := c.cfg.Store.Get(ctx, keyGeneration)
	if err == nil {
		if string(e.Value) != schema {
			return fmt.Errorf("control: the state is of another version (%s, want %s): start the program that wrote it, or upgrade this one",
				clip(string(e.Value)), schema)
		}
		return nil
	}
	if !errors.Is(err, state.ErrNotFound) {
		return fmt.Errorf("control: read the state: %w", err)
	}
	v := VNet{ID: defaultName, Name: defaultName, Created: c.now()}
	_, err = c.cfg.Store.Txn(ctx, []state.Cond{{Key: keyGeneration}}, []state.Op{
		put(prefixVNet+string(v.ID), v),
		state.Put(keyDefaultVNet, []byte(v.ID)),
		state.Put(keyGeneration, []byte(schema)),
	})
	if err != nil && !errors.Is(err, state.ErrConflict) { // a conflict: another edge was first
		return fmt.Errorf("control: found the state: %w", err)
	}
	return nil
}

// followPause is about how long to wait before the store is read as a whole again after it failed.
const followPause = time.Second

// follow keeps the picture up to date until ctx ends. It reports on ready, once, how the first reading went.
func (c *Control) follow(ctx context.Context, ready chan<- error) {
	for failing := false; ; failing = true {
		f := follower{c: c, ready: ready}
		err := state.Follow(ctx, c.cfg.Store, "", f.reset, f.apply)
		if ctx.Err() != nil {
			return
		}
		select {
		case ready <- err: // nobody waits any more, except at the first reading
		default:
		}
		if !failing || f.read {
			c.log.Error("state cannot be followed; what is known stays in force", "err", err)
		}
		sleep(ctx, followPause/2+rand.N(followPause))
	}
}

// A follower turns events into changes of the picture.
type follower struct {
	c       *Control
	ready   chan<- error
	pending []delta // of a transaction whose generation record has not come yet
	read    bool    // the state was read
}

func (f *follower) reset(entries []state.Entry, _ state.Revision) error {
	f.pending, f.read = nil, true
	bad := f.c.model.load(entries)
	f.c.complain(bad)
	f.c.peers.reset(entries)
	f.c.applyRemoved()
	f.c.status.markAll()
	f.c.sweep(f.c.reg.all())
	f.c.reroute("")
	f.c.publish.mark()
	f.c.configs.mark()
	f.c.polls.mark()
	f.c.markFailures()
	select {
	case f.ready <- errors.Join(bad...):
	default:
	}
	return nil
}

// apply takes one event. The generation record comes last in each transaction, so a change is applied as a whole or
// not yet. Sightings stand alone.
func (f *follower) apply(e state.Event) error {
	d := delta{key: e.Key, value: e.Value, rev: e.Revision}
	if e.Deleted {
		d.value = nil
	}
	switch {
	case e.Key == keyGeneration:
		f.c.complain(f.c.model.apply(f.pending, e.Revision))
		f.c.follows(f.pending)
		if slices.ContainsFunc(f.pending, publishes) {
			f.c.publish.mark()
		}
		if slices.ContainsFunc(f.pending, configures) {
			f.c.configs.mark()
		}
		if slices.ContainsFunc(f.pending, directs) {
			f.c.polls.mark()
			f.c.markFailures()
		}
		f.pending = nil
	case strings.HasPrefix(e.Key, prefixSeen):
		f.c.complain(f.c.model.apply([]delta{d}, 0))
		f.c.status.markConnector(strings.TrimPrefix(e.Key, prefixSeen))
	case strings.HasPrefix(e.Key, prefixDevice):
		f.c.complain(f.c.model.apply([]delta{d}, 0))
		f.c.markFailures()
	case strings.HasPrefix(e.Key, prefixEdge), strings.HasPrefix(e.Key, prefixPresent):
		f.c.peers.apply(d)
	case ours(e.Key):
		f.pending = append(f.pending, d)
	}
	return nil
}

// follows does what a transaction asks for, once it is in the picture: sessions end whose permission is gone, and flows are
// asked to leave that have another way now.
func (c *Control) follows(deltas []delta) {
	all := false
	networks := map[vnet.ID]struct{}{}
	for _, d := range deltas {
		kind, rest, _ := strings.Cut(d.key, "/")
		switch kind + "/" {
		case prefixConn:
			c.status.markConnector(rest)
			c.sweep(c.reg.ofConnector("", rest))
		case prefixTunnel:
			c.status.mark(rest)
			c.sweep(c.reg.of(rest))
		case prefixRoute:
			id, _, _ := strings.Cut(rest, "/")
			networks[vnet.ID(id)] = struct{}{}
		case prefixVNet:
			networks[vnet.ID(rest)] = struct{}{}
		case prefixRemoved:
			c.applyRemoved()
		default:
			all = all || d.key == keyDefaultVNet
		}
	}
	if all {
		c.reroute("")
		return
	}
	for id := range networks {
		c.reroute(id)
	}
}

func (c *Control) complain(bad []error) {
	for _, err := range bad {
		c.log.Error("record left out", "err", err)
	}
}

// maxTries bounds how often a change is decided anew because somebody else was faster.
const maxTries = 20

// maxOps bounds the operations of one change; [state.MaxTxnOps] leaves room for the generation record.
const maxOps = 100

// change runs decide on the picture of one generation and writes what it returns, as one transaction that no other
// change can come before. It returns when the picture shows it. decide must be free of side effects and may run
// several times; no operations mean nothing to do.
func (c *Control) change(ctx context.Context, decide func(m *model) ([]state.Op, error)) error {
	select {
	case c.changing <- struct{}{}:
		defer func() { <-c.changing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for range maxTries {
		e, err := c.cfg.Store.Get(ctx, keyGeneration)
		if err != nil {
			return storeError("read", err)
		}
		if err := c.await(ctx, e.Revision); err != nil {
			return err
		}
		c.model.mu.RLock()
		ops, err := decide(c.model)
		c.model.mu.RUnlock()
		if err != nil || len(ops) == 0 {
			return err
		}
		rev, err := c.cfg.Store.Txn(ctx, []state.Cond{{Key: keyGeneration, Revision: e.Revision}},
			append(ops, state.Put(keyGeneration, []byte(schema))))
		if errors.Is(err, state.ErrConflict) {
			sleep(ctx, rand.N(20*time.Millisecond))
			continue
		}
		if err != nil {
			return storeError("write", err)
		}
		return c.await(ctx, rev)
	}
	return refusal(CodeConflict, "try again", "others kept changing the state")
}

// storeError is err of reading or writing the state, for people where the store is away.
func storeError(op string, err error) error {
	if errors.Is(err, state.ErrUnavailable) {
		return fmt.Errorf("%w (%w)", refusal(CodeUnavailable, "try again when it is back; what is running goes on", "the state cannot be changed: its store does not answer"), err)
	}
	return fmt.Errorf("control: %s the state: %w", op, err)
}

// catchUpTimeout bounds how long one that comes in waits for what another edge has decided on it a moment ago.
const catchUpTimeout = 2 * time.Second

// catchUp waits until the picture shows all that is in the store now. An edge that is alone made every change itself.
func (c *Control) catchUp(ctx context.Context) {
	if c.peers.alone() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	if e, err := c.cfg.Store.Get(ctx, keyGeneration); err == nil {
		_ = c.await(ctx, e.Revision)
	}
}

// await waits until the picture is at least as new as rev.
func (c *Control) await(ctx context.Context, rev state.Revision) error {
	for {
		c.model.mu.RLock()
		ok, moved := c.model.generation >= rev, c.model.moved
		c.model.mu.RUnlock()
		if ok {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("control: wait for the state: %w", ctx.Err())
		}
	}
}

func (c *Control) now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }

func put(key string, v any) state.Op {
	b, err := json.Marshal(v)
	if err != nil {
		panic("control: a record cannot be encoded: " + err.Error()) // only our own types come here
	}
	return state.Put(key, b)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
