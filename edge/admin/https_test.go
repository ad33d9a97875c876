package admin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/mtls"
)

// issue makes an identity of the authority.
func issue(t *testing.T, a *mtls.Authority, kind mtls.Kind, name string, lifetime time.Duration) *mtls.Source {
	t.Helper()
	key, csr, err := mtls.NewKeyCSR()
	must(t, err)
	chain, err := a.IssueCSR(csr, mtls.Identity{TrustDomain: a.TrustDomain(), Kind: kind, Name: name}, lifetime)
	must(t, err)
	dir := filepath.Join(t.TempDir(), name)
	must(t, mtls.WriteIdentity(dir, key, chain, a.RootPEM()))
	src, err := mtls.OpenDir(dir, nil)
	must(t, err)
	return src
}

// A lockedBuffer is a log that several goroutines write.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A remote is a server with HTTPS.
type remote struct {
	*Server
	authority *mtls.Authority
	url       string
	log       *lockedBuffer
}

func serveHTTPS(t *testing.T, operators ...string) *remote {
	t.Helper()
	a, err := mtls.InitAuthority(filepath.Join(t.TempDir(), "ca"), "edge.test")
	must(t, err)
	r := &remote{authority: a, log: &lockedBuffer{}}
	r.Server, err = Listen(Config{Socket: filepath.Join(t.TempDir(), "s"), Control: newControl(t), Listen: "127.0.0.1:0", Operators: operators,
		Identity: issue(t, a, mtls.KindEdge, "e1", 0), Logger: slog.New(slog.NewTextHandler(r.log, nil))})
	must(t, err)
	r.url = "https://" + r.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return r
}

func (r *remote) client(t *testing.T, id *mtls.Source) *Client {
	t.Helper()
	c, err := NewRemote(r.url, id)
	must(t, err)
	t.Cleanup(c.Close)
	return c
}

func TestOperators(t *testing.T) {
	r := serveHTTPS(t, "alice", "late")
	alice := r.client(t, issue(t, r.authority, mtls.KindOperator, "alice", 0))
	_, err := alice.AddVNet(t.Context(), "red", "", false)
	must(t, err)
	if log := r.log.String(); !strings.Contains(log, "peer=spiffe://edge.test/operator/alice") || !strings.Contains(log, `op="POST /v1/vnets"`) {
		t.Errorf("the log does not name who did it: %s", log)
	}
	mallory := r.client(t, issue(t, r.authority, mtls.KindOperator, "mallory", 0))
	_, err = mallory.VNets(t.Context())
	if e, ok := errors.AsType[*Error](err); !ok || e.Code != CodeDenied || !strings.Contains(err.Error(), "admin.operators") {
		t.Errorf("an operator who is not on the list: %v", err)
	}
	// Whoever leaves the list is out at the next request, on the same connection.
	r.SetOperators([]string{"mallory"})
	if _, err := alice.VNets(t.Context()); err == nil {
		t.Error("an operator who was taken off the list is served")
	}
	_, err = mallory.VNets(t.Context())
	must(t, err)
	r.SetOperators(nil)
	if _, err := mallory.VNets(t.Context()); err == nil {
		t.Error("an empty list admits somebody")
	}
}

