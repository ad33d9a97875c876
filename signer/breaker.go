package signer

import (
	"math/rand/v2"
	"time"
)

// BreakerConfig says when a home counts as failed. The zero value has the defaults.
type BreakerConfig struct {
	// Failures is how many failures in succession open the breaker; 0 is 5.
	Failures int
	// MinOpen is how long the breaker stays open at first, MaxOpen to how long that doubles as trials fail; 0 is 1 s and 30 s.
	MinOpen, MaxOpen time.Duration
}

func (c BreakerConfig) withDefaults() BreakerConfig {
	if c.Failures <= 0 {
		c.Failures = 5
	}
	if c.MinOpen <= 0 {
		c.MinOpen = time.Second
	}
	if c.MaxOpen <= 0 {
		c.MaxOpen = 30 * time.Second
	}
	c.MaxOpen = max(c.MaxOpen, c.MinOpen)
	return c
}

type breakerState byte

const (
	closed breakerState = iota
	open
	halfOpen
)

func (s breakerState) String() string { return [...]string{"closed", "open", "half-open"}[s] }

// verdict is what an operation says of its home.
type verdict byte

const (
	noVerdict verdict = iota // nothing, as when the caller went away
	well
	ill
)

// breakerChange is what a verdict changed.
type breakerChange byte

const (
	unchanged breakerChange = iota
	hasOpened
	hasClosed
)

// A breaker keeps operations from a home that fails. After a time it lets one through to see. It has no lock of its own.
type breaker struct {
	config   BreakerConfig
	state    breakerState
	failures int           // in succession, while closed
	pause    time.Duration // for how long it was opened last
	until    time.Duration // when the next trial is due, while open
	trial    bool          // the trial of the half-open state is in progress
}

// admit reports whether an operation may go on, and whether it is the trial. A trial's verdict must be recorded.
func (b *breaker) admit(now time.Duration) (ok, trial bool) {
	switch {
	case b.state == closed:
		return true, false
	case b.state == open && now < b.until, b.state == halfOpen && b.trial:
		return false, false
	}
	b.state, b.trial = halfOpen, true
	return true, true
}

// record takes a verdict. Those of operations that were begun before the breaker opened, and so are no trials, count only while it is closed.
func (b *breaker) record(v verdict, trial bool, now time.Duration) breakerChange {
	if b.state == closed {
		switch v {
		case well:
			b.failures = 0
		case ill:
			if b.failures++; b.failures >= b.config.Failures {
				return b.open(b.config.MinOpen, now)
			}
		}
		return unchanged
	}
	if !trial {
		return unchanged
	}
	switch v {
	case well:
		b.state, b.failures, b.trial = closed, 0, false
		return hasClosed
	case ill:
		if b.state == halfOpen {
			b.open(min(2*b.pause, b.config.MaxOpen), now)
		}
	case noVerdict:
		b.trial = false // the next operation is the trial
	}
	return unchanged
}

// open opens the breaker for the pause, less up to a fifth, so that key servers do not all come back to a home at once.
func (b *breaker) open(pause, now time.Duration) breakerChange {
	b.state, b.pause, b.trial = open, pause, false
	b.until = now + pause - rand.N(pause/5+1)
	return hasOpened
}
