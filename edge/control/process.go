package control

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// proveTimeout bounds the wait for a sign of life that a session is asked for.
	proveTimeout = 2 * time.Second
	// challengeWait is the least time in which a process must answer a challenge, or its sessions count as suspect.
	challengeWait = 250 * time.Millisecond
)

// A sibling is a session as its process sees it.
type sibling interface {
	Suspect() bool
	LastHeard() time.Time
	RTT() time.Duration
	prove() // has the session ask its peer for a sign of life; never blocks
}

// A process is what the sessions of one process of a connector have in common: they die together. The zero value is ready.
type process struct {
	siblings atomic.Pointer[[]sibling] // the slice is never changed in place
	alarm    func()                    // called when one of them is found suspect; may be nil

	mu    sync.Mutex // guards the fields below, and changes of siblings
	since time.Time  // when one of them was first found suspect; zero: none is
	asked time.Time  // when all had to give a sign of life, and have not yet
}

func (p *process) add(m sibling) {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := p.list()
	list = append(list[:len(list):len(list)], m)
	p.siblings.Store(&list)
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
	p.siblings.Store(&list)
}

func (p *process) list() []sibling {
	if l := p.siblings.Load(); l != nil {
		return *l
	}
	return nil
}

// silent reports whether a session of the process is suspect and none of them was heard since that was noticed, or none
// answered a challenge in time. When it is first noticed, all are asked for a sign of life, so that only of a process that
// died nothing is heard for long, and the alarm is raised.
func (p *process) silent() bool {
	silent, news := p.judge()
	if news && p.alarm != nil {
		p.alarm()
	}
	return silent
}

func (p *process) judge() (silent, news bool) {
	suspect, slowest := false, time.Duration(0)
	for _, m := range p.list() {
		suspect = suspect || m.Suspect()
		slowest = max(slowest, m.RTT())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if suspect {
		if p.since.IsZero() {
			p.since = p.askLocked()
			return true, true
		}
		return !p.heardLocked(p.since), false
	}
	p.since = time.Time{}
	if p.asked.IsZero() {
		return false, false
	}
	if p.heardLocked(p.asked) {
		p.asked = time.Time{}
		return false, false
	}
	return time.Since(p.asked) > max(challengeWait, 4*slowest), false
}

// challenge gives the sessions of the process a short time to prove that they live: others on the way to the same site
// have most likely died.
func (p *process) challenge() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked.IsZero() {
		p.asked = p.askLocked()
	}
}

// askLocked asks for a sign of life, and returns since when one counts.
func (p *process) askLocked() time.Time {
	for _, m := range p.list() {
		m.LastHeard() // what came before is not taken for new later
	}
	now := time.Now()
	for _, m := range p.list() {
		m.prove()
	}
	return now
}

func (p *process) heardLocked(since time.Time) bool {
	for _, m := range p.list() {
		if m.LastHeard().After(since) {
			return true
		}
	}
	return false
}

// challenge challenges the tunnel's processes but one, which is suspect.
func (r *registry) challenge(tunnelID string, but *process) {
	for _, l := range r.of(tunnelID) {
		if l.process != but {
			l.process.challenge()
		}
	}
}

// Suspect reports whether the session itself is suspect.
func (l *live) Suspect() bool { return l.s.Suspect() }

// LastHeard is when the connector was heard last over the session.
func (l *live) LastHeard() time.Time { return l.s.LastHeard() }

// RTT is the session's round-trip time.
func (l *live) RTT() time.Duration { return l.s.RTT() }

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
