package edge

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/tunnel"
)

// origin starts a plain HTTP/1.1 origin; tlsOrigin one with TLS, HTTP/2 and a certificate of its own.
func origin(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL
}

func (w *world) tlsOrigin(h http.HandlerFunc) (string, zone.OriginTLS) {
	w.t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	w.t.Cleanup(srv.Close)
	ca := writePEM(w.t, filepath.Join(w.dir, "origin-ca.pem"), srv.Certificate().Raw)
	return srv.URL, zone.OriginTLS{CA: ca, ServerName: "example.com"}
}

// raw is a visitor who writes HTTP/1.1 by hand.
func (w *world) raw(host string) net.Conn {
	w.t.Helper()
	c, err := w.dialTLS(w.tlsConfig(host))
	must(w.t, err)
	w.t.Cleanup(func() { _ = c.Close() })
	must(w.t, c.SetDeadline(time.Now().Add(30*time.Second)))
	return c
}

func roundTrip(t testing.TB, c net.Conn, request string) (*http.Response, string) {
	t.Helper()
	_, err := io.WriteString(c, request)
	must(t, err)
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	body, err := io.ReadAll(res.Body)
	must(t, err)
	return res, string(body)
}

func TestForgedHeadersDoNotReachTheOrigin(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		for name, vv := range r.Header {
			fmt.Fprintf(rw, "%s: %s\n", name, strings.Join(vv, " | "))
		}
	}), "a.test")
	w.start()
	for _, v := range versions {
		req, err := http.NewRequest("GET", "https://a.test/", nil)
		must(t, err)
		for _, name := range []string{
			"X-Forwarded-For", "x-forwarded-for", "X_Forwarded_For", "X-Forwarded_For", "X-Forwarded-Proto", "X-Forwarded-Host", "X_Forwarded_Host", "X-Forwarded-Port",
			"Forwarded", "FORWARDED", "X-Real-IP", "X_Real_Ip", "CF-Connecting-IP", "Cf_connecting_ip", "True-Client-IP", "True_Client_Ip", "X-Client-Ip", "Client_Ip", "X-Original-Url",
		} {
			req.Header[name] = []string{"6.6.6.6"}
		}
		req.Header["Te"] = []string{"trailers"}
		if v == "1.1" {
			req.Header["Connection"] = []string{"X-Forwarded-For, X-Secret-Hop, Host"}
			req.Header["X-Secret-Hop"] = []string{"6.6.6.6"}
			req.Header["Keep-Alive"] = []string{"6.6.6.6"}
			req.Header["Proxy-Connection"] = []string{"6.6.6.6"}
		}
		req.Header["X-App"] = []string{"passes"}
		res, err := w.client(v).Do(req)
		must(t, err)
		body, err := io.ReadAll(res.Body)
		must(t, err)
		_ = res.Body.Close()
		got := string(body)
		if strings.Contains(got, "6.6.6.6") {
			t.Errorf("HTTP/%s: a forged header passed:\n%s", v, got)
		}
		for _, want := range []string{
			"X-Forwarded-For: 127.0.0.1\n", "X-Forwarded-Proto: https\n", "X-Forwarded-Host: a.test\n", "Forwarded: for=127.0.0.1;host=a.test;proto=https\n", "X-App: passes\n",
		} {
			if !strings.Contains(got, want) {
				t.Errorf("HTTP/%s: no %q in\n%s", v, want, got)
			}
		}
		if strings.Contains(got, "Accept-Encoding") && v == "1.1" {
			t.Errorf("HTTP/%s: the edge added Accept-Encoding", v)
		}
	}
}

