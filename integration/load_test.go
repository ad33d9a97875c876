//go:build netns && upgrade

package integration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A load is visitors who come all the time. A request has failed if it ended in anything but the whole page. A refused
// connection is no failed request: such a visitor tries the next edge, and all again for a while, as browsers do.
type load struct {
	w     *world
	roots *x509.CertPool
	edges []string // host:port
	stop  func()
	wg    sync.WaitGroup

	mu      sync.Mutex // guards the rest
	good    map[string]int
	failed  []string
	refused time.Duration // the longest time in which no edge could be connected to
	phase   string
}

// visitAll starts visitors of every kind at the edges.
func (w *world) visitAll(t *testing.T, edges ...string) *load {
	t.Helper()
	pem, err := os.ReadFile(w.Roots())
	must(t, err)
	l := &load{w: w, roots: x509.NewCertPool(), edges: edges, good: map[string]int{}}
	l.roots.AppendCertsFromPEM(pem)
	ctx, cancel := context.WithCancel(t.Context())
	l.stop = sync.OnceFunc(func() {
		cancel()
		l.wg.Wait()
	})
	t.Cleanup(l.stop)
	for i := range 2 {
		l.wg.Go(func() {
			l.loop(ctx, "new visitor", i, func() *http.Client { return l.client(i, false) }, "/", "private origin")
		})
		kept := l.client(i, true)
		l.wg.Go(func() { l.loop(ctx, "kept connection", i, func() *http.Client { return kept }, "/", "private origin") })
		l.wg.Go(func() {
			l.loop(ctx, "event stream", i, func() *http.Client { return l.client(i, i == 0) }, "/events?n=15", "data: 14")
		})
	}
	return l
}

// client makes a client that begins with the i-th edge.
func (l *load) client(i int, http2 bool) *http.Client {
	cfg := &tls.Config{RootCAs: l.roots, ServerName: plain}
	if http2 {
		cfg.NextProtos, cfg.ClientSessionCache = []string{"h2"}, tls.NewLRUClientSessionCache(8)
	}
	return &http.Client{Transport: &http.Transport{ForceAttemptHTTP2: http2, DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		raw, err := l.dial(ctx, i)
		if err != nil {
			return nil, err
		}
		c := tls.Client(raw, cfg)
		if err := c.HandshakeContext(ctx); err != nil {
			raw.Close()
			return nil, fmt.Errorf("handshake: %w", err)
		}
		return c, nil
	}}}
}

func (l *load) dial(ctx context.Context, i int) (c net.Conn, err error) {
	began := time.Now()
	for try := range 600 {
		c, err = l.w.visitor.Dial(ctx, l.edges[(i+try)%len(l.edges)])
		// A listener that is closed resets what it has not yet taken: that too is known before anything was sent.
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) {
			break
		}
		if try%len(l.edges) == len(l.edges)-1 {
			time.Sleep(50 * time.Millisecond)
			l.mu.Lock()
			l.refused = max(l.refused, time.Since(began))
			l.mu.Unlock()
		}
	}
	return c, err
}

func (l *load) loop(ctx context.Context, kind string, i int, client func() *http.Client, path, want string) {
	for ctx.Err() == nil {
		c := client()
		began := time.Now()
		err := l.get(ctx, c, path, want)
		if kind != "kept connection" {
			c.CloseIdleConnections()
		}
		if ctx.Err() != nil {
			break
		}
		l.mu.Lock()
		if err == nil {
			l.good[kind]++
		} else {
			l.failed = append(l.failed, fmt.Sprintf("%s: %s %d, begun %s, failed %s: %v", l.phase, kind, i, began.Format("05.000"), time.Now().Format("05.000"), err))
		}
		l.mu.Unlock()
		time.Sleep(20 * time.Millisecond)
	}
	client().CloseIdleConnections()
}

func (l *load) get(ctx context.Context, c *http.Client, path, want string) error {
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+plain+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
		return fmt.Errorf("%s: %.100q", resp.Status, body)
	}
	return nil
}

// during names what happens next, for the failures, and waits until each kind of visitor has been served since.
func (l *load) during(t *testing.T, phase string, f func()) {
	t.Helper()
	l.mu.Lock()
	l.phase = phase
	l.mu.Unlock()
	began := time.Now()
	f()
	before := map[string]int{}
	l.mu.Lock()
	for _, kind := range []string{"new visitor", "kept connection", "event stream"} {
		before[kind] = l.good[kind]
	}
	l.mu.Unlock()
	eventually(t, "visitors are served after: "+phase, func(context.Context) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		for kind, n := range before {
			if l.good[kind] < n+3 {
				return fmt.Errorf("no more of %s succeeded; failures: %q", kind, l.failed)
			}
		}
		return nil
	})
	t.Logf("%-50s %.1f s", phase, time.Since(began).Seconds())
}

// forgive takes out the failures of a phase that hold text, and says how many there were.
func (l *load) forgive(t *testing.T, phase, text string) {
	t.Helper()
	l.stop()
	n := len(l.failed)
	l.failed = slices.DeleteFunc(l.failed, func(f string) bool { return strings.HasPrefix(f, phase) && strings.Contains(f, text) })
	if n -= len(l.failed); n > 0 {
		t.Logf("forgiven: %d × %s %s", n, phase, text)
	}
}

// end stops the visitors. Each request that failed is an error.
func (l *load) end(t *testing.T) {
	t.Helper()
	l.stop()
	t.Logf("requests: %v, %d failed; longest time without an edge to connect to: %.2f s", l.good, len(l.failed), l.refused.Seconds())
	for _, f := range l.failed {
		t.Error(f)
	}
}
