package connector

import (
	"context"
	"errors"
	"sync"

	"github.com/keyhaven/keyhaven/tunnel"
)

// errSuspended ends attempts to reach an edge that go on when Suspend is called.
var errSuspended = errors.New("no sessions are made while another process takes over")

// suspension holds up the making of sessions. The zero value does not.
type suspension struct {
	mu      sync.Mutex // guards the fields below
	resumed chan struct{}
	tries   map[*context.CancelCauseFunc]struct{}
	under   sync.WaitGroup // tries; none is added while resumed is set
}

// enter waits until sessions may be made. The context that it returns ends when they no longer may.
func (p *suspension) enter(ctx context.Context) (try context.Context, leave func(), err error) {
	for {
		p.mu.Lock()
		wait := p.resumed
		if wait == nil {
			break
		}
		p.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
	defer p.mu.Unlock()
	try, cancel := context.WithCancelCause(ctx)
	if p.tries == nil {
		p.tries = map[*context.CancelCauseFunc]struct{}{}
	}
	p.tries[&cancel] = struct{}{}
	p.under.Add(1)
	return try, func() {
		p.mu.Lock()
		delete(p.tries, &cancel)
		p.mu.Unlock()
		cancel(nil)
		p.under.Done()
	}, nil
}

// dial is attempt, once the connector is not suspended.
func (e *endpoint) dial(ctx context.Context, addrs []string, from int, cfg tunnel.DialConfig) (session, error) {
	for {
		try, leave, err := e.c.suspension.enter(ctx)
		if err != nil {
			return nil, err
		}
		s, err := e.attempt(try, addrs, from, cfg)
		cut := errors.Is(context.Cause(try), errSuspended)
		leave()
		if err == nil || !cut {
			return s, err
		}
	}
}

// Suspend makes no more sessions until Resume; those that there are go on. A process calls it before it starts the one that
// takes its place: since to the edges a connector is one process, a session that this one made later would put those of the
// other out of service. No attempt is under way when Suspend returns.
func (c *Connector) Suspend() {
	p := &c.suspension
	p.mu.Lock()
	if p.resumed == nil {
		p.resumed = make(chan struct{})
	}
	for cancel := range p.tries {
		(*cancel)(errSuspended)
	}
	p.mu.Unlock()
	p.under.Wait()
}

// Resume ends what Suspend began: nobody has taken this process's place. Every session is replaced by a new one, as the edges
// may have taken the old ones out of service when the other process registered.
func (c *Connector) Resume() {
	p := &c.suspension
	p.mu.Lock()
	if p.resumed != nil {
		close(p.resumed)
		p.resumed = nil
	}
	p.mu.Unlock()
	c.mu.Lock()
	for _, e := range c.endpoints {
		for _, l := range e.lines {
			l.mu.Lock()
			l.per = 0 // no number of connections that is announced: the line is told again until it is replaced
			l.mu.Unlock()
		}
	}
	c.mu.Unlock()
	c.edges.kick()
}
