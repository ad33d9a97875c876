package transit

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
)

// maxAnswer bounds an answer of the server, in bytes. The greatest that is expected is that of a full batch of P-521 signatures, or of
// a key with some hundred versions.
const maxAnswer = 1 << 20

// connector makes API clients that share connections. Nothing of it comes from the environment.
type connector struct {
	cfg  *Config
	http *http.Client
}

// newConnector prepares connections. They end with ctx, whatever requests are under way.
func newConnector(ctx context.Context, cfg *Config) (*connector, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: cfg.TLS.ServerName}
	if cfg.TLS.CA != "" {
		roots, err := cfg.TLS.roots()
		if err != nil {
			return nil, fmt.Errorf("transit: %w", err)
		}
		t.RootCAs = roots
	}
	if cfg.TLS.Cert != "" {
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cfg.TLS.certificate() }
	}
	tr := &http.Transport{
		DialContext:           (&net.Dialer{Timeout: cfg.Timeout, KeepAlive: 15 * time.Second}).DialContext,
		TLSClientConfig:       t,
		TLSHandshakeTimeout:   cfg.Timeout,
		ResponseHeaderTimeout: cfg.Timeout,
		ForceAttemptHTTP2:     true,
		MaxIdleConns:          cfg.InFlight + 2,
		MaxIdleConnsPerHost:   cfg.InFlight + 2,
		IdleConnTimeout:       90 * time.Second,
		// An answer of thousands of headers is none of a Transit engine's.
		MaxResponseHeaderBytes: 64 << 10,
		// A connection whose other end vanished without a word is found out and replaced.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: cfg.Timeout},
	}
	client := &http.Client{
		Transport:     &boundary{base: ctx, next: tr},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &connector{cfg, client}, nil
}

// client returns an API client without a token.
func (c *connector) client() (*api.Client, error) {
	client, err := api.NewClient(&api.Config{
		Address:          c.cfg.Address,
		HttpClient:       c.http,
		Timeout:          c.cfg.Timeout,
		DisableRedirects: true,
		// Whether an operation is tried again is for the signer to say.
		MaxRetries: 0,
		CheckRetry: func(ctx context.Context, _ *http.Response, _ error) (bool, error) { return false, ctx.Err() },
	})
	if err != nil {
		// The library reads the environment before it looks at what it was given.
		return nil, fmt.Errorf("transit: Vault client: %w: if a VAULT_ variable is set in the environment, unset it; it has no effect here", err)
	}
	client.ClearToken()
	client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	client.SetWrappingLookupFunc(func(string, string) string { return "" }) // else the library asks VAULT_WRAP_TTL at each request
	if c.cfg.Namespace != "" {
		client.SetNamespace(c.cfg.Namespace)
	}
	return client, nil
}

func (c *connector) close() { c.http.Transport.(*boundary).next.CloseIdleConnections() }

// boundary ends requests with the backend and bounds what is read of an answer.
type boundary struct {
	base context.Context
	next *http.Transport
}

// RoundTrip returns when the whole answer is there: the API client ends a request's context before it hands out the body.
func (b *boundary) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(b.base, cancel)()
	resp, err := b.next.RoundTrip(replayable(r.WithContext(ctx)))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := readBounded(resp.Body)
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// readBounded reads an answer to its end.
func readBounded(r io.Reader) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, maxAnswer+1))
	if err == nil && len(body) > maxAnswer {
		return nil, fmt.Errorf("the answer is longer than %d bytes", maxAnswer)
	}
	return body, err
}

// replayable lets the transport send a request once more, on another connection, if a kept one turns out to be dead before a byte of the
// answer came. Without it each restart of the server would cost one signature for each idle connection. To sign or to log in twice does no
// harm; what a wrapping token yields comes only once.
func replayable(r *http.Request) *http.Request {
	if r.GetBody == nil && r.Body != nil && r.Body != http.NoBody || strings.HasSuffix(r.URL.Path, "/unwrap") {
		return r
	}
	r.Header = r.Header.Clone()
	r.Header["Idempotency-Key"] = nil // not sent; see http.Transport
	return r
}

// answer is what the server said, whatever it was.
type answer struct {
	status   int
	body     []byte
	location string // of a redirection
	retry    string // Retry-After
}

// collect reads an answer to its end. Its error is one of the connection, or of the caller's patience.
func collect(resp *api.Response, err error) (*answer, error) {
	var refused *api.ResponseError
	if resp == nil || resp.Response == nil {
		if err == nil {
			err = errors.New("no answer")
		}
		return nil, err
	}
	if err != nil && !errors.As(err, &refused) {
		resp.Body.Close()
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	return &answer{resp.StatusCode, body, resp.Header.Get("Location"), resp.Header.Get("Retry-After")}, nil
}
