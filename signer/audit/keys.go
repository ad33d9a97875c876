package audit

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/keyhaven/keyhaven/signer"
)

// CheckpointSigner signs checkpoints. All methods may be called from several goroutines at once.
type CheckpointSigner interface {
	// Public returns the key's public half, or nil while it is not known because the key's home is away.
	Public() crypto.PublicKey
	// Sign signs msg and says how: ed25519, ecdsa-sha256, ecdsa-sha384, ecdsa-sha512 or rsa-pss-sha256, as the key's type demands.
	Sign(ctx context.Context, msg []byte) (alg string, sig []byte, err error)
}

type fileSigner ed25519.PrivateKey

// maxKeyFile bounds a key file, in bytes.
const maxKeyFile = 64 << 10

// FileSigner returns a signer with the Ed25519 key in a PEM file (PKCS #8), as openssl genpkey -algorithm ed25519 makes it. A file that others than its owner may use is refused.
func FileSigner(path string) (CheckpointSigner, error) {
	key, err := readPrivate(path)
	if err != nil {
		return nil, fmt.Errorf("audit: key file %s: %w", path, err)
	}
	return fileSigner(key), nil
}

func readPrivate(path string) (ed25519.PrivateKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, errors.New("is no regular file")
	case st.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("has mode %04o, so that others may use it; chmod 600 it", st.Mode().Perm())
	}
	text, err := readLimited(f)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("holds no PEM block PRIVATE KEY; make one with openssl genpkey -algorithm ed25519")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("holds no PKCS #8 key that can be read")
	}
	ed, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("holds a key of type %T; make an Ed25519 key with openssl genpkey -algorithm ed25519", k)
	}
	return ed, nil
}

func readLimited(r io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxKeyFile+1))
	if err == nil && len(text) > maxKeyFile {
		err = fmt.Errorf("is larger than %d bytes", maxKeyFile)
	}
	return text, err
}

func (s fileSigner) Public() crypto.PublicKey { return ed25519.PrivateKey(s).Public() }

func (s fileSigner) Sign(_ context.Context, msg []byte) (string, []byte, error) {
	return "ed25519", ed25519.Sign(ed25519.PrivateKey(s), msg), nil
}

type keySigner func() *signer.Entry

// KeySigner returns a signer with a key of the registry, asked for anew each time, since a reload may replace the entry; nil while the key cannot be found. The key needs no
// rule in the policy, and should have none: nobody else should use it.
func KeySigner(find func() *signer.Entry) CheckpointSigner { return keySigner(find) }

func (s keySigner) Public() crypto.PublicKey {
	if e := s(); e != nil {
		return e.Public()
	}
	return nil
}

func (s keySigner) Sign(ctx context.Context, msg []byte) (string, []byte, error) {
	e := s()
	if e == nil {
		return "", nil, fmt.Errorf("audit: the audit key is in none of the homes that answer: %w", signer.ErrUnavailable)
	}
	name, err := algorithmFor(e.Public())
	if err != nil {
		return "", nil, err
	}
	alg := algorithms[name]
	sig, _, err := e.Sign(ctx, signer.Caller{Peer: "audit"}, alg, digest(alg.Hash, msg))
	return name, sig, err
}

// LoadKeys reads the public keys in PEM files: PUBLIC KEY blocks, and CERTIFICATE blocks for their keys.
func LoadKeys(paths ...string) ([]crypto.PublicKey, error) {
	var keys []crypto.PublicKey
	for _, path := range paths {
		found, err := loadKeys(path)
		if err != nil {
			return nil, fmt.Errorf("audit: public key file %s: %w", path, err)
		}
		keys = append(keys, found...)
	}
	return keys, nil
}

func loadKeys(path string) ([]crypto.PublicKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := readLimited(f)
	if err != nil {
		return nil, err
	}
	var keys []crypto.PublicKey
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		var pub crypto.PublicKey
		switch block.Type {
		case "PUBLIC KEY":
			pub, err = x509.ParsePKIXPublicKey(block.Bytes)
		case "CERTIFICATE":
			var c *x509.Certificate
			if c, err = x509.ParseCertificate(block.Bytes); err == nil {
				pub = c.PublicKey
			}
		default:
			err = fmt.Errorf("PEM block %q; PUBLIC KEY and CERTIFICATE are read", block.Type)
		}
		if err == nil {
			_, err = algorithmFor(pub)
		}
		if err != nil {
			return nil, err
		}
		keys = append(keys, pub)
	}
	if len(keys) == 0 {
		return nil, errors.New("holds no PEM block PUBLIC KEY or CERTIFICATE")
	}
	return keys, nil
}
