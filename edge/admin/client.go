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

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
)

// clientTimeout bounds one request of the client.
const clientTimeout = 30 * time.Second

// A Client asks a running edge. Its methods return an [*Error] if the edge refuses. Safe for concurrent use.
type Client struct {
	where  string // the socket or the server's URL, for messages
	scheme string
	addr   string // host:port of requests; not their Host, which is always hostName
	http   *http.Client
}

// NewClient returns a client of the edge whose socket is at path. It connects when asked something; Close it at the
// end.
func NewClient(path string) *Client {
	return newClient(path, "http", hostName, &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
	})
}

// NewRemote returns a client of the edge at server, https://host:port, as the operator with an identity. The edge is known
// by its certificate's identity, whatever its host name is.
func NewRemote(server string, id *mtls.Source) (*Client, error) {
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("%q is not https://host:port of an edge's admin.listen", server)
	}
	if k := id.Identity().Kind; k != mtls.KindOperator {
		return nil, fmt.Errorf("the identity is %s; an operator's is needed: have one issued with 'keyhaven-edge ca issue operator NAME'", id.Identity())
	}
	return newClient(server, u.Scheme, u.Host, &http.Transport{
		TLSClientConfig:     id.ClientConfig(mtls.ClientOptions{ALPN: []string{"http/1.1"}, Expect: mtls.AcceptKinds(mtls.KindEdge)}),
		TLSHandshakeTimeout: headerTimeout,
		DialContext:         (&net.Dialer{Timeout: headerTimeout}).DialContext,
	}), nil
}

func newClient(where, scheme, addr string, t *http.Transport) *Client {
	t.MaxIdleConns = 1
	return &Client{where: where, scheme: scheme, addr: addr, http: &http.Client{
		Timeout:       clientTimeout,
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// A request is one question or change. Names in path are escaped already.
type request struct {
	method, path string
	query        url.Values
	in           any            // body, if not nil
	ifRevision   state.Revision // sent as If-Match, if not zero
}

// call sends r and decodes the reply into out.
func (c *Client) call(ctx context.Context, r request, out any) error {
	req, err := c.request(ctx, r)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.unreachable(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return fmt.Errorf("admin: read the reply of the edge on %s: %w", c.where, err)
	}
	if resp.StatusCode != http.StatusOK {
		return replyError(resp.StatusCode, b)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("admin: the edge on %s answered what this version does not understand: %w", c.where, err)
	}
	return nil
}

func (c *Client) request(ctx context.Context, r request) (*http.Request, error) {
	var rd io.Reader
	if r.in != nil {
		b, err := json.Marshal(r.in)
		if err != nil {
			return nil, fmt.Errorf("admin: encode the request: %w", err)
		}
		rd = bytes.NewReader(b)
	}
	u := url.URL{Scheme: c.scheme, Host: c.addr, Path: r.path, RawPath: r.path, RawQuery: r.query.Encode()}
	if p, err := url.PathUnescape(r.path); err == nil {
		u.Path = p
	}
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), rd)
	if err != nil {
		return nil, fmt.Errorf("admin: make the request: %w", err)
	}
	req.Host = hostName
	if r.in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if r.ifRevision != 0 {
		req.Header.Set("If-Match", strconv.Quote(strconv.FormatUint(uint64(r.ifRevision), 10)))
	}
	return req, nil
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
	case c.scheme == "https":
		return fmt.Errorf("the edge at %s cannot be asked: %w; is that its admin.listen, and the identity one of its operators?", c.where, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no edge answers on %s; start it with 'keyhaven-edge run', or name its socket with --socket: %w", c.where, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("this user may not use %s; use root, or the user that the edge runs as: %w", c.where, err)
	}
	return fmt.Errorf("admin: ask the edge on %s: %w", c.where, err)
}

func ask[T any](ctx context.Context, c *Client, r request) (out T, err error) {
	err = c.call(ctx, r, &out)
	return out, err
}

// path joins the segments of a path below /v1, escaping each.
func path(segments ...string) string {
	p := "/v1"
	for _, s := range segments {
		p += "/" + url.PathEscape(s)
	}
	return p
}

func optional(name, value string) url.Values {
	q := url.Values{}
	if value != "" {
		q.Set(name, value)
	}
	return q
}

func forceQuery(force bool) url.Values {
	if !force {
		return nil
	}
	return url.Values{"force": {strconv.FormatBool(force)}}
}
