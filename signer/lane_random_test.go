package signer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestRandomSchedules runs operations of several callers through two homes that fail, throttle, hang and change their capacity, while callers go away, all at
// random. Whatever happens, each operation ends by its deadline, no home does one that another has done unless it was hedged or the home
// said it could not, and no place and no waiter is lost.
func TestRandomSchedules(t *testing.T) {
	var all LaneStats
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := randomSchedule(t, seed, 0)
				all.Hedges += s.Hedges
				all.Opened += s.Opened
				all.Throttled += s.Throttled
				all.Failovers += s.Failovers
				all.Refused.Overloaded += s.Refused.Overloaded
				all.Refused.Deadline += s.Refused.Deadline
				all.Refused.Open += s.Refused.Open
			})
		})
	}
	if min(all.Hedges, all.Opened, all.Throttled, all.Failovers, all.Refused.Overloaded, all.Refused.Deadline, all.Refused.Open) < 20 {
		t.Errorf("too little happened: %+v", all)
	}
}

// doneKey counts which operations it did. An operation is known by its input.
type doneKey struct {
	Key
	home   string
	mu     sync.Mutex // guards all below
	random *rand.Rand
	done   map[[32]byte]int
	down   bool
	atOnce int
	most   int
}

func (k *doneKey) Info() KeyInfo { return KeyInfo{Home: k.home} }

func (k *doneKey) Sign(ctx context.Context, _ Algorithm, input []byte) ([]byte, error) {
	k.mu.Lock()
	dice, took := k.random.IntN(100), time.Duration(k.random.ExpFloat64()*float64(5*time.Millisecond))
	if k.down {
		dice, took = 1, 0
	}
	k.atOnce++
	k.most = max(k.most, k.atOnce)
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.atOnce--
	}()
	if dice == 0 {
		took = time.Minute
	}
	if err := takes(took)(ctx); err != nil {
		return nil, err
	}
	switch {
	case dice < 6:
		return nil, ErrUnavailable
	case dice < 10:
		return nil, ErrThrottled
	case dice < 12:
		return nil, errRefused
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.done[[32]byte(input)]++
	return []byte(k.home), nil
}

var errRefused = errors.New("the home refuses")

const mostCapacity = 8

// randomSchedule allows operations the slack after their deadline.
func randomSchedule(t *testing.T, seed uint64, slack time.Duration) LaneStats {
	random := rand.New(rand.NewPCG(seed, 1))
	var keys [2]*doneKey
	var homes []Home
	for i := range keys {
		keys[i] = &doneKey{Key: memoryKey(t, "p256"), home: fmt.Sprint(i), random: rand.New(rand.NewPCG(seed, uint64(i+2))), done: map[[32]byte]int{}}
		homes = append(homes, Home{Key: keys[i], Lane: NewLane(LaneConfig{
			Name: keys[i].home, Capacity: 1 + random.IntN(mostCapacity), Queue: 20,
			Breaker: BreakerConfig{MinOpen: 50 * time.Millisecond, MaxOpen: 200 * time.Millisecond},
			Hedge:   HedgeConfig{Percentile: .9, Budget: .2},
		})})
	}
	e, r := entryOf(t, homes...)
	var wg sync.WaitGroup
	var mu sync.Mutex
	results := map[string]int{}
	hedged := map[[32]byte]bool{}
	const operations = 1500
	for i := range operations {
		time.Sleep(time.Duration(random.ExpFloat64() * float64(time.Millisecond)))
		if random.IntN(50) == 0 {
			homes[random.IntN(2)].Lane.SetCapacity(random.IntN(mostCapacity + 1))
		}
		if random.IntN(100) == 0 {
			k := keys[random.IntN(2)]
			k.mu.Lock()
			k.down = !k.down
			k.mu.Unlock()
		}
		c := Caller{fmt.Sprint("edge/", random.IntN(3)), fmt.Sprint(random.IntN(5), ".example.com")}
		left := time.Duration(1+random.IntN(200)) * time.Millisecond
		away := time.Duration(random.IntN(2000)) * time.Millisecond
		input := [32]byte{byte(i), byte(i >> 8)}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), left)
			defer cancel()
			defer time.AfterFunc(away, cancel).Stop()
			start := time.Now()
			sig, out, err := e.Sign(ctx, c, p256Alg, input[:])
			if took := time.Since(start); took > left+slack {
				t.Errorf("took %v of %v", took, left)
			}
			if err == nil && string(sig) != out.Home {
				t.Errorf("got %q from home %s", sig, out.Home)
			}
			mu.Lock()
			defer mu.Unlock()
			hedged[input] = out.Hedged
			results[resultOf(err)]++
		})
	}
	wg.Wait()
	r.Wait()
	for i, k := range keys {
		wantIdle(t, homes[i].Lane)
		if most := (1 + maxAhead) * mostCapacity; k.most > most {
			t.Errorf("home %d had %d operations at once, want %d at most", i, k.most, most)
		}
		for input, n := range k.done {
			if n > 1 || keys[1-i].done[input] > 0 && !hedged[input] {
				t.Errorf("operation %x was done %d times here, %d times there, hedged: %v", input[:2], n, keys[1-i].done[input], hedged[input])
			}
		}
	}
	if results["unknown"] > 0 || results["ok"] == 0 {
		t.Errorf("got %v", results)
	}
	return homes[0].Lane.Stats()
}

func resultOf(err error) string {
	if err == nil {
		return "ok"
	}
	for _, known := range []error{ErrOverloaded, ErrDeadline, ErrUnavailable, errRefused, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	return "unknown"
}

// TestRealTimeSchedules does the same in real time, for the race detector.
func TestRealTimeSchedules(t *testing.T) { randomSchedule(t, 1000, time.Minute) }
