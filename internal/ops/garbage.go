package ops

import (
	"context"
	"math"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	garbageLook = 2 * time.Second
	// leastGOGC bounds how often a large heap is collected.
	leastGOGC = 15
	// defaultGOGC is Go's: the heap may double before it is collected.
	defaultGOGC = 100
)

// BoundGarbage keeps what awaits collection at about most bytes, until ctx ends: a heap of many idle connections would
// otherwise take twice what it holds. Where most is more than the heap, and where GOGC is in the environment, everything
// stays as Go has it.
func BoundGarbage(ctx context.Context, most uint64) {
	if os.Getenv("GOGC") != "" {
		return
	}
	now := defaultGOGC
	defer func() { debug.SetGCPercent(defaultGOGC) }()
	tick := time.NewTicker(garbageLook)
	defer tick.Stop()
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(live)
		// Small steps are not worth a stop of the world.
		if want := gogcFor(live[0].Value.Uint64(), most); math.Abs(float64(want-now)) >= 5 {
			now = want
			debug.SetGCPercent(want)
		}
	}
}

// gogcFor is the percentage of live that is most.
func gogcFor(live, most uint64) int {
	return int(min(max(most*100/max(live, 1), leastGOGC), defaultGOGC))
}
