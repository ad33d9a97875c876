package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	ck "github.com/miekg/pkcs11"
)

// session is a session of the token, owned by one operation at a time.
type session struct {
	handle ck.SessionHandle
	epoch  uint64      // of the pool: an older one means that the session has to be looked at before use
	dead   atomic.Bool // the module has given the handle to a newer session
}

// errStale is what a session is worth whose handle is another's by now.
var errStale = coded(ck.Error(ck.CKR_SESSION_HANDLE_INVALID))

// pool hands out sessions, at most cap(permits) at a time. Takers wait in the order of the runtime's channel queue.
type pool struct {
	m       *module
	slot    uint
	permits chan struct{} // holds a value for each session that may be taken
	closed  chan struct{}
	epoch   atomic.Uint64 // rises when the module says that a session is dead: all are in doubt

	mu   sync.Mutex // guards idle
	idle []*session // the last one used is the next to be taken
}

func newPool(m *module, slot uint, size int) *pool {
	p := &pool{m: m, slot: slot, permits: make(chan struct{}, size), closed: make(chan struct{})}
	for range size {
		p.permits <- struct{}{}
	}
	return p
}

// sessionWait is how long take waits for a session of its own process when the token has no more to give.
const sessionWait = 2 * time.Second

// take returns a session that the caller owns until give, a new one if fresh. It waits for one until ctx ends or the pool is closed.
func (p *pool) take(ctx context.Context, fresh bool) (*session, error) {
	if err := p.permit(ctx); err != nil {
		return nil, err
	}
	var deadline time.Time
	for {
		s, err := p.get()
		if err == nil && fresh {
			err = p.exchange(s)
		}
		if err == nil {
			return s, nil
		}
		p.permits <- struct{}{}
		now := time.Now()
		if deadline.IsZero() {
			deadline = now.Add(sessionWait)
		}
		if !errors.Is(err, ck.Error(ck.CKR_SESSION_COUNT)) || now.After(deadline) {
			return nil, fmt.Errorf("open session: %w", err)
		}
		// The token has fewer sessions than the configuration says, or other programs hold them: one may come back.
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if err := p.permit(ctx); err != nil {
			return nil, err
		}
	}
}

func (p *pool) permit(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	select {
	case <-p.closed:
		return ErrClosed
	default:
	}
	select {
	case <-p.permits:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for a session: %w", context.Cause(ctx))
	case <-p.closed:
		return ErrClosed
	}
}

// get takes an idle session or opens one.
func (p *pool) get() (*session, error) {
	for {
		p.mu.Lock()
		n := len(p.idle)
		if n == 0 {
			p.mu.Unlock()
			return p.open(false)
		}
		s := p.idle[n-1]
		p.idle = p.idle[:n-1]
		p.mu.Unlock()
		epoch := p.epoch.Load()
		if s.epoch == epoch {
			return s, nil
		}
		if _, err := p.m.sessionInfo(s); err == nil {
			s.epoch = epoch
			return s, nil
		}
		p.m.closeSession(s)
	}
}

// open opens a session that is not yet in the pool.
func (p *pool) open(writable bool) (*session, error) {
	s := &session{}
	if err := p.openInto(s, writable); err != nil {
		return nil, err
	}
	return s, nil
}

// openInto makes s a new session. A device that was restarted counts its handles from the start again: if it gives out one that an older
// session bears, that one is dead, and must neither be used nor closed.
func (p *pool) openInto(s *session, writable bool) error {
	flags := uint(ck.CKF_SERIAL_SESSION)
	if writable {
		flags |= ck.CKF_RW_SESSION
	}
	epoch := p.epoch.Load()
	m := p.m
	m.calls.RLock()
	defer m.calls.RUnlock()
	m.sessionsMu.Lock()
	defer m.sessionsMu.Unlock()
	h, err := m.ctx.OpenSession(p.slot, flags)
	if err != nil {
		return coded(err)
	}
	if old := m.sessions[h]; old != nil {
		old.dead.Store(true)
	}
	m.sessions[h] = s
	s.handle, s.epoch = h, epoch
	s.dead.Store(false)
	return nil
}

