package edge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

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
		{"/%61pi/x", 200, "root /%61pi/x"},
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

func TestServerSentEventsAreNotBuffered(t *testing.T) {
	w := newWorld(t)
	next := make(chan struct{})
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "text/event-stream")
		if r.URL.Path == "/length" { // not an event stream by name, and with a known length
			rw.Header().Set("Content-Type", "application/x")
			rw.Header().Set("Content-Length", "27")
		}
		rw.WriteHeader(200)
		for i := range 3 {
			fmt.Fprintf(rw, "data: %d\n\n", i)
			rw.(http.Flusher).Flush()
			<-next
		}
	}), "a.test")
	w.start()
	for _, v := range versions {
		for _, path := range []string{"/", "/length"} {
			res, err := w.client(v).Get("https://a.test" + path)
			must(t, err)
			buf := make([]byte, 9)
			for i := range 3 {
				if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != fmt.Sprintf("data: %d\n\n", i) {
					t.Fatalf("HTTP/%s: event %d: %q, %v", v, i, buf, err)
				}
				next <- struct{}{} // only now may the origin write the next one
			}
			if rest, err := io.ReadAll(res.Body); err != nil || len(rest) > 0 {
				t.Errorf("HTTP/%s: the end: %q, %v", v, rest, err)
			}
			_ = res.Body.Close()
		}
	}
}

func TestTrailersBothWays(t *testing.T) {
	w := newWorld(t)
	h := func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Trailer", "X-Sum")
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		_, _ = rw.Write(body)
		rw.Header().Set("X-Sum", r.Trailer.Get("X-Check"))
		rw.Header().Set(http.TrailerPrefix+"X-Late", "late "+r.Trailer.Get("X-Forwarded-For"))
	}
	w.addZone("a", "p256", origin(t, h), "a.test")
	tlsURL, originTLS := w.tlsOrigin(h)
	w.addZone("b", "p256", tlsURL, "b.test").Origins[0].TLS = originTLS
	w.start()
	for _, v := range versions {
		for _, host := range []string{"a.test", "b.test"} {
			req, err := http.NewRequest("POST", "https://"+host+"/", io.LimitReader(rand.Reader, 100_000))
			must(t, err)
			req.ContentLength = -1
			req.Trailer = http.Header{"X-Check": {"checked"}, "X-Forwarded-For": {"6.6.6.6"}}
			res, err := w.client(v).Do(req)
			must(t, err)
			body, err := io.ReadAll(res.Body)
			must(t, err)
			_ = res.Body.Close()
			if len(body) != 100_000 || res.Trailer.Get("X-Sum") != "checked" || strings.TrimSpace(res.Trailer.Get("X-Late")) != "late" {
				t.Errorf("HTTP/%s to %s: %d bytes, trailers %v", v, host, len(body), res.Trailer)
			}
		}
	}
}

// An origin that breaks off must be seen as broken off.
func TestBrokenResponseIsNeverAWholeOne(t *testing.T) {
	w := newWorld(t)
	h := func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/length" {
			rw.Header().Set("Content-Length", "100000")
		}
		_, _ = rw.Write(make([]byte, 10_000))
		rw.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	w.addZone("a", "p256", origin(t, h), "a.test")
	tlsURL, originTLS := w.tlsOrigin(h)
	w.addZone("b", "p256", tlsURL, "b.test").Origins[0].TLS = originTLS
	w.start()
	for _, v := range versions {
		for _, host := range []string{"a.test", "b.test"} {
			for _, path := range []string{"/", "/length"} {
				res, err := w.client(v).Get("https://" + host + path)
				if err != nil {
					continue // the cut overtook the header
				}
				if n, err := io.Copy(io.Discard, res.Body); err == nil {
					t.Errorf("HTTP/%s %s%s: a clean end after %d bytes", v, host, path, n)
				}
				_ = res.Body.Close()
			}
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
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	deadURL := "http://" + dead.Addr().String()
	_ = dead.Close()
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
			for _, secret := range []string{"127.0.0.1", "10.9.8.7", "8080", "dial", "tcp"} {
				if strings.Contains(page, secret) {
					t.Errorf("HTTP/%s %s: the page shows %q", v, tt.host, secret)
				}
			}
		}
	}
}

// A pattern is a body of so many bytes that costs nothing to make.
type pattern struct{ left int64 }

func (p *pattern) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	n := int(min(int64(len(b)), p.left))
	p.left -= int64(n)
	return n, nil
}

