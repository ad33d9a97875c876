package signer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/keyhaven/keyhaven/keyless"
)

// Kind is a family of signature algorithms. The zero value is none.
type Kind byte

// The kinds of signature.
const (
	PKCS1v15 Kind = iota + 1 // RSASSA-PKCS1-v1_5, RFC 8017 section 8.2
	PSS                      // RSASSA-PSS, RFC 8017 section 8.1: MGF1 with the same hash, salt as long as the hash
	ECDSA                    // ECDSA with an ASN.1 DER result, RFC 3279 section 2.2.3
	Ed25519                  // pure Ed25519, RFC 8032
)

// String returns the name used in records and metrics.
func (k Kind) String() string {
	switch k {
	case PKCS1v15:
		return "rsa-pkcs1v15"
	case PSS:
		return "rsa-pss"
	case ECDSA:
		return "ecdsa"
	case Ed25519:
		return "ed25519"
	}
	return "none"
}

// Algorithm is a way to sign. Hash is 0 for Ed25519, which signs whole messages; crypto.MD5SHA1 is allowed with PKCS1v15 and
// ECDSA, as TLS up to 1.1 uses it. Algorithms are comparable.
type Algorithm struct {
	Kind Kind
	Hash crypto.Hash
}

// Key is one private key, wherever it lives. All methods may be called from several goroutines at once.
type Key interface {
	// Public returns the public key: *ecdsa.PublicKey, *rsa.PublicKey or ed25519.PublicKey. It is cached, never asked of a token.
	Public() crypto.PublicKey
	// Info describes the key. The answer shares no memory that the caller may change.
	Info() KeyInfo
	// Supports reports whether Sign can be expected to work with the algorithm.
	Supports(Algorithm) bool
	// Sign signs input: the digest, of exactly the hash's length, or the whole message for Ed25519. The result is an ASN.1 DER
	// signature for ECDSA and the plain octets otherwise. It does not keep input. ErrUnsupported means that the
	// algorithm does not fit the key, ErrUnavailable that the key's home does not answer now and another home may, and ErrThrottled
	// that the home asks for a pause. An ErrUnavailable that is an ErrNotFound too tells of this key alone, and does not count
	// against its home. Any other error would come again. Sign should return soon after the context has ended.
	Sign(ctx context.Context, alg Algorithm, input []byte) ([]byte, error)
}

// Decrypter is an optional power of an RSA [Key].
type Decrypter interface {
	// DecryptRaw returns ciphertext^d mod n as a block of the modulus' length, padding and all. The caller
	// must take the padding away in constant time.
	DecryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error)
}

// Healther is an optional power of a [Key]: a key that knows that its home is away says so, and another home is used.
type Healther interface {
	// Healthy reports whether Sign can be expected to reach the key. It must not block.
	Healthy() bool
}

// KeyInfo describes a key to people, records and policies.
type KeyInfo struct {
	SKI              keyless.SKI
	Label            string
	ID               []byte // CKA_ID of a token's object; empty for files
	Home             string // the name of the backend that holds the key
	Type             string // as TypeOf returns it
	Extractable      bool   // the private key can leave its home
	NeverExtractable bool   // CKA_NEVER_EXTRACTABLE
	Local            bool   // CKA_LOCAL: the key was made where it is
	Certificate      *x509.Certificate
}

// Backend is a place that holds keys. All methods may be called from several goroutines at once.
type Backend interface {
	// Name is what operators call the place, without any secret in it.
	Name() string
	// Keys returns the keys that can be used now.
	Keys(ctx context.Context) ([]Key, error)
	// Check reports whether the place answers now.
	Check(ctx context.Context) error
	// Close releases the place and waits for operations in progress. Keys of a closed backend return ErrUnavailable. Close is idempotent.
	Close() error
}

// Capacitor is an optional power of a [Backend] that knows how much it takes.
type Capacitor interface {
	// Capacity returns how many operations the place works on at once now; 0 while it can work on none. It must not block.
	Capacity() int
}

