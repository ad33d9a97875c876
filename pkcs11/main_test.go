package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"log/slog"
	"strings"
	"sync"
	"testing"

	ck "github.com/miekg/pkcs11"
	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/signer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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

// configFor is the configuration that opens tok.
func configFor(tb testing.TB, tok *softhsm.Token) Config {
	tb.Helper()
	u, err := ParseURI(tok.URI())
	if err != nil {
		tb.Fatal(err)
	}
	return Config{URI: u, Module: tok.Module}
}

// openToken opens tok and closes it when the test ends. Whatever the test logs must not hold the PIN.
func openToken(tb testing.TB, tok *softhsm.Token, change func(*Config)) *Token {
	tb.Helper()
	cfg := configFor(tb, tok)
	log := &capture{}
	cfg.Logger = log.logger()
	if change != nil {
		change(&cfg)
	}
	t, err := Open(tb.Context(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := t.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
		if strings.Contains(log.String(), tok.PIN) {
			tb.Error("the log holds the PIN")
		}
	})
	return t
}

func generate(tb testing.TB, t *Token, typ string) signer.Key {
	tb.Helper()
	k, err := t.Generate(tb.Context(), GenerateOptions{Label: "test-" + typ, Type: typ, Decrypt: strings.HasPrefix(typ, "rsa")})
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

// inner returns the key behind its face.
func inner(k signer.Key) *key {
	if d, ok := k.(decrypter); ok {
		return d.key
	}
	return k.(*key)
}

// input is something to sign with alg.
func input(alg signer.Algorithm) []byte {
	size := 300
	if alg.Hash != 0 {
		size = alg.Hash.Size()
	}
	return bytes.Repeat([]byte{0xa5}, size)
}

// mustSign signs with the key's plainest algorithm and verifies.
func mustSign(tb testing.TB, k signer.Key) {
	tb.Helper()
	if err := signOnce(tb.Context(), k); err != nil {
		tb.Fatal(err)
	}
}

func signOnce(ctx context.Context, k signer.Key) error {
	alg := probeAlgorithm(k.Public())
	in := input(alg)
	sig, err := k.Sign(ctx, alg, in)
	if err != nil {
		return err
	}
	if !verify(k.Public(), alg, in, sig) {
		return errWrongSignature
	}
	return nil
}

type testError string

func (e testError) Error() string { return string(e) }

const errWrongSignature = testError("the signature does not verify")

// behind runs f on the module without the package's knowledge, as another part of the process might.
func behind(tb testing.TB, t *Token, f func(c *ck.Ctx, slot uint) error) {
	tb.Helper()
	if err := f(t.m.ctx, uint(t.slot.Load())); err != nil {
		tb.Fatal(err)
	}
}

// writeBehind runs f on a session of its own that may write.
func writeBehind(tb testing.TB, t *Token, f func(c *ck.Ctx, s ck.SessionHandle) error) {
	tb.Helper()
	behind(tb, t, func(c *ck.Ctx, slot uint) error {
		s, err := c.OpenSession(slot, ck.CKF_SERIAL_SESSION|ck.CKF_RW_SESSION)
		if err != nil {
			return err
		}
		defer c.CloseSession(s)
		return f(c, s)
	})
}

var allAlgorithms = func() (all []signer.Algorithm) {
	hashes := []crypto.Hash{0, crypto.MD5SHA1, crypto.SHA1, crypto.SHA224, crypto.SHA256, crypto.SHA384, crypto.SHA512}
	for _, kind := range []signer.Kind{signer.PKCS1v15, signer.PSS, signer.ECDSA, signer.Ed25519} {
		for _, h := range hashes {
			all = append(all, signer.Algorithm{Kind: kind, Hash: h})
		}
	}
	return all
}()
