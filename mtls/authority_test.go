package mtls

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestInitAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	a, err := InitAuthority(dir, testDomain)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{".": 0o700, "ca.key": 0o600, "ca.crt": 0o644, "revoked.json": 0o644} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %04o, want %04o", name, got, want)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("directory holds %v (%v), want three files", entries, err)
	}
	root := a.Root()
	if years := time.Until(root.NotAfter).Hours() / 24 / 365; years < 9.99 || years > 10.01 {
		t.Errorf("root lasts %.2f years, want 10", years)
	}
	if root.PublicKey.(*ecdsa.PublicKey).Curve != elliptic.P256() {
		t.Error("root key is not P-256")
	}
	again, err := OpenAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	if again.TrustDomain() != testDomain || again.Pin() != a.Pin() || !bytes.Equal(again.RootPEM(), a.RootPEM()) {
		t.Error("the opened authority is not the one that was made")
	}
}

func TestInitAuthorityNeverOverwrites(t *testing.T) {
	for _, name := range []string{"ca.crt", "ca.key", "revoked.json"} {
		dir := t.TempDir()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := InitAuthority(dir, testDomain); !errors.Is(err, ErrAuthorityExists) {
			t.Errorf("%s: got %v, want ErrAuthorityExists", name, err)
		}
		if data, _ := os.ReadFile(path); string(data) != "precious" {
			t.Errorf("%s was overwritten", name)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 1 {
			t.Errorf("%s: a refused init left %v", name, entries)
		}
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := createFile(path, []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := createFile(path, []byte("2"), 0o600); !errors.Is(err, os.ErrExist) {
		t.Errorf("createFile over a file: got %v, want ErrExist", err)
	}
	for _, td := range []string{"", "UPPER.test", "a b", "10.0.0.1", "td/edge"} {
		if _, err := InitAuthority(t.TempDir(), td); err == nil {
			t.Errorf("trust domain %q was accepted", td)
		}
	}
}

func TestOpenAuthorityRefuses(t *testing.T) {
	other := newAuthority(t, "other.test")
	foreign := x509.Certificate{
		SerialNumber: other.root.SerialNumber, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	for _, c := range []struct {
		name, want string
		change     func(t *testing.T, dir string)
	}{
		{"key open to group", "chmod 600", func(t *testing.T, dir string) { chmod(t, dir, "ca.key", 0o640) }},
		{"key open to others", "chmod 600", func(t *testing.T, dir string) { chmod(t, dir, "ca.key", 0o604) }},
		{"key of another", "does not fit", func(t *testing.T, dir string) { copyFile(t, other.dir, dir, "ca.key", 0o600) }},
		{"certificate of another", "does not fit", func(t *testing.T, dir string) { copyFile(t, other.dir, dir, "ca.crt", 0o644) }},
		{"no key", "no such file", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "ca.key")) }},
		{"garbage key", "PRIVATE KEY", func(t *testing.T, dir string) { overwrite(t, dir, "ca.key", []byte("x")) }},
		{"garbage certificate", "PEM", func(t *testing.T, dir string) { overwrite(t, dir, "ca.crt", []byte("x")) }},
		{"huge certificate", "larger", func(t *testing.T, dir string) { overwrite(t, dir, "ca.crt", make([]byte, maxFileLen+1)) }},
		{"unconstrained root", "trust domain", func(t *testing.T, dir string) {
			a, err := OpenAuthority(dir)
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.CreateCertificate(rand.Reader, &foreign, &foreign, a.key.Public(), a.key)
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, dir, "ca.crt", encodeCerts([][]byte{der}))
		}},
		{"expired root", "expired", func(t *testing.T, dir string) {
			a, err := OpenAuthority(dir)
			if err != nil {
				t.Fatal(err)
			}
			der, err := makeRoot(a.key, testDomain, time.Now().Add(-rootLifetime-time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, dir, "ca.crt", encodeCerts([][]byte{der}))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := newAuthority(t, testDomain).dir
			c.change(t, dir)
			if _, err := OpenAuthority(dir); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

func chmod(t *testing.T, dir, name string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
		t.Fatal(err)
	}
}

func overwrite(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to, name string, mode os.FileMode) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(from, name))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(to, name), data, mode); err != nil {
		t.Fatal(err)
	}
}

func issueLeaf(t *testing.T, a *Authority, r IssueRequest) *x509.Certificate {
	t.Helper()
	if r.Public == nil {
		key, _, err := NewKeyCSR()
		if err != nil {
			t.Fatal(err)
		}
		r.Public = key.Public()
	}
	chain, err := a.Issue(r)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 2 || !bytes.Equal(chain[1], a.Root().Raw) {
		t.Fatalf("chain has %d certificates, want leaf and root", len(chain))
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func TestIssue(t *testing.T) {
	a := newAuthority(t, testDomain)
	roots := x509.NewCertPool()
	roots.AddCert(a.Root())
	serials := map[string]bool{}
	for _, c := range []struct {
		kind           Kind
		lifetime, want time.Duration
		client, server bool
	}{
		{KindEdge, 0, 30 * 24 * time.Hour, true, true},
		{KindConnector, 0, 24 * time.Hour, true, false},
		{KindKeyServer, 0, 30 * 24 * time.Hour, false, true},
		{KindOperator, 0, 30 * 24 * time.Hour, true, false},
		{KindConnector, time.Minute, time.Minute, true, false},
	} {
		before := time.Now()
		leaf := issueLeaf(t, a, IssueRequest{Identity: testID(c.kind, "x"), Lifetime: c.lifetime, DNSNames: []string{"x.example"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}})
		if id, err := IdentityOf(leaf); err != nil || id != testID(c.kind, "x") {
			t.Errorf("got identity %v, %v", id, err)
		}
		if got := leaf.NotAfter.Sub(before); got < c.want-2*time.Second || got > c.want+10*time.Second {
			t.Errorf("%s lives %s, want %s", c.kind, got, c.want)
		}
		if got := before.Sub(leaf.NotBefore); got < backdate-10*time.Second || got > backdate+2*time.Second {
			t.Errorf("%s starts %s before its issue, want %s", c.kind, got, backdate)
		}
		for usage, want := range map[x509.ExtKeyUsage]bool{x509.ExtKeyUsageClientAuth: c.client, x509.ExtKeyUsageServerAuth: c.server} {
			_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}})
			if (err == nil) != want {
				t.Errorf("%s verifies for usage %v: %v, want %v", c.kind, usage, err, want)
			}
		}
		if leaf.IsCA || leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() > 128 || serials[SerialOf(leaf)] {
			t.Errorf("bad leaf: CA %v, serial %v", leaf.IsCA, leaf.SerialNumber)
		}
		serials[SerialOf(leaf)] = true
		if err := leaf.VerifyHostname("x.example"); err != nil {
			t.Error(err)
		}
	}
}

