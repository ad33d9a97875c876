package ingress

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/internal/httprelay"
)

const (
	originHeaderBytes = 1 << 20          // of a response's header
	originPing        = 30 * time.Second // silence of an HTTP/2 connection before it is probed
	originPingTimeout = 10 * time.Second
	continueWait      = time.Second // for a 100 from an origin that may not know Expect
	maxPoolFile       = 1 << 20     // bytes of a file of certificates
)

// rules are what holds at one moment. They are never changed.
type rules struct {
	source  string
	config  *ingressconf.Config
	origins []*origin // of each rule; nil for those that lead to no HTTP origin
	paces   []*pace   // of each rule; nil for those without a bandwidth
	paced   map[paceKey]*pace
}

// originKey tells origins apart: rules with the same one share connections, over changes of configuration too.
type originKey struct {
	service               ingressconf.Service
	options               string
	pool                  [sha256.Size]byte
	remote                bool
	http2, lax, unchunked bool
	pace                  *pace
}

// An origin is a service that speaks HTTP, with its connections.
type origin struct {
	key     originKey
	target  *ingressconf.Target
	remote  bool
	scheme  string
	plain   *http.Transport // HTTP/1.1, or what TLS agrees on
	h2c     *http.Transport // HTTP/2 without TLS; nil unless the rule wants it
	proxy   *httputil.ReverseProxy
	retired atomic.Bool
}

// build makes rules of c, with the origins of old where they are the same.
func (h *Handler) build(c *ingressconf.Config, source string, old *rules) (*rules, error) {
	r := &rules{source: source, config: c, origins: make([]*origin, c.Len())}
	remote := source == SourceRemote
	r.paces, r.paced = h.paces(c, remote, old)
	have := map[originKey]*origin{}
	if old != nil {
		for _, o := range old.origins {
			if o != nil {
				have[o.key] = o
			}
		}
	}
	for i, t := range c.Targets() {
		switch t.Service.Scheme {
		case ingressconf.HTTP, ingressconf.HTTPS, ingressconf.Unix:
		default:
			continue
		}
		pem, err := readPool(t.Origin.CAPool)
		if err != nil {
			return nil, fmt.Errorf("ingress[%d].origin.ca_pool: %w", i, err)
		}
		key := keyOf(t, pem, remote)
		key.pace = r.paces[i]
		if have[key] == nil {
			if have[key], err = h.newOrigin(key, t, pem); err != nil {
				return nil, fmt.Errorf("ingress[%d].origin.ca_pool: %w", i, err)
			}
		}
		r.origins[i] = have[key]
	}
	return r, nil
}

func keyOf(t *ingressconf.Target, pem []byte, remote bool) originKey {
	o := t.Origin
	k := originKey{service: t.Service, pool: sha256.Sum256(pem), remote: remote, http2: ingressconf.True(o.HTTP2Origin),
		lax: ingressconf.True(o.NoTLSVerify), unchunked: ingressconf.True(o.DisableChunkedEncoding)}
	o.CAPool, o.HTTP2Origin, o.NoTLSVerify, o.DisableChunkedEncoding = "", nil, nil, nil
	k.options = fmt.Sprintf("%q", fmt.Sprint(o))
	return k
}

// readPool returns the certificates that a ca_pool names or is.
func readPool(s string) ([]byte, error) {
	if s == "" || ingressconf.InlinePEM(s) {
		return []byte(s), nil
	}
	f, err := os.Open(s)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPoolFile+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) == 0:
		return nil, fmt.Errorf("%s is empty", s)
	case len(b) > maxPoolFile:
		return nil, fmt.Errorf("%s is larger than %d bytes; is this the right file?", s, maxPoolFile)
	}
	return b, nil
}

