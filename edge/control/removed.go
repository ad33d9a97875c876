package control

import (
	"context"
	"maps"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
)

// prefixRemoved are the keys of edges that were removed, + name. Programs that do not know them leave them alone.
const prefixRemoved = "removed/"

// A removedEdge is an edge that others must have nothing to do with any more, whatever certificate it holds.
type removedEdge struct {
	Name    string    `json:"name"`
	Removed time.Time `json:"removed"`
}

// RemoveEdge keeps the edge name out from now on, whether it is known or not: the others forward nothing to it, accept
// nothing from it, end the flows that it has forwarded, and connectors are told to leave it. It holds for every certificate
// of the name. It does not take from the edge what it has outside of the store: see docs/edges.md.
func (c *Control) RemoveEdge(ctx context.Context, name string) (EdgeView, error) {
	id := mtls.Identity{TrustDomain: c.cfg.Authority.TrustDomain(), Kind: mtls.KindEdge, Name: name}
	if err := id.Validate(); err != nil {
		return EdgeView{}, refusal(CodeInvalid, "'edge list' shows those that there are", "%q is no name of an edge", clip(name))
	}
	if c.peers.alone() || name == c.peers.name {
		return EdgeView{}, refusal(CodeInvalid, "ask another edge of the installation", "the edge that answers cannot remove itself")
	}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if old, ok := m.removed[name]; ok {
			return nil, refusal(CodeRevoked, "", "edge %q was removed on %s", name, old.Removed.Format("2006-01-02 15:04:05 MST"))
		}
		return []state.Op{put(prefixRemoved+name, removedEdge{Name: name, Removed: c.now()}), state.Delete(prefixEdge + name)}, nil
	})
	if err != nil {
		return EdgeView{}, err
	}
	c.log.Info("edge removed", "edge", name)
	return c.edgeView(name)
}

// RestoreEdge takes back [Control.RemoveEdge]. Certificates of the name that have not run out count again, so give the edge a
// new name if its key may have been taken.
func (c *Control) RestoreEdge(ctx context.Context, name string) (EdgeView, error) {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if _, ok := m.removed[name]; !ok {
			return nil, refusal(CodeNotFound, "'edge list' shows those that were", "no edge %q was removed", clip(name))
		}
		return []state.Op{state.Delete(prefixRemoved + name)}, nil
	})
	if err != nil {
		return EdgeView{}, err
	}
	c.log.Info("edge restored", "edge", name)
	if v, err := c.edgeView(name); err == nil {
		return v, nil
	}
	return EdgeView{Name: name, Advertise: []string{}}, nil // it has not told of itself yet
}

func (c *Control) edgeView(name string) (EdgeView, error) {
	for _, v := range c.Edges() {
		if v.Name == name {
			return v, nil
		}
	}
	return EdgeView{}, refusal(CodeNotFound, "'edge list' shows those that there are", "there is no edge %q", clip(name))
}

// applyRemoved has the peers follow the picture.
func (c *Control) applyRemoved() {
	c.model.mu.RLock()
	removed := maps.Clone(c.model.removed)
	c.model.mu.RUnlock()
	c.peers.setRemoved(removed)
}

func (p *peers) setRemoved(removed map[string]removedEdge) {
	if p.alone() {
		return
	}
	p.mu.Lock()
	_, was := p.removed[p.name]
	_, is := removed[p.name]
	p.removed = removed
	for name := range removed {
		if l := p.leashes[name]; l != nil {
			l.cancel()
			delete(p.leashes, name)
		}
	}
	p.mu.Unlock()
	if is && !was {
		p.log.Error("this edge was removed from the installation; stop it, or take that back with 'edge restore'", "edge", p.name)
	}
	p.judge()
}

// A leash is the life of what one other edge has forwarded.
type leash struct {
	ctx    context.Context
	cancel context.CancelFunc
}

// leash returns a context that ends when the edge name is removed; ok is false if it was.
func (p *peers) leash(name string) (ctx context.Context, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, removed := p.removed[name]; removed {
		return nil, false
	}
	l := p.leashes[name]
	if l == nil {
		l = &leash{}
		l.ctx, l.cancel = context.WithCancel(p.running)
		p.leashes[name] = l
	}
	return l.ctx, true
}

// away reports whether the edge name, which may be this one, was removed.
func (p *peers) away(name string) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	_, removed := p.removed[name]
	return removed
}
