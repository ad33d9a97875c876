package mtls

import (
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestRequest(t *testing.T) {
	base := t.TempDir()
	dir, answer := filepath.Join(base, "id"), filepath.Join(base, "answer")
	a, err := InitAuthority(filepath.Join(base, "ca"), "keys.example")
	if err != nil {
		t.Fatal(err)
	}
	any := func(Identity) error { return nil }
	cert, roots := filepath.Join(answer, CertFileName), filepath.Join(answer, RootsFileName)
	if _, err := InstallCertificate(dir, cert, roots, any); !errors.Is(err, ErrNoRequest) {
		t.Errorf("without a request: %v, want ErrNoRequest", err)
	}
	fingerprint, err := WriteRequest(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := WriteRequest(dir, false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second request: %v, want ErrExist", err)
	}
	der, err := ReadCSR(filepath.Join(dir, RequestFile))
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil || Fingerprint(csr.RawSubjectPublicKeyInfo) != fingerprint {
		t.Errorf("the fingerprint %s is not that of the request's key, %v", fingerprint, err)
	}
	id := Identity{TrustDomain: "keys.example", Kind: KindEdge, Name: "e1"}
	issue := func(lifetime time.Duration) {
		t.Helper()
		chain, err := a.IssueCSR(der, id, lifetime)
		if err != nil {
			t.Fatal(err)
		}
		if err := WriteCertificate(answer, chain, a.RootPEM(), true); err != nil {
			t.Fatal(err)
		}
	}
	issue(time.Nanosecond)
	if _, err := InstallCertificate(dir, cert, roots, any); err == nil || !strings.Contains(err.Error(), "check the clock") {
		t.Errorf("a certificate that ran out: %v", err)
	}
	issue(0)
	if err := WriteCertificate(answer, [][]byte{der}, a.RootPEM(), false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over an answer: %v, want ErrExist", err)
	}
	wrong := errors.New("wrong")
	if _, err := InstallCertificate(dir, cert, roots, func(Identity) error { return wrong }); !errors.Is(err, wrong) {
		t.Errorf("an identity that is not accepted: %v", err)
	}
	other, err := InitAuthority(filepath.Join(base, "other"), "keys.example")
	if err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(base, "foreign.pem")
	if err := os.WriteFile(foreign, other.RootPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := InstallCertificate(dir, cert, foreign, any); err == nil || !strings.Contains(err.Error(), "does not verify under "+foreign) {
		t.Errorf("under another root: %v", err)
	}
	key := filepath.Join(dir, requestKeyFile)
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := InstallCertificate(dir, cert, roots, any); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others may read: %v", err)
	}
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := InstallCertificate(dir, cert, roots, any)
	if err != nil || got != id {
		t.Fatalf("got %v, %v, want %v", got, err, id)
	}
	if src, err := OpenDir(dir, nil); err != nil || src.Identity() != id {
		t.Errorf("the identity does not open: %v", err)
	}
	if _, err := os.Lstat(key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the request's key is still there: %v", err)
	}
	if _, err := ReadCSR(cert); err == nil || !strings.Contains(err.Error(), "CERTIFICATE REQUEST") {
		t.Errorf("a certificate for a request: %v", err)
	}
}
