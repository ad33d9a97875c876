package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// A heat is one thing that all contenders of a link do in turn.
type heat struct {
	key     string
	callers int
	unit    string
	less    bool // whether less is better
	udp     bool
	once    bool // measured in the first round alone
	clean   bool // measured over the clean link alone
	run     func(ctx context.Context, c *contender, d time.Duration) (result, error)
}

// result is what one heat measured; more has further figures of the same run, as rows of their own.
type result struct {
	value    float64
	p50, p99 time.Duration
	more     map[string]float64
}

// Rows that come out of other heats.
const (
	cpuPerGB = "processor time of a bulk download"
	udpLoss  = "UDP packets lost"
	busyRSS  = "resident memory with 1,000 streams"
)

func bulkHeat(key string, n int, up bool) heat {
	return heat{key: key, callers: n, unit: "Mb/s", run: func(ctx context.Context, c *contender, d time.Duration) (result, error) {
		bytes, cpu, err := c.bulk(ctx, n, up, d)
		r := result{value: float64(bytes) * 8 / 1e6 / d.Seconds()}
		if n > 1 && !up && bytes > 0 && len(c.procs) > 0 {
			r.more = map[string]float64{cpuPerGB: cpu.Seconds() / (float64(bytes) / 1e9)}
		}
		return r, err
	}}
}

var heats = []heat{
	bulkHeat("bulk to the visitor", 1, false),
	bulkHeat("bulk to the visitor", 16, false),
	bulkHeat("bulk to the site", 1, true),
	bulkHeat("bulk to the site", 16, true),
	{key: "small HTTP requests", callers: 64, unit: "req/s", run: func(ctx context.Context, c *contender, d time.Duration) (result, error) {
		s, err := c.requests(ctx, 64, d)
		if err != nil {
			return result{}, err
		}
		return result{value: s.rate(), p50: s.p50, p99: s.p99}, nil
	}},
	{key: "connection set-up", callers: 1, unit: "ms", less: true, run: func(ctx context.Context, c *contender, d time.Duration) (result, error) {
		s, err := c.setUps(ctx, d/2)
		return result{value: us(s.p50) / 1000, p50: s.p50, p99: s.p99}, err
	}},
	{key: "UDP echo, 200 B", unit: "packets/s", udp: true, run: func(ctx context.Context, c *contender, d time.Duration) (result, error) {
		rate, lost, err := c.packets(ctx, c.link.inFlight, d)
		return result{value: rate, more: map[string]float64{udpLoss: 100 * lost}}, err
	}},
	{key: "resident memory, idle", unit: "MiB", less: true, once: true, clean: true, run: func(ctx context.Context, c *contender, _ time.Duration) (result, error) {
		idle, busy, err := c.resident(ctx, allStream)
		return result{value: idle, more: map[string]float64{busyRSS: busy}}, err
	}},
}

// units of the rows in more.
var moreRows = map[string]heat{
	cpuPerGB: {unit: "CPU s/GB", callers: 16, less: true},
	udpLoss:  {unit: "%", less: true},
	busyRSS:  {unit: "MiB", less: true, callers: allStream},
}

// race runs all heats for all rounds and reports medians, and ours against the best of the others.
func (b *bench) race(ctx context.Context, all []*contender) error {
	type lane struct {
		heat int
		c    *contender
	}
	results := map[lane][]result{}
	for round := range b.rounds {
		for hi, h := range heats {
			for _, link := range benchLinks {
				if h.once && round > 0 || h.clean && link != benchLinks[0] {
					continue
				}
				for _, c := range running(all, link) {
					if c.name == plainName && h.unit == "MiB" || h.udp && c.udp == "" {
						continue
					}
					r, err := h.run(ctx, c, b.window)
					if ctx.Err() != nil {
						return ctx.Err()
					}
					if err != nil { // that one has lost this round; the others go on
						b.report.note("FAILED: %s, %s, %s, round %d: %v", link.name, h.key, c.name, round+1, err)
						continue
					}
					results[lane{hi, c}] = append(results[lane{hi, c}], r)
				}
			}
		}
	}
	for _, link := range benchLinks {
		for hi, h := range heats {
			rows := map[string][]contended{}
			for _, c := range running(all, link) {
				rs := results[lane{hi, c}]
				if len(rs) == 0 {
					continue
				}
				m := middle(rs, func(r result) float64 { return r.value })
				rows[h.key] = append(rows[h.key], contended{c, m.value, m})
				for key := range m.more {
					v := middle(rs, func(r result) float64 { return r.more[key] }).more[key]
					rows[key] = append(rows[key], contended{c, v, result{}})
				}
			}
			b.reportHeat(link, h, h.key, rows[h.key])
			for _, key := range []string{cpuPerGB, udpLoss, busyRSS} {
				b.reportHeat(link, moreRows[key], key, rows[key])
			}
		}
	}
	return nil
}

// middle returns the run with the median of a figure.
func middle(runs []result, of func(result) float64) result {
	sorted := slices.SortedFunc(slices.Values(runs), func(a, b result) int {
		switch {
		case of(a) < of(b):
			return -1
		case of(a) > of(b):
			return 1
		}
		return 0
	})
	return sorted[len(sorted)/2]
}

// contended is the figure of one contender.
type contended struct {
	c     *contender
	value float64
	r     result
}

// reportHeat adds the rows of a heat, and the ratio of ours, as it comes, to the best peer; above one is better.
func (b *bench) reportHeat(link *benchLink, h heat, key string, rows []contended) {
	better := func(a, b float64) bool { return (a > b) != h.less }
	var own, best *contended
	for i := range rows {
		x := &rows[i]
		b.report.rows = append(b.report.rows, row{Group: link.name, Key: key, Case: x.c.name, Callers: h.callers, Rate: x.value, Unit: h.unit,
			P50: us(x.r.p50), P99: us(x.r.p99)})
		switch {
		case x.c.name == ownName:
			own = x
		case x.c.ours || x.c.name == plainName:
		case best == nil || better(x.value, best.value):
			best = x
		}
	}
	if own == nil || best == nil || key == udpLoss {
		return
	}
	goal := 1.0
	if link != benchLinks[0] {
		goal = 1.5
	}
	what := key
	if h.callers > 1 {
		what = fmt.Sprintf("%s, %d at a time", key, h.callers)
	}
	name := fmt.Sprintf("%s, %s: ours to %s", link.name, what, best.c.name)
	if h.less {
		b.report.compare(name, best.value, own.value, goal)
	} else {
		b.report.compare(name, own.value, best.value, goal)
	}
}
