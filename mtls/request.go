package mtls

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// EncodeCSR returns a certificate request as PEM text.
func EncodeCSR(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// ReadCSR reads the first certificate request of a PEM file and returns it in DER, with its signature not yet checked.
func ReadCSR(path string) ([]byte, error) {
	text, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("mtls: read certificate request: %w", err)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE REQUEST" || block.Type == "NEW CERTIFICATE REQUEST" { // the older name
			return block.Bytes, nil
		}
	}
	return nil, fmt.Errorf("mtls: read certificate request: %s has no PEM block CERTIFICATE REQUEST", path)
}

// WriteCertificate writes what the owner of a key gets for its request to dir, which is made with mode 0700 if it is
// missing: cert.pem with the chain, leaf first, ca.pem with the roots given as PEM text. Files that are there are an
// error that is fs.ErrExist, unless replace is set.
func WriteCertificate(dir string, chain [][]byte, roots []byte, replace bool) error {
	if err := makeDir(dir); err != nil {
		return fmt.Errorf("mtls: write certificate: %w", err)
	}
	write := createFile
	if replace {
		write = replaceFile
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{RootsFileName, roots}, {CertFileName, encodeCerts(chain)}} {
		err := write(filepath.Join(dir, f.name), f.data, 0o644)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("mtls: write certificate: %s is there already: %w; choose another directory, or replace it",
				filepath.Join(dir, f.name), fs.ErrExist)
		}
		if err != nil {
			return fmt.Errorf("mtls: write certificate: %w", err)
		}
	}
	return nil
}

// Fingerprint is how people compare public keys: the SHA-256 of a SubjectPublicKeyInfo in hexadecimal digits, by fours.
func Fingerprint(spki []byte) string {
	digits := fmt.Sprintf("%x", sha256.Sum256(spki))
	var b strings.Builder
	for i := 0; i < len(digits); i += 4 {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(digits[i : i+4])
	}
	return b.String()
}

// Files of a request that waits for its certificate, beside the identity that it may be the successor of.
const (
	requestKeyFile = "request.key"
	RequestFile    = "request.csr"
)

// ErrNoRequest says that a directory holds no request that waits for its certificate.
var ErrNoRequest = errors.New("mtls: no request waits for a certificate")

// WriteRequest makes a key and a request for it in dir, which is made with mode 0700 if it is missing: the key in
// request.key with mode 0600, the request in request.csr. An identity in dir stays as it is. A request that waits there
// already is an error that is fs.ErrExist, unless replace is set. It returns the fingerprint of the key.
func WriteRequest(dir string, replace bool) (fingerprint string, err error) {
	key, der, err := NewKeyCSR()
	if err != nil {
		return "", err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return "", err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", fmt.Errorf("mtls: encode public key: %w", err)
	}
	if err := makeDir(dir); err != nil {
		return "", fmt.Errorf("mtls: write request: %w", err)
	}
	write := createFile
	if replace {
		write = replaceFile
	}
	err = write(filepath.Join(dir, requestKeyFile), keyPEM, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("mtls: write request: %s has one that waits for its certificate: %w", dir, fs.ErrExist)
	}
	if err == nil { // a request without its key was left by a crash
		err = replaceFile(filepath.Join(dir, RequestFile), EncodeCSR(der), 0o644)
	}
	if err != nil {
		return "", fmt.Errorf("mtls: write request: %w", err)
	}
	return Fingerprint(spki), nil
}

// InstallCertificate completes the request that WriteRequest left in dir: the certificates of certFile must be for its
// key, valid now, and verify under those of rootsFile, and accept must admit the identity. The identity in dir is
// replaced as a whole, as by WriteIdentity, and the request is removed. Without a request it returns ErrNoRequest.
func InstallCertificate(dir, certFile, rootsFile string, accept func(Identity) error) (Identity, error) {
	id, err := installCertificate(dir, SourceConfig{
		CertFile: certFile, KeyFile: filepath.Join(dir, requestKeyFile), RootsFile: rootsFile,
	}, accept)
	if err != nil {
		return Identity{}, fmt.Errorf("mtls: install certificate: %w", err)
	}
	return id, nil
}

func installCertificate(dir string, from SourceConfig, accept func(Identity) error) (Identity, error) {
	keyPEM, err := readSecretFile(from.KeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{}, fmt.Errorf("%s: %w", dir, ErrNoRequest)
	}
	if err != nil {
		return Identity{}, err
	}
	certPEM, err := readFile(from.CertFile)
	if err != nil {
		return Identity{}, err
	}
	rootsPEM, err := readFile(from.RootsFile)
	if err != nil {
		return Identity{}, err
	}
	l, err := assemble(from, certPEM, keyPEM, rootsPEM)
	if err != nil {
		return Identity{}, fmt.Errorf("%w; is it the answer to %s?", err, filepath.Join(dir, RequestFile))
	}
	leaf := l.cert.Leaf
	if now := time.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return Identity{}, fmt.Errorf("%s is valid from %s to %s, not now; check the clock, or have it issued again",
			from.CertFile, leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	if err := accept(l.identity); err != nil {
		return Identity{}, fmt.Errorf("%s: %w", from.CertFile, err)
	}
	if err := writeFiles(DirConfig(dir), keyPEM, certPEM, rootsPEM); err != nil {
		return Identity{}, err
	}
	err = errors.Join(os.Remove(from.KeyFile), os.Remove(filepath.Join(dir, RequestFile)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Identity{}, fmt.Errorf("the identity is in place, but: %w", err)
	}
	return l.identity, nil
}