// Other kinds of certificate, and other authorities', do not even get a connection.
func TestOnlyOperatorsConnect(t *testing.T) {
	r := serveHTTPS(t, "x")
	other, err := mtls.InitAuthority(filepath.Join(t.TempDir(), "ca"), "edge.test")
	must(t, err)
	for name, id := range map[string]*mtls.Source{
		"edge": issue(t, r.authority, mtls.KindEdge, "x", 0), "connector": issue(t, r.authority, mtls.KindConnector, "x", 0),
		"another authority's": issue(t, other, mtls.KindOperator, "x", 0),
	} {
		tr := &http.Transport{TLSClientConfig: id.ClientConfig(mtls.ClientOptions{ALPN: []string{"http/1.1"}, Expect: func(mtls.Identity) error { return nil }}), DisableKeepAlives: true}
		if name == "another authority's" {
			tr.TLSClientConfig.VerifyConnection = nil
		}
		req, err := http.NewRequestWithContext(t.Context(), get, r.url+"/v1/status", nil)
		must(t, err)
		req.Host = hostName
		if resp, err := tr.RoundTrip(req); err == nil {
			resp.Body.Close()
			t.Errorf("%s: status %d, want no connection", name, resp.StatusCode)
		}
	}
	if _, err := NewRemote(r.url, issue(t, r.authority, mtls.KindConnector, "c", 0)); err == nil || !strings.Contains(err.Error(), "operator") {
		t.Errorf("a client with a connector's identity: %v", err)
	}
	// The client in turn asks nobody but an edge of its own authority.
	c, err := NewRemote(r.url, issue(t, other, mtls.KindOperator, "x", 0))
	must(t, err)
	defer c.Close()
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "admin.listen") {
		t.Errorf("an edge of another authority: %v", err)
	}
}

// A connection outlives neither the certificate nor the rules about web pages.
func TestRequestsOverHTTPS(t *testing.T) {
	r := serveHTTPS(t, "alice")
	short := r.client(t, issue(t, r.authority, mtls.KindOperator, "alice", 2*time.Second))
	_, err := short.Status(t.Context())
	must(t, err)
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if _, err = short.Status(t.Context()); err != nil || time.Now().After(end) {
			break
		}
	}
	if err == nil {
		t.Error("the certificate has run out, and its connection is served")
	}
	id := issue(t, r.authority, mtls.KindOperator, "alice", 0)
	c := r.client(t, id)
	for _, h := range [][2]string{{"Origin", "https://evil.example"}, {"Sec-Fetch-Site", "same-origin"}, {"Host", strings.TrimPrefix(r.url, "https://")}, {"Host", "evil.example"}} {
		req, err := c.request(t.Context(), request{method: get, path: path("status")})
		must(t, err)
		if h[0] == "Host" {
			req.Host = h[1]
		}
		req.Header.Set(h[0], h[1])
		resp, err := c.http.Do(req)
		must(t, err)
		b, err := io.ReadAll(resp.Body)
		must(t, errors.Join(err, resp.Body.Close()))
		if resp.StatusCode != http.StatusForbidden || !bytes.Contains(b, []byte(CodeDenied)) {
			t.Errorf("%v: status %d, %s", h, resp.StatusCode, b)
		}
	}
	_, err = c.Tunnel(t.Context(), "nope")
	if !errors.Is(err, control.ErrNotFound) {
		t.Errorf("after that: %v", err)
	}
}

func TestRemoteAddresses(t *testing.T) {
	a, err := mtls.InitAuthority(filepath.Join(t.TempDir(), "ca"), "edge.test")
	must(t, err)
	id := issue(t, a, mtls.KindOperator, "alice", 0)
	for _, bad := range []string{"", "edge1:9443", "http://edge1:9443", "https://edge1", "https://u@edge1:1", "https://edge1:1/x", "https://edge1:1?x"} {
		if _, err := NewRemote(bad, id); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	for _, good := range []string{"https://edge1:9443", "https://[::1]:9443/"} {
		if c, err := NewRemote(good, id); err != nil {
			t.Errorf("%q: %v", good, err)
		} else {
			c.Close()
		}
	}
}

// HTTPS without an identity, or on a taken port, does not leave a socket behind.
func TestListenFails(t *testing.T) {
	r := serveHTTPS(t)
	sock := filepath.Join(t.TempDir(), "s")
	for _, cfg := range []Config{{Socket: sock, Listen: "127.0.0.1:0"}, {Socket: sock, Listen: r.Addr().String(), Identity: r.cfg.Identity}} {
		if s, err := Listen(cfg); err == nil {
			s.Close()
			t.Errorf("%+v: no error", cfg.Listen)
		}
		s, err := Listen(Config{Socket: sock})
		must(t, err)
		must(t, s.Close())
	}
}
