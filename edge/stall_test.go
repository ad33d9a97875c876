package edge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// postHalf sends the beginning of a body, of a length or of none (-1), and returns the answer. Over HTTP/1.1 it writes by
// hand: net/http's client waits for its body.
func (w *world) postHalf(version string, length int64) (status int, body string) {
	w.t.Helper()
	if version == "1.1" {
		framing := fmt.Sprintf("Content-Length: %d\r\n\r\n", length)
		if length < 0 {
			framing = "Transfer-Encoding: chunked\r\n\r\nd\r\n"
		}
		res, body := roundTrip(w.t, w.raw("a.test"), "POST / HTTP/1.1\r\nHost: a.test\r\n"+framing+"the beginning")
		return res.StatusCode, body
	}
	pr, pw := io.Pipe()
	w.t.Cleanup(func() { _ = pw.Close() })
	go func() { _, _ = io.WriteString(pw, "the beginning") }()
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", "https://a.test/", pr)
	must(w.t, err)
	req.ContentLength = length
	res, err := w.client(version).Do(req)
	if err != nil {
		w.t.Fatalf("HTTP/%s, length %d: %v", version, length, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	must(w.t, err)
	return res.StatusCode, string(b)
}

// A body that stops arriving must not hold the edge, the tunnel and the origin for ever.
func TestStalledUploadsAreCut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cut := make(chan error, 10)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		cut <- err
	}), "a.test")
	w.cfg.Limits.BodyIdleTimeout = 300 * time.Millisecond
	w.start()
	for _, v := range versions {
		for _, length := range []int64{1000, -1} {
			status, body := w.postHalf(v, length)
			if status != http.StatusRequestTimeout || !strings.Contains(body, "did not arrive in full") {
				t.Errorf("HTTP/%s, length %d: %d %q", v, length, status, body)
			}
			if err := <-cut; err == nil {
				t.Errorf("HTTP/%s, length %d: the origin took the stalled body for a whole one", v, length)
			}
		}
	}
}

// What may be silent: streams in both directions, from the response's header on; gRPC from its beginning; and events.
func TestSilentStreamsAreNotCut(t *testing.T) {
	const limit = 100 * time.Millisecond
	w := newWorld(t)
	tlsURL, originTLS := w.tlsOrigin(func(rw http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(rw).EnableFullDuplex()
		if r.Header.Get("Content-Type") == "application/grpc" {
			_, _ = io.ReadFull(r.Body, make([]byte, 4))
		}
		rw.WriteHeader(200)
		_ = http.NewResponseController(rw).Flush()
		if r.Method == "GET" {
			time.Sleep(4 * limit)
			_, _ = io.WriteString(rw, "event")
			return
		}
		_, _ = io.Copy(rw, r.Body)
	})
	w.addZone("a", "p256", tlsURL, "a.test").Origins[0].TLS = originTLS
	w.cfg.Limits.BodyIdleTimeout = limit
	w.start()
	for _, v := range versions {
		for kind, want := range map[string]string{"": "", "stream": "word", "application/grpc": "word"} {
			method, body := "GET", io.Reader(nil)
			pr, pw := io.Pipe()
			if kind != "" {
				method, body = "POST", pr
				go func() {
					time.Sleep(4 * limit) // for gRPC nothing at all has come by then
					if kind == "application/grpc" {
						_, _ = io.WriteString(pw, "call")
						time.Sleep(4 * limit)
					}
					_, _ = io.WriteString(pw, want)
					_ = pw.Close()
				}()
			} else {
				want = "event"
			}
			req, err := http.NewRequest(method, "https://a.test/", body)
			must(t, err)
			req.Header.Set("Content-Type", kind)
			res, err := w.client(v).Do(req)
			if err != nil {
				t.Fatalf("HTTP/%s %q: %v", v, kind, err)
			}
			if got, err := io.ReadAll(res.Body); string(got) != want || err != nil {
				t.Errorf("HTTP/%s %q: %d %q %v", v, kind, res.StatusCode, got, err)
			}
			_ = res.Body.Close()
		}
	}
}

// An origin that takes its time is not the visitor's fault.
func TestSlowOriginDoesNotCutUploads(t *testing.T) {
	const limit, size = 200 * time.Millisecond, 8 << 20
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		time.Sleep(4 * limit)
		if n, err := io.Copy(io.Discard, r.Body); n != size || err != nil {
			http.Error(rw, "cut", http.StatusInternalServerError)
		}
	}), "a.test")
	w.cfg.Limits.BodyIdleTimeout = limit
	w.start()
	for _, v := range versions {
		res, err := w.client(v).Post("https://a.test/", "text/plain", io.LimitReader(zeros{}, size))
		must(t, err)
		if res.StatusCode != http.StatusOK {
			t.Errorf("HTTP/%s: %s", v, res.Status)
		}
		_ = res.Body.Close()
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A visitor who does not take a response must not hold the origin for ever.
func TestStalledDownloadsAreCut(t *testing.T) {
	w := newWorld(t)
	ended := make(chan struct{}, 10)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(rw, io.LimitReader(zeros{}, 1<<30))
		ended <- struct{}{}
	}), "a.test")
	w.cfg.Limits.BodyIdleTimeout = 300 * time.Millisecond
	w.start()
	for _, v := range versions {
		res, err := w.client(v).Get("https://a.test/")
		must(t, err)
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			t.Errorf("HTTP/%s: the origin is held", v)
		}
		if n, err := io.Copy(io.Discard, res.Body); err == nil {
			t.Errorf("HTTP/%s: %d bytes with a clean end", v, n)
		}
		_ = res.Body.Close()
	}
}

// A response that comes before the body has arrived must reach the visitor in full, however long the body lasts.
func TestEarlyResponseToAStalledUpload(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		http.Error(rw, "too large", http.StatusRequestEntityTooLarge)
	}), "a.test")
	w.cfg.Limits.BodyIdleTimeout = 10 * time.Minute
	w.start()
	for _, v := range versions {
		if status, body := w.postHalf(v, 1<<20); status != http.StatusRequestEntityTooLarge || body != "too large\n" {
			t.Errorf("HTTP/%s: %d %q", v, status, body)
		}
	}
}

// What a malformed body leaves on the connection is no request, and the page does not blame the origin.
func TestMalformedBody(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/smuggled" {
			t.Error("the origin saw what stood behind a malformed body")
		}
		_, _ = io.Copy(io.Discard, r.Body)
	}), "a.test")
	w.start()
	c := w.raw("a.test")
	res, body := roundTrip(t, c, "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\nzzz\r\nGET /smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n")
	if res.StatusCode != http.StatusBadRequest || !strings.Contains(body, "body is not valid") || !res.Close {
		t.Errorf("%s, close %v: %s", res.Status, res.Close, body)
	}
	if rest, err := io.ReadAll(c); len(rest) != 0 || (err != nil && !errors.Is(err, io.ErrUnexpectedEOF)) {
		t.Errorf("after it: %q, %v", rest, err)
	}
}
