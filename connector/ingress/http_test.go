package ingress

import (
	"bufio"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/pires/go-proxyproto"
)

// What is matched is what is forwarded, byte for byte.
func TestRouting(t *testing.T) {
	a := server(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "a %s %s", r.RequestURI, r.Host) })
	b := server(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "b %s %s", r.RequestURI, r.Host) })
	bed := newBed(t, fmt.Sprintf(`
ingress:
  - {hostname: shop.test, path: "^/api/", service: %q}
  - {hostname: shop.test, path: "%%20$", service: %q}
  - {hostname: "*.below.test", service: %q}
  - {hostname: teapot.test, service: http_status:418}
  - {hostname: gone.test, service: http_status:204}
  - {hostname: hello.test, service: hello_world}
  - {hostname: bytes.test, service: "tcp://127.0.0.1:1"}
  - service: http_status:404
`, a.URL, b.URL, b.URL))
	for _, tt := range []struct {
		host, target string
		status       int
		body         string
	}{
		{"shop.test", "/api/x?q=1;2&%zz", 200, "a /api/x?q=1;2&%zz shop.test"},
		{"SHOP.test:8443", "/api/%7euser", 200, "a /api/%7euser SHOP.test:8443"},
		{"shop.test", "/x/%20", 200, "b /x/%20 shop.test"},
		{"shop.test", "/x/%41", 404, "404 Not Found"},
		{"shop.test", "/%61pi/x", 400, "path is not valid"}, // the origin of the other rules would read /api/x
		{"shop.test", "/api;v=1/x", 400, ""},
		{"shop.test", "/API/x", 404, ""},
		{"shop.test", "/api/../x", 400, "path is not valid"},
		{"shop.test", "/api/%2e%2e/x", 400, ""},
		{"shop.test", "/x/..%2fapi/", 400, ""},
		{"shop.test", "//api/", 400, ""},
		{"x.below.test", "/a/../b//c?", 200, "b /a/../b//c? x.below.test"}, // no rule looks at the path
		{"x.y.below.test", "/", 200, "b / x.y.below.test"},
		{"below.test", "/", 404, ""},
		{"teapot.test", "/", 418, "418 I'm a teapot"},
		{"gone.test", "/", 204, ""},
		{"hello.test", "/any", 200, "Hello, world"},
		{"bytes.test", "/", 502, "does not speak HTTP"},
		{"10.0.0.1", "/", 404, ""},
		{"a b", "/", 400, ""},
	} {
		status, body := bed.raw("GET " + tt.target + " HTTP/1.1\r\nHost: " + tt.host + "\r\nConnection: close\r\n\r\n")
		if status != tt.status || !strings.Contains(body, tt.body) {
			t.Errorf("%s%s: got %d %q, want %d %q", tt.host, tt.target, status, body, tt.status, tt.body)
		}
	}
	if status, _ := bed.raw("CONNECT shop.test:443 HTTP/1.1\r\nHost: shop.test:443\r\n\r\n"); status != 405 {
		t.Errorf("CONNECT: got %d, want 405", status)
	}
	if status, _ := bed.raw("GET /api/ HTTP/1.1\r\nHost: shop.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"); status != 400 {
		t.Errorf("an upgrade to h2c: got %d, want 400", status)
	}
}

func TestHeaders(t *testing.T) {
	var got http.Header
	var host string
	o := server(t, func(_ http.ResponseWriter, r *http.Request) { got, host = r.Header.Clone(), r.Host })
	bed := newBed(t, "ingress:\n  - {hostname: own.test, service: '"+o.URL+"', origin: {http_host_header: 'inside.corp:81'}}\n  - service: "+o.URL+"\n")
	status, _ := bed.raw("GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: a.test\r\n" +
		"Forwarded: for=203.0.113.7\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nX-Mine: 2\r\n\r\n")
	if status != 200 || host != "a.test" {
		t.Errorf("got %d, Host %q", status, host)
	}
	for name, want := range map[string]string{"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "a.test",
		"Forwarded": "for=203.0.113.7", "X-Mine": "2", "X-Hop": "", "User-Agent": ""} {
		if v := strings.Join(got[name], "|"); v != want {
			t.Errorf("%s: got %q, want %q", name, v, want)
		}
	}
	if bed.raw("GET / HTTP/1.1\r\nHost: own.test\r\nConnection: close\r\n\r\n"); host != "inside.corp:81" {
		t.Errorf("Host: got %q, want that of the rule", host)
	}
}

