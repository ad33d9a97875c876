package signer

import "time"

// LaneStats is the state of a [Lane]. Counts only grow.
type LaneStats struct {
	Name     string
	Capacity int    // operations in the home at once, as configured
	Limit    int    // the same, as far as a throttling home takes them now; at most Capacity
	InFlight int    // operations in the home, and a few that were sent ahead so that it need not wait for them
	Waiting  int    // operations in the queue
	Breaker  string // "closed", "open" or "half-open"

	Done      uint64 // operations that the home answered with a result
	Failed    uint64 // operations that failed because the home did
	Opened    uint64 // how often the breaker opened; failed trials that keep it open are not counted
	Throttled uint64 // answers by which the home asked to be left alone
	Failovers uint64 // operations that went on to another home because this one failed
	Hedges    uint64 // operations for which a second home was asked because this one took long
	HedgesWon uint64 // those that the second home answered first

	Refused LaneRefused

	Latency Percentiles // from asking for the home to its answer, the queue included
	Service Percentiles // in the home alone
}

// LaneRefused counts operations that a [Lane] did not let into the home.
type LaneRefused struct {
	Overloaded uint64 // the queue was full
	Deadline   uint64 // the deadline would have been missed
	Open       uint64 // the breaker was open or the capacity 0, or became so while the operation waited; another home was asked if there was one
}

// Percentiles are estimates from a few thousand recent results, too high by at most an eighth. All are 0 without results.
type Percentiles struct{ P50, P95, P99 time.Duration }

// Stats returns the lane's present state and its counts since it was made.
func (l *Lane) Stats() LaneStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.counts
	s.Name, s.Capacity, s.InFlight, s.Waiting = l.config.Name, l.capacity, l.inFlight, l.root.queued
	s.Limit = min(l.capacity, int(l.limit))
	s.Breaker = l.breaker.state.String()
	s.Hedges, s.HedgesWon = l.hedges.asked.Load(), l.hedges.won.Load()
	s.Failovers = l.failovers.Load()
	var all latency
	for i := range l.latency {
		if l.latency[i].count() > 0 {
			all.merge(&l.latency[i])
		}
	}
	s.Latency, s.Service = all.percentiles(), l.service.percentiles()
	return s
}
