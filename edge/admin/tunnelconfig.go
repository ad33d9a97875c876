package admin

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"

	"github.com/keyhaven/keyhaven/edge/control"
)

type tunnelConfigRequest struct {
	Config    json.RawMessage `json:"config,omitempty"` // none takes the configuration back
	IfVersion *uint64         `json:"if_version,omitempty"`
}

func (a api) getTunnelConfig(r *http.Request, _ url.Values) (any, error) {
	return a.c.TunnelConfig(r.PathValue("ref"))
}

func (a api) setTunnelConfig(r *http.Request, _ url.Values) (any, error) {
	var in tunnelConfigRequest
	if err := bodyOf(r, &in, maxLargeBody); err != nil {
		return nil, err
	}
	return a.c.SetTunnelConfig(r.Context(), r.PathValue("ref"), in.Config, in.IfVersion)
}

// TunnelConfig returns the ingress configuration of a tunnel, by name or id, and how its connectors took it.
func (c *Client) TunnelConfig(ctx context.Context, ref string) (control.TunnelConfigView, error) {
	return ask[control.TunnelConfigView](ctx, c, request{method: get, path: path("tunnels", ref, "config")})
}

// SetTunnelConfig replaces the ingress configuration of a tunnel, by JSON; nil takes it back. If ifVersion is not nil, it
// must be the current version.
func (c *Client) SetTunnelConfig(ctx context.Context, ref string, config json.RawMessage, ifVersion *uint64) (control.TunnelConfigView, error) {
	return ask[control.TunnelConfigView](ctx, c, request{method: put, path: path("tunnels", ref, "config"),
		in: tunnelConfigRequest{config, ifVersion}})
}