// give returns a session after an operation that ended with err. A session whose state is in doubt is closed, but
// not before another is open if it is the last: with the last session the login would go.
func (p *pool) give(s *session, err error) {
	defer func() { p.permits <- struct{}{} }()
	switch faultOf(err) {
	case faultNone, faultLogin, faultObject:
	case faultSession:
		if !errors.Is(err, ck.Error(ck.CKR_OPERATION_ACTIVE)) {
			p.epoch.Add(1)
		}
		s = p.replace(s)
	default:
		s = p.replace(s)
	}
	if s == nil {
		return
	}
	p.mu.Lock()
	p.idle = append(p.idle, s)
	p.mu.Unlock()
}

// exchange makes s a new session in place of the old, which is closed after that so that the login survives, unless the
// token has no room for both.
func (p *pool) exchange(s *session) error {
	fresh, err := p.open(false)
	p.m.closeSession(s)
	if errors.Is(err, ck.Error(ck.CKR_SESSION_COUNT)) {
		return p.openInto(s, false)
	}
	if err != nil {
		return err
	}
	p.m.sessionsMu.Lock()
	defer p.m.sessionsMu.Unlock()
	s.handle, s.epoch = fresh.handle, fresh.epoch
	s.dead.Store(fresh.dead.Load())
	if p.m.sessions[s.handle] == fresh {
		p.m.sessions[s.handle] = s
	}
	return nil
}

// replace closes s and returns a session in its place, or nil if none is needed or to be had.
func (p *pool) replace(s *session) *session {
	p.mu.Lock()
	last := len(p.idle) == 0
	p.mu.Unlock()
	if last && p.exchange(s) == nil {
		return s
	}
	p.m.closeSession(s)
	return nil
}

// doubt makes every session and object handle be looked at before its next use.
func (p *pool) doubt() { p.epoch.Add(1) }

// close waits until every session is back, then closes them. It must be called once.
func (p *pool) close() {
	close(p.closed)
	for range cap(p.permits) {
		<-p.permits
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.idle {
		p.m.closeSession(s)
	}
	p.idle = nil
}

// with runs f on the session's handle, unless the module has given the number to another session since.
func (m *module) with(s *session, f func(*ck.Ctx, ck.SessionHandle) error) error {
	m.calls.RLock()
	defer m.calls.RUnlock()
	if !m.alive(s) {
		return errStale
	}
	return coded(f(m.ctx, s.handle))
}

// operate is with for one signature or decryption, without a closure.
func (m *module) operate(s *session, key ck.ObjectHandle, op *operation) error {
	m.calls.RLock()
	defer m.calls.RUnlock()
	if !m.alive(s) {
		return errStale
	}
	return coded(m.fns.operate(s.handle, key, op))
}

func (m *module) sessionInfo(s *session) (ck.SessionInfo, error) {
	var info ck.SessionInfo
	err := m.with(s, func(c *ck.Ctx, h ck.SessionHandle) (err error) {
		info, err = c.GetSessionInfo(h)
		return err
	})
	return info, err
}

// alive reports whether the session's handle can still be its own. The caller holds calls.
func (m *module) alive(s *session) bool {
	return !s.dead.Load()
}

// closeSession closes a session, if it is not closed yet. A failure is of no interest: the session is given up.
func (m *module) closeSession(s *session) {
	m.calls.RLock()
	defer m.calls.RUnlock()
	m.sessionsMu.Lock()
	defer m.sessionsMu.Unlock()
	if !m.alive(s) {
		return
	}
	delete(m.sessions, s.handle)
	s.dead.Store(true)
	_ = m.ctx.CloseSession(s.handle)
}
