package keyless

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// drainable is a connection that can be told to end.
type drainable struct {
	net.Conn
	ch chan struct{}
}

func (d drainable) Draining() <-chan struct{} { return d.ch }

// A connection that drains is given up for another, and no request notices: neither those in flight nor later ones.
func TestClientLeavesDrainingConnections(t *testing.T) {
	entered, release := make(chan struct{}, 1), make(chan struct{})
	addr, _ := startServer(t, &Server{TLS: serverTLS(), Handler: handlerFunc(func(ctx context.Context, req *Request) ([]byte, error) {
		if req.CustomFunc == "slow" {
			entered <- struct{}{}
			<-release
		}
		return []byte("done"), nil
	})})
	var mu sync.Mutex
	var conns []drainable
	c := startClient(t, ClientConfig{Servers: []string{addr}, TLS: clientTLS, ConnsPerServer: 1, Dial: func(ctx context.Context, addr string) (net.Conn, error) {
		raw, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		conns = append(conns, drainable{raw, make(chan struct{})})
		return conns[len(conns)-1], nil
	}})
	ask := func(name string) error {
		_, err := c.Do(t.Context(), &Operation{Opcode: OpCustom, CustomFunc: name})
		return err
	}
	if err := ask("fast"); err != nil {
		t.Fatal(err)
	}
	slow := make(chan error, 1)
	go func() { slow <- ask("slow") }()
	<-entered
	mu.Lock()
	close(conns[0].ch)
	mu.Unlock()
	eventually(t, "the connection is out of use", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.live) == 0
	})
	later := make(chan error, 1)
	go func() { later <- ask("fast") }()
	close(release)
	if err := <-slow; err != nil {
		t.Errorf("the request in flight: %v", err)
	}
	if err := <-later; err != nil {
		t.Errorf("a later request: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(conns) != 2 {
		t.Errorf("%d connections were dialled, want 2", len(conns))
	}
}

// silenced is a connection over a path that dies without a word when told to.
type silenced struct {
	net.Conn
	dead *atomic.Bool
}

func (m silenced) Suspect() bool { return m.dead.Load() }

func (m silenced) Read(p []byte) (int, error) {
	for {
		n, err := m.Conn.Read(p)
		if err != nil || !m.dead.Load() {
			return n, err
		}
	}
}

// A request whose connection's path dies without a word is sent again over another one, long before its time is up; one that
// may not be repeated fails then.
func TestClientLeavesSuspectConnections(t *testing.T) {
	addr, _ := startServer(t, &Server{TLS: serverTLS(), Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) { return []byte("done"), nil })})
	for name, op := range map[string]*Operation{
		"repeatable": {Opcode: OpECDSASignSHA256, SKI: SKI{1}, Payload: make([]byte, 32)},
		"not":        {Opcode: OpCustom, CustomFunc: "once"},
	} {
		t.Run(name, func(t *testing.T) {
			var first atomic.Pointer[atomic.Bool]
			c := startClient(t, ClientConfig{Servers: []string{addr}, TLS: clientTLS, ConnsPerServer: 1, Timeout: time.Minute,
				Dial: func(ctx context.Context, addr string) (net.Conn, error) {
					raw, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
					if err != nil {
						return nil, err
					}
					dead := new(atomic.Bool)
					first.CompareAndSwap(nil, dead)
					return silenced{raw, dead}, nil
				}})
			if _, err := c.Do(t.Context(), &Operation{Opcode: OpPing}); err != nil {
				t.Fatal(err)
			}
			first.Load().Store(true)
			_, err := c.Do(t.Context(), op)
			if name == "repeatable" && err != nil {
				t.Errorf("got %v, want a reply over another connection", err)
			}
			if name == "not" && !errors.Is(err, errSilent) {
				t.Errorf("got %v, want %v", err, errSilent)
			}
		})
	}
}

// A drain is no failure, not even of a young connection after failed attempts: requests wait for the next one.
func TestDrainOfYoungConnection(t *testing.T) {
	addr, _ := startServer(t, &Server{TLS: serverTLS(), Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) { return []byte("done"), nil })})
	drain, again, gate := make(chan struct{}), make(chan struct{}), make(chan struct{})
	dials := 0 // there is one link, which dials one at a time
	c := startClient(t, ClientConfig{Servers: []string{addr}, TLS: clientTLS, ConnsPerServer: 1, Dial: func(ctx context.Context, addr string) (net.Conn, error) {
		switch dials++; dials {
		case 1, 2:
			return nil, errors.New("not yet")
		case 4:
			close(again)
			<-gate
		}
		raw, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err != nil || dials > 3 {
			return raw, err
		}
		return drainable{raw, drain}, nil
	}})
	eventually(t, "the connection", c.Healthy)
	close(drain)
	<-again
	done := make(chan error, 1)
	go func() {
		_, err := c.Do(t.Context(), &Operation{Opcode: OpCustom, CustomFunc: "wait"})
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("the request did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(gate)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// acknowledged is a connection over a path that dies, when told to, behind having acknowledged what was written first: only
// what is written after that is owed an acknowledgement.
type acknowledged struct {
	silenced
	taken *atomic.Bool // of all paths that die together
	owing *atomic.Bool
}

func (m acknowledged) Write(p []byte) (int, error) {
	if !m.dead.Load() {
		return m.Conn.Write(p)
	}
	if m.taken.Swap(true) {
		m.owing.Store(true)
	}
	return len(p), nil
}

func (m acknowledged) Suspect() bool { return m.owing.Load() }

// A request that was acknowledged by a path that then died, as all others did, is sent again over a new one, before its time
// is up and without a heartbeat.
func TestClientAsksWhenItIsQuiet(t *testing.T) {
	addr, _ := startServer(t, &Server{TLS: serverTLS(), Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) { return []byte("done"), nil })})
	var dead, taken atomic.Bool
	var dials atomic.Int32
	c := startClient(t, ClientConfig{Servers: []string{addr}, TLS: clientTLS, ConnsPerServer: 2, Timeout: 20 * time.Second, Heartbeat: 29 * time.Second,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			raw, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			if err != nil || dials.Add(1) > 2 {
				return raw, err
			}
			return acknowledged{silenced{raw, &dead}, &taken, new(atomic.Bool)}, nil
		}})
	for up := 0; up < 2; time.Sleep(time.Millisecond) {
		c.mu.Lock()
		up = len(c.live)
		c.mu.Unlock()
	}
	dead.Store(true)
	got, err := c.Do(t.Context(), &Operation{Opcode: OpECDSASignSHA256, SKI: SKI{1}, Payload: make([]byte, 32)})
	if err != nil || string(got) != "done" {
		t.Errorf("got %q, %v", got, err)
	}
}