// bulkBytes is moved in each direction; KEYHAVEN_BULK_MB raises it.
func bulkBytes(t *testing.T) int64 {
	mb := 24
	if s := os.Getenv("KEYHAVEN_BULK_MB"); s != "" {
		var err error
		mb, err = strconv.Atoi(s)
		must(t, err)
	}
	return int64(mb) << 20
}

func TestBulkUsesFlatMemory(t *testing.T) {
	w := newWorld(t)
	size := bulkBytes(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil || (r.Method == "POST" && n != size) {
			panic(http.ErrAbortHandler)
		}
		_, _ = io.Copy(rw, &pattern{size})
	}), "a.test")
	w.start()
	var peak atomic.Uint64
	stop := make(chan struct{})
	watched := make(chan struct{})
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	base := m.HeapAlloc
	go func() {
		defer close(watched)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak.Store(max(peak.Load(), m.HeapAlloc))
		}
	}()
	for _, v := range versions {
		began := time.Now()
		res, err := w.client(v).Post("https://a.test/", "application/octet-stream", &pattern{size})
		must(t, err)
		n, err := io.Copy(io.Discard, res.Body)
		if err != nil || n != size {
			t.Errorf("HTTP/%s: %d bytes, %v", v, n, err)
		}
		_ = res.Body.Close()
		t.Logf("HTTP/%s: %d MiB up and down in %v", v, size>>20, time.Since(began).Round(time.Millisecond))
	}
	close(stop)
	<-watched
	// The windows of HTTP/2 and QUIC, of visitor, edge and origin together, all live in this process.
	if grown := int64(peak.Load()) - int64(base); grown > 20<<20 {
		t.Errorf("the heap grew by %d MiB for bodies of %d MiB", grown>>20, size>>20)
	} else {
		t.Logf("heap: %d MiB more at most", grown>>20)
	}
}

// An origin may answer while it still reads: bytes must come back before the upload ends.
func TestFullDuplexBodies(t *testing.T) {
	w := newWorld(t)
	tlsURL, originTLS := w.tlsOrigin(func(rw http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(rw).EnableFullDuplex()
		rw.WriteHeader(200)
		buf := make([]byte, 64)
		for {
			n, err := r.Body.Read(buf)
			_, _ = rw.Write(bytes.ToUpper(buf[:n]))
			_ = http.NewResponseController(rw).Flush()
			if err != nil {
				return
			}
		}
	})
	w.addZone("a", "p256", tlsURL, "a.test").Origins[0].TLS = originTLS
	w.start()
	for _, v := range versions {
		pr, pw := io.Pipe()
		req, err := http.NewRequest("POST", "https://a.test/", pr)
		must(t, err)
		go func() { _, _ = io.WriteString(pw, "ping") }()
		res, err := w.client(v).Do(req)
		must(t, err)
		buf := make([]byte, 4)
		for range 3 {
			if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != "PING" {
				t.Fatalf("HTTP/%s: %q, %v", v, buf, err)
			}
			_, err = io.WriteString(pw, "ping")
			must(t, err)
		}
		_ = pw.Close()
		if rest, err := io.ReadAll(res.Body); err != nil || string(rest) != "PING" {
			t.Errorf("HTTP/%s: the end: %q, %v", v, rest, err)
		}
		_ = res.Body.Close()
	}
}

func TestExpectContinue(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			rw.WriteHeader(http.StatusForbidden)
			return
		}
		h := sha256.New()
		n, _ := io.Copy(h, r.Body)
		fmt.Fprint(rw, n)
	}), "a.test")
	w.start()
	c := w.raw("a.test")
	_, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n")
	must(t, err)
	br := bufio.NewReader(c)
	if line, err := br.ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 100") {
		t.Fatalf("%q, %v", line, err)
	}
	_, err = io.WriteString(c, "body")
	must(t, err)
	if rest, err := io.ReadAll(br); err != nil || !strings.Contains(string(rest), "HTTP/1.1 200") || !strings.HasSuffix(string(rest), "4") {
		t.Errorf("%q, %v", rest, err)
	}
	// A final answer in place of the 100: the visitor never sends the body.
	c = w.raw("a.test")
	_, err = io.WriteString(c, "POST /no HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
	must(t, err)
	if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 403") {
		t.Errorf("%q, %v", line, err)
	}
	if out, err := w.curl("--http1.1", "-H", "Expect: 100-continue", "--data-binary", strings.Repeat("x", 5000), "https://a.test/"); err != nil || out != "5000" {
		t.Errorf("curl: %v %s", err, out)
	}
}

