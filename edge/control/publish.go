package control

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"

	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
)

// Published is all that the store tells an edge to serve, each sorted by name. It belongs to the function that gets it.
type Published struct {
	Pools []spec.PoolConfig
	Ports []spec.PortConfig
	Zones []zone.Config
}

// A publisher tells others what changed. Changes that come while one is being told are told together.
type publisher struct {
	mu    sync.Mutex // held while a function runs
	funcs []func(Published)
	due   chan struct{}
}

func newPublisher() publisher { return publisher{due: make(chan struct{}, 1)} }

// mark asks for a round. It never blocks.
func (p *publisher) mark() {
	select {
	case p.due <- struct{}{}:
	default:
	}
}

// publishes reports whether a record is among what is published.
func publishes(d delta) bool {
	return strings.HasPrefix(d.key, prefixPool) || strings.HasPrefix(d.key, prefixPort) || strings.HasPrefix(d.key, prefixZone)
}

// OnPublished calls f at once, before it returns, and after each change of a pool, a port or a zone, whichever edge it
// was made at. Calls never overlap; changes that come while f runs are told together in one further call. f must not
// call OnPublished.
func (c *Control) OnPublished(f func(Published)) {
	c.publish.mu.Lock()
	defer c.publish.mu.Unlock()
	c.publish.funcs = append(c.publish.funcs, f)
	f(c.published())
}

func (c *Control) runPublisher(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.publish.due:
		}
		c.publish.mu.Lock()
		for _, f := range c.publish.funcs {
			f(c.published())
		}
		c.publish.mu.Unlock()
	}
}

func (c *Control) published() Published {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	return Published{
		Pools: configs(c.model.pools, func(a, b spec.PoolConfig) int { return cmp.Compare(a.Name, b.Name) }),
		Ports: configs(c.model.ports, func(a, b spec.PortConfig) int { return cmp.Compare(a.Name, b.Name) }),
		Zones: configs(c.model.zones, func(a, b zone.Config) int { return cmp.Compare(a.Name, b.Name) }),
	}
}

func configs[T any](from map[string]Stored[T], order func(a, b T) int) []T {
	list := make([]T, 0, len(from))
	for _, v := range from {
		list = append(list, v.Config)
	}
	slices.SortFunc(list, order)
	return list
}
