package proxy

import (
	"context"
	"net/http"
	"sync"
)

// A Visitor is one connection of a visitor, with the connections to origins that are this visitor's alone. Whoever accepts
// connections puts one into the context of each with [WithVisitor], and closes it when the connection ends.
type Visitor struct {
	mu         sync.Mutex
	closed     bool
	transports map[visitorKey]*http.Transport
}

type visitorKey struct {
	p    *place
	lane int
}

type visitorContext struct{}

// WithVisitor returns a context for the requests of one connection.
func WithVisitor(ctx context.Context, v *Visitor) context.Context {
	return context.WithValue(ctx, visitorContext{}, v)
}

// visitorOf never returns nil. Without a [Visitor] in the context it is one for a single request, whose idle connections
// have to be closed with it.
func visitorOf(ctx context.Context) (v *Visitor, single bool) {
	if v, ok := ctx.Value(visitorContext{}).(*Visitor); ok {
		return v, false
	}
	return new(Visitor), true
}

// transport returns the visitor's connections to a place.
func (v *Visitor) transport(p *place, lane int, make func() *http.Transport) *http.Transport {
	v.mu.Lock()
	defer v.mu.Unlock()
	k := visitorKey{p, lane}
	if t := v.transports[k]; t != nil {
		return t
	}
	t := make()
	if v.closed { // the request outlives its connection: what it opens is not kept
		t.DisableKeepAlives = true
		return t
	}
	if v.transports == nil {
		v.transports = map[visitorKey]*http.Transport{}
	}
	v.transports[k] = t
	return t
}

// drop forgets the connections t to a place, unless they were replaced. Those in use end with their requests.
func (v *Visitor) drop(p *place, lane int, t *http.Transport) {
	v.mu.Lock()
	defer v.mu.Unlock()
	k := visitorKey{p, lane}
	if v.transports[k] == t {
		delete(v.transports, k)
		t.CloseIdleConnections()
	}
}

// Close closes the connections that are idle; the others close when they become idle. It is idempotent.
func (v *Visitor) Close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	for _, t := range v.transports {
		t.CloseIdleConnections()
	}
}