func TestIssueRefuses(t *testing.T) {
	a := newAuthority(t, testDomain)
	good, _, err := NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}
	for _, c := range []struct {
		name string
		r    IssueRequest
	}{
		{"zero identity", IssueRequest{Public: good.Public()}},
		{"other trust domain", IssueRequest{Identity: Identity{"other.test", KindEdge, "x"}, Public: good.Public()}},
		{"subdomain", IssueRequest{Identity: Identity{"a." + testDomain, KindEdge, "x"}, Public: good.Public()}},
		{"unknown kind", IssueRequest{Identity: testID("root", "x"), Public: good.Public()}},
		{"bad name", IssueRequest{Identity: testID(KindEdge, "../x"), Public: good.Public()}},
		{"no key", IssueRequest{Identity: testID(KindEdge, "x")}},
		{"P-224", IssueRequest{Identity: testID(KindEdge, "x"), Public: p224.Public()}},
		{"RSA 1024", IssueRequest{Identity: testID(KindEdge, "x"), Public: weak}},
		{"negative lifetime", IssueRequest{Identity: testID(KindEdge, "x"), Public: good.Public(), Lifetime: -1}},
		{"endless lifetime", IssueRequest{Identity: testID(KindEdge, "x"), Public: good.Public(), Lifetime: maxLifetime + 1}},
	} {
		if _, err := a.Issue(c.r); err == nil {
			t.Errorf("%s: was issued", c.name)
		}
	}
}

func TestIssueEndsWithRoot(t *testing.T) {
	a := newAuthority(t, testDomain)
	der, err := makeRoot(a.key, testDomain, time.Now().Add(time.Hour-rootLifetime))
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, a.dir, "ca.crt", encodeCerts([][]byte{der}))
	if a, err = OpenAuthority(a.dir); err != nil {
		t.Fatal(err)
	}
	leaf := issueLeaf(t, a, IssueRequest{Identity: testID(KindEdge, "x")})
	if !leaf.NotAfter.Equal(a.Root().NotAfter) {
		t.Errorf("leaf ends %s, root %s", leaf.NotAfter, a.Root().NotAfter)
	}
}

