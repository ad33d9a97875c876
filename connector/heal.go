package connector

import (
	"context"
	"net"
	"slices"
	"strings"
	"time"
)

const (
	// lookEvery is how often this host's addresses and clock are looked at.
	lookEvery = 2 * time.Second
	// clockJump is by how much the wall clock must part from the monotonic one to mean that the host slept, or that
	// somebody set the clock.
	clockJump = 3 * time.Second
	// probeTimeout is how long an edge has to answer a probe.
	probeTimeout = 2 * time.Second
)

// surroundings is what of this host says that the way to the edges may be another one.
type surroundings struct {
	addrs func() string    // this host's addresses in one text; empty: not known
	wall  func() time.Time // the time without the monotonic reading, which stands still while a host sleeps
}

var thisHost = surroundings{
	addrs: func() string {
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return ""
		}
		texts := make([]string, len(addrs))
		for i, a := range addrs {
			texts[i] = a.String()
		}
		slices.Sort(texts)
		return strings.Join(texts, " ")
	},
	wall: func() time.Time { return time.Now().Round(0) },
}

// watch has all sessions looked at when this host's addresses change, or when it wakes up, until ctx ends.
func (c *Connector) watch(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	addrs, wall, mono := c.host.addrs(), c.host.wall(), time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		nowWall, nowMono := c.host.wall(), time.Now()
		slept := nowWall.Sub(wall) - nowMono.Sub(mono)
		wall, mono = nowWall, nowMono
		nowAddrs := c.host.addrs()
		changed := nowAddrs != "" && nowAddrs != addrs
		if changed {
			addrs = nowAddrs
		}
		if !changed && slept.Abs() < clockJump {
			continue
		}
		c.log.Info("the network may be another one, looking after all sessions", "addresses_changed", changed, "clock_jump", slept.Round(time.Second))
		c.lookAfter()
	}
}

// lookAfter has every session prove that it lives, and every wait end.
func (c *Connector) lookAfter() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.endpoints {
		e.forget()
		for _, l := range e.lines {
			signal(l.wake)
		}
		e.bulk.lookAfter()
	}
}

// answers reports whether the edge answers a probe in time.
func answers(ctx context.Context, s session) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	_, err := s.Probe(ctx)
	return err == nil
}