func TestTargetIsForwardedByteForByte(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.RequestURI) }), "a.test")
	tlsURL, originTLS := w.tlsOrigin(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.RequestURI) })
	w.addZone("b", "p256", tlsURL, "b.test").Origins[0].TLS = originTLS
	w.start()
	targets := []string{
		"/", "/?", "/a/b?c=d", "/%41%2f%2F", "/a/../b", "/a/%2e%2E/b", "/a//b", "/./", "/a;b=c", "/?a=1;b=%zz&c", "/a|b{c}^d", "/a?b?c=/../",
		"/caf%C3%A9", "/+%20", "/'()*!$&,;=:@", "/a\\b", "//x/y", "/%00", "/?%",
	}
	clients := map[string]*http.Client{"2": w.client("2"), "3": w.client("3")}
	for _, host := range []string{"a.test", "b.test"} {
		for _, target := range targets {
			_, got := roundTrip(t, w.raw(host), "GET "+target+" HTTP/1.1\r\nHost: "+host+"\r\nConnection: close\r\n\r\n")
			if got != target {
				t.Errorf("%s HTTP/1.1: sent %q, the origin saw %q", host, target, got)
			}
			if strings.HasPrefix(target, "//") {
				continue // Go's client cannot send it
			}
			for _, v := range []string{"2", "3"} {
				path, query, has := strings.Cut(target, "?")
				req := &http.Request{Method: "GET", Header: http.Header{}, Host: host, URL: &url.URL{Scheme: "https", Host: host, Opaque: path, RawQuery: query, ForceQuery: has}}
				res, err := clients[v].Do(req)
				must(t, err)
				body, err := io.ReadAll(res.Body)
				must(t, err)
				_ = res.Body.Close()
				if string(body) != target {
					t.Errorf("%s HTTP/%s: sent %q, the origin saw %q", host, v, target, body)
				}
			}
		}
	}
	_, got := roundTrip(t, w.raw("a.test"), "GET https://A.test/x%2fy?z HTTP/1.1\r\nHost: ignored.test\r\nConnection: close\r\n\r\n")
	if got != "/x%2fy?z" {
		t.Errorf("absolute form: the origin saw %q", got)
	}
}

func TestOriginsByPath(t *testing.T) {
	w := newWorld(t)
	name := func(n string) string {
		return origin(t, func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, n, " ", r.RequestURI) })
	}
	z := w.addZone("a", "p256", name("root"), "a.test")
	z.Origins = append(z.Origins, zone.Origin{Path: "/api", URL: name("api")}, zone.Origin{Path: "/api/v2/", URL: name("v2")})
	w.start()
	for _, tt := range []struct {
		target string
		status int
		want   string
	}{
		{"/", 200, "root /"},
		{"/api", 200, "api /api"},
		{"/api?x", 200, "api /api?x"},
		{"/api/x", 200, "api /api/x"},
		{"/apix", 200, "root /apix"},
		{"/API/x", 200, "root /API/x"},
		{"/api/v2/x", 200, "v2 /api/v2/x"},
		{"/%41pi/x;v=1", 200, "root /%41pi/x;v=1"},
		{"/api/%61;v=1", 200, "api /api/%61;v=1"},
		{"/%61pi/x", 400, ""},
		{"/api;v=1/x", 400, ""},
		{"/api/v%32/x", 400, ""},
		{"/x/../api", 400, ""},
		{"/api/%2e%2e/x", 400, ""},
		{"/api%2fx", 400, ""},
		{"//api", 400, ""},
	} {
		res, got := roundTrip(t, w.raw("a.test"), "GET "+tt.target+" HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
		if res.StatusCode != tt.status || (tt.status == 200 && got != tt.want) {
			t.Errorf("%s: %d %q, want %d %q", tt.target, res.StatusCode, got, tt.status, tt.want)
		}
	}
}

func TestHostMustFitTheName(t *testing.T) {
	w := newWorld(t)
	o := echoOrigin(t)
	w.addZone("a", "p256", o, "a.test", "*.w.test")
	w.addZone("b", "p256", o, "b.test", "special.w.test")
	w.start()
	clients := map[string]*http.Client{}
	for _, v := range versions {
		clients[v] = w.client(v)
	}
	for _, tt := range []struct {
		sni, host string
		status    int
	}{
		{"a.test", "a.test", 200},
		{"a.test", "A.TEST.:443", 200},
		{"a.test", "x.w.test", 200}, // the same zone, so the same certificate and origins
		{"a.test", "b.test", 421},
		{"x.w.test", "special.w.test", 421}, // covered by the wildcard, but another zone's
		{"special.w.test", "x.w.test", 421},
		{"a.test", "nobody.test", 421},
		{"a.test", "127.0.0.1", 400},
	} {
		for _, v := range versions {
			c := clients[v]
			req, err := http.NewRequest("GET", "https://"+tt.sni+"/", nil)
			must(t, err)
			req.Host = tt.host
			res, err := c.Do(req)
			must(t, err)
			body, err := io.ReadAll(res.Body)
			must(t, err)
			_ = res.Body.Close()
			if res.StatusCode != tt.status {
				t.Errorf("HTTP/%s: SNI %s, Host %s: %d, want %d\n%s", v, tt.sni, tt.host, res.StatusCode, tt.status, body)
			}
		}
	}
	for request, status := range map[string]int{
		"GET / HTTP/1.0\r\n\r\n":                                              400,
		"GET / HTTP/1.1\r\nHost: \r\n\r\n":                                    400,
		"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n":              400,
		"GET / HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n":                      400,
		"GET https://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n":                421,
		"CONNECT b.test:443 HTTP/1.1\r\nHost: b.test:443\r\n\r\n":             421,
		"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n":             405,
		"GET / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: x\r\n\r\n":      501,
		"GET / HTTP/1.1\r\nHost : a.test\r\n\r\n":                             400,
		"GET / HTTP/1.1\r\nHost: a.test\r\nX: a\r\n folded\r\n\r\n":           200,
		"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n":                 400,
		"GET /#f HTTP/1.1\r\nHost: a.test\r\n\r\n":                            400,
		"GET / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1, 2\r\n\r\nx":     400,
		"GET / HTTP/1.1\r\nHost: a.test\r\nX: " + strings.Repeat("a", 90<<10): 431,
	} {
		res, _ := roundTrip(t, w.raw("a.test"), request)
		if res.StatusCode != status {
			t.Errorf("%.60q: %d, want %d", request, res.StatusCode, status)
		}
	}
}

