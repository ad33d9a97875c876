package control

import (
	"sync"

	"github.com/keyhaven/keyhaven/tunnel"
)

// A flow is an open flow with the question that the routes answered. Whoever keeps it in a pool learns from Draining when
// it should go: when its session drains, or when the routes answer differently. What it carries then may end in peace.
type flow struct {
	tunnel.Conn
	flows          *flows
	ref, host      string
	tunnelID       string
	leave, over    chan struct{}
	leaving, ended sync.Once
}

// flows are those that are open. The zero value is ready.
type flows struct {
	mu   sync.Mutex
	open map[*flow]struct{}
}

// add follows conn until it is closed.
func (s *flows) add(conn tunnel.Conn, ref, host, tunnelID string) *flow {
	f := &flow{Conn: conn, flows: s, ref: ref, host: host, tunnelID: tunnelID, leave: make(chan struct{}), over: make(chan struct{})}
	s.mu.Lock()
	if s.open == nil {
		s.open = map[*flow]struct{}{}
	}
	s.open[f] = struct{}{}
	s.mu.Unlock()
	if d, ok := conn.(tunnel.Drainer); ok {
		go func() { // ends with the flow or its session
			select {
			case <-d.Draining():
				f.expel()
			case <-f.over:
			}
		}()
	}
	return f
}

func (s *flows) all() []*flow {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*flow, 0, len(s.open))
	for f := range s.open {
		list = append(list, f)
	}
	return list
}

func (f *flow) expel() { f.leaving.Do(func() { close(f.leave) }) }

func (f *flow) forget() {
	f.ended.Do(func() {
		close(f.over)
		f.flows.mu.Lock()
		delete(f.flows.open, f)
		f.flows.mu.Unlock()
	})
}

// Draining implements [tunnel.Drainer].
func (f *flow) Draining() <-chan struct{} { return f.leave }

// Close implements net.Conn.
func (f *flow) Close() error {
	f.forget()
	return f.Conn.Close()
}

// Reset implements [tunnel.Resetter].
func (f *flow) Reset(r tunnel.Result) {
	f.forget()
	if c, ok := f.Conn.(tunnel.Resetter); ok {
		c.Reset(r)
	} else {
		_ = f.Conn.Close()
	}
}

// reroute asks the flows to leave that would not be opened, or not to the same tunnel, today.
func (c *Control) reroute() {
	for _, f := range c.flows.all() {
		if _, tunnelID, _, err := c.resolve(f.ref, f.host); err != nil || tunnelID != f.tunnelID {
			f.expel()
		}
	}
}