func TestWebSocket(t *testing.T) {
	w := newWorld(t)
	h := func(rw http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(rw, r, &websocket.AcceptOptions{OriginPatterns: []string{"*"}})
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			kind, msg, err := c.Read(r.Context())
			if err != nil {
				return
			}
			if err := c.Write(r.Context(), kind, msg); err != nil {
				return
			}
		}
	}
	w.addZone("a", "p256", origin(t, h), "a.test")
	tlsURL, originTLS := w.tlsOrigin(h)
	w.addZone("b", "p256", tlsURL, "b.test").Origins[0].TLS = originTLS
	w.start()
	for _, host := range []string{"a.test", "b.test"} {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		c, _, err := websocket.Dial(ctx, "wss://"+host+"/", &websocket.DialOptions{HTTPClient: w.client("1.1")})
		if err != nil {
			t.Fatalf("%s: %v", host, err)
		}
		for i := range 20 {
			msg := bytes.Repeat([]byte{byte(i)}, i*1000)
			must(t, c.Write(ctx, websocket.MessageBinary, msg))
			_, got, err := c.Read(ctx)
			if err != nil || !bytes.Equal(got, msg) {
				t.Fatalf("%s: message %d: %d bytes, %v", host, i, len(got), err)
			}
		}
		if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
			t.Errorf("%s: close: %v", host, err)
		}
	}
}

// After an upgrade the connection is two streams: each ends on its own.
func TestUpgradedConnectionHalfCloses(t *testing.T) {
	w := newWorld(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				br := bufio.NewReader(c)
				if _, err := http.ReadRequest(br); err != nil {
					return
				}
				_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
				all, _ := io.ReadAll(br) // to the visitor's end
				fmt.Fprintf(c, "%d bytes and then the end", len(all))
			}()
		}
	}()
	w.addZone("a", "p256", "http://"+ln.Addr().String(), "a.test")
	w.start()
	c := w.raw("a.test")
	_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	must(t, err)
	br := bufio.NewReader(c)
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != 101 {
		t.Fatalf("%v %v", res, err)
	}
	_, err = c.Write(make([]byte, 100_000))
	must(t, err)
	must(t, c.(*tls.Conn).CloseWrite())
	if got, err := io.ReadAll(br); err != nil || string(got) != "100000 bytes and then the end" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestAltSvcOnlyWhereHTTP3Is(t *testing.T) {
	w := newWorld(t)
	o := origin(t, func(rw http.ResponseWriter, r *http.Request) { rw.Header().Set("Alt-Svc", `h3="evil:1"`) })
	w.addZone("a", "p256", o, "a.test")
	w.addZone("b", "p256", o, "b.test").HTTP = []string{"1.1", "2"}
	w.start()
	_, port, _ := net.SplitHostPort(w.addr())
	for host, want := range map[string]string{"a.test": `h3=":` + port + `"; ma=86400`, "b.test": ""} {
		res, err := w.client("2").Get("https://" + host + "/")
		must(t, err)
		_ = res.Body.Close()
		if got := res.Header.Get("Alt-Svc"); got != want {
			t.Errorf("%s: Alt-Svc %q, want %q", host, got, want)
		}
	}
}

