package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"testing"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestIdentityHeaders(t *testing.T) {
	for _, name := range []string{
		"X-Forwarded-For", "x-forwarded-for", "X_Forwarded_For", "X.Forwarded.For", "x_forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host",
		"X-Forwarded-Port", "X-Forwarded-Client-Cert", "X-Forwarded-Prefix", "X-Forwarded-User", "Forwarded", "FORWARDED", "X-Real-IP", "X_Real_IP", "X-Real_Ip",
		"CF-Connecting-IP", "Cf_Connecting_Ip", "True-Client-IP", "True_Client_IP", "X-Client-IP", "X-Cluster-Client-IP", "Client-Ip", "Fastly-Client-IP",
		"X-Original-URL", "X-Rewrite-URL", "X-Original-Host", "Proxy", "X-Original-Forwarded-For", "X~Real~IP",
		"X-SSL-Client-Verify", "X_SSL_Client_S_DN", "SSL-Client-Cert", "X-Client-Cert-Subject", "X-ARR-ClientCert", "X-Amzn-Mtls-Clientcert-Leaf", "X_TLS_Client_Subject", "X-True-Client-IP", "X-HTTP-Host-Override", "X-Original-URI", "X-Envoy-Original-Path",
	} {
		if !namesIdentity(name) {
			t.Errorf("%s is passed on", name)
		}
	}
	for _, name := range []string{"Host", "Accept", "X-Request-Id", "Authorization", "Cookie", "X-Forward", "Via", "X-Real", "Client", "Proxy-Agent", "Te"} {
		if namesIdentity(name) {
			t.Errorf("%s is removed", name)
		}
	}
}

func TestForwarded(t *testing.T) {
	for _, tt := range []struct{ ip, host, want string }{
		{"192.0.2.7", "www.example.com", "for=192.0.2.7;host=www.example.com;proto=https"},
		{"2001:db8::1", "www.example.com", `for="[2001:db8::1]";host=www.example.com;proto=https`},
		{"192.0.2.7", "www.example.com:8443", `for=192.0.2.7;host="www.example.com:8443";proto=https`},
	} {
		if got := forwarded(netip.MustParseAddr(tt.ip), tt.host); got != tt.want {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
}

// real dials to nowhere and returns the error that the system makes.
func realRefusal(t *testing.T) error {
	t.Helper()
	addr, err := freeport.Addr("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	_, err = net.Dial("tcp", addr)
	if err == nil {
		t.Fatal("a closed port answered")
	}
	return err
}

func TestFaultOf(t *testing.T) {
	srv := httptest.NewTLSServer(http.NotFoundHandler())
	defer srv.Close()
	_, untrusted := (&http.Transport{TLSClientConfig: &tls.Config{RootCAs: x509.NewCertPool()}}).RoundTrip(httptest.NewRequest("GET", srv.URL, nil))
	if untrusted == nil {
		t.Fatal("an untrusted certificate was accepted")
	}
	for _, tt := range []struct {
		err    error
		kind   string
		status int
	}{
		{control.ErrTunnelDown, "tunnel_down", 502},
		{&control.Error{Code: control.CodeNoRoute}, "no_route", 502},
		{&tunnel.FlowError{Result: tunnel.ResultRefused, Remote: true}, "origin_refused", 502},
		{&tunnel.FlowError{Result: tunnel.ResultTimedOut, Remote: true}, "origin_timeout", 504},
		{&tunnel.FlowError{Result: tunnel.ResultDenied, Remote: true}, "not_permitted", 502},
		{&tunnel.FlowError{Result: tunnel.ResultNoRoute, Remote: true}, "no_route", 502},
		{&tunnel.FlowError{Result: tunnel.ResultNameNotFound, Remote: true}, "name_not_found", 502},
		{&tunnel.FlowError{Result: tunnel.ResultLimit}, "busy", 503},
		{&tunnel.FlowError{Result: tunnel.ResultSessionLost, Err: errors.New("x")}, "tunnel_down", 502},
		{realRefusal(t), "origin_refused", 502},
		{syscall.EHOSTUNREACH, "no_route", 502},
		{context.DeadlineExceeded, "origin_timeout", 504},
		{untrusted, "origin_tls", 502},
		{errors.New("malformed HTTP response"), "origin_protocol", 502},
	} {
		wrapped := &url.Error{Op: "Get", URL: "x", Err: fmt.Errorf("dial: %w", tt.err)}
		if got := faultOf(wrapped); got.kind != tt.kind || got.status != tt.status {
			t.Errorf("%v: %s %d, want %s %d", tt.err, got.kind, got.status, tt.kind, tt.status)
		}
	}
}

func TestPage(t *testing.T) {
	for _, accept := range []string{"", "*/*", "text/html,application/xhtml+xml"} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Accept", accept)
		w := httptest.NewRecorder()
		w.Header().Set("Set-Cookie", "left over")
		faultRefused.write(w, r, "abc123")
		body := w.Body.String()
		if !strings.Contains(body, "refused") || !strings.Contains(body, "abc123") || w.Code != 502 || w.Header().Get("Set-Cookie") != "" {
			t.Errorf("Accept %q: %d %v\n%s", accept, w.Code, w.Header(), body)
		}
		if isHTML := strings.HasPrefix(body, "<!DOCTYPE html>"); isHTML != strings.Contains(accept, "text/html") {
			t.Errorf("Accept %q: html %v", accept, isHTML)
		}
	}
}
