package tunnel

import (
	"net/netip"
	"sync"
	"time"
)

const (
	// maxSources bounds the rate limiter's table. When it is full, one of a few sources picked at random is forgotten,
	// the one that is closest to having its whole allowance back; the joins that run at a time are bounded besides.
	maxSources = 4096
	// evictSample is how many are picked.
	evictSample = 16
)

// rateLimiter allows each source so many events per period, all at once or spread.
type rateLimiter struct {
	every time.Duration // one event's share of the period
	burst time.Duration // the period

	mu      sync.Mutex // guards the field below
	sources map[netip.Prefix]time.Time
}

func newRateLimiter(n int, per time.Duration) *rateLimiter {
	return &rateLimiter{every: per / time.Duration(n), burst: per, sources: make(map[netip.Prefix]time.Time)}
}

// allow reports whether an event of addr is within the limit at now, and counts it if so. IPv6 addresses count by /64.
func (r *rateLimiter) allow(addr netip.Addr, now time.Time) bool {
	bits := 32
	if addr = addr.Unmap(); addr.Is6() {
		bits = 64
	}
	source, err := addr.Prefix(bits)
	if err != nil || !source.IsValid() {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	// due is when the source has its whole allowance back: each event moves it on by every.
	due, known := r.sources[source]
	if !known && len(r.sources) >= maxSources {
		r.evictLocked()
	}
	if due.Before(now) {
		due = now
	}
	due = due.Add(r.every)
	if due.Sub(now) > r.burst {
		return false
	}
	r.sources[source] = due
	return true
}

func (r *rateLimiter) evictLocked() {
	var first netip.Prefix
	seen := 0
	for source, due := range r.sources { // in random order
		if !first.IsValid() || due.Before(r.sources[first]) {
			first = source
		}
		if seen++; seen == evictSample {
			break
		}
	}
	delete(r.sources, first)
}
