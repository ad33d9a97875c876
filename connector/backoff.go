package connector

import (
	"math/rand/v2"
	"time"
)

const (
	backoffBase = 250 * time.Millisecond
	// backoffCap is the longest pause. An attempt takes up to 15 s itself, and together they must not take more than 30 s.
	backoffCap = 15 * time.Second
	// refusedCap is the longest pause after a refusal, which comes at once and only a person can mend.
	refusedCap = 30 * time.Second
	// steady is how long a session must have lived for the next attempt to begin anew with the shortest delay.
	steady = time.Minute
)

// backoff gives the delays between attempts to reach an edge: full jitter, that is, uniform between 0 and a ceiling
// that doubles with each attempt from backoffBase to backoffCap, so that many connectors do not come back at once. The
// zero value is at the beginning.
type backoff struct {
	n       int
	refused bool // the next delay is that after a refusal
}

// ceiling is the longest that the next delay can be.
func (b *backoff) ceiling() time.Duration {
	switch {
	case b.refused:
		return refusedCap
	case b.n >= 6: // 250 ms << 6 is above the cap
		return backoffCap
	}
	return backoffBase << b.n
}

// next returns the delay before the next attempt, and makes later ones longer.
func (b *backoff) next() time.Duration {
	c := b.ceiling()
	b.refused = false
	if b.n < 6 {
		b.n++
	}
	return rand.N(c)
}

// reset starts again from the shortest delay.
func (b *backoff) reset() { *b = backoff{} }

// max makes the next delay as long as it can be, for refusals.
func (b *backoff) max() { b.n, b.refused = 6, true }
