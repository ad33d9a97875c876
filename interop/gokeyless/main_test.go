package gokeyless

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/cloudflare/gokeyless/client"
)

// bin holds the programs, and dir what all tests share.
var dir, bin string

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	if dir, err = os.MkdirTemp("", "keyhaven-interop-"); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	bin = filepath.Join(dir, "bin")
	if err := build("../..", "./cmd/keyserver", "keyhaven-keyserver"); err != nil {
		return 1, err
	}
	if err := build(".", "./cmd/peerserver", "peerserver", "-tags", "pkcs11"); err != nil {
		return 1, err
	}
	// Its pool is the process's: it would lend one client's connection to another.
	atomic.StoreUint32(&client.TestDisableConnectionPool, 1)
	return m.Run(), nil
}

func build(from, pkg, name string, flags ...string) error {
	args := append([]string{"build", "-o", filepath.Join(bin, name)}, flags...)
	cmd := exec.Command("go", append(args, pkg)...)
	cmd.Dir = from
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", pkg, err, out)
	}
	return nil
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// verify checks a signature over a digest, or over a message for Ed25519.
func verify(pub crypto.PublicKey, digest, sig []byte, opts crypto.SignerOpts) error {
	ok := false
	switch p := pub.(type) {
	case *rsa.PublicKey:
		if pss, is := opts.(*rsa.PSSOptions); is {
			return rsa.VerifyPSS(p, opts.HashFunc(), digest, sig, pss)
		}
		return rsa.VerifyPKCS1v15(p, opts.HashFunc(), digest, sig)
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(p, digest, sig)
	case ed25519.PublicKey:
		ok = ed25519.Verify(p, digest, sig)
	}
	if !ok {
		return errors.New("the signature is not right")
	}
	return nil
}
