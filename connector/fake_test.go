package connector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// fakeSession lives until lose, Drain, or its context's end.
type fakeSession struct {
	draining, done chan struct{}
	once, drain    sync.Once
	err            error
	drained        atomic.Bool
	hang           bool // Drain waits for its context
	mute           bool // Renew is not answered
	cut            bool // Run ended by its context
	carrier        tunnel.Carrier
	deaf           atomic.Bool // Probe is not answered
	flows          atomic.Int64
	remote         *net.UDPAddr
}

func newFake() *fakeSession {
	return &fakeSession{draining: make(chan struct{}), done: make(chan struct{}), carrier: tunnel.CarrierQUIC}
}

func (s *fakeSession) lose(err error) { s.once.Do(func() { s.err = err; close(s.done) }) }
func (s *fakeSession) alive() bool {
	select {
	case <-s.done:
		return false
	case <-s.draining:
		return false
	default:
		return true
	}
}
func (s *fakeSession) Close(r tunnel.CloseReason) { s.lose(&tunnel.SessionError{Reason: r}) }
func (s *fakeSession) Carrier() tunnel.Carrier    { return s.carrier }
func (s *fakeSession) Peer() mtls.Identity        { return mtls.Identity{} }
func (s *fakeSession) RTT() time.Duration         { return time.Millisecond }
func (s *fakeSession) Flows() int                 { return int(s.flows.Load()) }
func (s *fakeSession) Probe(ctx context.Context) (time.Duration, error) {
	if !s.deaf.Load() {
		return time.Millisecond, nil
	}
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-s.done:
		return 0, s.err
	}
}
func (s *fakeSession) Run(ctx context.Context) error {
	select {
	case <-s.done:
	case <-ctx.Done():
		s.cut = true
		s.lose(ctx.Err())
	}
	return s.err
}
func (s *fakeSession) startDrain() { s.drain.Do(func() { close(s.draining) }) }
func (s *fakeSession) Drain(ctx context.Context) error {
	s.startDrain()
	s.drained.Store(true)
	if s.hang {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.done:
		}
	}
	s.lose(nil)
	return nil
}
func (s *fakeSession) Renew(ctx context.Context, _ []byte) ([][]byte, error) {
	if s.mute {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return [][]byte{[]byte("chain")}, nil
}
func (s *fakeSession) Draining() <-chan struct{} { return s.draining }
func (s *fakeSession) Done() <-chan struct{}     { return s.done }
func (s *fakeSession) RemoteAddr() net.Addr      { return s.remote }
func (s *fakeSession) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

// dials records the attempts of a connector whose edges are fakes.
type dials struct {
	answer func(d tunnel.DialConfig) (session, error)
	host   *surroundings // nil: a host that never changes

	mu   sync.Mutex
	list []attempt
}

type attempt struct {
	at   time.Time
	cfg  tunnel.DialConfig
	addr string
	reg  tunnel.Registration
	s    *fakeSession
}

// errHang has an attempt wait until it is given up, as it does when nothing answers.
var errHang = errors.New("hang")

func (d *dials) dial(ctx context.Context, c tunnel.DialConfig) (session, error) {
	at := time.Now()
	s, err := d.answer(c)
	if errors.Is(err, errHang) {
		<-ctx.Done()
		err = fmt.Errorf("%w: %w", tunnel.ErrNoAnswer, context.Cause(ctx))
	}
	fake, _ := s.(*fakeSession)
	if to, err := net.ResolveUDPAddr("udp", c.Addr); err == nil && fake != nil {
		fake.remote = to
	}
	d.mu.Lock()
	d.list = append(d.list, attempt{at, c, c.Addr, c.Registration, fake})
	d.mu.Unlock()
	return s, err
}

// living returns the attempts whose sessions take flows.
func (d *dials) living() (list []attempt) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range d.list {
		if a.s != nil && a.s.alive() {
			list = append(list, a)
		}
	}
	return list
}

// all returns all attempts so far.
func (d *dials) all() []attempt {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.list)
}

// of returns the attempts of one index.
func (d *dials) of(index int) (list []attempt) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range d.list {
		if a.reg.Index == index {
			list = append(list, a)
		}
	}
	return list
}

// bubble runs f in a time of its own, with a connector whose dials d answers.
func bubble(t *testing.T, d *dials, cfg Config, f func(c *Connector, stop func())) {
	synctest.Test(t, func(t *testing.T) {
		_, _, cfg.Identity = identities(t)
		if cfg.Edges == nil {
			cfg.Edges = []string{"192.0.2.1"}
		}
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		c.dial = d.dial
		c.host = surroundings{addrs: func() string { return "" }, wall: func() time.Time { return time.Now().Round(0) }}
		if d.host != nil {
			c.host = *d.host
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		stopped := false
		stop := func() {
			if stopped {
				return
			}
			stopped = true
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: got %v, want nil", err)
			}
		}
		defer stop()
		f(c, stop)
	})
}