func TestOriginDown(t *testing.T) {
	bed := newBed(t, "ingress:\n  - {hostname: name.test, service: 'http://nosuch.invalid'}\n  - {hostname: unix.test, service: 'unix:/nonexistent.sock'}\n  - service: http://"+downAddr(t)+"\n")
	status, body := bed.get("http://a.test/")
	if status != 502 {
		t.Errorf("got %d, want 502", status)
	}
	wantHas(t, "page", body, "cannot be reached", "request ")
	m := regexp.MustCompile(`request (\w{16})`).FindStringSubmatch(body)
	if m == nil {
		t.Fatalf("no request id in %q", body)
	}
	wantHas(t, "log", bed.log.String(), "request="+m[1], "reason=origin_down")
	if strings.Contains(body, "127.0.0.1") {
		t.Errorf("the page shows the inside: %q", body)
	}
	if status, body := bed.get("http://unix.test/"); status != 502 {
		t.Errorf("no socket: got %d %s, want 502", status, body)
	}
	if status, body := bed.get("http://name.test/"); status != 502 || !strings.Contains(body, "name was not found") {
		t.Errorf("no such name: got %d %s", status, body)
	}
}

// A response that breaks off is cut, never ended.
func TestTruncated(t *testing.T) {
	for name, header := range map[string]string{"length": "Content-Length: 1000\r\n", "chunked": "Transfer-Encoding: chunked\r\n"} {
		t.Run(name, func(t *testing.T) {
			addr := rawOrigin(t, func(c *net.TCPConn) {
				if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
					return
				}
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\n%s\r\n", header)
				if name == "chunked" {
					fmt.Fprint(c, "4\r\npart\r\n")
				} else {
					fmt.Fprint(c, "part")
				}
			})
			bed := newBed(t, "ingress:\n  - service: http://"+addr+"\n")
			c := bed.open(netip.AddrPort{})
			fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
			b, err := io.ReadAll(c)
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the flow ended with %v, want a reset", err)
			}
			if strings.HasSuffix(string(b), "0\r\n\r\n") {
				t.Errorf("the body ends cleanly: %q", b)
			}
		})
	}
}

func TestBrokenOriginBeforeTheHeader(t *testing.T) {
	addr := rawOrigin(t, func(c *net.TCPConn) {
		http.ReadRequest(bufio.NewReader(c)) //nolint:errcheck // it is there
		fmt.Fprint(c, "not HTTP at all\r\n\r\n")
	})
	bed := newBed(t, "ingress:\n  - service: http://"+addr+"\n")
	if status, body := bed.get("http://a.test/"); status != 502 || !strings.Contains(body, "did not speak HTTP") {
		t.Errorf("got %d %q", status, body)
	}
}

// Each write of the origin arrives at once, and so does each of the visitor while the response is under way.
func TestFullDuplexAndEvents(t *testing.T) {
	o := server(t, func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		c.EnableFullDuplex() //nolint:errcheck // HTTP/1.1 has it
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("Trailer", "X-Sum")
		buf := make([]byte, 64)
		for n := 0; ; n++ {
			m, err := r.Body.Read(buf)
			if m > 0 {
				fmt.Fprintf(w, "data: %s\n\n", buf[:m])
				c.Flush() //nolint:errcheck // the test notices
			}
			if err != nil {
				w.Header().Set("X-Sum", fmt.Sprint(n, " ", r.Trailer.Get("X-End")))
				return
			}
		}
	})
	bed := newBed(t, "ingress:\n  - service: "+o.URL+"\n")
	pr, pw := io.Pipe()
	req, err := http.NewRequest(http.MethodPost, "http://a.test/", pr)
	must(t, err)
	req.Trailer = http.Header{"X-End": nil}
	go pw.Write([]byte("0")) //nolint:errcheck // read below
	res, err := bed.client().Do(req)
	must(t, err)
	defer res.Body.Close()
	lines := bufio.NewReader(res.Body)
	for i := range 10 {
		line, err := lines.ReadString('\n')
		must(t, err)
		if want := fmt.Sprintf("data: %d\n", i); line != want {
			t.Fatalf("got %q, want %q", line, want)
		}
		lines.ReadString('\n') //nolint:errcheck // the empty line
		if i < 9 {
			_, err := fmt.Fprint(pw, i+1)
			must(t, err)
		}
	}
	req.Trailer.Set("X-End", "fin")
	pw.Close()
	_, err = io.Copy(io.Discard, lines)
	must(t, err)
	if got := res.Trailer.Get("X-Sum"); got != "10 fin" {
		t.Errorf("trailers: got %q, want %q", got, "10 fin")
	}
}

// A part of a body of known length does not wait for the rest.
func TestPartsOfKnownLength(t *testing.T) {
	rest := make(chan struct{})
	o := server(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "8")
		fmt.Fprint(w, "part")
		http.NewResponseController(w).Flush() //nolint:errcheck // the test notices
		<-rest
		fmt.Fprint(w, "rest")
	})
	bed := newBed(t, "ingress:\n  - service: "+o.URL+"\n")
	res, err := bed.client().Get("http://a.test/")
	must(t, err)
	defer res.Body.Close()
	part := make([]byte, 4)
	_, err = io.ReadFull(res.Body, part)
	close(rest)
	if err != nil || string(part) != "part" {
		t.Fatalf("got %q, %v before the rest", part, err)
	}
	if b, err := io.ReadAll(res.Body); err != nil || string(b) != "rest" {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestUnixOrigin(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	must(t, err)
	s := &httptest.Server{Listener: ln, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Host, r.RequestURI) })}}
	s.Start()
	defer s.Close()
	bed := newBed(t, "ingress:\n  - service: unix:"+path+"\n")
	if status, body := bed.get("http://a.test/x"); status != 200 || body != "a.test/x" {
		t.Errorf("got %d %q", status, body)
	}
}