// Errors that a [Key] returns and callers branch on.
var (
	ErrUnsupported = errors.New("signer: algorithm does not fit the key")
	ErrUnavailable = errors.New("signer: the key's home is not available")
	ErrNotFound    = errors.New("signer: no such key")
	ErrAmbiguous   = errors.New("signer: more than one fits")
	// ErrThrottled means that the home is well and asks to be left alone for a while. The operation is tried again there, within its
	// deadline, and not in another home.
	ErrThrottled = errors.New("signer: the key's home is throttling")
)

// Errors of a [Lane]. The operation was not begun, or, where the error is an [ErrThrottled] too, not done.
var (
	// ErrOverloaded means that the queue before the home is full.
	ErrOverloaded = errors.New("signer: the queue before the key's home is full")
	// ErrDeadline means that the operation would not be done before its deadline, so that it was refused at once.
	ErrDeadline = errors.New("signer: the operation would miss its deadline")
)

// TypeOf names the type and size of a public key: "ECDSA P-256", "RSA 2048", "Ed25519". It returns "" for a type that no
// [Key] can have.
func TypeOf(pub crypto.PublicKey) string {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	}
	return ""
}

// Fits reports whether the algorithm can be used with the public key at all. A backend's key may support less.
// An ECDSA key takes every hash: TLS 1.2 does not bind the hash to the curve (RFC 8422 section 5.10); that TLS 1.3 does
// is for [keyless.CheckScheme] to say.
func Fits(pub crypto.PublicKey, alg Algorithm) bool {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return alg.Kind == ECDSA && hashKnown(alg.Hash)
	case ed25519.PublicKey:
		return alg.Kind == Ed25519 && alg.Hash == 0
	case *rsa.PublicKey:
		switch alg.Kind {
		case PKCS1v15:
			return hashKnown(alg.Hash)
		case PSS:
			switch alg.Hash {
			case crypto.SHA256, crypto.SHA384, crypto.SHA512:
				// RFC 8017 section 9.1.1: emLen must hold hash, salt and two bytes.
				return (k.N.BitLen()-1+7)/8 >= 2*alg.Hash.Size()+2
			}
		}
	}
	return false
}

func hashKnown(h crypto.Hash) bool {
	switch h {
	case crypto.MD5SHA1, crypto.SHA1, crypto.SHA224, crypto.SHA256, crypto.SHA384, crypto.SHA512:
		return true
	}
	return false
}

// AlgorithmOf returns the algorithm behind a TLS signature scheme (RFC 8446 section 4.2.3), and false for an unknown one. The
// schemes with SHA-1 are unknown.
func AlgorithmOf(s tls.SignatureScheme) (Algorithm, bool) {
	switch s {
	case tls.ECDSAWithP256AndSHA256:
		return Algorithm{ECDSA, crypto.SHA256}, true
	case tls.ECDSAWithP384AndSHA384:
		return Algorithm{ECDSA, crypto.SHA384}, true
	case tls.ECDSAWithP521AndSHA512:
		return Algorithm{ECDSA, crypto.SHA512}, true
	case tls.PSSWithSHA256:
		return Algorithm{PSS, crypto.SHA256}, true
	case tls.PSSWithSHA384:
		return Algorithm{PSS, crypto.SHA384}, true
	case tls.PSSWithSHA512:
		return Algorithm{PSS, crypto.SHA512}, true
	case tls.PKCS1WithSHA256:
		return Algorithm{PKCS1v15, crypto.SHA256}, true
	case tls.PKCS1WithSHA384:
		return Algorithm{PKCS1v15, crypto.SHA384}, true
	case tls.PKCS1WithSHA512:
		return Algorithm{PKCS1v15, crypto.SHA512}, true
	case tls.Ed25519:
		return Algorithm{Ed25519, 0}, true
	}
	return Algorithm{}, false
}
