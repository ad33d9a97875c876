package admin

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"

	"github.com/keyhaven/keyhaven/edge/control"
)

type api struct {
	c       *control.Control
	serving Serving
}

type methods = map[string]method

const get, post, put, patch, del = http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete

// endpoints is the whole API but its description, openapi.yaml, which a test holds against this.
func endpoints(a api) []endpoint {
	return slices.Concat(a.recordEndpoints(), a.servingEndpoints(), a.fleetEndpoints())
}

func (a api) recordEndpoints() []endpoint {
	return []endpoint{
		{"/v1/status", methods{get: {serve: a.status}}},
		{"/v1/vnets", methods{get: {serve: a.listVNets}, post: {serve: a.addVNet}}},
		{"/v1/vnets/{ref}", methods{get: {serve: a.getVNet}, patch: {serve: a.setVNet}, del: {a.deleteVNet, []string{"force"}}}},
		{"/v1/tunnels", methods{get: {serve: a.listTunnels}, post: {serve: a.addTunnel}}},
		{"/v1/tunnels/{ref}", methods{get: {serve: a.getTunnel}, patch: {serve: a.setTunnel}, del: {a.deleteTunnel, []string{"force"}}}},
		{"/v1/tunnels/{ref}/config", methods{get: {serve: a.getTunnelConfig}, put: {serve: a.setTunnelConfig}}},
		{"/v1/tunnels/{ref}/tokens", methods{post: {serve: a.createToken}}},
		{"/v1/tokens", methods{get: {a.listTokens, []string{"tunnel"}}}},
		{"/v1/tokens/{id}", methods{del: {serve: a.revokeToken}}},
		{"/v1/cleanup", methods{post: {serve: a.cleanup}}},
		{"/v1/echo", methods{post: {serve: a.echo}}},
		{"/v1/connectors", methods{get: {a.listConnectors, []string{"tunnel"}}}},
		{"/v1/connectors/{name}/revoke", methods{post: {serve: naming(a.c.RevokeConnector)}}},
		{"/v1/routes", methods{get: {a.listRoutes, []string{"vnet"}}, post: {serve: a.addRoute},
			del: {a.deleteRoute, []string{"vnet", "prefix", "host"}}}},
		{"/v1/routes/lookup", methods{get: {a.findHost, []string{"vnet", "host"}}}},
	}
}

func (a api) listVNets(*http.Request, url.Values) (any, error)   { return a.c.VNets(), nil }
func (a api) listTunnels(*http.Request, url.Values) (any, error) { return a.c.Tunnels(), nil }

func (a api) addVNet(r *http.Request, _ url.Values) (any, error) {
	var in vnetRequest
	if err := body(r, &in); err != nil {
		return nil, err
	}
	return a.c.AddVNet(r.Context(), in.Name, in.Comment, in.Default)
}

func (a api) getVNet(r *http.Request, _ url.Values) (any, error) { return a.c.VNet(r.PathValue("ref")) }

func (a api) setVNet(r *http.Request, _ url.Values) (any, error) {
	var in control.VNetChange
	if err := body(r, &in); err != nil {
		return nil, err
	}
	return a.c.SetVNet(r.Context(), r.PathValue("ref"), in)
}

func (a api) deleteVNet(r *http.Request, q url.Values) (any, error) {
	force, err := forced(q)
	if err != nil {
		return nil, err
	}
	return nothing{}, a.c.DeleteVNet(r.Context(), r.PathValue("ref"), force)
}

func forced(q url.Values) (bool, error) {
	if !q.Has("force") {
		return false, nil
	}
	force, err := strconv.ParseBool(q.Get("force"))
	if err != nil {
		return false, badRequest("force must be true or false")
	}
	return force, nil
}

func (a api) addTunnel(r *http.Request, _ url.Values) (any, error) {
	var in tunnelRequest
	if err := body(r, &in); err != nil {
		return nil, err
	}
	return a.c.AddTunnel(r.Context(), in.Name, in.Comment)
}

func (a api) getTunnel(r *http.Request, _ url.Values) (any, error) {
	return a.c.Tunnel(r.PathValue("ref"))
}

func (a api) setTunnel(r *http.Request, _ url.Values) (any, error) {
	var in control.TunnelChange
	if err := body(r, &in); err != nil {
		return nil, err
	}
	return a.c.SetTunnel(r.Context(), r.PathValue("ref"), in)
}

func (a api) deleteTunnel(r *http.Request, q url.Values) (any, error) {
	force, err := forced(q)
	if err != nil {
		return nil, err
	}
	return nothing{}, a.c.DeleteTunnel(r.Context(), r.PathValue("ref"), force)
}

func (a api) createToken(r *http.Request, _ url.Values) (any, error) {
	var in tokenRequest
	if err := body(r, &in); err != nil {
		return nil, err
	}
	ttl, err := duration("ttl", in.TTL)
	if err != nil {
		return nil, err
	}
	return a.c.CreateToken(r.Context(), r.PathValue("ref"), ttl)
}

func (a api) listTokens(_ *http.Request, q url.Values) (any, error) {
	return a.c.Tokens(q.Get("tunnel"))
}

func (a api) revokeToken(r *http.Request, _ url.Values) (any, error) {
	return a.c.RevokeToken(r.Context(), r.PathValue("id"))
}

func (a api) cleanup(r *http.Request, _ url.Values) (any, error) {
	var in cleanupRequest
	if err := body(r, &in); err != nil {
		return nil, err
	}
	unseen, err := duration("unseen", in.Unseen)
	if err != nil {
		return nil, err
	}
	return a.c.Cleanup(r.Context(), control.CleanupSpec{Tunnel: in.Tunnel, Unseen: unseen, DryRun: in.DryRun})
}

func (a api) listConnectors(_ *http.Request, q url.Values) (any, error) {
	return a.c.Connectors(q.Get("tunnel"))
}

func (a api) listRoutes(_ *http.Request, q url.Values) (any, error) { return a.c.Routes(q.Get("vnet")) }

func (a api) addRoute(r *http.Request, _ url.Values) (any, error) {
	var in control.RouteSpec
	if err := body(r, &in); err != nil {
		return nil, err
	}
	return a.c.AddRoute(r.Context(), in)
}

func (a api) deleteRoute(r *http.Request, q url.Values) (any, error) {
	return a.c.DeleteRoute(r.Context(), control.RouteSpec{VNet: q.Get("vnet"), Prefix: q.Get("prefix"), Host: q.Get("host")})
}

func (a api) findHost(_ *http.Request, q url.Values) (any, error) {
	return a.c.FindHost(q.Get("host"), q.Get("vnet"))
}
