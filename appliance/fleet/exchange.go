package fleet

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// The connector's control socket, as an agent on the same host uses it: HTTP with this path and Host.
const (
	Path = "/v1/device"
	Host = "keyhaven-connector"
)

// exchangeTimeout bounds one Exchange.
const exchangeTimeout = 10 * time.Second

// Exchange hands the report of this host to the connector that answers on the control socket, and returns the newest
// directive that an edge gave: the zero Directive if none has since the connector started. The caller is root or the
// connector's user. Reports cost little; once a minute and at each change of State is right.
func Exchange(ctx context.Context, socket string, r Report) (Directive, error) {
	b, err := r.Encode()
	if err != nil {
		return Directive{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+Host+Path, bytes.NewReader(b))
	if err != nil {
		return Directive{}, fmt.Errorf("fleet: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return Directive{}, fmt.Errorf("fleet: report to the connector on %s: %w", socket, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, MaxSize+1))
	if err != nil {
		return Directive{}, fmt.Errorf("fleet: read the answer of the connector on %s: %w", socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		return Directive{}, fmt.Errorf("fleet: the connector on %s answered with status %s: %s", socket, resp.Status, plain(string(answer)))
	}
	return ParseDirective(answer)
}
