package ingress

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("%s: still not so after %v", what, patience)
}

// flow is a TCP connection in place of a flow of the tunnel.
type flow struct{ *net.TCPConn }

func (f flow) Reset(tunnel.Result) {
	f.SetLinger(0) //nolint:errcheck // the test then fails
	f.Close()      //nolint:errcheck // it is cut
}

// bed is a handler with the edge's ends of flows to it.
type bed struct {
	t *testing.T
	*Handler
	log lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func rulesOf(t *testing.T, yaml string) *ingressconf.Config {
	t.Helper()
	c, err := ingressconf.Parse([]byte(yaml))
	must(t, err)
	return c
}

func newBed(t *testing.T, yaml string) *bed {
	return openBed(t, HandlerConfig{Local: rulesOf(t, yaml)})
}

func openBed(t *testing.T, cfg HandlerConfig) *bed {
	t.Helper()
	b := &bed{t: t}
	cfg.Logger = slog.New(slog.NewTextHandler(&b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	h, err := New(cfg)
	must(t, err)
	b.Handler = h
	t.Cleanup(func() { must(t, h.Close()) })
	return b
}

// open returns the edge's end of a new flow of requests.
func (b *bed) open(visitor netip.AddrPort) *net.TCPConn {
	b.t.Helper()
	mine, theirs := pair(b.t)
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(done)
		b.ServeFlow(ctx, flow{theirs}, tunnel.Flow{Kind: tunnel.KindIngress, Service: "http", Visitor: visitor})
	}()
	b.t.Cleanup(func() { mine.Close(); cancel(); <-done })
	return mine
}

func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	must(t, err)
	d, err := ln.Accept()
	must(t, err)
	must(t, c.SetDeadline(time.Now().Add(patience)))
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// client makes requests over flows as an edge does.
func (b *bed) client() *http.Client {
	tr := &http.Transport{DisableCompression: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return b.open(netip.AddrPort{}), nil
	}}
	b.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// get makes one request and returns status and body.
func (b *bed) get(url string) (int, string) {
	b.t.Helper()
	res, err := b.client().Get(url)
	must(b.t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	must(b.t, err)
	return res.StatusCode, string(body)
}

// raw sends bytes over a new flow and reads one response.
func (b *bed) raw(text string) (int, string) {
	b.t.Helper()
	c := b.open(netip.MustParseAddrPort("203.0.113.9:4711"))
	_, err := io.WriteString(c, text)
	must(b.t, err)
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	must(b.t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	must(b.t, err)
	return res.StatusCode, string(body)
}

func server(t *testing.T, f http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	return s
}

// rawOrigin answers each connection with f.
func rawOrigin(t *testing.T, f func(c *net.TCPConn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience)) //nolint:errcheck // reads would fail
				f(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// downAddr is an address where nothing listens.
func downAddr(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	return ln.Addr().String()
}

func wantHas(t *testing.T, what, got string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(got, p) {
			t.Errorf("%s: got %q, want it to have %q", what, got, p)
		}
	}
}

// permitAll lets everything be; permitNone nothing.
type permitAll struct{}

func (permitAll) Name(string, uint16) bool         { return true }
func (permitAll) Addr(string, netip.AddrPort) bool { return true }

type permitNone struct{}

func (permitNone) Name(string, uint16) bool         { return false }
func (permitNone) Addr(string, netip.AddrPort) bool { return false }
