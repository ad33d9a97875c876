// Package vault tests the transit package against the real Transit engine; see package server.
package vault

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/interop/vault/server"
	"github.com/keyhaven/keyhaven/signer"
	"github.com/keyhaven/keyhaven/transit"
)

func TestMain(m *testing.M) {
	// What the engine's libraries start when they are loaded.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// lab is a server of the real engine and a place for files.
type lab struct {
	*server.Server
	t    testing.TB
	url  string
	dir  string
	log  *lines
	http *httptest.Server
}

func newLab(t testing.TB) *lab {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := server.New(ctx)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(s)
	t.Cleanup(func() { cancel(); srv.Close() })
	return &lab{Server: s, t: t, url: srv.URL, dir: t.TempDir(), log: new(lines), http: srv}
}

// write puts a secret into a file and returns its path.
func (l *lab) write(name, secret string) string {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	// In one step, as whoever replaces a secret should.
	if err := os.WriteFile(path+".new", []byte(secret+"\n"), 0o600); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		l.t.Fatal(err)
	}
	return path
}

// make makes a key in the engine.
func (l *lab) make(name, typ string, more ...any) {
	l.t.Helper()
	data := map[string]any{"type": typ}
	for i := 0; i < len(more); i += 2 {
		data[more[i].(string)] = more[i+1]
	}
	if _, err := l.Do("keys/"+name, data); err != nil {
		l.t.Fatal(err)
	}
}

// config is one that serves the keys with a token that never ends.
func (l *lab) config(names ...string) transit.Config {
	l.t.Helper()
	cfg := transit.Config{
		Address: l.url,
		Auth:    transit.AuthConfig{Method: transit.AuthTokenFile, TokenFile: l.write("token", l.NewToken(server.Lifetime{}))},
		Logger:  slog.New(slog.NewTextHandler(l.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Timeout: 20 * time.Second,
	}
	for _, n := range names {
		cfg.Keys = append(cfg.Keys, transit.KeyConfig{Name: n})
	}
	return cfg
}

func (l *lab) open(cfg transit.Config) *transit.Backend {
	l.t.Helper()
	b, err := transit.Open(context.Background(), cfg)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() {
		if err := b.Close(); err != nil {
			l.t.Error(err)
		}
	})
	return b
}

// keys returns the backend's keys by label, of which there must be n.
func keys(t testing.TB, b *transit.Backend, n int) map[string]signer.Key {
	t.Helper()
	all, err := b.Keys(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != n {
		t.Fatalf("got %d keys, want %d; faults %v", len(all), n, b.Faults())
	}
	m := map[string]signer.Key{}
	for _, k := range all {
		m[k.Info().Label] = k
	}
	return m
}

// lines is a log that can be searched.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) has(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.b.String(), s)
}

// inputFor returns something to sign and what verify needs.
func inputFor(t testing.TB, alg signer.Algorithm) []byte {
	t.Helper()
	msg := make([]byte, 130)
	rand.Read(msg)
	if alg.Hash == 0 {
		return msg
	}
	h := alg.Hash.New()
	h.Write(msg)
	return h.Sum(nil)
}

// verify checks a signature with the standard library.
func verify(t testing.TB, pub crypto.PublicKey, alg signer.Algorithm, input, sig []byte) {
	t.Helper()
	ok := false
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if alg.Kind == signer.PSS {
			// TLS 1.3 asks for a salt as long as the hash.
			ok = rsa.VerifyPSS(k, alg.Hash, input, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		} else {
			ok = rsa.VerifyPKCS1v15(k, alg.Hash, input, sig) == nil
		}
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, input, sig)
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, input, sig)
	}
	if !ok {
		t.Errorf("%s: the signature is wrong", alg)
	}
}

// sign signs and verifies once.
func sign(t testing.TB, k signer.Key, alg signer.Algorithm) {
	t.Helper()
	input := inputFor(t, alg)
	sig, err := k.Sign(context.Background(), alg, input)
	if err != nil {
		t.Fatalf("%s: %v", alg, err)
	}
	verify(t, k.Public(), alg, input, sig)
}

// eventually waits until ok, for what happens by itself.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

var p256 = signer.Algorithm{Kind: signer.ECDSA, Hash: crypto.SHA256}

func lifetime(ttl, most time.Duration) server.Lifetime { return server.Lifetime{TTL: ttl, Max: most} }
