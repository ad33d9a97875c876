package control

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/state"
)

// A sightings collects what is to be written about connectors that came and went, so that a storm of reconnecting
// connectors costs one transaction a second.
type sightings struct {
	mu    sync.Mutex
	fresh map[string]seen // by connector name; at most one per connector
	wake  chan struct{}   // holds a value while fresh is not empty
}

const (
	sightingsPause = time.Second
	sightingsBatch = maxOps // records in a transaction
)

func newSightings() *sightings {
	return &sightings{fresh: map[string]seen{}, wake: make(chan struct{}, 1)}
}

// sighted notes that the connector of l was there just now.
func (c *Control) sighted(l *live) {
	c.model.mu.RLock()
	gone := c.model.connectors[l.connector.Name].ID != l.connector.ID
	c.model.mu.RUnlock()
	if gone {
		return
	}
	reg := l.s.Registration()
	s := c.sightLog
	s.mu.Lock()
	s.fresh[l.connector.Name] = seen{Last: c.now(), Origin: l.s.RemoteAddr().String(), Version: plain(reg.Version), Hostname: plain(reg.Hostname)}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *sightings) take() []state.Op {
	s.mu.Lock()
	defer s.mu.Unlock()
	ops := make([]state.Op, 0, min(len(s.fresh), sightingsBatch))
	for name, v := range s.fresh {
		if len(ops) == sightingsBatch {
			break
		}
		ops = append(ops, put(prefixSeen+name, v))
		delete(s.fresh, name)
	}
	return ops
}

// recordSightings writes what is collected, at most once a second, and what is left when ctx ends.
func (c *Control) recordSightings(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-c.sightLog.wake:
			c.writeSightings(ctx)
			sleep(ctx, sightingsPause)
		case <-ctx.Done():
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	c.writeSightings(last)
}

func (c *Control) writeSightings(ctx context.Context) {
	for {
		ops := c.sightLog.take()
		if len(ops) == 0 {
			return
		}
		if _, err := c.cfg.Store.Txn(ctx, nil, ops); err != nil {
			// What was seen is for people to look at; the next sighting of the connector is written again.
			c.log.Warn("last-seen times not written", "err", err)
			return
		}
	}
}

// ours reports whether a key belongs to this package.
func ours(key string) bool {
	for _, p := range [...]string{"control/", prefixVNet, prefixTunnel, prefixConn, prefixRoute, prefixToken, prefixSeen, prefixPool, prefixPort, prefixZone, prefixConfig, prefixRemoved, prefixRollout} {
		if strings.HasPrefix(key, p) {
			return true
		}
	}
	return false
}