func TestTLSOrigin(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.TLS.ServerName, " ", r.Proto) }))
	defer s.Close()
	pool := filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	must(t, os.WriteFile(pool, text, 0o600))
	for _, tt := range []struct {
		name, origin string
		status       int
		body         string
	}{
		{"unknown authority", "{}", 502, "certificate was not accepted"},
		{"file", "{ca_pool: " + pool + ", origin_server_name: example.com}", 200, "example.com HTTP/1.1"},
		{"inline", fmt.Sprintf("{ca_pool: %q, origin_server_name: example.com}", text), 200, "example.com"},
		{"another name", "{ca_pool: " + pool + ", origin_server_name: other.test}", 502, "certificate"},
		{"no check", "{no_tls_verify: true}", 200, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bed := newBed(t, "ingress:\n  - service: "+s.URL+"\n    origin: "+tt.origin+"\n")
			if status, body := bed.get("http://a.test/"); status != tt.status || !strings.Contains(body, tt.body) {
				t.Errorf("got %d %q, want %d %q", status, body, tt.status, tt.body)
			}
		})
	}
	if _, err := New(HandlerConfig{Local: rulesOf(t, "ingress:\n  - service: https://a\n    origin: {ca_pool: /nonexistent}\n")}); err == nil || !strings.Contains(err.Error(), "ingress[0].origin.ca_pool") {
		t.Errorf("a missing file: got %v", err)
	}
}

func TestDisableChunkedEncoding(t *testing.T) {
	o := server(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, r.ContentLength, " ", n, " ", r.TransferEncoding)
	})
	bed := newBed(t, "ingress:\n  - {hostname: plain.test, service: '"+o.URL+"'}\n  - service: "+o.URL+"\n    origin: {disable_chunked_encoding: true}\n")
	post := func(url string, n int64) (int, string) {
		res, err := bed.client().Post(url, "text/plain", io.LimitReader(zeros{}, n)) // of unknown length
		must(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		must(t, err)
		return res.StatusCode, string(b)
	}
	if _, body := post("http://plain.test/", 10); body != "-1 10 [chunked]" {
		t.Errorf("with chunks: got %q", body)
	}
	if _, body := post("http://a.test/", 10); body != "10 10 []" {
		t.Errorf("collected: got %q", body)
	}
	if status, _ := post("http://a.test/", maxCollected+1); status != 411 {
		t.Errorf("too long: got %d, want 411", status)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// The origin learns who visits, and no connection is used for two visitors.
func TestProxyProtocol(t *testing.T) {
	for _, version := range []string{"v1", "v2"} {
		t.Run(version, func(t *testing.T) {
			addr := rawOrigin(t, func(c *net.TCPConn) {
				r := bufio.NewReader(c)
				h, err := proxyproto.Read(r)
				if err != nil {
					fmt.Fprintf(c, "HTTP/1.1 500 bad\r\nContent-Length: %d\r\n\r\n%v", len(err.Error()), err)
					return
				}
				for {
					if _, err := http.ReadRequest(r); err != nil {
						return
					}
					text := fmt.Sprint(h.Version, " ", h.SourceAddr)
					fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
				}
			})
			bed := newBed(t, "ingress:\n  - service: http://"+addr+"\n    origin: {proxy_protocol: "+version+"}\n")
			client := bed.client()
			ask := func(visitor string) string {
				req, err := http.NewRequest(http.MethodGet, "http://a.test/", nil)
				must(t, err)
				if visitor != "" {
					req.Header.Set("X-Forwarded-For", visitor)
				}
				res, err := client.Do(req)
				must(t, err)
				defer res.Body.Close()
				b, err := io.ReadAll(res.Body)
				must(t, err)
				return string(b)
			}
			n := version[1:]
			for visitor, want := range map[string]string{"203.0.113.7": n + " 203.0.113.7:0", "2001:db8::7": n + " [2001:db8::7]:0", "": n + " <nil>"} {
				if got := ask(visitor); got != want {
					t.Errorf("visitor %q: got %q, want %q", visitor, got, want)
				}
			}
			if _, body := bed.raw("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.9\r\nConnection: close\r\n\r\n"); body != n+" 203.0.113.9:4711" {
				t.Errorf("the flow is the visitor's: got %q", body)
			}
		})
	}
}
