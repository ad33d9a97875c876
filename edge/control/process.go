package control

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// proveTimeout bounds the wait for a sign of life that a session is asked for.
const proveTimeout = 2 * time.Second

// A sibling is a session as its process sees it.
type sibling interface {
	Suspect() bool
	LastHeard() time.Time
	prove() // has the session ask its peer for a sign of life; never blocks
}

// A process is what the sessions of one process of a connector have in common: they die together. The zero value is ready.
type process struct {
	members atomic.Pointer[[]sibling] // the slice is never changed in place

	mu    sync.Mutex // guards the field below, and changes of members
	since time.Time  // when one of them was first found suspect; zero: none is
}

func (p *process) add(m sibling) {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.list()
	list = append(list[:len(list):len(list)], m)
	p.members.Store(&list)
}

func (p *process) remove(m sibling) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var list []sibling
	for _, o := range p.list() {
		if o != m {
			list = append(list, o)
		}
	}
	p.members.Store(&list)
}

func (p *process) list() []sibling {
	if l := p.members.Load(); l != nil {
		return *l
	}
	return nil
}

// silent reports whether a session of the process is suspect and none of them was heard since that was noticed. The others
// are asked for a sign of life then, so that only of a process that died nothing is heard for long.
func (p *process) silent() bool {
	list := p.list()
	suspect := false
	for _, m := range list {
		suspect = suspect || m.Suspect()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !suspect:
		p.since = time.Time{}
		return false
	case p.since.IsZero():
		for _, m := range list {
			m.LastHeard() // what came before is not taken for new later
		}
		p.since = time.Now()
		for _, m := range list {
			m.prove()
		}
		return true
	}
	for _, m := range list {
		if m.LastHeard().After(p.since) {
			return false
		}
	}
	return true
}

// Suspect reports whether the session itself is suspect.
func (l *live) Suspect() bool { return l.s.Suspect() }

// LastHeard is when the connector was heard last over the session.
func (l *live) LastHeard() time.Time { return l.s.LastHeard() }

// suspect reports whether the session has most likely died, alone or with its process.
func (l *live) suspect() bool { return l.Suspect() || l.process.silent() }

func (l *live) prove() {
	select {
	case l.proof <- struct{}{}:
	default:
	}
}

// probe asks the connector for a sign of life. What comes of it is in the session's LastHeard.
func (l *live) probe(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, proveTimeout)
	defer cancel()
	l.s.Probe(ctx) //nolint:errcheck // see LastHeard
}
