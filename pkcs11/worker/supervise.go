package worker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// seat is the place of one worker, whichever process fills it. Its fields are guarded by Pool.mu, kick excepted.
type seat struct {
	kick      chan chan error // asks for another process in place of the one there is
	proc      *proc           // nil if there is none
	state     string
	restarts  int64
	lastError string
	failing   bool // the last start came to nothing
}

// enter sets what is known of a seat.
func (p *Pool) enter(s *seat, state string, w *proc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.state, s.proc = state, w
	if state == StateReady {
		s.failing = false
	}
	if state == StateWaiting || state == StateRefused {
		p.notifyLocked()
	}
}

// start starts a worker for a seat and waits until it is logged in. Workers start one after another.
func (p *Pool) start(ctx context.Context, s *seat) (*proc, error) {
	select {
	case p.starts <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-p.ctx.Done():
		return nil, p.ctx.Err()
	}
	defer func() { <-p.starts }()
	p.mu.Lock()
	pin, reading := p.pin, p.readings
	p.mu.Unlock()
	if err := p.logins.denial(); err != nil {
		return nil, err
	}
	if n := int(p.behind.Load()); n > p.cfg.Workers {
		return nil, unavailable{fmt.Errorf("%d workers before cannot be killed, and no more are started: look at the device and its driver", n)}
	}
	w, err := p.spawn(pin, reading)
	if err != nil {
		return nil, unavailable{err}
	}
	stop := context.AfterFunc(p.ctx, func() { w.kill("", context.Canceled) })
	defer stop()
	began := time.Now()
	if err := w.waitStart(ctx, p.cfg.StartDeadline); err != nil {
		w.conn.Close()
		<-w.gone
		p.count(w)
		return nil, err
	}
	w.born = time.Now()
	p.log.Info("worker is ready", "pid", w.cmd.Process.Pid, "sessions", w.sessions, "dur", w.born.Sub(began))
	p.enter(s, StateReady, w)
	p.offer(w)
	return w, nil
}

// count records why a worker ended, if it was not told to.
func (p *Pool) count(w *proc) (reason string, cause error) {
	w.mu.Lock()
	reason, cause = w.reason, w.cause
	w.mu.Unlock()
	if reason == "" || p.ctx.Err() != nil && reason != "deadline" {
		return reason, cause
	}
	p.mu.Lock()
	p.kills[reason]++
	p.mu.Unlock()
	return reason, cause
}

// supervise keeps a seat filled until the pool is closed.
func (p *Pool) supervise(s *seat, w *proc) {
	fails := 0 // starts in a row that came to nothing
	for {
		if w == nil {
			var err error
			p.enter(s, StateStarting, nil)
			if w, err = p.start(p.ctx, s); err != nil {
				if p.ctx.Err() != nil {
					return
				}
				fails++
				if w = p.unfilled(s, fails, err); w == nil {
					continue
				}
			}
		}
		select {
		case <-w.gone:
			reason, cause := p.count(w)
			p.log.Warn("worker is lost", "pid", w.cmd.Process.Pid, "reason", reason, "err", cause)
			w = p.lost(s, cause, time.Since(w.born), &fails)
		case <-w.sick:
			p.log.Warn("device failed; worker is replaced", "pid", w.cmd.Process.Pid, "err", w.whyEnded())
			p.retire(s, w)
			_, cause := p.count(w)
			w = p.lost(s, cause, time.Since(w.born), &fails)
		case answer := <-s.kick:
			w = p.replace(s, w, answer)
		case <-p.ctx.Done():
			p.retire(s, w)
			return
		}
	}
}

func (w *proc) whyEnded() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cause
}

// lost waits before the next start, if the worker did not last. It returns a worker only if one came by other means.
func (p *Pool) lost(s *seat, cause error, age time.Duration, fails *int) *proc {
	p.mu.Lock()
	s.restarts++
	if cause != nil {
		s.lastError = cause.Error()
	}
	p.mu.Unlock()
	if age >= p.cfg.Restart.Max {
		*fails = 0
	}
	*fails++
	if *fails == 1 {
		return nil // the first time at once
	}
	return p.pause(s, StateWaiting, p.backoff(*fails-1))
}

// unfilled deals with a start that came to nothing: a PIN that was refused waits for the operator, all else for a while.
func (p *Pool) unfilled(s *seat, fails int, err error) *proc {
	p.mu.Lock()
	s.lastError, s.failing = err.Error(), true
	p.mu.Unlock()
	if p.logins.denial() != nil {
		p.log.Error("token refused the PIN; worker is not started before an operator acts", "err", err)
		return p.pause(s, StateRefused, -1)
	}
	wait := p.backoff(fails)
	p.log.Error("worker did not start", "err", err, "dur", wait)
	return p.pause(s, StateWaiting, wait)
}

// backoff is the pause after so many failures in a row, somewhere between half of it and the whole.
func (p *Pool) backoff(fails int) time.Duration {
	d := p.cfg.Restart.Max
	if shift := fails - 1; shift < 20 {
		d = min(p.cfg.Restart.Min<<shift, d)
	}
	return d/2 + rand.N(d/2+1)
}

// pause waits, for ever if d is negative, or until the seat is asked for a worker, which it returns.
func (p *Pool) pause(s *seat, state string, d time.Duration) *proc {
	p.enter(s, state, nil)
	var over <-chan time.Time
	if d >= 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-over:
	case <-p.ctx.Done():
	case answer := <-s.kick:
		return p.replace(s, nil, answer)
	}
	return nil
}

// replace starts another worker in place of one, which goes when the other is there. It returns the one that the seat has then.
func (p *Pool) replace(s *seat, old *proc, answer chan error) *proc {
	if old == nil {
		p.enter(s, StateStarting, nil)
	}
	w, err := p.start(p.ctx, s)
	if err != nil && old != nil && errors.Is(err, signer.ErrThrottled) {
		// The token has no sessions for both.
		p.retire(s, old)
		old = nil
		p.enter(s, StateStarting, nil)
		w, err = p.start(p.ctx, s)
	}
	if err == nil {
		p.mu.Lock()
		s.restarts++
		s.lastError = ""
		p.mu.Unlock()
		if old != nil {
			old.quit(p.drainLimit())
		}
	} else {
		w = old
	}
	answer <- err
	return w
}

// retire lets a worker finish what it holds and ends it.
func (p *Pool) retire(s *seat, w *proc) {
	p.enter(s, StateDraining, w)
	w.quit(p.drainLimit())
	p.enter(s, StateDraining, nil)
}

// drainLimit is how long a worker may take to finish and leave.
func (p *Pool) drainLimit() time.Duration { return p.cfg.Deadline + 2*closeWait }

// Retry reads the PIN anew, forgets that one was refused, and replaces the workers one after another, each before the old one
// goes. The PIN is tried once: if it is refused again, the others stay as they are.
func (p *Pool) Retry(ctx context.Context) error { return named(p.retry(ctx)) }

func (p *Pool) retry(ctx context.Context) error {
	p.retries.Lock()
	defer p.retries.Unlock()
	pin, err := p.cfg.Token.ReadPIN()
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.pin = pin
	p.readings++
	reading := p.readings
	p.mu.Unlock()
	p.logins.renew(reading)
	for _, s := range p.slots {
		answer := make(chan error, 1)
		select {
		case s.kick <- answer:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.ctx.Done():
			return pkcs11.ErrClosed
		}
		select {
		case err := <-answer:
			if err != nil {
				return fmt.Errorf("retry token %s: %w", p.name, err)
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
