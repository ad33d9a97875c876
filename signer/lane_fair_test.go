package signer

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A source asks for operations at random times, as many a second as given, for whom it is told.
type source struct {
	rate   float64
	caller func(i int) Caller
	class  keyClass
	cost   time.Duration
}

// ever is how long a refused operation takes.
const ever = time.Hour

// crowd lets sources use a lane for a while, and returns how long the operations of each took, and how much of the home's time they got
// in that while.
func crowd(l *Lane, length time.Duration, sources ...source) (took [][]time.Duration, busy []time.Duration) {
	took, busy = make([][]time.Duration, len(sources)), make([]time.Duration, len(sources))
	var mu sync.Mutex
	var wg sync.WaitGroup
	end := time.Now().Add(length)
	for i, s := range sources {
		random := rand.New(rand.NewPCG(1, uint64(i)))
		wg.Go(func() {
			for n := 0; ; n++ {
				time.Sleep(time.Duration(random.ExpFloat64() / s.rate * float64(time.Second)))
				if time.Now().After(end) {
					return
				}
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
					defer cancel()
					start := time.Now()
					d := ever
					if p, err := l.acquire(ctx, s.caller(n), s.class, 0, laneTime()); err == nil {
						time.Sleep(s.cost)
						l.release(ctx, &p, nil)
						d = time.Since(start)
					}
					mu.Lock()
					took[i] = append(took[i], d)
					if d != ever && time.Now().Before(end) {
						busy[i] += s.cost
					}
					mu.Unlock()
				})
			}
		})
	}
	wg.Wait()
	return took, busy
}

func p99(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)*99/100]
}

func same(peer, sni string) func(int) Caller {
	return func(int) Caller { return Caller{peer, sni} }
}

// TestFairUnderOverload has one client or server name ask for ten times what the home can do, beside others that ask for a tenth of it. To the
// others it may cost a doubling of their 99th percentile. One queue for all cannot do that, which shows that the test can fail.
func TestFairUnderOverload(t *testing.T) {
	const cost, capacity = 10 * time.Millisecond, 4
	const full = capacity * float64(time.Second/cost)
	others := func(peer func(i int) string) source {
		return source{full / 10, func(i int) Caller { return Caller{peer(i), fmt.Sprintf("www%d.example.com", i%8)} }, classP256, cost}
	}
	onePeer := func(int) string { return "edge/1" }
	manyPeers := func(i int) string { return "edge/" + strconv.Itoa(2+i%3) }
	tests := []struct {
		name   string
		others source
		abuse  func(int) Caller
		fair   bool
	}{
		{"abusive server name", others(onePeer), same("edge/1", "abuse.example.com"), true},
		{"abusive client", others(manyPeers), same("edge/1", "www1.example.com"), true},
		{"abusive client with many server names", others(manyPeers), func(i int) Caller { return Caller{"edge/1", strconv.Itoa(i)} }, true},
		{"one queue", source{full / 10, same("", ""), classP256, cost}, same("", ""), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				run := func(sources ...source) ([][]time.Duration, LaneStats) {
					l := NewLane(LaneConfig{Capacity: capacity})
					took, _ := crowd(l, 4*time.Second, sources...)
					synctest.Wait()
					wantIdle(t, l)
					return took, l.Stats()
				}
				calm, _ := run(tt.others)
				loud, stats := run(tt.others, source{10 * full, tt.abuse, classP256, cost})
				was, is := p99(calm[0]), p99(loud[0])
				t.Logf("99th percentile of the others: %v without abuse, %v with; %d of %d operations done, %d refused for the queue, %d for the deadline",
					was, is, stats.Done, len(loud[0])+len(loud[1]), stats.Refused.Overloaded, stats.Refused.Deadline)
				if fair := is <= 2*was; fair != tt.fair {
					t.Errorf("99th percentile of the others: %v without abuse, %v with: fair is %v, want %v", was, is, fair, tt.fair)
				}
				if got := float64(stats.Done) / (4 * full); got < .95 {
					t.Errorf("the home was busy for %.0f %% of the time, want all", 100*got)
				}
			})
		})
	}
}

// TestSharesAreOfTime has two clients ask for more than there is, with operations of which one takes ten times as long as the other.
func TestSharesAreOfTime(t *testing.T) {
	for name, class := range map[string]keyClass{"expected": classRSA2048, "not expected": classP256} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLane(LaneConfig{Capacity: 4, Queue: 256})
				_, busy := crowd(l, 5*time.Second,
					source{400, same("long", ""), class, 50 * time.Millisecond},
					source{4000, same("short", ""), classP256, 5 * time.Millisecond})
				if ratio := busy[0].Seconds() / busy[1].Seconds(); ratio < .9 || ratio > 1.1 {
					t.Errorf("got %v and %v of the home's time, want equal shares", busy[0], busy[1])
				}
				synctest.Wait()
				wantIdle(t, l)
			})
		})
	}
}

// TestFlowsKeepTheirDebts has one flow that never has more than one long operation in the queue, beside one with many short ones.
func TestFlowsKeepTheirDebts(t *testing.T) {
	root := newRoot()
	put := func(name string, cost time.Duration) {
		f := root.find(Caller{"edge", name})
		f.push(&waiter{flow: f, cost: cost})
	}
	put("long", 10)
	for range 50 {
		put("short", 1)
	}
	var time [2]int
	for range 1100 {
		switch w := root.pop(); w.flow.name {
		case "long":
			time[0] += 10
			put("long", 10)
		case "short":
			time[1]++
			put("short", 1)
		}
	}
	if time[0] < 900 || time[0] > 1100 {
		t.Errorf("got %d and %d of the time, want equal shares", time[0], time[1])
	}
}

// TestFlowsSaveNothing has a flow come that was not there while another was served a thousand times.
func TestFlowsSaveNothing(t *testing.T) {
	root := newRoot()
	put := func(peer string) {
		f := root.find(Caller{peer, ""})
		f.push(&waiter{flow: f, cost: 1})
	}
	for range 1200 {
		put("early")
	}
	for range 1000 {
		root.pop()
	}
	for range 200 {
		put("late")
	}
	n := 0
	for range 100 {
		if root.pop().flow.parent.name == "late" {
			n++
		}
	}
	if n < 49 || n > 51 {
		t.Errorf("got %d of 100 turns for the one that came late, want half", n)
	}
}

// TestNewNamesDoNotStarveOthers has 20 operations wait whenever one is served, each with a new server name, beside one name that stays.
func TestNewNamesDoNotStarveOthers(t *testing.T) {
	root := newRoot()
	names, stays := 0, 0
	put := func(name string) {
		f := root.find(Caller{"edge", name})
		f.push(&waiter{flow: f, cost: time.Millisecond})
	}
	for range 2 {
		put("stays")
	}
	for range 4200 {
		for root.queued < 22 {
			names++
			put(strconv.Itoa(names))
		}
		if w := root.pop(); w.flow.name == "stays" {
			stays++
			put("stays")
		}
	}
	if stays < 180 || stays > 220 {
		t.Errorf("got %d of 4200 turns beside 20 others, want about 200", stays)
	}
}
