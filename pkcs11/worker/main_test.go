package worker

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// TestMain is a worker if it is started as one.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "worker" {
		os.Exit(Main(context.Background()))
	}
	if len(os.Args) > 2 && os.Args[1] == "probe" {
		os.Exit(probe(os.Args[2:]))
	}
	// The race detector of a worker would have it sleep for a second before it leaves.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	goleak.VerifyTestMain(m)
}

// capture is a log that tests read.
type capture struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (c *capture) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.Write(p)
}

func (c *capture) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

func (c *capture) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(c, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// makeToken makes a token with keys of the types.
func makeToken(tb testing.TB, types ...string) *softhsm.Token {
	tb.Helper()
	st := softhsm.New(tb)
	t, err := pkcs11.Open(tb.Context(), tokenConfig(tb, st))
	if err != nil {
		tb.Fatal(err)
	}
	for _, typ := range types {
		o := pkcs11.GenerateOptions{Label: "test-" + typ, Type: typ, Decrypt: strings.HasPrefix(typ, "rsa")}
		if _, err := t.Generate(tb.Context(), o); err != nil {
			tb.Fatal(err)
		}
	}
	if err := t.Close(); err != nil {
		tb.Fatal(err)
	}
	return st
}

func tokenConfig(tb testing.TB, st *softhsm.Token) pkcs11.Config {
	tb.Helper()
	u, err := pkcs11.ParseURI(st.URI())
	if err != nil {
		tb.Fatal(err)
	}
	return pkcs11.Config{URI: u, Module: st.Module}
}

// configFor is the configuration that serves st.
func configFor(tb testing.TB, st *softhsm.Token) Config {
	return Config{Token: tokenConfig(tb, st), Restart: Restart{Min: 10 * time.Millisecond, Max: 100 * time.Millisecond}}
}

// openPool opens st and closes it when the test ends. Whatever is logged must not hold the PIN.
func openPool(tb testing.TB, st *softhsm.Token, change func(*Config)) *Pool {
	tb.Helper()
	cfg := configFor(tb, st)
	log := &capture{}
	cfg.Logger = log.logger()
	if change != nil {
		change(&cfg)
	}
	p, err := Open(tb.Context(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := p.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
		if strings.Contains(log.String(), st.PIN) {
			tb.Error("the log holds the PIN")
		}
		if tb.Failed() {
			tb.Log(log.String())
		}
	})
	return p
}

// keysOf returns the pool's keys by label.
func keysOf(tb testing.TB, p *Pool) map[string]signer.Key {
	tb.Helper()
	keys, err := p.Keys(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	all := map[string]signer.Key{}
	for _, k := range keys {
		all[k.Info().Label] = k
	}
	return all
}

// plainest is an algorithm that every key of this type should have.
func plainest(pub crypto.PublicKey) signer.Algorithm {
	switch pub.(type) {
	case *ecdsa.PublicKey:
		return signer.Algorithm{Kind: signer.ECDSA, Hash: crypto.SHA256}
	case *rsa.PublicKey:
		return signer.Algorithm{Kind: signer.PKCS1v15, Hash: crypto.SHA256}
	}
	return signer.Algorithm{Kind: signer.Ed25519}
}

type testError string

func (e testError) Error() string { return string(e) }

const errWrongSignature = testError("the signature does not verify")

// signOnce signs with the key's plainest algorithm and verifies.
func signOnce(ctx context.Context, k signer.Key) error {
	alg := plainest(k.Public())
	in := bytes.Repeat([]byte{0xa5}, 32)
	sig, err := k.Sign(ctx, alg, in)
	if err != nil {
		return err
	}
	ok := false
	switch pub := k.Public().(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(pub, in, sig)
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(pub, alg.Hash, in, sig) == nil
	case ed25519.PublicKey:
		ok = ed25519.Verify(pub, in, sig)
	}
	if !ok {
		return errWrongSignature
	}
	return nil
}

func mustSign(tb testing.TB, k signer.Key) {
	tb.Helper()
	if err := signOnce(tb.Context(), k); err != nil {
		tb.Fatal(err)
	}
}

// eventually waits until a condition holds.
func eventually(tb testing.TB, what string, holds func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("waited in vain for: %s", what)
		}
	}
}
