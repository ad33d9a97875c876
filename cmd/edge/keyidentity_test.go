package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
)

// keyIdentityCommand runs a command of the edge to its end.
func keyIdentityCommand(t *testing.T, args ...string) (code int, out string) {
	t.Helper()
	var b bytes.Buffer
	root := newRoot()
	root.SetOut(&b)
	root.SetArgs(append([]string{"key-identity"}, args...))
	code = cli.Execute(t.Context(), root, &b)
	return code, b.String()
}

// TestKeyIdentity has the edge make the key with which it asks for signatures, and a key owner certify it.
func TestKeyIdentity(t *testing.T) {
	base := t.TempDir()
	dir, answer := filepath.Join(base, "id"), filepath.Join(base, "answer")
	authority, err := mtls.InitAuthority(filepath.Join(base, "ca"), "keys.example.com")
	if err != nil {
		t.Fatal(err)
	}
	certify := func(kind mtls.Kind) {
		t.Helper()
		der, err := mtls.ReadCSR(filepath.Join(dir, "request.csr"))
		if err != nil {
			t.Fatal(err)
		}
		chain, err := authority.IssueCSR(der, mtls.Identity{TrustDomain: "keys.example.com", Kind: kind, Name: "e1"}, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := mtls.WriteCertificate(answer, chain, authority.RootPEM(), true); err != nil {
			t.Fatal(err)
		}
	}
	step := func(code int, want string, args ...string) {
		t.Helper()
		if got, out := keyIdentityCommand(t, args...); got != code || !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("%v: got %d, %s; want %d with %q", args, got, out, code, want)
		}
	}
	request := []string{"request", "--dir", dir}
	install := []string{"install", "--dir", dir, "--cert", filepath.Join(answer, "cert.pem"), "--ca", filepath.Join(answer, "ca.pem")}

	step(2, "dir", "request")
	step(1, "key-identity request", install...)
	step(0, `request\.csr[^$]*fingerprint of the key: ([0-9a-f]{4} ?){16}\n`, request...)
	step(1, "--replace", request...)
	if info, err := os.Stat(filepath.Join(dir, "request.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("request.key: %v, %v, want mode 600", info, err)
	}
	step(3, "answer/cert.pem", install...) // there is no answer yet
	certify(mtls.KindKeyServer)
	step(3, "not of an admitted kind", install...)
	certify(mtls.KindEdge)
	step(0, "", append(request, "--replace")...)
	step(3, "does not match.*request.csr", install...)
	certify(mtls.KindEdge)
	step(0, "installed spiffe://keys.example.com/edge/e1 in "+dir, install...)

	first, err := mtls.OpenDir(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	// The successor's request leaves the identity in use alone until it is installed.
	step(0, "", request...)
	if src, err := mtls.OpenDir(dir, nil); err != nil || !src.Leaf().Equal(first.Leaf()) {
		t.Errorf("after another request: %v", err)
	}
	certify(mtls.KindEdge)
	step(0, "installed", install...)
	if src, err := mtls.OpenDir(dir, nil); err != nil || src.Leaf().Equal(first.Leaf()) {
		t.Errorf("after another certificate: %v", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
	}
	if got := strings.Join(names, " "); got != "ca.pem cert.pem key.pem" {
		t.Errorf("the directory holds %s", got)
	}
}
