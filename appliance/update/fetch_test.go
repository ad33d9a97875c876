package update

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"aead.dev/minisign"

	"github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/appliance/slot"
	"github.com/keyhaven/keyhaven/internal/freeport"
)

// fast are intervals for a real server on the loopback.
var fast = Timing{Resume: time.Millisecond, Stalled: 10 * time.Second, Total: time.Minute}

// testSource returns a source at a server.
func testSource(t *testing.T, address string, keys []minisign.PublicKey, timing Timing, log *slog.Logger) *source {
	t.Helper()
	timing.setDefaults()
	s, err := newSource(Config{Source: address, Keys: keys, Timing: timing, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// body is what a download is about, and its release.
func body(t *testing.T) ([]byte, bundle.Release) {
	t.Helper()
	b := make([]byte, 300<<10)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b) // never fails
	return b, bundle.Release{Version: "1.1.0", URL: "b.update", Size: int64(len(b)), SHA256: sumOf(b)}
}

// A fault answers the n-th request in place of a file server, and says whether it did.
type fault func(w http.ResponseWriter, r *http.Request, n int, b []byte) bool

func server(t *testing.T, b []byte, f fault) (*httptest.Server, *atomic.Int64) {
	t.Helper()
	var n atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if i := int(n.Add(1)); f != nil && f(w, r, i, b) {
			return
		}
		w.Header().Set("ETag", `"one"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	t.Cleanup(s.Close)
	return s, &n
}

// cutAfter sends the head of an answer and so many bytes, and cuts the connection.
func cutAfter(w http.ResponseWriter, status int, header map[string]string, b []byte) bool {
	for k, v := range header {
		w.Header().Set(k, v)
	}
	w.WriteHeader(status)
	_, _ = w.Write(b)
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

func from(r *http.Request) int {
	n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(r.Header.Get("Range"), "bytes="), "-"))
	return n
}

func TestDownload(t *testing.T) {
	all, rel := body(t)
	whole := strconv.Itoa(len(all))
	for name, c := range map[string]struct {
		fault fault
		want  error  // nil: any that has text
		text  string // empty: it works
		asked int64  // requests; 0: not counted
	}{
		"whole": {nil, nil, "", 1},
		"cut three times": {func(w http.ResponseWriter, r *http.Request, n int, b []byte) bool {
			if n > 3 {
				return false
			}
			at := from(r)
			h := map[string]string{"ETag": `"one"`, "Content-Length": strconv.Itoa(len(b) - at)}
			if at == 0 {
				return cutAfter(w, 200, h, b[:70_000])
			}
			h["Content-Range"] = fmt.Sprintf("bytes %d-%d/%d", at, len(b)-1, len(b))
			return cutAfter(w, 206, h, b[at:at+50_000])
		}, nil, "", 4},
		"cut, and no ranges": {func(w http.ResponseWriter, r *http.Request, n int, b []byte) bool {
			r.Header.Del("Range")
			return n == 1 && cutAfter(w, 200, map[string]string{"ETag": `"one"`, "Content-Length": whole}, b[:100_000])
		}, nil, "", 2},
		"cut before each byte": {func(w http.ResponseWriter, r *http.Request, n int, b []byte) bool {
			return cutAfter(w, 200, map[string]string{"Content-Length": whole}, nil)
		}, nil, "without a byte more", maxResumes + 1},
		"ends early every time": {func(w http.ResponseWriter, _ *http.Request, _ int, b []byte) bool {
			_, _ = w.Write(b[:200_000]) // chunked: it looks whole
			_ = http.NewResponseController(w).Flush()
			return true
		}, nil, "without a byte more", 0},
		"longer than said": {func(w http.ResponseWriter, _ *http.Request, _ int, b []byte) bool {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)+4))
			_, _ = w.Write(append(bytes.Clone(b), "more"...))
			return true
		}, bundle.ErrCorrupt, "the index says " + whole, 1},
		"longer, chunked": {func(w http.ResponseWriter, _ *http.Request, _ int, b []byte) bool {
			_ = http.NewResponseController(w).Flush()
			_, _ = w.Write(append(bytes.Clone(b), "more"...))
			return true
		}, nil, "", 1},
		"another file": {func(w http.ResponseWriter, r *http.Request, _ int, b []byte) bool {
			b = bytes.Clone(b)
			b[1000] ^= 1
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
			return true
		}, bundle.ErrCorrupt, "SHA-256", 1},
		"replaced meanwhile": {func(w http.ResponseWriter, r *http.Request, n int, b []byte) bool {
			if n == 1 {
				return cutAfter(w, 200, map[string]string{"ETag": `"zero"`, "Content-Length": whole}, b[:100_000])
			}
			return false
		}, bundle.ErrCorrupt, "changed during the download", 2},
		"range of something else": {func(w http.ResponseWriter, r *http.Request, n int, b []byte) bool {
			if n == 1 {
				return cutAfter(w, 200, map[string]string{"Content-Length": whole}, b[:100_000])
			}
			w.Header().Set("Content-Range", "bytes 0-9/10")
			w.WriteHeader(206)
			return true
		}, bundle.ErrCorrupt, "bytes 0-9/10", 2},
		"missing": {func(w http.ResponseWriter, r *http.Request, _ int, _ []byte) bool {
			http.NotFound(w, r)
			return true
		}, nil, "is update.source right", 1},
		"forbidden": {func(w http.ResponseWriter, _ *http.Request, _ int, _ []byte) bool {
			w.WriteHeader(403)
			return true
		}, nil, "who asks", 1},
		"busy twice": {func(w http.ResponseWriter, _ *http.Request, n int, _ []byte) bool {
			if n <= 2 {
				w.WriteHeader(503)
			}
			return n <= 2
		}, nil, "", 3},
		"busy for ever": {func(w http.ResponseWriter, _ *http.Request, _ int, _ []byte) bool {
			w.WriteHeader(503)
			return true
		}, nil, "503 Service Unavailable", maxResumes + 1},
		"redirects for ever": {func(w http.ResponseWriter, r *http.Request, _ int, _ []byte) bool {
			http.Redirect(w, r, r.URL.Path, http.StatusFound)
			return true
		}, nil, "redirects more than 5 times", 0},
	} {
		t.Run(name, func(t *testing.T) {
			s, asked := server(t, all, c.fault)
			d, err := testSource(t, s.URL, nil, fast, quiet).download(t.Context(), "stable", rel)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			got, err := io.ReadAll(d)
			switch {
			case c.text == "" && (err != nil || !bytes.Equal(got, all)):
				t.Errorf("got %d bytes, %v", len(got), err)
			case c.text != "" && (err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text)):
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			case len(got) > len(all):
				t.Errorf("%d bytes were taken, more than %d", len(got), len(all))
			}
			if n := asked.Load(); c.asked != 0 && n != c.asked {
				t.Errorf("asked %d times, want %d", n, c.asked)
			}
		})
	}
}

// A peer that sends nothing does not hold a download: it goes on over another connection.
func TestDownloadStalls(t *testing.T) {
	all, rel := body(t)
	s, asked := server(t, all, func(w http.ResponseWriter, r *http.Request, n int, b []byte) bool {
		if n > 2 {
			return false
		}
		if at := from(r); at == 0 {
			w.Header().Set("ETag", `"one"`)
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(b[:1000])
			_ = http.NewResponseController(w).Flush()
		}
		<-r.Context().Done() // until the device gives up
		return true
	})
	timing := fast
	timing.Stalled = 50 * time.Millisecond
	d, err := testSource(t, s.URL, nil, timing, quiet).download(t.Context(), "stable", rel)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if got, err := io.ReadAll(d); err != nil || !bytes.Equal(got, all) || asked.Load() < 3 {
		t.Errorf("got %d bytes, %v, asked %d times", len(got), err, asked.Load())
	}
}

// A download that would take for ever ends.
func TestDownloadIsTooSlow(t *testing.T) {
	all, rel := body(t)
	s, _ := server(t, all, func(w http.ResponseWriter, r *http.Request, _ int, b []byte) bool {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		for i := range b {
			if _, err := w.Write(b[i : i+1]); err != nil {
				return true
			}
			_ = http.NewResponseController(w).Flush()
			time.Sleep(time.Millisecond)
		}
		return true
	})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	d, err := testSource(t, s.URL, nil, fast, quiet).download(ctx, "stable", rel)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := io.ReadAll(d); err == nil || !strings.Contains(err.Error(), "fast enough") {
		t.Errorf("got %v", err)
	}
}

func TestIndexIsAskedConditionally(t *testing.T) {
	p := newPublisher(t)
	p.publish(t, "1.1.0", 100)
	var full, not atomic.Int64
	for _, header := range []string{"ETag", "Last-Modified"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("If-None-Match") == `"x"` || r.Header.Get("If-Modified-Since") != "" {
				not.Add(1)
				w.WriteHeader(http.StatusNotModified)
				return
			}
			full.Add(1)
			if header == "ETag" {
				w.Header().Set(header, `"x"`)
			} else {
				w.Header().Set(header, "Fri, 02 Jan 2026 03:04:05 GMT")
			}
			_, _ = w.Write(p.files[r.URL.Path])
		}))
		src := testSource(t, s.URL+"/", []minisign.PublicKey{p.pub}, fast, quiet)
		for range 3 {
			x, err := src.index(t.Context(), "stable", "arm64", time.Time{})
			if r, ok := x.Release(""); err != nil || !ok || r.Version != "1.1.0" {
				t.Errorf("%s: got %+v, %v", header, x, err)
			}
		}
		s.Close()
	}
	if full.Load() != 2 || not.Load() != 4 {
		t.Errorf("%d whole answers and %d short ones, want 2 and 4", full.Load(), not.Load())
	}
}

func TestIndexFaults(t *testing.T) {
	p := newPublisher(t)
	p.publish(t, "1.1.0", 100)
	good := p.files["/stable/arm64.json"]
	foreign := newPublisher(t)
	foreign.publish(t, "6.6.6", 100)
	var answer []byte
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(answer) }))
	defer s.Close()
	for name, c := range map[string]struct {
		answer        []byte
		channel, arch string
		want          error
	}{
		"a page":          {[]byte("<html>log in to this network</html>"), "stable", "arm64", bundle.ErrFormat},
		"another key":     {foreign.files["/stable/arm64.json"], "stable", "arm64", bundle.ErrKey},
		"another channel": {good, "beta", "arm64", bundle.ErrArch},
		"another arch":    {good, "stable", "armhf", bundle.ErrArch},
		"endless":         {bytes.Repeat([]byte(" "), 4<<20), "stable", "arm64", bundle.ErrTooLarge},
	} {
		answer = c.answer
		src := testSource(t, s.URL, []minisign.PublicKey{p.pub}, fast, quiet)
		if _, err := src.index(t.Context(), c.channel, c.arch, time.Time{}); !errors.Is(err, c.want) || !strings.Contains(err.Error(), s.URL) {
			t.Errorf("%s: got %v, want %v and the address", name, err, c.want)
		}
	}
}

func TestRedirectFromHTTPSIsRefused(t *testing.T) {
	plain, _ := server(t, nil, nil)
	s := httptest.NewTLSServer(http.RedirectHandler(plain.URL+"/x", http.StatusFound))
	defer s.Close()
	src := testSource(t, s.URL, nil, fast, quiet)
	src.client = &http.Client{Transport: s.Client().Transport, CheckRedirect: src.client.CheckRedirect}
	if _, err := src.index(t.Context(), "stable", "arm64", time.Time{}); err == nil || !strings.Contains(err.Error(), "from https to http") {
		t.Errorf("got %v", err)
	}
}

// Where a bundle is: beside the index unless it says otherwise, with the credentials of the source for its own host alone.
func TestBundleAddress(t *testing.T) {
	src := testSource(t, "https://user:s3cret@updates.example.com/keyhaven/", nil, fast, quiet)
	for ref, want := range map[string]string{
		"a.update":                         "https://user:s3cret@updates.example.com/keyhaven/stable/a.update",
		"../a.update":                      "https://user:s3cret@updates.example.com/keyhaven/a.update",
		"https://cdn.example.com/a.update": "https://cdn.example.com/a.update",
		"//cdn.example.com/a.update":       "https://cdn.example.com/a.update",
	} {
		d, err := src.download(t.Context(), "stable", bundle.Release{URL: ref})
		if err != nil || d.u.String() != want {
			t.Errorf("%s: got %v, %v, want %s", ref, d.u, err, want)
		}
	}
	for _, bad := range []string{"", "updates.example.com", "ftp://x/", "https://", "https://x/?token=s3cret", "https://u:s3cret@%zz/"} {
		if _, err := newSource(Config{Source: bad}); err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: got %v", bad, err)
		}
	}
}

// A whole update from a real server over connections that are cut, and the states that are told on the way.
func TestUpdateOverBadNetwork(t *testing.T) {
	m, p := newMachine("1.0.0"), newPublisher(t)
	p.publish(t, "1.1.0", 100)
	var mu sync.Mutex
	cuts := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b := p.files[r.URL.Path]
		mu.Lock()
		cuts++
		first := strings.HasSuffix(r.URL.Path, ".update") && cuts < 5
		mu.Unlock()
		if at := from(r); first && at == 0 {
			cutAfter(w, 200, map[string]string{"Content-Length": strconv.Itoa(len(b))}, b[:10])
		} else if first {
			cutAfter(w, 206, map[string]string{"Content-Range": fmt.Sprintf("bytes %d-%d/%d", at, len(b)-1, len(b)), "Content-Length": strconv.Itoa(len(b) - at)}, b[at:at+10])
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	defer s.Close()
	var texts []string
	var e *Engine
	e = m.engine(t, p, func(c *Config) {
		c.Source, c.HTTP, c.Timing = s.URL, nil, fast
		c.Changed = func() {
			if e != nil {
				texts = append(texts, e.Text(), e.Report().State)
			}
		}
	})
	if err := e.Update(t.Context(), Request{}); !errors.Is(err, ErrRestart) || m.slots[slot.PartB].Version != "1.1.0" {
		t.Fatalf("got %v", err)
	}
	for _, state := range []string{fleet.Checking, fleet.Downloading, fleet.Writing, fleet.Trial} {
		if !slices.Contains(texts, state) {
			t.Errorf("state %s was not told: %q", state, texts)
		}
	}
}

// The index and the bundle are of the same version, or neither is believed.
func TestBundleOfAnotherVersion(t *testing.T) {
	m, p := newMachine("1.0.0"), newPublisher(t)
	p.publish(t, "1.1.0", 100)
	p.publish(t, "1.2.0", 100)
	older := p.index.Releases[0]
	p.files["/stable/1.2.0.update"] = p.files["/stable/1.1.0.update"]
	p.index.Releases[1].Size, p.index.Releases[1].SHA256 = older.Size, older.SHA256
	p.write(t)
	e := m.engine(t, p, nil)
	if err := e.Update(t.Context(), Request{}); !errors.Is(err, bundle.ErrCorrupt) || len(m.restarts) > 0 {
		t.Errorf("got %v, restarts %q", err, m.restarts)
	}
	wantReport(t, e, "1.0.0", fleet.Failed, "1.2.0", "the index says 1.2.0, the bundle is 1.1.0")
}

// Whatever fails, the password of the source's address appears nowhere: not in errors, reports, texts, records or the log.
func TestPasswordStaysSecret(t *testing.T) {
	const canary = "c4n4ry"
	p := newPublisher(t)
	p.publish(t, "1.1.0", 100)
	refused, err := freeport.Addr("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	away := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(fmt.Sprint(r.Header), canary) || r.Header.Get("Authorization") != "" {
			t.Error("another host was told the password")
		}
		http.NotFound(w, r)
	}))
	defer away.Close()
	asked := ""
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, asked, _ = r.BasicAuth()
		switch {
		case strings.HasPrefix(r.URL.Path, "/redirect"):
			http.Redirect(w, r, strings.Replace(away.URL, "127.0.0.1", "localhost", 1)+"/x", http.StatusFound)
		case strings.HasPrefix(r.URL.Path, "/loop"):
			http.Redirect(w, r, r.URL.Path, http.StatusFound)
		case strings.HasPrefix(r.URL.Path, "/cut") && strings.HasSuffix(r.URL.Path, ".update"):
			panic(http.ErrAbortHandler)
		case strings.HasPrefix(r.URL.Path, "/cut"):
			_, _ = w.Write(p.files["/stable/arm64.json"])
		default:
			http.NotFound(w, r)
		}
	}))
	defer s.Close()
	for _, address := range []string{s.URL + "/missing", s.URL + "/redirect", s.URL + "/loop", s.URL + "/cut", "http://" + refused, "https://" + s.Listener.Addr().String()} {
		u, err := url.Parse(address)
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword("user", canary)
		var log bytes.Buffer
		m := newMachine("1.0.0")
		e := m.engine(t, p, func(c *Config) {
			c.Source, c.HTTP, c.Timing = u.String(), nil, fast
			c.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		})
		err = e.Update(t.Context(), Request{})
		if err == nil || errors.Is(err, ErrRestart) {
			t.Errorf("%s: got %v", address, err)
		}
		all := fmt.Sprintf("%v %+v %s %s %s", err, e.Report(), e.Text(), log.String(), m.files[recordFile])
		if strings.Contains(all, canary) || log.Len() == 0 {
			t.Errorf("%s: the password is in %s", address, all)
		}
	}
	if asked != canary {
		t.Error("the server was never told the password: the test looks at the wrong thing")
	}
}