func TestIssueCSR(t *testing.T) {
	a := newAuthority(t, testDomain)
	key, csr, err := NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.IssueCSR(csr, testID(KindConnector, "c1"), 0)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(chain[0])
	if !samePublicKey(leaf.PublicKey, key.Public()) {
		t.Error("certificate is for another key")
	}
	// Names that a request asks for are not granted.
	greedy, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		URIs: []*url.URL{testID(KindEdge, "e1").url()}, DNSNames: []string{"edge.example"},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	if chain, err = a.IssueCSR(greedy, testID(KindConnector, "c1"), 0); err != nil {
		t.Fatal(err)
	}
	leaf, _ = x509.ParseCertificate(chain[0])
	if id, err := IdentityOf(leaf); err != nil || id != testID(KindConnector, "c1") || len(leaf.DNSNames) != 0 {
		t.Errorf("a request got its own names: %v, %v, %v", id, err, leaf.DNSNames)
	}
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	edCSR, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, ed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.IssueCSR(edCSR, testID(KindConnector, "c1"), 0); err != nil {
		t.Errorf("Ed25519 request: %v", err)
	}
	tampered := bytes.Clone(csr)
	tampered[len(tampered)-1] ^= 1
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	for name, der := range map[string][]byte{
		"empty":     nil,
		"garbage":   []byte("csr"),
		"tampered":  tampered,
		"trailing":  append(bytes.Clone(csr), 0),
		"too large": make([]byte, maxCSRLen+1),
		"weak key":  mustCSR(t, p224),
	} {
		if _, err := a.IssueCSR(der, testID(KindConnector, "c1"), 0); err == nil {
			t.Errorf("%s request: was issued", name)
		}
	}
}

func mustCSR(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// FuzzCSR stands for a connector, enrolling or enrolled, that sends what it likes.
func FuzzCSR(f *testing.F) {
	_, csr, err := NewKeyCSR()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(csr)
	f.Fuzz(func(t *testing.T, der []byte) {
		pub, err := parseCSR(der)
		if err == nil && checkPublicKey(pub) != nil {
			t.Error("accepted a key that is not admitted")
		}
	})
}

// TestNameConstraint uses the root's key against its rules: outside the trust domain its certificates are worth nothing,
// to Go and to OpenSSL.
func TestNameConstraint(t *testing.T) {
	a := newAuthority(t, testDomain)
	rootPath := filepath.Join(a.dir, "ca.crt")
	roots := x509.NewCertPool()
	roots.AddCert(a.Root())
	for _, c := range []struct {
		domain string
		want   bool
	}{{testDomain, true}, {"other.test", false}, {"x" + testDomain, false}} {
		leaf := forge(t, a, Identity{c.domain, KindEdge, "e1"}, func(*x509.Certificate) {}).Leaf
		_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if (err == nil) != c.want {
			t.Errorf("Go: certificate of %s: got %v, want good %v", c.domain, err, c.want)
		}
		path := filepath.Join(t.TempDir(), "leaf.pem")
		if err := os.WriteFile(path, encodeCerts([][]byte{leaf.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := command(t, "", "openssl", "verify", "-CAfile", rootPath, "-purpose", "sslclient", path)
		if (err == nil) != c.want {
			t.Errorf("OpenSSL: certificate of %s: got %v, want good %v:\n%s", c.domain, err, c.want, out)
		}
	}
}

func TestOpenSSLReads(t *testing.T) {
	a := newAuthority(t, testDomain)
	s := newIdentity(t, a, testID(KindConnector, "c1"))
	rootPath := filepath.Join(a.dir, "ca.crt")
	for purpose, want := range map[string]bool{"sslclient": true, "sslserver": false} {
		out, err := command(t, "", "openssl", "verify", "-x509_strict", "-CAfile", rootPath, "-purpose", purpose, s.files.CertFile)
		if (err == nil) != want {
			t.Errorf("openssl verify -purpose %s: got %v, want good %v:\n%s", purpose, err, want, out)
		}
	}
	for path, wants := range map[string][]string{
		s.files.CertFile: {"URI:spiffe://keyhaven.test/connector/c1", "TLS Web Client Authentication", "CA:FALSE", "NIST CURVE: P-256"},
		rootPath:         {"URI:spiffe://keyhaven.test", "Name Constraints: critical", "Permitted:", "CA:TRUE, pathlen:0", "NIST CURVE: P-256"},
	} {
		out, err := command(t, "", "openssl", "x509", "-noout", "-text", "-in", path)
		if err != nil {
			t.Fatalf("openssl x509: %v\n%s", err, out)
		}
		for _, want := range wants {
			if !strings.Contains(out, want) {
				t.Errorf("openssl x509 does not show %q:\n%s", want, out)
			}
		}
		if strings.Contains(out, "TLS Web Server Authentication") && path == s.files.CertFile {
			t.Error("a connector's certificate serves as server")
		}
	}
}
