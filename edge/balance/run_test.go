package balance

import (
	"context"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/tunnel"
)

// An alarm is a way to nowhere that must not be taken once something has stopped.
type alarm struct{ stopped, late atomic.Bool }

func (a *alarm) Dial(context.Context, control.Query) (net.Conn, error) {
	if a.stopped.Load() {
		a.late.Store(true)
	}
	return nil, errDown
}

func (*alarm) Echo(context.Context, control.Query, tunnel.EchoRequest) (tunnel.EchoReply, error) {
	return tunnel.EchoReply{}, errDown
}

// A lateEnd is a context that ends right after it was found not to have ended.
type lateEnd struct {
	context.Context
	end func()
}

func (c lateEnd) Err() error {
	err := c.Context.Err()
	c.end()
	return err
}

// Pools that come while the balancer stops begin no monitor that nobody waits for.
func TestSetWhileStopping(t *testing.T) {
	d := &alarm{}
	b, err := New(Config{Dialer: d})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	returned := make(chan struct{})
	end := sync.OnceFunc(func() {
		cancel()
		select {
		case <-returned:
		case <-time.After(100 * time.Millisecond): // time enough for it to return too early
		}
	})
	go func() {
		defer close(returned)
		_ = b.Run(lateEnd{ctx, end})
		d.stopped.Store(true)
	}()
	for running := false; !running; runtime.Gosched() {
		b.mu.Lock()
		running = b.ctx != nil
		b.mu.Unlock()
	}
	p := spec.PoolConfig{Name: "p", Endpoints: []spec.Endpoint{{Host: "10.0.0.1", Port: 80}}, Monitor: &spec.Monitor{Type: spec.MonitorTCP}}
	if err := b.Set([]spec.PoolConfig{p}); err != nil {
		t.Fatal(err)
	}
	<-returned
	b.running.Wait()
	if d.late.Load() {
		t.Error("a monitor probed when Run had returned")
	}
}
