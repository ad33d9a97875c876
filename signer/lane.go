package signer

import (
	"log/slog"
	"sync"
	"time"
)

// LaneConfig is what a [Lane] works with. The Lane keeps a copy.
type LaneConfig struct {
	// Name is what operators call the place, as [Backend] has it.
	Name string
	// Capacity is how many operations are in the home at once; below 1 it is 1. See [Lane.SetCapacity].
	Capacity int
	// Queue is how many operations wait at most; 0 is 1024, below 0 none.
	Queue int
	// Breaker says when the home counts as failed.
	Breaker BreakerConfig
	// Hedge says when a second home is asked.
	Hedge HedgeConfig
	// Logger is told when the home fails and recovers; nil discards.
	Logger *slog.Logger
}

// BreakerConfig says when a home counts as failed. The zero value has the defaults.
type BreakerConfig struct {
	// Failures is how many failures in succession open the breaker; 0 is 5.
	Failures int
	// MinOpen is how long the breaker stays open at first, MaxOpen to how long that doubles as trials fail; 0 is 1 s and 30 s.
	MinOpen, MaxOpen time.Duration
}

// HedgeConfig says when a second home is asked because the first takes long. The zero value turns hedging off.
type HedgeConfig struct {
	// Percentile is the share of operations, such as 0.95, that the home answers faster than a second one is asked; 0 or 1 turns
	// hedging off.
	Percentile float64
	// Budget is the share of operations for which a second home may be asked; 0 is 0.05.
	Budget float64
	// Min is the shortest time after which a second home is asked.
	Min time.Duration
}

// A Lane is the way into one place that holds keys: a token, a Transit mount, or all file keys. All keys of the place share one lane, and it
// outlives reloads. Make one with [NewLane]; all methods may be called from several goroutines at once. It has no goroutines of its own.
type Lane struct {
	config LaneConfig

	mu sync.Mutex // guards all below
	n  int
}

// NewLane returns a lane that is idle and takes the home to be well.
func NewLane(c LaneConfig) *Lane { return &Lane{config: c, n: c.Capacity} }

// Name returns what operators call the place.
func (l *Lane) Name() string { return l.config.Name }

// SetCapacity changes how many operations are in the home at once. With 0 the home takes none: operations that wait fail
// with [ErrUnavailable], and so do those that come.
func (l *Lane) SetCapacity(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n = n
}

// Stats returns the lane's present state and its counts since it was made.
func (l *Lane) Stats() LaneStats { return LaneStats{} }

// LaneStats is the state of a [Lane]. Counts only grow.
type LaneStats struct {
	Name     string
	Capacity int    // operations in the home at once, as configured
	Limit    int    // the same, as far as a throttling home takes them now; at most Capacity
	InFlight int    // operations in the home
	Waiting  int    // operations in the queue
	Breaker  string // "closed", "open" or "half-open"

	Done      uint64 // operations that the home answered with a result
	Failed    uint64 // failures that the breaker counted
	Opened    uint64 // how often the breaker opened
	Throttled uint64 // answers by which the home asked to be left alone
	Failovers uint64 // operations that went on to another home from this one
	Hedges    uint64 // operations for which a second home was asked because this one took long
	HedgesWon uint64 // those that the second home answered first

	Refused LaneRefused

	Latency Percentiles // of results lately, from asking for the home to its answer, the queue included
	Service Percentiles // of results lately, in the home alone
}

// LaneRefused counts operations that a [Lane] did not let into the home.
type LaneRefused struct {
	Overloaded uint64 // the queue was full
	Deadline   uint64 // the deadline would have been missed
	Open       uint64 // the breaker was open, or opened while the operation waited
}

// Percentiles are estimates from the results of the last minutes at most, too high by at most an eighth. All are 0 without results.
type Percentiles struct{ P50, P95, P99 time.Duration }
