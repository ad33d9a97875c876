package signer

import (
	"math/bits"
	"time"
)

const (
	// Octaves of microseconds, each in eight parts, up to a quarter of an hour.
	latencyBuckets = 28 * 8
	// A window of results is replaced after windowResults, or after windowTime if it has enough.
	windowResults = 4096
	windowTime    = 30 * time.Second
	// enough is how many results a percentile needs to mean something.
	enough = 100
)

// A latency holds the distribution of recent durations in two windows, of which the older is dropped when the younger is full.
type latency struct {
	young, old [latencyBuckets]uint32
	n, nOld    int
	since      time.Duration // the begin of the young window
}

func latencyBucket(d time.Duration) int {
	us := uint64(max(d, 0) / time.Microsecond)
	if us < 8 {
		return int(us)
	}
	octave := bits.Len64(us) - 3 // at least 1
	return min(octave*8+int(us>>(octave-1)&7), latencyBuckets-1)
}

// latencyBound returns the end of a bucket.
func latencyBound(i int) time.Duration {
	if i < 8 {
		return time.Duration(i+1) * time.Microsecond
	}
	octave := i / 8
	return time.Duration(uint64(8+i%8+1)<<(octave-1)) * time.Microsecond
}

func (l *latency) add(d, now time.Duration) {
	if l.count() == 0 {
		l.since = now
	}
	if l.n >= windowResults || l.n >= enough && now-l.since >= windowTime {
		l.old, l.nOld = l.young, l.n
		l.young, l.n, l.since = [latencyBuckets]uint32{}, 0, now
	}
	l.young[latencyBucket(d)]++
	l.n++
}

// count returns how many results the percentiles come from.
func (l *latency) count() int { return l.n + l.nOld }

// merge adds the results of another.
func (l *latency) merge(m *latency) {
	for i := range l.young {
		l.young[i] += m.young[i] + m.old[i]
	}
	l.n += m.count()
}

// percentile returns the end of the bucket in which the share q of the results ends; 0 without results.
func (l *latency) percentile(q float64) time.Duration {
	rest := q * float64(l.count())
	if rest <= 0 {
		return 0
	}
	last := 0
	for i := range l.young {
		if c := l.young[i] + l.old[i]; c > 0 {
			last = i
			if rest -= float64(c); rest <= 0 {
				break
			}
		}
	}
	return latencyBound(last)
}

func (l *latency) percentiles() Percentiles {
	return Percentiles{P50: l.percentile(.50), P95: l.percentile(.95), P99: l.percentile(.99)}
}
