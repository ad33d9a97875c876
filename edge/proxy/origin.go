package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/edge/zone"
)

const (
	originIdle        = 90 * time.Second // of a pooled connection
	originHeaderBytes = 1 << 20          // of a response's header
	originBuffer      = 32 << 10         // per connection and direction
	originPing        = 30 * time.Second // silence of an HTTP/2 connection before it is probed
	originPingTimeout = 10 * time.Second
	continueWait      = time.Second // for a 100 from an origin that may not know Expect
)

// buffers holds the copy buffers of response bodies.
var buffers = bufferPool{sync.Pool{New: func() any { return new([originBuffer]byte) }}}

type bufferPool struct{ p sync.Pool }

func (b *bufferPool) Get() []byte  { return b.p.Get().(*[originBuffer]byte)[:] }
func (b *bufferPool) Put(s []byte) { b.p.Put((*[originBuffer]byte)(s)) }

// An origin is an upstream of one zone with connections of its own: pools are never shared between zones.
type origin struct {
	up        *zone.Upstream
	scheme    string
	transport *http.Transport
	proxy     *httputil.ReverseProxy
}

func (h *Handler) newOrigin(up *zone.Upstream) *origin {
	o := &origin{up: up, scheme: "http", transport: h.newTransport(up)}
	if up.TLS != nil {
		o.scheme = "https"
	}
	o.proxy = &httputil.ReverseProxy{
		Transport:      o.transport,
		Rewrite:        rewrite,
		ModifyResponse: h.cleanResponse,
		ErrorHandler:   h.roundTripFailed,
		BufferPool:     &buffers,
		ErrorLog:       log.New(io.Discard, "", 0), // errors reach the visitor as a cut, and ErrorHandler otherwise
	}
	return o
}

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
		WriteBufferSize:        originBuffer,
		ReadBufferSize:         originBuffer,
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: originPing, PingTimeout: originPingTimeout},
	}
	t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, h.cfg.ConnectTimeout)
		defer cancel()
		conn, err := h.cfg.Dialer.DialContext(ctx, up.VNet, up.Host, up.Port, netip.AddrPort{})
		if err != nil {
			return nil, err
		}
		return leavingDrains(conn, t), nil
	}
	if up.TLS != nil {
		t.TLSClientConfig = up.TLS.Clone()
	}
	return t
}

// isTLS reports whether err comes from securing the connection to an origin.
func isTLS(err error) bool {
	var (
		verify  *tls.CertificateVerificationError
		record  tls.RecordHeaderError
		alert   tls.AlertError
		host    x509.HostnameError
		unknown x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
	)
	return errors.As(err, &verify) || errors.As(err, &record) || errors.As(err, &alert) ||
		errors.As(err, &host) || errors.As(err, &unknown) || errors.As(err, &invalid)
}
