package keyless

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
)

// A SKI names a key: the SHA-1 of its public key's BIT STRING contents (RFC 5280, section 4.2.1.2, method 1). It is a
// name and no more; nothing is trusted because of it. The zero SKI means "none".
type SKI [sha1.Size]byte

// String is the lower-case hexadecimal form.
func (s SKI) String() string { return hex.EncodeToString(s[:]) }

// IsZero reports whether s names no key.
func (s SKI) IsZero() bool { return s == SKI{} }

// ParseSKI reads the 40 hexadecimal digits that String writes; upper case is accepted.
func ParseSKI(text string) (SKI, error) {
	var s SKI
	if hex.DecodedLen(len(text)) != len(s) || len(text)%2 != 0 {
		return SKI{}, fmt.Errorf("keyless: SKI %q: want 40 hexadecimal digits, got %d characters", text, len(text))
	}
	if _, err := hex.Decode(s[:], []byte(text)); err != nil {
		return SKI{}, fmt.Errorf("keyless: SKI %q: %w", text, err)
	}
	return s, nil
}

// SKIOf computes the SKI of an RSA, ECDSA or Ed25519 public key, or of any other that x509.MarshalPKIXPublicKey knows.
func SKIOf(pub crypto.PublicKey) (SKI, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return SKI{}, fmt.Errorf("keyless: SKI of %T: %w", pub, err)
	}
	var spki struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &spki); err != nil {
		return SKI{}, fmt.Errorf("keyless: SKI of %T: %w", pub, err)
	}
	return sha1.Sum(spki.Key.Bytes), nil
}

// DigestOf computes the name that older clients send in item 0x01: the SHA-256 of the upper-case hexadecimal text of
// the RSA modulus, or of the compressed point of an ECDSA key. Other keys have none.
func DigestOf(pub crypto.PublicKey) ([sha256.Size]byte, error) {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		return sha256.Sum256(fmt.Appendf(nil, "%X", k.N)), nil
	case *ecdsa.PublicKey:
		point, err := k.Bytes() // uncompressed; also checks that the point is on the curve
		if err != nil {
			return [sha256.Size]byte{}, fmt.Errorf("keyless: digest name of ECDSA key: %w", err)
		}
		return sha256.Sum256(fmt.Appendf(nil, "%X", compressed(k.Curve, point))), nil
	default:
		return [sha256.Size]byte{}, fmt.Errorf("keyless: %T has no digest name, use its SKI", pub)
	}
}

// compressed turns 0x04 ‖ x ‖ y into 0x02 or 0x03 ‖ x (SEC 1, section 2.3.3).
func compressed(curve elliptic.Curve, point []byte) []byte {
	n := (curve.Params().BitSize + 7) / 8
	out := append([]byte{0x02 | point[2*n]&1}, point[1:1+n]...)
	return out
}
