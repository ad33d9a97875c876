package signer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"math/rand/v2"
	"time"
)

// keyClass groups keys whose operations take about the same time in one home.
type keyClass byte

const (
	classOther keyClass = iota
	classRSA2048
	classRSA3072
	classRSA4096 // and longer
	classP256    // and shorter
	classP384
	classP521
	classEd25519
	keyClasses
)

func classOf(pub crypto.PublicKey) keyClass {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		switch bits := k.N.BitLen(); {
		case bits <= 2048:
			return classRSA2048
		case bits <= 3072:
			return classRSA3072
		}
		return classRSA4096
	case *ecdsa.PublicKey:
		switch bits := k.Curve.Params().BitSize; {
		case bits <= 256:
			return classP256
		case bits <= 384:
			return classP384
		}
		return classP521
	case ed25519.PublicKey:
		return classEd25519
	}
	return classOther
}

// An average follows durations. One that is far off counts for no more than four times the present value, so that a single hanging
// operation does not turn the next ones away.
type average struct {
	value time.Duration
	n     int
}

// measured is how many durations make an average to go by.
const measured = 16

func (a *average) add(d time.Duration) {
	a.n++
	if a.n == 1 {
		a.value = max(d, time.Microsecond)
		return
	}
	d = min(d, 4*a.value)
	a.value = max(a.value+(d-a.value)/time.Duration(min(a.n, measured)), time.Microsecond)
}

func (a *average) get() time.Duration { return a.value }

func (l *Lane) measureLocked(class keyClass, took time.Duration) {
	l.cost[class].add(took)
	l.mean.add(took)
}

// costLocked returns the expected service time of an operation; a guess until there were some.
func (l *Lane) costLocked(class keyClass) time.Duration {
	if a := &l.cost[class]; a.n > 0 {
		return a.get()
	}
	if l.mean.n > 0 {
		return l.mean.get()
	}
	return time.Millisecond
}

func (l *Lane) measuredLocked(class keyClass) bool { return l.cost[class].n >= measured }

// roomLocked returns how many operations the lane sends at once: as many as the home does at once, and a little work ahead so that it never waits
// for the next one; less while it throttles.
func (l *Lane) roomLocked() int {
	if l.limit < float64(l.capacity) {
		return int(l.limit)
	}
	return l.capacity + min(l.ahead, maxAhead*l.capacity)
}

// The work that is sent ahead: what the home does in aheadTime, as the last paceWindow tells, and maxAhead times its capacity at most. Nobody's fair
// turn comes later than by aheadTime for it.
const (
	aheadTime  = time.Millisecond
	paceWindow = 5 * time.Millisecond
	maxAhead   = 3
)

// paceLocked counts a result.
func (l *Lane) paceLocked(now time.Duration) {
	l.finished++
	if since := now - l.paceFrom; since >= paceWindow {
		l.ahead = int(time.Duration(l.finished) * aheadTime / since)
		l.finished, l.paceFrom = 0, now
	}
}

type throttleChange byte

const (
	throttleUnchanged throttleChange = iota
	throttleBegan
	throttleEnded
)

// throttleLocked halves what is sent at once, but once for all operations that were in the home together.
func (l *Lane) throttleLocked(from, now time.Duration) throttleChange {
	if from < l.cut {
		return throttleUnchanged
	}
	change := throttleUnchanged
	lower := max(l.limit/2, 1)
	if l.limit >= float64(l.capacity) && lower < l.limit {
		change = throttleBegan
	}
	l.limit, l.cut = lower, now
	return change
}

// creepLocked lets one more operation in for each full round of results, until the home's capacity is reached.
func (l *Lane) creepLocked() throttleChange {
	top := float64(max(l.capacity, 1))
	if l.limit >= top {
		return throttleUnchanged
	}
	if l.limit += 1 / l.limit; l.limit < top {
		return throttleUnchanged
	}
	l.limit = top
	return throttleEnded
}

// Pauses before a throttled operation is tried again; they double.
const (
	minThrottlePause = 10 * time.Millisecond
	maxThrottlePause = time.Second
	maxThrottleTries = 20
)

// pauseThrottled waits before the next try of a throttled operation, and reports whether there is to be one.
func pauseThrottled(ctx context.Context, try int) bool {
	if try >= maxThrottleTries {
		return false
	}
	pause := min(minThrottlePause<<min(try, 10), maxThrottlePause)
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		if left <= minThrottlePause {
			return false
		}
		pause = min(pause, left/2)
	}
	timer := time.NewTimer(pause/2 + rand.N(pause/2+1))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
