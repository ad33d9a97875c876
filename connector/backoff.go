package connector

import (
	"math/rand/v2"
	"time"
)

const (
	backoffBase = 250 * time.Millisecond
	backoffCap  = 30 * time.Second
	// steady is how long a session must have lived for the next attempt to begin anew with the shortest delay.
	steady = time.Minute
)

// backoff gives the delays between attempts to reach an edge: full jitter, that is, uniform between 0 and a ceiling
// that doubles with each attempt from backoffBase to backoffCap, so that many connectors do not come back at once. The
// zero value is at the beginning.
type backoff struct {
	n int
}

// ceiling is the longest that the next delay can be.
func (b *backoff) ceiling() time.Duration {
	if b.n >= 7 { // 250 ms << 7 is above the cap
		return backoffCap
	}
	return backoffBase << b.n
}

// next returns the delay before the next attempt, and makes later ones longer.
func (b *backoff) next() time.Duration {
	c := b.ceiling()
	if c < backoffCap {
		b.n++
	}
	return rand.N(c)
}

// reset starts again from the shortest delay.
func (b *backoff) reset() { b.n = 0 }

// max makes the delays as long as they can be, for refusals that only a person can mend.
func (b *backoff) max() { b.n = 7 }
