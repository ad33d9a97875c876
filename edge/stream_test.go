package edge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
)

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

// An origin that switches protocols unasked gets neither the visitor's connection nor a connection that nobody closes.
func TestSwitchThatWasNotAskedFor(t *testing.T) {
	for _, head := range []string{"", "Connection: Upgrade\r\nUpgrade: websocket\r\n"} {
		ended := make(chan error, 1)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		defer ln.Close()
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = http.ReadRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\n"+head+"\r\n")
				_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
				_, err = c.Read(make([]byte, 1))
				_ = c.Close()
				ended <- err
			}
		}()
		w := newWorld(t)
		w.addZone("a", "p256", "http://"+ln.Addr().String(), "a.test")
		w.start()
		for _, version := range versions {
			res, err := w.client(version).Get("https://a.test/")
			must(t, err)
			_ = res.Body.Close()
			if res.StatusCode != http.StatusBadGateway {
				t.Errorf("HTTP/%s: got %d, want 502", version, res.StatusCode)
			}
			if err := <-ended; err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("HTTP/%s: the origin's connection stays open: %v", version, err)
			}
		}
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
