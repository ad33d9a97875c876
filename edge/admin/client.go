package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
)

// clientTimeout bounds one request of the client.
const clientTimeout = 30 * time.Second

// A Client asks a running edge. Its methods return an [*Error] if the edge refuses. Safe for concurrent use.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client of the edge whose socket is at path. It connects when asked something; Close it at the
// end.
func NewClient(path string) *Client {
	return &Client{path: path, http: &http.Client{
		Timeout: clientTimeout,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", path)
			},
			MaxIdleConns: 1,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// call sends in, if it is not nil, and decodes the reply into out.
func (c *Client) call(ctx context.Context, method, path string, q url.Values, in, out any) error {
	var rd io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("admin: encode the request: %w", err)
		}
		rd = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "http", Host: hostName, Path: path, RawQuery: q.Encode()}
	u.RawPath = path // names are escaped already
	if p, err := url.PathUnescape(path); err == nil {
		u.Path = p
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), rd)
	if err != nil {
		return fmt.Errorf("admin: make the request: %w", err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.unreachable(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return fmt.Errorf("admin: read the reply of the edge on %s: %w", c.path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return replyError(resp.StatusCode, b)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("admin: the edge on %s answered what this version does not understand: %w", c.path, err)
	}
	return nil
}

func replyError(status int, b []byte) error {
	var e errorBody
	if err := json.Unmarshal(b, &e); err != nil || e.Error == nil || e.Error.Message == "" {
		return &Error{Code: CodeInternal, Message: fmt.Sprintf("the edge answered with status %d", status), Status: status}
	}
	e.Error.Status = status
	return e.Error
}

func (c *Client) unreachable(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err // the URL is none of the caller's
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no edge answers on %s; start it with 'keyhaven-edge run', or name its socket with --socket: %w", c.path, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("this user may not use %s; use root, or the user that the edge runs as: %w", c.path, err)
	}
	return fmt.Errorf("admin: ask the edge on %s: %w", c.path, err)
}

func ask[T any](ctx context.Context, c *Client, method, path string, q url.Values, in any) (out T, err error) {
	err = c.call(ctx, method, path, q, in, &out)
	return out, err
}

// Status returns the state of the whole edge.
func (c *Client) Status(ctx context.Context) (control.Summary, error) {
	return ask[control.Summary](ctx, c, http.MethodGet, "/v1/status", nil, nil)
}

// VNets returns all virtual networks.
func (c *Client) VNets(ctx context.Context) ([]control.VNetView, error) {
	return ask[[]control.VNetView](ctx, c, http.MethodGet, "/v1/vnets", nil, nil)
}

// VNet returns one network, by name or id.
func (c *Client) VNet(ctx context.Context, ref string) (control.VNetDetail, error) {
	return ask[control.VNetDetail](ctx, c, http.MethodGet, "/v1/vnets/"+url.PathEscape(ref), nil, nil)
}

// AddVNet creates a network.
func (c *Client) AddVNet(ctx context.Context, name, comment string, isDefault bool) (control.VNetView, error) {
	return ask[control.VNetView](ctx, c, http.MethodPost, "/v1/vnets", nil, vnetRequest{name, comment, isDefault})
}

// SetVNet changes a network.
func (c *Client) SetVNet(ctx context.Context, ref string, change control.VNetChange) (control.VNetView, error) {
	return ask[control.VNetView](ctx, c, http.MethodPatch, "/v1/vnets/"+url.PathEscape(ref), nil, change)
}

// DeleteVNet deletes a network; with force, its routes too.
func (c *Client) DeleteVNet(ctx context.Context, ref string, force bool) error {
	_, err := ask[struct{}](ctx, c, http.MethodDelete, "/v1/vnets/"+url.PathEscape(ref), forceQuery(force), nil)
	return err
}

func forceQuery(force bool) url.Values {
	if !force {
		return nil
	}
	return url.Values{"force": {strconv.FormatBool(force)}}
}

// Tunnels returns all tunnels.
func (c *Client) Tunnels(ctx context.Context) ([]control.TunnelView, error) {
	return ask[[]control.TunnelView](ctx, c, http.MethodGet, "/v1/tunnels", nil, nil)
}

// Tunnel returns one tunnel, by name or id.
func (c *Client) Tunnel(ctx context.Context, ref string) (control.TunnelDetail, error) {
	return ask[control.TunnelDetail](ctx, c, http.MethodGet, "/v1/tunnels/"+url.PathEscape(ref), nil, nil)
}

// AddTunnel creates a tunnel.
func (c *Client) AddTunnel(ctx context.Context, name, comment string) (control.TunnelView, error) {
	return ask[control.TunnelView](ctx, c, http.MethodPost, "/v1/tunnels", nil, tunnelRequest{name, comment})
}

// DeleteTunnel deletes a tunnel; with force, its routes, connectors and join tokens too.
func (c *Client) DeleteTunnel(ctx context.Context, ref string, force bool) error {
	_, err := ask[struct{}](ctx, c, http.MethodDelete, "/v1/tunnels/"+url.PathEscape(ref), forceQuery(force), nil)
	return err
}

// CreateToken makes a join token. A ttl of zero is the default.
func (c *Client) CreateToken(ctx context.Context, ref string, ttl time.Duration) (control.JoinGrant, error) {
	var in tokenRequest
	if ttl != 0 {
		in.TTL = ttl.String()
	}
	return ask[control.JoinGrant](ctx, c, http.MethodPost, "/v1/tunnels/"+url.PathEscape(ref)+"/tokens", nil, in)
}

// Connectors returns all connectors, or those of one tunnel.
func (c *Client) Connectors(ctx context.Context, tunnelRef string) ([]control.ConnectorView, error) {
	return ask[[]control.ConnectorView](ctx, c, http.MethodGet, "/v1/connectors", optional("tunnel", tunnelRef), nil)
}

// RevokeConnector revokes a connector.
func (c *Client) RevokeConnector(ctx context.Context, name string) (control.ConnectorView, error) {
	return ask[control.ConnectorView](ctx, c, http.MethodPost, "/v1/connectors/"+url.PathEscape(name)+"/revoke", nil, struct{}{})
}

// Routes returns all routes, or those of one network.
func (c *Client) Routes(ctx context.Context, vnetRef string) ([]control.RouteView, error) {
	return ask[[]control.RouteView](ctx, c, http.MethodGet, "/v1/routes", optional("vnet", vnetRef), nil)
}

// AddRoute creates a route.
func (c *Client) AddRoute(ctx context.Context, s control.RouteSpec) (control.RouteView, error) {
	return ask[control.RouteView](ctx, c, http.MethodPost, "/v1/routes", nil, s)
}

// DeleteRoute deletes the route with the prefix or host of s in the network of s.
func (c *Client) DeleteRoute(ctx context.Context, s control.RouteSpec) (control.RouteView, error) {
	q := optional("vnet", s.VNet)
	if s.Prefix != "" {
		q.Set("prefix", s.Prefix)
	}
	if s.Host != "" {
		q.Set("host", s.Host)
	}
	return ask[control.RouteView](ctx, c, http.MethodDelete, "/v1/routes", q, nil)
}

// FindHost asks which tunnel has an address, a prefix or a name.
func (c *Client) FindHost(ctx context.Context, host, vnetRef string) (control.RouteAnswer, error) {
	q := optional("vnet", vnetRef)
	q.Set("host", host)
	return ask[control.RouteAnswer](ctx, c, http.MethodGet, "/v1/routes/lookup", q, nil)
}

func optional(name, value string) url.Values {
	q := url.Values{}
	if value != "" {
		q.Set(name, value)
	}
	return q
}
