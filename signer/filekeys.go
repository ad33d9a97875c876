package signer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/keyhaven/keyhaven/keyless"
)

// Files is a [Backend] over private keys in PEM files. It is for trying out: whoever reads the file or the memory of the process has the key.
type Files struct {
	keys   []Key
	closed atomic.Bool
}

// maxKeyFile bounds a key file, in bytes.
const maxKeyFile = 64 << 10

// LoadFileKeys reads one private key (PKCS #8, SEC 1 or PKCS #1) from each file, and the key's certificate if the file holds it too.
// A key's label is the file's name without its ending. Files that others than their owner may read are refused. The logger gets a warning
// for each key; nil discards.
func LoadFileKeys(logger *slog.Logger, paths ...string) (*Files, error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	f := new(Files)
	for _, path := range paths {
		k, err := loadFileKey(path)
		if err != nil {
			return nil, fmt.Errorf("signer: key file %s: %w", path, err)
		}
		k.closed = &f.closed
		logger.Warn("this private key is a file: good for trying out, no protection for production; keep it in a token",
			"path", path, "key_ski", k.info.SKI.String(), "type", k.info.Type)
		f.keys = append(f.keys, k)
	}
	return f, nil
}

// Name implements [Backend].
func (f *Files) Name() string { return "files" }

// Keys implements [Backend].
func (f *Files) Keys(context.Context) ([]Key, error) { return f.keys, f.err() }

// Check implements [Backend].
func (f *Files) Check(context.Context) error { return f.err() }

// Close implements [Backend].
func (f *Files) Close() error {
	f.closed.Store(true)
	return nil
}

func (f *Files) err() error {
	if f.closed.Load() {
		return fmt.Errorf("signer: file keys are closed: %w", ErrUnavailable)
	}
	return nil
}

func loadFileKey(path string) (*fileKey, error) {
	text, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	key, cert, err := parseKeyPEM(text)
	if err != nil {
		return nil, err
	}
	pub := key.Public()
	if r, ok := pub.(*rsa.PublicKey); ok && (r.N.BitLen() < 2048 || r.N.BitLen() > 8192) {
		return nil, fmt.Errorf("an RSA key of %d bits; 2048 to 8192 are taken", r.N.BitLen())
	}
	ski, err := keyless.SKIOf(pub)
	if err != nil {
		return nil, err
	}
	if cert != nil && !cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(pub) {
		return nil, errors.New("the certificate in the file belongs to another key; put the right one there, or none")
	}
	base := filepath.Base(path)
	return &fileKey{key: key, info: KeyInfo{
		SKI: ski, Label: strings.TrimSuffix(base, filepath.Ext(base)), Home: "file:" + path,
		Type: TypeOf(pub), Extractable: true, Certificate: cert,
	}}, nil
}

// readSecret reads a file that nobody but its owner may read.
func readSecret(path string) ([]byte, error) {
	return readOwn(path, 0o077, maxKeyFile)
}

// readOwn reads a regular file of at most size bytes whose mode has none of the bits.
func readOwn(path string, bits fs.FileMode, size int64) ([]byte, error) {
	in, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would keep a plain Open waiting
	if err != nil {
		return nil, err
	}
	defer in.Close()
	st, err := in.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, errors.New("is no regular file")
	case st.Mode().Perm()&bits != 0:
		return nil, fmt.Errorf("has mode %04o, so that others may use it; chmod 600 it", st.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(in, size+1))
	if err == nil && int64(len(text)) > size {
		err = fmt.Errorf("is larger than %d bytes", size)
	}
	return text, err
}

// parseKeyPEM finds the one private key in the text, and the first certificate.
func parseKeyPEM(text []byte) (crypto.Signer, *x509.Certificate, error) {
	var key crypto.Signer
	var cert *x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		var parsed any
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			parsed, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			parsed, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			parsed, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			err = errors.New("is encrypted; write it without a pass phrase, or keep the key in a token")
		case "CERTIFICATE":
			if cert == nil {
				cert, err = x509.ParseCertificate(block.Bytes)
			}
		}
		if err != nil {
			return nil, nil, fmt.Errorf("block %q: %w", block.Type, err)
		}
		if parsed == nil {
			continue
		}
		if key != nil {
			return nil, nil, errors.New("holds two private keys; put each in a file of its own")
		}
		switch k := parsed.(type) {
		case *ecdsa.PrivateKey:
			if k.Curve == elliptic.P224() {
				return nil, nil, errors.New("a P-224 key; P-256, P-384 and P-521 are taken")
			}
			key = k
		case *rsa.PrivateKey:
			key = k
		case ed25519.PrivateKey:
			key = k
		default:
			return nil, nil, fmt.Errorf("a %T; RSA, ECDSA and Ed25519 keys are taken", parsed)
		}
	}
	if key == nil {
		return nil, nil, errors.New("holds no private key in PEM; PKCS #8, SEC 1 and PKCS #1 are taken")
	}
	return key, cert, nil
}

