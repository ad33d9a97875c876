package keyless

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// countingServer answers after a moment and counts.
func countingServer(t *testing.T) (addr string, served *atomic.Int32) {
	served = new(atomic.Int32)
	addr, _ = startServer(t, &Server{DrainTimeout: time.Millisecond, Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		time.Sleep(time.Millisecond)
		served.Add(1)
		return req.Payload, nil
	})})
	return addr, served
}

// Servers come and go under load, and no request fails.
func TestSetServersUnderLoad(t *testing.T) {
	a, servedA := countingServer(t)
	b, servedB := countingServer(t)
	c := startClient(t, ClientConfig{Servers: []string{a}})
	op := &Operation{Opcode: OpEd25519Sign, SKI: SKI{1}, Payload: []byte("m")}
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 16 {
		wg.Go(func() {
			for {
				if _, err := c.Do(context.Background(), op); err != nil {
					t.Errorf("request failed: %v", err)
					return
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	connected := func(addr string) bool {
		for _, s := range c.Stats().Servers {
			if s.Addr == addr {
				return s.Conns == 2
			}
		}
		return false
	}
	for range 5 {
		c.SetServers([]string{a, b}, nil)
		eventually(t, "b is connected", func() bool { return connected(b) })
		before := servedB.Load()
		c.SetServers([]string{b}, nil) // a is taken out with requests in flight
		eventually(t, "b serves", func() bool { return servedB.Load() > before+20 })
		c.SetServers([]string{b, a}, nil)
		eventually(t, "a is connected", func() bool { return connected(a) })
		c.SetServers([]string{a}, nil)
	}
	close(done)
	wg.Wait()
	if got := len(c.Stats().Servers); got != 1 || servedA.Load() == 0 {
		t.Errorf("%d servers at the end, want 1", got)
	}
}

// A server that comes last gets nothing while another can answer, and everything when none can.
func TestServersThatComeLast(t *testing.T) {
	a, servedA := countingServer(t)
	b, servedB := countingServer(t)
	c := startClient(t, ClientConfig{Servers: []string{a, b}})
	c.SetServers([]string{a, b}, []string{a})
	eventually(t, "both are connected", func() bool { st := c.Stats(); return st.Servers[0].Conns == 2 && st.Servers[1].Conns == 2 })
	op := &Operation{Opcode: OpEd25519Sign, SKI: SKI{1}, Payload: []byte("m")}
	do := func() {
		t.Helper()
		for range 50 {
			if _, err := c.Do(context.Background(), op); err != nil {
				t.Fatal(err)
			}
		}
	}
	do()
	if servedA.Load() != 0 {
		t.Errorf("the last server served %d requests", servedA.Load())
	}
	c.SetServers([]string{a}, []string{a})
	do()
	if servedA.Load() != 50 || servedB.Load() != 50 {
		t.Errorf("served %d and %d", servedA.Load(), servedB.Load())
	}
}

func TestNoServersForNow(t *testing.T) {
	c := startClient(t, ClientConfig{MayBeEmpty: true})
	op := &Operation{Opcode: OpEd25519Sign, SKI: SKI{1}, Payload: []byte("m")}
	if _, err := c.Do(context.Background(), op); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable at once", err)
	}
	a, _ := countingServer(t)
	c.SetServers([]string{a, a}, nil)
	if _, err := c.Do(context.Background(), op); err != nil {
		t.Errorf("after a server came: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c.SetServers([]string{a}, nil)
}
