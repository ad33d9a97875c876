package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// The sessions with which the existing key server is tried, to find its best setting for a key.
var peerSessions = []int{1, 2, 4, 8, 16, 32, 64}

// A comparison is ours against the existing key server over one token.
type comparison struct {
	group       string
	token       token
	ours        obj     // settings of our token
	overDefault float64 // least ratio to its default
	overBest    float64 // least ratio to its best setting
}

// bare compares over SoftHSM2 as it is: its own locks and the machine's cores bound both.
func (b *bench) bare(ctx context.Context) error {
	return b.compareServers(ctx, comparison{group: "bare", token: token{module: b.lab.Token.Module}, overDefault: 1.3, overBest: 1.1})
}

func (b *bench) compareServers(ctx context.Context, c comparison) (err error) {
	if err := b.buildPeer(ctx); err != nil {
		return err
	}
	best, err := b.sweep(ctx, c)
	if err != nil {
		return err
	}
	var running []*keyServer
	defer func() {
		for _, k := range running {
			err = errors.Join(err, k.stop())
		}
	}()
	add := func(k *keyServer, err error) (*keyServer, error) {
		if err == nil {
			running = append(running, k)
		}
		return k, err
	}
	audit, err := b.auditRequired()
	if err != nil {
		return err
	}
	ours, err := add(b.startOurs(ctx, "ours", c.token, c.ours, audit))
	if err != nil {
		return err
	}
	standard, err := add(b.startPeer(ctx, c.token, 0))
	if err != nil {
		return err
	}
	tuned := map[int]*keyServer{}
	for _, n := range slices.Sorted(maps.Values(best)) {
		if tuned[n] == nil {
			if tuned[n], err = add(b.startPeer(ctx, c.token, n)); err != nil {
				return err
			}
		}
	}
	var cases []*measured
	for _, key := range keyTypes {
		for _, k := range []*keyServer{standard, tuned[best[key]], ours} {
			op, err := b.digestOp(k.client, key, hosts[key])
			if err != nil {
				return err
			}
			for _, n := range inFlight {
				cases = append(cases, &measured{key: key, name: k.name, callers: n, op: op, pids: k.pids})
			}
		}
		op, err := b.signOp(ours.client, key)
		if err != nil {
			return err
		}
		for _, n := range inFlight {
			cases = append(cases, &measured{key: key, name: "ours, tls-sign", callers: n, op: op, pids: ours.pids})
		}
	}
	if err := b.measure(ctx, c.group, cases); err != nil {
		return err
	}
	for _, key := range keyTypes {
		for _, n := range inFlight {
			d, t := 0.0, 0.0 // targets are for a loaded server
			if n == inFlight[len(inFlight)-1] {
				d, t = c.overDefault, c.overBest
			}
			own := b.report.rate(c.group, key, ours.name, n)
			b.report.compare(fmt.Sprintf("%s, %s, %d in flight: ours / existing, default", c.group, key, n), own, b.report.rate(c.group, key, standard.name, n), d)
			b.report.compare(fmt.Sprintf("%s, %s, %d in flight: ours / %s", c.group, key, n, tuned[best[key]].name), own, b.report.rate(c.group, key, tuned[best[key]].name, n), t)
		}
	}
	return nil
}

// sweep finds for each key the number of sessions with which the existing server is fastest at the greatest load.
func (b *bench) sweep(ctx context.Context, c comparison) (map[string]int, error) {
	best, top := map[string]int{}, map[string]float64{}
	for _, n := range peerSessions {
		k, err := b.startPeer(ctx, c.token, n)
		if err != nil {
			b.report.note("%s: the existing server does not serve with max-sessions=%d: %v", c.group, n, err)
			continue
		}
		for _, key := range keyTypes {
			op, err := b.digestOp(k.client, key, hosts[key])
			if err != nil {
				return nil, errors.Join(err, k.stop())
			}
			s, err := load(ctx, 64, max(b.window/2, 200*time.Millisecond), k.pids(), op)
			if err != nil {
				return nil, errors.Join(err, k.stop())
			}
			b.report.add(c.group+", sweep", key, k.name, 64, s)
			if s.rate() > top[key] {
				best[key], top[key] = n, s.rate()
			}
		}
		if err := k.stop(); err != nil {
			return nil, err
		}
	}
	if len(best) != len(keyTypes) {
		return nil, fmt.Errorf("the existing key server serves with none of the settings: %s", strings.Join(b.report.notes, "; "))
	}
	return best, nil
}