// What comes after one request on a connection must be what this edge takes for the next one, and so must the origin.
func TestNoSmuggling(t *testing.T) {
	w := newWorld(t)
	var seen atomic.Pointer[[]string]
	seen.Store(&[]string{})
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		next := append([]string{fmt.Sprintf("%s %s %q", r.Method, r.RequestURI, body)}, *seen.Load()...)
		seen.Store(&next)
	}), "a.test")
	w.start()
	for _, request := range []string{
		"POST /1 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 35\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nX: ",
		"POST /1 HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n",
		"POST /1 HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n",
		"GET /1 HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: b.test\r\n\r\n",
	} {
		c := w.raw("a.test")
		_, err := io.WriteString(c, request)
		must(t, err)
		_ = c.(*tls.Conn).CloseWrite()
		_, _ = io.Copy(io.Discard, c)
		for _, s := range *seen.Load() {
			if strings.Contains(s, "smuggled") && !strings.HasPrefix(s, "GET /smuggled \"\"") {
				t.Errorf("the origin saw %s", s)
			}
		}
	}
	for _, s := range *seen.Load() {
		if strings.Contains(s, "b.test") || strings.HasPrefix(s, "PRI") {
			t.Errorf("the origin saw %s", s)
		}
	}
}

func TestOriginFailuresAndTheirPages(t *testing.T) {
	w := newWorld(t)
	up := origin(t, func(rw http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(20 * time.Second):
		}
	})
	garbage, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer garbage.Close()
	go func() {
		for {
			c, err := garbage.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "SSH-2.0-nothing\r\n")
			_ = c.Close()
		}
	}()
	deadURL := "http://" + deadAddr(t)
	tlsURL, _ := w.tlsOrigin(func(http.ResponseWriter, *http.Request) {})
	failing := "10.9.8.7:8080"
	w.loop.cut(failing, &tunnel.FlowError{Result: tunnel.ResultDenied, Remote: true})
	w.addZone("slow", "p256", up, "slow.test")
	w.addZone("garbage", "p256", "http://"+garbage.Addr().String(), "garbage.test")
	w.addZone("dead", "p256", deadURL, "dead.test")
	w.addZone("untrusted", "p256", tlsURL, "untrusted.test")
	w.addZone("denied", "p256", "http://"+failing, "denied.test")
	w.cfg.Limits.OriginResponseTimeout = 300 * time.Millisecond
	w.start()
	for _, tt := range []struct {
		host   string
		status int
		text   string
	}{
		{"slow.test", 504, "did not answer in time"},
		{"garbage.test", 502, "did not speak HTTP"},
		{"dead.test", 502, "refused the connection"},
		{"untrusted.test", 502, "certificate was not accepted"},
		{"denied.test", 502, "is not permitted"},
	} {
		for _, v := range versions {
			req, err := http.NewRequest("GET", "https://"+tt.host+"/", nil)
			must(t, err)
			req.Header.Set("Accept", "text/html")
			res, err := w.client(v).Do(req)
			must(t, err)
			body, err := io.ReadAll(res.Body)
			must(t, err)
			_ = res.Body.Close()
			page := string(body)
			if res.StatusCode != tt.status || !strings.Contains(page, tt.text) || !strings.Contains(page, res.Header.Get("X-Request-Id")) || res.Header.Get("X-Request-Id") == "" {
				t.Errorf("HTTP/%s %s: %d\n%s", v, tt.host, res.StatusCode, page)
			}
			page = strings.ReplaceAll(page, res.Header.Get("X-Request-Id"), "") // random letters, which may say tcp
			for _, secret := range []string{"127.0.0.1", "10.9.8.7", "8080", "dial", "tcp"} {
				if strings.Contains(page, secret) {
					t.Errorf("HTTP/%s %s: the page shows %q", v, tt.host, secret)
				}
			}
		}
	}
}
