package admin

import (
	"context"
	"net/http"
	"net/url"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/state"
)

func (a api) fleetEndpoints() []endpoint {
	return []endpoint{
		{"/v1/fleet/devices", methods{get: {a.listDevices, []string{"tunnel"}}}},
		{"/v1/fleet/devices/{name}", methods{get: {serve: a.getDevice}}},
		{"/v1/fleet/rollouts", methods{get: {serve: a.listRollouts}, post: {serve: a.createRollout}}},
		{"/v1/fleet/rollouts/{name}", methods{get: {serve: a.getRollout}, patch: {serve: a.setRollout}, del: {serve: deleting(a.c.DeleteRollout)}}},
	}
}

func (a api) listDevices(_ *http.Request, q url.Values) (any, error) {
	return a.c.Devices(q.Get("tunnel"))
}

func (a api) getDevice(r *http.Request, _ url.Values) (any, error) {
	return a.c.Device(r.PathValue("name"))
}

func (a api) listRollouts(*http.Request, url.Values) (any, error) { return a.c.Rollouts(), nil }

func (a api) createRollout(r *http.Request, _ url.Values) (any, error) {
	var in control.RolloutSpec
	if err := body(r, &in); err != nil {
		return nil, err
	}
	return a.c.CreateRollout(r.Context(), in)
}

func (a api) getRollout(r *http.Request, _ url.Values) (any, error) {
	return a.c.Rollout(r.PathValue("name"))
}

func (a api) setRollout(r *http.Request, _ url.Values) (any, error) {
	var in control.RolloutChange
	if err := body(r, &in); err != nil {
		return nil, err
	}
	rev, err := ifMatch(r)
	if err != nil {
		return nil, err
	}
	return a.c.SetRollout(r.Context(), r.PathValue("name"), in, rev)
}

// Devices returns the devices that have ever reported, or those of one tunnel.
func (c *Client) Devices(ctx context.Context, tunnelRef string) ([]control.DeviceView, error) {
	return ask[[]control.DeviceView](ctx, c, request{method: get, path: path("fleet", "devices"), query: optional("tunnel", tunnelRef)})
}

// Device returns one device, by its connector's name.
func (c *Client) Device(ctx context.Context, name string) (control.DeviceView, error) {
	return ask[control.DeviceView](ctx, c, request{method: get, path: path("fleet", "devices", name)})
}

// Rollouts returns all rollouts, the newest first.
func (c *Client) Rollouts(ctx context.Context) ([]control.RolloutView, error) {
	return ask[[]control.RolloutView](ctx, c, request{method: get, path: path("fleet", "rollouts")})
}

// Rollout returns one rollout.
func (c *Client) Rollout(ctx context.Context, name string) (control.RolloutView, error) {
	return ask[control.RolloutView](ctx, c, request{method: get, path: path("fleet", "rollouts", name)})
}

// CreateRollout begins a rollout.
func (c *Client) CreateRollout(ctx context.Context, s control.RolloutSpec) (control.RolloutView, error) {
	return ask[control.RolloutView](ctx, c, request{method: post, path: path("fleet", "rollouts"), in: s})
}

// SetRollout changes a rollout that still has a revision, if that is not zero.
func (c *Client) SetRollout(ctx context.Context, name string, change control.RolloutChange, ifRevision state.Revision) (control.RolloutView, error) {
	return ask[control.RolloutView](ctx, c, request{method: patch, path: path("fleet", "rollouts", name), in: change, ifRevision: ifRevision})
}

// DeleteRollout deletes a rollout.
func (c *Client) DeleteRollout(ctx context.Context, name string) error {
	return c.call(ctx, request{method: del, path: path("fleet", "rollouts", name)}, &nothing{})
}
