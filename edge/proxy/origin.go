package proxy

import (
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/internal/httprelay"
)

const (
	originIdle        = 90 * time.Second // of a pooled connection
	originHeaderBytes = 1 << 20          // of a response's header
	originPing        = 30 * time.Second // silence of an HTTP/2 connection before it is probed
	originPingTimeout = 10 * time.Second
	continueWait      = time.Second // for a 100 from an origin that may not know Expect
)

// An origin is an upstream of one zone, with its place, or those of its pool.
type origin struct {
	h      *Handler
	up     *zone.Upstream
	scheme string
	proxy  *httputil.ReverseProxy
	size   atomic.Uint64 // bits of the mean size of its responses; zero: none yet
	place  *place        // nil with a pool

	mu         sync.Mutex // guards the rest
	generation uint64     // of the pools when places was last cleared of those that are gone
	places     map[placeKey]*place
}

// A placeKey is what must stay for connections to a place to stay usable.
type placeKey struct {
	balance.Key
	version string
}

func (h *Handler) newOrigin(up *zone.Upstream) *origin {
	o := &origin{h: h, up: up, scheme: up.Scheme(), places: map[placeKey]*place{}}
	switch {
	case up.Tunnel != "":
		o.place = &place{h: h, up: up, query: control.Query{Tunnel: up.Tunnel, Service: "http"}}
	case up.Pool == "":
		o.place = &place{h: h, up: up, addr: up.Addr(), version: up.ProxyProtocol, query: control.Query{VNet: up.VNet, Host: up.Host, Port: up.Port}}
	}
	o.proxy = &httputil.ReverseProxy{
		Transport:      o,
		Rewrite:        rewrite,
		ModifyResponse: h.cleanResponse,
		ErrorHandler:   h.roundTripFailed,
		BufferPool:     &httprelay.Buffers,
		ErrorLog:       log.New(io.Discard, "", 0), // errors reach the visitor as a cut, and ErrorHandler otherwise
	}
	return o
}

// name is the origin's in logs.
func (o *origin) name() string {
	switch {
	case o.up.Pool != "":
		return "pool " + o.up.Pool
	case o.up.Tunnel != "":
		return "tunnel " + o.up.Tunnel
	}
	return o.up.Addr()
}

// pooled reports whether the origin is a pool.
func (o *origin) pooled() bool { return o.place == nil }

// next returns where a request goes. The lease is nil without a pool.
func (o *origin) next(ctx context.Context, v *visit, tried []*balance.Lease) (*place, *balance.Lease, error) {
	if o.place != nil {
		return o.place, nil, nil
	}
	if o.h.cfg.Balancer == nil {
		return nil, nil, balance.ErrNoPool
	}
	lease, err := o.h.cfg.Balancer.Pick(ctx, o.up.Pool, balance.Visit{IP: v.visitor, Request: v.in, Tried: tried})
	if err != nil {
		return nil, nil, err
	}
	return o.placeOf(lease), lease, nil
}

// placeOf returns the place of an endpoint, with the connections that it has.
func (o *origin) placeOf(l *balance.Lease) *place {
	k := placeKey{l.Key(), l.ProxyProtocol()}
	o.mu.Lock()
	defer o.mu.Unlock()
	if g := o.h.cfg.Balancer.Generation(); g != o.generation {
		o.generation = g
		for k, p := range o.places {
			if !o.h.cfg.Balancer.Usable(k.Key) {
				p.closeIdle()
				delete(o.places, k)
			}
		}
	}
	p := o.places[k]
	if p == nil {
		e := l.Endpoint()
		p = &place{h: o.h, up: o.up, addr: e.Addr(), serverName: e.Host, version: k.version, open: l.Open,
			query: control.Query{VNet: e.VNet, Host: e.Host, Port: e.Port, Connector: e.Connector}}
		o.places[k] = p
	}
	return p
}

func (o *origin) closeIdle() {
	if o.place != nil {
		o.place.closeIdle()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, p := range o.places {
		p.closeIdle()
	}
}

// newTransport returns a pool of connections to an upstream, without what dials them.
func (h *Handler) newTransport(up *zone.Upstream) *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(!up.H2C)
	protocols.SetHTTP2(up.TLS != nil)
	protocols.SetUnencryptedHTTP2(up.H2C)
	t := &http.Transport{
		TLSHandshakeTimeout:    h.cfg.ConnectTimeout,
		Protocols:              &protocols,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    h.cfg.IdleConns,
		IdleConnTimeout:        originIdle,
		ResponseHeaderTimeout:  h.cfg.ResponseTimeout,
		ExpectContinueTimeout:  continueWait,
		MaxResponseHeaderBytes: originHeaderBytes,
		WriteBufferSize:        httprelay.BufferSize,
		ReadBufferSize:         httprelay.BufferSize,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: originPing, PingTimeout: originPingTimeout},
	}
	if up.TLS != nil {
		t.TLSClientConfig = up.TLS.Clone()
	}
	return t
}
