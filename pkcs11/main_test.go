package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	ck "github.com/miekg/pkcs11"
	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/signer"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		for _, path := range []string{spyLog, shimDir} {
			if path != "" {
				os.RemoveAll(path)
			}
		}
		os.Exit(code)
	}))
}

// spyLog is where pkcs11-spy writes. It opens the file once in a process.
var spyLog string

// spyModule puts OpenSC's pkcs11-spy, which records every call, before the module, and returns its path and a function that counts
// the calls of a C function since.
func spyModule(tb testing.TB, module string) (string, func(function string) int) {
	tb.Helper()
	var spy []string
	for _, pattern := range []string{"/usr/lib/*/pkcs11-spy.so", "/usr/lib64/pkcs11-spy.so", "/usr/lib/pkcs11-spy.so"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			tb.Fatal(err)
		}
		spy = append(spy, found...)
	}
	if len(spy) == 0 {
		tb.Fatal("pkcs11-spy.so is missing; install opensc")
	}
	if spyLog == "" {
		f, err := os.CreateTemp("", "keyhaven-pkcs11-spy-")
		if err != nil {
			tb.Fatal(err)
		}
		spyLog = f.Name()
		if err := f.Close(); err != nil {
			tb.Fatal(err)
		}
		// Not t.Setenv: the spy keeps what it read first.
		os.Setenv("PKCS11SPY", module)
		os.Setenv("PKCS11SPY_OUTPUT", spyLog)
	}
	count := func(function string) int {
		b, err := os.ReadFile(spyLog)
		if err != nil {
			tb.Fatal(err)
		}
		return len(regexp.MustCompile(`(?m)^\d+: `+function+`$`).FindAll(b, -1))
	}
	before := map[string]int{}
	for _, f := range []string{"C_Login", "C_SignInit", "C_Sign", "C_Initialize", "C_OpenSession", "C_FindObjectsInit"} {
		before[f] = count(f)
	}
	return spy[0], func(function string) int { return count(function) - before[function] }
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
	if err := f(t.m.ctx, t.slot); err != nil {
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
