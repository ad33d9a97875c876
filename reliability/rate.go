package reliability

import (
	"context"
	"crypto/tls"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
)

// A Rate is how many operations a number of sessions carries.
type Rate struct {
	Sessions  int
	PerSecond float64
	P50, P99  time.Duration
}

// What the token of [Bench.Rates] does: as an HSM on the network, where each session keeps one of its cores busy.
const (
	tokenTime  = 3 * time.Millisecond
	tokenCores = 16
	rateTime   = 2 * time.Second
)

// Rates measures one worker with so many sessions, on a token that takes 3 ms for an operation and works on 16 at once. A session
// carries one operation at a time, so that it is the number of sessions that decides.
func (b *Bench) Rates(ctx context.Context, sessions ...int) ([]Rate, error) {
	var rates []Rate
	for _, n := range sessions {
		row := Row{Name: fmt.Sprintf("rate-%d", n), Homes: 1, Workers: 1, Token: fmt.Sprintf("deadline: 5s\nsessions: %d", n),
			Before: func(t *Trial) error {
				return t.Homes[0].Set(faultmodule.Faults{Delay: tokenTime, Serve: tokenCores})
			}}
		var rate Rate
		row.Fault = func(t *Trial) (err error) {
			rate, err = t.rate(n)
			return err
		}
		if _, err := b.Run(ctx, row); err != nil {
			return nil, err
		}
		rates = append(rates, rate)
	}
	return rates, nil
}

// rate asks for as much as there is room for.
func (t *Trial) rate(sessions int) (Rate, error) {
	load, err := t.bench.startLoad(t.ctx, t.server.address("serving"), tls.ECDSAWithP256AndSHA256)
	if err != nil {
		return Rate{}, err
	}
	defer load.stop()
	for _, l := range []*Load{load, t.Load} {
		if err := l.Pause(t.ctx); err != nil {
			return Rate{}, err
		}
	}
	ctx, cancel := context.WithTimeout(t.ctx, rateTime)
	defer cancel()
	var (
		wg     sync.WaitGroup
		failed atomic.Int64
		mu     sync.Mutex // guards took
		took   []time.Duration
	)
	begin := time.Now()
	for range 3 * tokenCores / 2 {
		wg.Go(func() {
			for ctx.Err() == nil {
				start := time.Now()
				if err := load.Ask(t.ctx); err != nil {
					failed.Add(1)
					continue
				}
				mu.Lock()
				took = append(took, time.Since(start))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for _, l := range []*Load{load, t.Load} {
		l.Resume()
	}
	if n := failed.Load(); n > 0 || len(took) == 0 {
		return Rate{}, fmt.Errorf("%d requests failed with %d sessions", n, sessions)
	}
	slices.Sort(took)
	return Rate{sessions, float64(len(took)) / time.Since(begin).Seconds(), took[len(took)/2], took[len(took)*99/100]}, nil
}
