package worker

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// TestOpenRefuses: what is wrong with configuration, module or token is told as if the module were in this process.
func TestOpenRefuses(t *testing.T) {
	st := makeToken(t, "p256")
	twin, err := st.Twin()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	text := filepath.Join(dir, "text.so")
	if err := os.WriteFile(text, []byte("no library"), 0o600); err != nil {
		t.Fatal(err)
	}
	libc, err := filepath.Glob("/lib/*/libm.so.6")
	if err != nil || len(libc) == 0 {
		t.Fatalf("no libm.so.6: %v", err)
	}
	for _, tc := range []struct {
		name   string
		change func(*Config)
		is     error // nil: any
		says   []string
	}{
		{"workers", func(c *Config) { c.Workers = 1000 }, nil, []string{"1000 workers"}},
		{"deadline", func(c *Config) { c.Deadline = -1 }, nil, []string{"negative"}},
		{"on loss", func(c *Config) { c.OnLoss = "cry" }, nil, []string{`"cry"`, `"move"`}},
		{"sandbox mode", func(c *Config) { c.Sandbox.Mode = "box" }, nil, []string{`"box"`, `"strict"`}},
		{"sandbox path", func(c *Config) { c.Sandbox.ReadPaths = []string{"etc"} }, nil, []string{`"etc"`, "absolute"}},
		{"sandbox files", func(c *Config) { c.Sandbox.MaxFiles = 3 }, nil, []string{"at least 32"}},
		{"sandbox memory", func(c *Config) { c.Sandbox.MaxMemory = 3 }, nil, []string{"at least 64 MiB"}},
		{"URI", func(c *Config) { c.Token.URI.Token = "" }, nil, []string{"names no token"}},
		{"PIN file", func(c *Config) { c.Token.URI.PINSource = dir + "/none" }, os.ErrNotExist, []string{"PIN file"}},
		{"no module", func(c *Config) { c.Token.URI.ModulePath, c.Token.Module = "", dir+"/none.so" }, os.ErrNotExist, []string{"install"}},
		{"module is no library", func(c *Config) { c.Token.URI.ModulePath, c.Token.Module = "", text }, pkcs11.ErrModule, []string{text, "no shared library"}},
		{"module is no module", func(c *Config) { c.Token.URI.ModulePath, c.Token.Module = "", libc[0] }, pkcs11.ErrModule, []string{"no C_GetFunctionList", "name the token's"}},
		{"no such token", func(c *Config) { c.Token.URI.Token = "absent" }, pkcs11.ErrTokenNotFound, []string{"absent", st.Serial}},
		{"two tokens of one label", func(*Config) {}, pkcs11.ErrAmbiguous, []string{st.Serial, twin.Serial}},
		{"two tokens of one label, for others", func(*Config) {}, signer.ErrAmbiguous, nil},
		{"program does not start", func(c *Config) { c.Command = []string{dir + "/none"} }, os.ErrNotExist, []string{"start worker"}},
		{"program is none of ours", func(c *Config) { c.Command = []string{"/bin/false"} }, signer.ErrUnavailable, []string{"exit status 1"}},
		{"program talks nonsense", func(c *Config) { c.Command = []string{"/bin/sh", "-c", "echo nonsense >&3; sleep 5"} }, errFrame, []string{"malformed"}},
		{"program says nothing", func(c *Config) {
			c.Command, c.StartDeadline = []string{"/bin/sleep", "60"}, 100*time.Millisecond
		}, signer.ErrUnavailable, []string{"not logged in after 100ms"}},
		{"little memory", func(c *Config) { c.Sandbox.MaxMemory = 64 << 20; c.Command = []string{"/bin/false"} }, nil, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := configFor(t, st)
			tc.change(&cfg)
			p, err := Open(t.Context(), cfg)
			if err == nil {
				p.Close()
				t.Fatal("opened, want an error")
			}
			if tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("%v, want it to be %v", err, tc.is)
			}
			for _, s := range append(tc.says, "pkcs11: ") {
				if strings.Count(err.Error(), s) < 1 {
					t.Errorf("%v, want it to say %q", err, s)
				}
			}
			if n := strings.Count(err.Error(), "pkcs11: "); n != 1 {
				t.Errorf("%q has the package's name %d times", err, n)
			}
			if strings.Contains(err.Error(), st.PIN) {
				t.Errorf("the error holds the PIN: %v", err)
			}
		})
	}
	if n := len(childrenOf(t)); n != 0 {
		t.Errorf("%d child processes are left", n)
	}
}

func TestOpenEndsWithItsContext(t *testing.T) {
	cfg := configFor(t, makeToken(t))
	cfg.Command = []string{"/bin/sleep", "60"}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if p, err := Open(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) {
		p.Close()
		t.Errorf("open: %v, want the context's error", err)
	}
}

func TestClosedPool(t *testing.T) {
	p := openPool(t, makeToken(t, "p256"), nil)
	k := keysOf(t, p)["test-p256"]
	for range 2 {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := signOnce(t.Context(), k); !errors.Is(err, pkcs11.ErrClosed) || !errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("sign: %v, want ErrClosed", err)
	}
	if _, err := p.Keys(t.Context()); !errors.Is(err, pkcs11.ErrClosed) {
		t.Errorf("list: %v, want ErrClosed", err)
	}
	if err := p.Retry(t.Context()); !errors.Is(err, pkcs11.ErrClosed) {
		t.Errorf("retry: %v, want ErrClosed", err)
	}
	if p.Capacity() != 0 || k.(signer.Healther).Healthy() {
		t.Error("a closed pool has capacity or a healthy key")
	}
}

// TestKeysStay: handles outlive listings, workers and changes on the token.
func TestKeysStay(t *testing.T) {
	st := makeToken(t, "p256", "rsa2048")
	p := openPool(t, st, nil)
	first := keysOf(t, p)
	d, ok := first["test-rsa2048"].(signer.Decrypter)
	if !ok {
		t.Fatal("the RSA key does not decrypt")
	}
	if _, err := d.DecryptRaw(t.Context(), make([]byte, 256)); err != nil {
		t.Error(err)
	}
	if _, err := d.DecryptRaw(t.Context(), make([]byte, 3)); !errors.Is(err, pkcs11.ErrInput) {
		t.Errorf("decrypt a short block: %v, want ErrInput", err)
	}
	if _, err := first["test-p256"].Sign(t.Context(), signer.Algorithm{Kind: signer.PSS, Hash: 5}, make([]byte, 32)); !errors.Is(err, signer.ErrUnsupported) {
		t.Errorf("sign with another key's algorithm: %v, want ErrUnsupported", err)
	}
	if _, err := first["test-p256"].Sign(t.Context(), plainest(first["test-p256"].Public()), make([]byte, 31)); !errors.Is(err, pkcs11.ErrInput) {
		t.Errorf("sign a short digest: %v, want ErrInput", err)
	}
	tok, err := pkcs11.Open(t.Context(), tokenConfig(t, st))
	if err != nil {
		t.Fatal(err)
	}
	defer tok.Close()
	if _, err := tok.Generate(t.Context(), pkcs11.GenerateOptions{Label: "new", Type: "ed25519"}); err != nil {
		t.Fatal(err)
	}
	second := keysOf(t, p)
	if second["test-p256"] != first["test-p256"] || len(second) != 3 {
		t.Errorf("got %d keys after a change, want 3 with the old ones among them", len(second))
	}
	mustSign(t, second["new"])
	mustSign(t, first["test-p256"])
}