// retire ends the origins of r that now does not use any more: idle connections close, and those in use when they become
// idle.
func (r *rules) retire(now *rules) {
	used := map[*origin]bool{}
	if now != nil {
		for _, o := range now.origins {
			used[o] = true
		}
	}
	for _, o := range r.origins {
		if o != nil && !used[o] {
			o.retired.Store(true)
			o.closeIdle()
		}
	}
}

func (o *origin) closeIdle() {
	o.plain.CloseIdleConnections()
	if o.h2c != nil {
		o.h2c.CloseIdleConnections()
	}
}

func (h *Handler) newOrigin(key originKey, t *ingressconf.Target, pem []byte) (*origin, error) {
	o := &origin{key: key, target: t, remote: key.remote, scheme: "http"}
	var secure *tls.Config
	if t.Service.Scheme == ingressconf.HTTPS {
		o.scheme = "https"
		secure = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.Origin.OriginServerName, InsecureSkipVerify: key.lax}
		if len(pem) > 0 {
			secure.RootCAs = x509.NewCertPool()
			if !secure.RootCAs.AppendCertsFromPEM(pem) {
				return nil, errors.New("it holds no certificate that can be read")
			}
		}
	}
	var plain http.Protocols
	plain.SetHTTP1(true)
	plain.SetHTTP2(secure != nil && key.http2)
	o.plain = h.newTransport(o, &plain)
	o.plain.TLSClientConfig = secure
	if secure == nil && key.http2 {
		var h2c http.Protocols
		h2c.SetUnencryptedHTTP2(true)
		o.h2c = h.newTransport(o, &h2c)
	}
	o.proxy = &httputil.ReverseProxy{
		Transport:      o,
		Rewrite:        rewrite,
		ModifyResponse: h.responseCame,
		ErrorHandler:   h.roundTripFailed,
		BufferPool:     &httprelay.Buffers,
		ErrorLog:       log.New(io.Discard, "", 0), // errors reach the visitor as a cut, and ErrorHandler otherwise
	}
	return o, nil
}

func (h *Handler) newTransport(o *origin, p *http.Protocols) *http.Transport {
	opt := o.target.Origin
	return &http.Transport{
		Protocols:              p,
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return h.dialOrigin(ctx, o) },
		TLSHandshakeTimeout:    opt.TLSTimeout,
		DisableCompression:     true,
		DisableKeepAlives:      opt.ProxyProtocol == "v1" || opt.ProxyProtocol == "v2", // a connection is one visitor's
		MaxIdleConnsPerHost:    opt.KeepAliveConnections,
		IdleConnTimeout:        opt.KeepAliveTimeout,
		ExpectContinueTimeout:  continueWait,
		MaxResponseHeaderBytes: originHeaderBytes,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: originPing, PingTimeout: originPingTimeout},
	}
}

func (h *Handler) dialOrigin(ctx context.Context, o *origin) (net.Conn, error) {
	var visitor netip.AddrPort
	if v, ok := ctx.Value(visitKey{}).(*visit); ok {
		visitor = v.visitor
	}
	conn, err := h.dialer.dial(ctx, o.target, o.remote, visitor, o.key.pace)
	if err != nil {
		return nil, err // not conn, which would be an interface that holds nil
	}
	return conn, nil
}

// RoundTrip implements [http.RoundTripper]. HTTP/2 knows no upgrades of the kind that WebSockets use over HTTP/1.1.
func (o *origin) RoundTrip(r *http.Request) (*http.Response, error) {
	if o.key.unchunked && r.ContentLength < 0 && r.Body != nil {
		if err := collect(r); err != nil {
			return nil, err
		}
	}
	if o.h2c != nil && r.Header.Get("Upgrade") == "" {
		return o.h2c.RoundTrip(r)
	}
	return o.plain.RoundTrip(r)
}

// addr is the host of URLs for the origin. Connections are the origin's own, so that it only has to be the same always;
// TLS takes the server's name from it.
func (o *origin) addr() string {
	if o.target.Service.Scheme == ingressconf.Unix {
		return "localhost"
	}
	return o.target.Service.Addr()
}
