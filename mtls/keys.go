package mtls

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
)

// maxCSRLen bounds a certificate request in bytes; a request for an RSA-4096 key is about 1.1 kB.
const maxCSRLen = 8 << 10

// NewKeyCSR makes a P-256 key and a PKCS#10 request signed by it. The request carries no names: the authority decides
// the identity.
func NewKeyCSR() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("mtls: make key: %w", err)
	}
	der, err := requestFor(key)
	return key, der, err
}

func requestFor(key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("mtls: make certificate request: %w", err)
	}
	return der, nil
}

// KeptKeyCSR is [NewKeyCSR] with a key that is kept in a file, mode 0600: made at the first call, the same at later ones. So who
// asks for a certificate can ask again after a power cut, as the same. A file with anything else than a key is an error.
func KeptKeyCSR(path string) (crypto.Signer, []byte, error) {
	b, err := readSecretFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, der, err := NewKeyCSR()
		if err != nil {
			return nil, nil, err
		}
		text, err := encodeKey(key)
		if err == nil {
			err = replaceFile(path, text, 0o600)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("mtls: keep key: %w", err)
		}
		return key, der, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("mtls: kept key: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, nil, fmt.Errorf("mtls: kept key: %s holds no key; remove it", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("mtls: kept key: %s: %w; remove it", path, err)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("mtls: kept key: %s holds no key that signs; remove it", path)
	}
	der, err := requestFor(key)
	return key, der, err
}

// parseCSR returns the public key of a request whose signature proves possession of the private key.
func parseCSR(der []byte) (crypto.PublicKey, error) {
	if len(der) > maxCSRLen {
		return nil, fmt.Errorf("mtls: certificate request of %d bytes is over the limit of %d", len(der), maxCSRLen)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("mtls: parse certificate request: %w", err)
	}
	if err := checkPublicKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("mtls: certificate request is not signed by its own key: %w", err)
	}
	return csr.PublicKey, nil
}

// checkPublicKey admits the key types that an identity may have.
func checkPublicKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
	case ed25519.PublicKey:
		if len(k) == ed25519.PublicKeySize {
			return nil
		}
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); 2048 <= bits && bits <= 4096 {
			return nil
		}
	}
	return errors.New("mtls: key type is not admitted; use ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits")
}

func samePublicKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// spkiPin returns the SHA-256 of a certificate's SubjectPublicKeyInfo.
func spkiPin(cert *x509.Certificate) [sha256.Size]byte {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

func encodeKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("mtls: encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func encodeCerts(chain [][]byte) []byte {
	var out []byte
	for _, der := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// parseCerts returns the certificates of a PEM text. Blocks of another type, and text with no certificate, are errors.
func parseCerts(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("found a PEM block %s, want only CERTIFICATE", quoteShort(block.Type))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("found no PEM certificate")
	}
	return certs, nil
}