// fileKey is a Key in memory.
type fileKey struct {
	key    crypto.Signer
	info   KeyInfo
	closed *atomic.Bool
}

// NewMemoryKey returns a [Key] over a private key in memory, for tests and trying out. Its home is "memory".
func NewMemoryKey(key crypto.Signer, label string) (Key, error) {
	ski, err := keyless.SKIOf(key.Public())
	if err != nil {
		return nil, fmt.Errorf("signer: key %q: %w", label, err)
	}
	return &fileKey{key: key, closed: new(atomic.Bool), info: KeyInfo{
		SKI: ski, Label: label, Home: "memory", Type: TypeOf(key.Public()), Extractable: true,
	}}, nil
}

func (k *fileKey) Public() crypto.PublicKey    { return k.key.Public() }
func (k *fileKey) Info() KeyInfo               { return k.info }
func (k *fileKey) Supports(alg Algorithm) bool { return Fits(k.key.Public(), alg) }

func (k *fileKey) Sign(ctx context.Context, alg Algorithm, input []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("signer: sign with %s: %w", k.info.Home, err)
	}
	if k.closed.Load() {
		return nil, fmt.Errorf("signer: sign with %s: %w", k.info.Home, ErrUnavailable)
	}
	if !k.Supports(alg) {
		return nil, fmt.Errorf("signer: sign with %s by %v: %w", k.info.Home, alg, ErrUnsupported)
	}
	if alg.Hash != 0 && len(input) != alg.Hash.Size() {
		return nil, fmt.Errorf("signer: sign with %s by %v: digest of %d bytes", k.info.Home, alg, len(input))
	}
	opts := crypto.SignerOpts(alg.Hash)
	if alg.Kind == PSS {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: alg.Hash}
	}
	sig, err := k.key.Sign(rand.Reader, input, opts)
	if err != nil {
		return nil, fmt.Errorf("signer: sign with %s by %v: %w", k.info.Home, alg, err)
	}
	return sig, nil
}

// DecryptRaw implements [Decrypter]. math/big does not run in constant time, so the ciphertext is blinded (Kocher 1996), and the result is checked
// before it is given away, so that a fault does not reveal a factor.
func (k *fileKey) DecryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error) {
	priv, ok := k.key.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("signer: decrypt with %s: %w", k.info.Home, ErrUnsupported)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("signer: decrypt with %s: %w", k.info.Home, err)
	}
	if k.closed.Load() {
		return nil, fmt.Errorf("signer: decrypt with %s: %w", k.info.Home, ErrUnavailable)
	}
	c := new(big.Int).SetBytes(ciphertext)
	if len(ciphertext) != priv.Size() || c.Cmp(priv.N) >= 0 {
		return nil, fmt.Errorf("signer: decrypt with %s: ciphertext is not below the modulus", k.info.Home)
	}
	e := big.NewInt(int64(priv.E))
	var r, unblind *big.Int
	for unblind == nil {
		var err error
		if r, err = rand.Int(rand.Reader, priv.N); err != nil {
			return nil, fmt.Errorf("signer: decrypt with %s: %w", k.info.Home, err)
		}
		unblind = new(big.Int).ModInverse(r, priv.N)
	}
	blinded := r.Exp(r, e, priv.N)
	blinded.Mul(blinded, c).Mod(blinded, priv.N)
	m := blinded.Exp(blinded, priv.D, priv.N)
	m.Mul(m, unblind).Mod(m, priv.N)
	if new(big.Int).Exp(m, e, priv.N).Cmp(c) != 0 {
		return nil, fmt.Errorf("signer: decrypt with %s: the result is wrong", k.info.Home)
	}
	return m.FillBytes(make([]byte, priv.Size())), nil
}
