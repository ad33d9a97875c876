package admin

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/state"
)

func (a api) servingEndpoints() []endpoint {
	c := a.c
	return []endpoint{
		{"/v1/pools", methods{get: {serve: a.listPools}, post: {serve: creating(c.CreatePool)}}},
		{"/v1/pools/{name}", methods{get: {serve: reading(c.Pool)}, del: {serve: deleting(c.DeletePool)},
			put: {serve: replacing(c.SetPool, func(p *spec.PoolConfig) *string { return &p.Name })}}},
		{"/v1/pools/{name}/endpoints/{endpoint}", methods{patch: {serve: a.setEndpoint}}},
		{"/v1/pool-health", methods{get: {a.poolHealth, []string{"pool"}}}},
		{"/v1/flows", methods{get: {a.listFlows, []string{"vnet", "tunnel", "limit"}}}},
		{"/v1/edges", methods{get: {serve: a.listEdges}}},
		{"/v1/edges/{name}/remove", methods{post: {serve: naming(c.RemoveEdge)}}},
		{"/v1/edges/{name}/restore", methods{post: {serve: naming(c.RestoreEdge)}}},
		{"/v1/ports", methods{get: {serve: a.listPorts}, post: {serve: creating(c.CreatePort)}}},
		{"/v1/ports/{name}", methods{get: {serve: reading(c.Port)}, del: {serve: deleting(c.DeletePort)},
			put: {serve: replacing(c.SetPort, func(p *spec.PortConfig) *string { return &p.Name })}}},
		{"/v1/zones", methods{get: {serve: a.listZones}, post: {serve: creating(c.CreateZone)}}},
		{"/v1/zones/{name}", methods{get: {serve: reading(c.Zone)}, del: {serve: deleting(c.DeleteZone)},
			put: {serve: replacing(c.SetZone, func(z *zone.Config) *string { return &z.Name })}}},
	}
}

// creating adds what the body describes.
func creating[T any](create func(context.Context, T) (control.Stored[T], error)) handler {
	return func(r *http.Request, _ url.Values) (any, error) {
		var in T
		if err := bodyOf(r, &in, maxLargeBody); err != nil {
			return nil, err
		}
		return create(r.Context(), in)
	}
}

// reading shows what the path names.
func reading[T any](read func(name string) (control.Stored[T], error)) handler {
	return func(r *http.Request, _ url.Values) (any, error) { return read(r.PathValue("name")) }
}

// replacing puts what the body describes in the place of what the path names. The body may leave the name out.
func replacing[T any](set func(context.Context, T, state.Revision) (control.Stored[T], error), name func(*T) *string) handler {
	return func(r *http.Request, _ url.Values) (any, error) {
		var in T
		if err := bodyOf(r, &in, maxLargeBody); err != nil {
			return nil, err
		}
		rev, err := ifMatch(r)
		if err != nil {
			return nil, err
		}
		switch n := name(&in); *n {
		case "":
			*n = r.PathValue("name")
		case r.PathValue("name"):
		default:
			return nil, badRequest("the body is about %q and the path about %q; names do not change", clip(*n), clip(r.PathValue("name")))
		}
		return set(r.Context(), in, rev)
	}
}

// naming does something with what the path names; the body is empty.
func naming[T any](do func(context.Context, string) (T, error)) handler {
	return func(r *http.Request, _ url.Values) (any, error) {
		if err := body(r, &nothing{}); err != nil {
			return nil, err
		}
		return do(r.Context(), r.PathValue("name"))
	}
}

// deleting deletes what the path names.
func deleting(remove func(context.Context, string, state.Revision) error) handler {
	return func(r *http.Request, _ url.Values) (any, error) {
		rev, err := ifMatch(r)
		if err != nil {
			return nil, err
		}
		return nothing{}, remove(r.Context(), r.PathValue("name"), rev)
	}
}

func (a api) listPools(*http.Request, url.Values) (any, error) { return a.c.Pools(), nil }
func (a api) listPorts(*http.Request, url.Values) (any, error) { return a.c.Ports(), nil }
func (a api) listZones(*http.Request, url.Values) (any, error) { return a.c.Zones(), nil }

func (a api) setEndpoint(r *http.Request, _ url.Values) (any, error) {
	var in control.EndpointChange
	if err := body(r, &in); err != nil {
		return nil, err
	}
	if in == (control.EndpointChange{}) {
		return nil, badRequest("the body changes nothing; give disabled, drain or weight")
	}
	return a.c.SetEndpoint(r.Context(), r.PathValue("name"), r.PathValue("endpoint"), in)
}

// poolHealth shows the pools that this edge serves, those of its configuration file included.
func (a api) poolHealth(_ *http.Request, q url.Values) (any, error) {
	all := a.health()
	if !q.Has("pool") {
		return all, nil
	}
	for _, h := range all {
		if h.Name == q.Get("pool") {
			return []balance.PoolHealth{h}, nil
		}
	}
	return nil, &control.Error{Code: control.CodeNotFound, Message: "this edge serves no pool \"" + clip(q.Get("pool")) + "\"",
		Remedy: "'pool list' shows those that there are, 'status' the faults that keep one from being served"}
}

func (a api) health() []balance.PoolHealth {
	if a.serving.Health == nil {
		return []balance.PoolHealth{}
	}
	return append([]balance.PoolHealth{}, a.serving.Health()...)
}

func (a api) status(*http.Request, url.Values) (any, error) {
	s := Status{Summary: a.c.Status(), Edges: append([]control.EdgeView{}, a.c.Edges()...), Pools: a.health(), Ports: len(a.c.Ports()), Zones: len(a.c.Zones()), Faults: []Fault{}}
	if a.serving.Faults != nil {
		s.Faults = append(s.Faults, a.serving.Faults()...)
	}
	return s, nil
}

func (a api) listEdges(*http.Request, url.Values) (any, error) {
	return append([]control.EdgeView{}, a.c.Edges()...), nil
}

// defaultFlows is how many flows are listed unless a request says otherwise.
const defaultFlows = 1000

func (a api) listFlows(_ *http.Request, q url.Values) (any, error) {
	limit := defaultFlows
	if q.Has("limit") {
		n, err := strconv.Atoi(q.Get("limit"))
		if err != nil || n < 1 {
			return nil, badRequest("limit %q is not a number above zero", clip(q.Get("limit")))
		}
		limit = n
	}
	tunnel, vnet := "", ""
	if q.Has("tunnel") {
		t, err := a.c.Tunnel(q.Get("tunnel"))
		if err != nil {
			return nil, err
		}
		tunnel = t.Name
	}
	var network control.VNetDetail
	if vnet = q.Get("vnet"); vnet != "" {
		var err error
		if network, err = a.c.VNet(vnet); err != nil {
			return nil, err
		}
	}
	list := FlowList{Flows: []control.FlowView{}}
	for _, f := range a.c.Flows() {
		if tunnel != "" && f.Tunnel != tunnel || vnet != "" && f.VNet != network.Name && f.VNet != string(network.ID) {
			continue
		}
		if list.Total++; len(list.Flows) < limit {
			list.Flows = append(list.Flows, f)
		}
	}
	return list, nil
}
