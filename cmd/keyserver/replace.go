package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyhaven/keyhaven/internal/cli"
)

// errReplaced ends the work of a server that another process is ready to take over.
var errReplaced = errors.New("another process takes over")

// A claim is this process's hold on the state that one server has at a time. The zero value is none.
type claim struct{ unlock func() }

// take takes hold, and reads what clients have used of their budgets.
func (c *claim) take(p *plan, o loadOptions) (err error) {
	if c.unlock, err = p.lockState(); err != nil {
		return err
	}
	path := p.cfg.beside(quotaFile)
	if path == "" || o.quotas == nil {
		return nil
	}
	if err := o.quotas.Load(path); err != nil {
		return cli.ConfigError(p.file.Errorf("state_dir", "%v", err))
	}
	return nil
}

// release gives it up. It may be called again.
func (c *claim) release() {
	if c.unlock != nil {
		c.unlock()
		c.unlock = nil
	}
}

// succeed waits for the predecessor to hand over, and takes its state. A server that could not open all homes does not replace
// one that may have.
func (s *server) succeed(ctx context.Context, c *claim) error {
	var errs []error
	for _, p := range s.keys.present() {
		if p.backend == nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.at, p.err))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("this process does not take over: %w", errors.Join(errs...))
	}
	if err := s.self.Ready(ctx); err != nil {
		return err
	}
	return c.take(s.current.Load().plan, s.options)
}

// replaced waits for the wish to have this process replaced, and reports whether another is ready to take over. It gives up when
// ctx ends.
func (s *server) replaced(ctx context.Context) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-s.self.Requests():
		}
		s.logger.Info("starting another process to take over")
		next, err := s.self.Start(ctx, false)
		if err != nil {
			s.logger.Error("no other process takes over, this one goes on", "err", err)
			continue
		}
		s.logger.Info("another process takes over when the operations in flight are finished", "pid", next.PID())
		s.next = next
		return true
	}
}

// handOver gives up the state and lets the successor begin, if there is one.
func (s *server) handOver(c *claim) error {
	c.release()
	if s.next == nil {
		return nil
	}
	return s.next.Release(s.notify)
}