func TestRedirect(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test", "*.w.test")
	w.cfg.Listen.Redirect = []string{"127.0.0.1:0"}
	w.cfg.Listen.PublicPort = 443
	w.start()
	addr := w.server.RedirectAddrs()[0].String()
	for _, tt := range []struct {
		request, location string
		status            int
	}{
		{"GET /a%2fb?c HTTP/1.1\r\nHost: A.test:80\r\n\r\n", "https://a.test/a%2fb?c", 308},
		{"GET / HTTP/1.1\r\nHost: x.w.test\r\n\r\n", "https://x.w.test/", 308},
		{"GET / HTTP/1.1\r\nHost: nobody.test\r\n\r\n", "", 404},
		{"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "", 400},
		{"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n", "", 400},
	} {
		c, err := net.Dial("tcp", addr)
		must(t, err)
		res, _ := roundTrip(t, c, tt.request)
		_ = c.Close()
		if res.StatusCode != tt.status || res.Header.Get("Location") != tt.location {
			t.Errorf("%q: %d %q, want %d %q", tt.request, res.StatusCode, res.Header.Get("Location"), tt.status, tt.location)
		}
	}
}

func TestReloadAndDrain(t *testing.T) {
	w := newWorld(t)
	release := make(chan struct{})
	slow := origin(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(200)
		rw.(http.Flusher).Flush()
		if r.URL.Path == "/slow" {
			<-release
		}
		fmt.Fprint(rw, "whole")
	})
	w.addZone("a", "p256", slow, "a.test")
	w.addZone("b", "p256", slow, "b.test")
	w.start()
	inFlight := func(v string) chan string {
		res, err := w.client(v).Get("https://a.test/slow")
		must(t, err)
		done := make(chan string, 1)
		go func() {
			body, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			done <- fmt.Sprint(string(body), err)
		}()
		return done
	}
	var before []chan string
	open := map[string]*http.Client{}
	for _, v := range versions {
		before = append(before, inFlight(v))
		open[v] = w.client(v)
		res, err := open[v].Get("https://b.test/")
		must(t, err)
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
	}
	// A bad configuration changes nothing.
	bad := w.cfg
	bad.Zones = append([]zone.Config{{Name: "x"}}, w.cfg.Zones...)
	if err := w.server.Reload(bad); err == nil {
		t.Fatal("a bad configuration was taken")
	}
	// b goes, c comes, on a key server group of another name.
	next := w.cfg
	next.KeyServers = []KeyServer{w.cfg.KeyServers[0]}
	next.KeyServers[0].Name = "hsm2"
	w.cfg = next
	w.cfg.Zones = w.cfg.Zones[:1:1]
	w.addZone("c", "p256", slow, "c.test")
	for i := range w.cfg.Zones {
		w.cfg.Zones[i].KeyServer = "hsm2"
	}
	must(t, w.server.Reload(w.cfg))
	eventually(t, "the new group is connected", func() bool { return w.server.Ready(t.Context()) == nil })
	for _, v := range versions {
		res, err := w.client(v).Get("https://c.test/")
		must(t, err)
		_ = res.Body.Close()
		if res, err = open[v].Get("https://b.test/"); err == nil {
			_ = res.Body.Close()
			if res.StatusCode != 421 {
				t.Errorf("HTTP/%s: a zone that is gone answers %d on an old connection", v, res.StatusCode)
			}
		}
		if _, err := w.client(v).Get("https://b.test/"); err == nil {
			t.Errorf("HTTP/%s: a zone that is gone answers", v)
		}
	}
	// The edge stops: what is in flight is finished first.
	stopped := make(chan struct{})
	go func() { defer close(stopped); w.stop() }()
	eventually(t, "the listener is closed", func() bool {
		c, err := net.Dial("tcp", w.addr())
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	close(release)
	for i, done := range before {
		if got := <-done; got != "whole<nil>" {
			t.Errorf("HTTP/%s: the request in flight ended with %s", versions[i], got)
		}
	}
	<-stopped
}

func TestDrainTimeoutCutsWhatRemains(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(200)
		rw.(http.Flusher).Flush()
		<-r.Context().Done()
	}), "a.test")
	w.cfg.Limits.DrainTimeout = 300 * time.Millisecond
	w.start()
	var bodies []io.ReadCloser
	for _, v := range versions {
		res, err := w.client(v).Get("https://a.test/")
		must(t, err)
		bodies = append(bodies, res.Body)
	}
	w.stop()
	for i, b := range bodies {
		if _, err := io.ReadAll(b); err == nil {
			t.Errorf("HTTP/%s: a cut response ended cleanly", versions[i])
		}
		_ = b.Close()
	}
}

func TestPoolsAreNotSharedBetweenZones(t *testing.T) {
	w := newWorld(t)
	o := echoOrigin(t)
	w.addZone("a", "p256", o, "a.test").Origins[0].VNet = "one"
	w.addZone("b", "p256", o, "b.test").Origins[0].VNet = "two"
	w.start()
	for range 3 {
		for _, host := range []string{"a.test", "b.test"} {
			res, err := w.client("2").Get("https://" + host + "/")
			must(t, err)
			_, _ = io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
		}
	}
	addr := strings.TrimPrefix(o, "http://")
	w.loop.mu.Lock()
	defer w.loop.mu.Unlock()
	if one, two := w.loop.dials["one/"+addr], w.loop.dials["two/"+addr]; one != 1 || two != 1 {
		t.Errorf("%d and %d connections, want one in each network: pooled, and never shared", one, two)
	}
}

func TestVisitorWhoLeavesEndsTheOriginsWork(t *testing.T) {
	w := newWorld(t)
	left := make(chan struct{}, 8)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(200)
		rw.(http.Flusher).Flush()
		<-r.Context().Done()
		left <- struct{}{}
	}), "a.test")
	w.start()
	for _, v := range versions {
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, "GET", "https://a.test/", nil)
		must(t, err)
		res, err := w.client(v).Do(req)
		must(t, err)
		cancel()
		_ = res.Body.Close()
		select {
		case <-left:
		case <-time.After(20 * time.Second):
			t.Errorf("HTTP/%s: the origin works on", v)
		}
	}
}
