package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// The crowd asks modestly: each client has one request in flight at a time, at this pace. The abuser keeps this many in
// flight, again at once when one is refused.
const (
	pace  = 50 * time.Millisecond
	abuse = 512
)

// crowd are the modest clients; the abusive one is "edge1".
var crowd = []string{"c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"}

// fairness measures what others notice of an abusive client, and of an abusive server name within one client, over a
// token that answers as a network HSM does.
func (b *bench) fairness(ctx context.Context) (err error) {
	for _, c := range crowd {
		if _, err := b.lab.Tool(ctx, "keyhaven-keyserver", "client", "add", c, "--ca-dir", b.lab.Path("key-ca"), "--out", b.lab.Path(c)); err != nil {
			return err
		}
	}
	t, end, err := b.networkHSM()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	k, err := b.startOurs(ctx, "ours", t, hsmSettings, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, k.stop()) }()
	flood, err := b.plainClient(k.addr, "ks1", "edge-client", 2)
	if err != nil {
		return err
	}
	defer flood.Close()
	var clients []*keyless.Client
	for _, c := range crowd {
		client, err := b.plainClient(k.addr, "ks1", c, 1)
		if err != nil {
			return err
		}
		defer client.Close()
		clients = append(clients, client)
	}
	const key = "P-256"
	abusive, err := b.digestOp(flood, key, "abusive.test")
	if err != nil {
		return err
	}
	for _, who := range []struct {
		name   string
		client func(i int) *keyless.Client
	}{
		{"other clients", func(i int) *keyless.Client { return clients[i] }},
		{"other names of the same client", func(int) *keyless.Client { return k.client }},
	} {
		var ops []func(context.Context, int) error
		for i := range crowd {
			op, err := b.digestOp(who.client(i), key, fmt.Sprintf("modest-%d.test", i))
			if err != nil {
				return err
			}
			ops = append(ops, op)
		}
		if err := b.crowded(ctx, key, who.name, ops, abusive); err != nil {
			return err
		}
	}
	return nil
}

// crowded measures the modest ones without and with the abuser, round by round.
func (b *bench) crowded(ctx context.Context, key, name string, ops []func(context.Context, int) error, abusive func(context.Context, int) error) error {
	window := 2 * b.window // a p99 takes samples
	var alone, beside []sample
	for range b.rounds {
		s, err := paced(ctx, window, ops)
		if err != nil {
			return err
		}
		alone = append(alone, s)
		stop := flooded(ctx, abusive)
		s, err = paced(ctx, window, ops)
		asked, served := stop()
		if err != nil {
			return err
		}
		b.report.note("fairness, %s: the abuser asked %d times in about %v, %d were served", name, asked, window, served)
		beside = append(beside, s)
	}
	byP99 := func(a, b sample) int { return int(a.p99 - b.p99) }
	slices.SortFunc(alone, byP99)
	slices.SortFunc(beside, byP99)
	quiet, loud := alone[len(alone)/2], beside[len(beside)/2]
	b.report.add("fairness", key, name+", alone", len(ops), quiet)
	b.report.add("fairness", key, name+", beside the abuser", len(ops), loud)
	b.report.atMost(fmt.Sprintf("fairness, %s: p99 beside the abuser / alone", name), us(loud.p99), us(quiet.p99), 2)
	return nil
}

// paced runs each op at its pace, and counts its time from when it should have begun.
func paced(ctx context.Context, d time.Duration, ops []func(context.Context, int) error) (sample, error) {
	var wg sync.WaitGroup
	lats, errs := make([][]time.Duration, len(ops)), make([]error, len(ops))
	start := time.Now()
	for i, op := range ops {
		wg.Go(func() {
			due := start.Add(pace * time.Duration(i) / time.Duration(len(ops)))
			for ; due.Before(start.Add(d)); due = due.Add(pace) {
				time.Sleep(time.Until(due))
				if errs[i] = op(ctx, i); errs[i] != nil {
					return
				}
				lats[i] = append(lats[i], time.Since(due))
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return sample{}, err
	}
	return sampleOf(slices.Concat(lats...), d), nil
}

// flooded runs op by many callers until it is told to stop. Refusals are what an abuser has coming.
func flooded(ctx context.Context, op func(context.Context, int) error) (stop func() (asked, served int)) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	var asked, served [abuse]int
	for i := range abuse {
		wg.Go(func() {
			for ctx.Err() == nil {
				asked[i]++
				if op(ctx, i) == nil {
					served[i]++
				}
			}
		})
	}
	time.Sleep(200 * time.Millisecond) // the queue is full from here on
	return func() (a, s int) {
		cancel()
		wg.Wait()
		for i := range abuse {
			a, s = a+asked[i], s+served[i]
		}
		return a, s
	}
}
