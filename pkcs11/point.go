package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
)

// curve is an elliptic curve that tokens and TLS have in common.
type curve struct {
	name   string
	params []byte         // CKA_EC_PARAMS: the curve's object identifier in DER
	ec     elliptic.Curve // nil for Ed25519
	order  int            // bytes of a scalar, and of a coordinate
}

// The object identifiers stand in RFC 5480 section 2.1.1.1 and RFC 8410 section 3.
var (
	p256     = &curve{"p256", []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}, elliptic.P256(), 32}
	p384     = &curve{"p384", []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}, elliptic.P384(), 48}
	p521     = &curve{"p521", []byte{6, 5, 0x2b, 0x81, 4, 0, 0x23}, elliptic.P521(), 66}
	edwards  = &curve{"ed25519", []byte{6, 3, 0x2b, 0x65, 0x70}, nil, 32}
	curves   = []*curve{p256, p384, p521, edwards}
	edString = []byte("\x13\x0cedwards25519") // the curve's name as PrintableString, PKCS #11 v3.0 section 2.3.5
)

func curveOf(params []byte) *curve {
	for _, c := range curves {
		if bytes.Equal(c.params, params) {
			return c
		}
	}
	if bytes.Equal(edString, params) {
		return edwards
	}
	return nil
}

// decodePoint makes a public key of CKA_EC_PARAMS and CKA_EC_POINT. The standard wants the point as a DER OCTET STRING; some
// modules give it raw, or as the BIT STRING of a certificate. The length tells them apart. Points off the curve are errors.
func decodePoint(params, value []byte) (crypto.PublicKey, error) {
	c := curveOf(params)
	if c == nil {
		return nil, fmt.Errorf("unknown curve %x", params[:min(len(params), 16)])
	}
	size := 1 + 2*c.order
	if c == edwards {
		size = ed25519.PublicKeySize
	}
	point := unwrapPoint(value, size)
	if point == nil {
		return nil, fmt.Errorf("a point of %d bytes is none of %s's", len(value), c.name)
	}
	if c == edwards {
		return ed25519.PublicKey(bytes.Clone(point)), nil
	}
	return ecdsa.ParseUncompressedPublicKey(c.ec, point)
}

// unwrapPoint returns the point of size bytes in value, or nil.
func unwrapPoint(value []byte, size int) []byte {
	if len(value) == size {
		return value
	}
	for _, prefix := range [][]byte{appendLength([]byte{4}, size), append(appendLength([]byte{3}, size+1), 0)} {
		if rest, ok := bytes.CutPrefix(value, prefix); ok && len(rest) == size {
			return rest
		}
	}
	return nil
}

// appendLength appends a DER length below 256.
func appendLength(dst []byte, n int) []byte {
	if n >= 0x80 {
		dst = append(dst, 0x81)
	}
	return append(dst, byte(n))
}

// Sizes of RSA keys that are used, in bits.
const (
	minRSA = 2048
	maxRSA = 8 * maxOutput
)

// decodeRSA makes a public key of CKA_MODULUS and CKA_PUBLIC_EXPONENT.
func decodeRSA(modulus, exponent []byte) (*rsa.PublicKey, error) {
	if len(modulus) > maxOutput+1 {
		return nil, errors.New("the RSA modulus is too long")
	}
	n, e := new(big.Int).SetBytes(modulus), new(big.Int).SetBytes(exponent)
	if bits := n.BitLen(); bits < minRSA || bits > maxRSA || n.Bit(0) == 0 {
		return nil, fmt.Errorf("an RSA modulus of %d bits is not used here: %d to %d", bits, minRSA, maxRSA)
	}
	if e.BitLen() > 31 || e.Int64() < 3 || e.Bit(0) == 0 {
		return nil, errors.New("the RSA public exponent is not an odd number from 3 to 2^31")
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

// appendSignature appends the DER form (RFC 3279 section 2.2.3) of an ECDSA signature that a token gave as r‖s, each of
// the curve's width. A signature of another length, or with r or s zero, is an error.
func appendSignature(dst, rs []byte, order int) ([]byte, error) {
	if len(rs) != 2*order || order > 66 {
		return nil, fmt.Errorf("the token gave an ECDSA signature of %d bytes, want %d", len(rs), 2*order)
	}
	r, s := bytes.TrimLeft(rs[:order], "\x00"), bytes.TrimLeft(rs[order:], "\x00")
	if len(r) == 0 || len(s) == 0 {
		return nil, errors.New("the token gave an ECDSA signature with a zero in it")
	}
	dst = append(dst, 0x30)
	dst = appendLength(dst, integerSize(r)+integerSize(s))
	return appendInteger(appendInteger(dst, r), s), nil
}

// integerSize is the encoded size of a positive number without leading zeros: tag, length, sign byte if needed, digits.
func integerSize(b []byte) int { return 2 + int(b[0]>>7) + len(b) }

func appendInteger(dst, b []byte) []byte {
	dst = append(dst, 2, byte(len(b))+b[0]>>7)
	if b[0] >= 0x80 {
		dst = append(dst, 0)
	}
	return append(dst, b...)
}
