package keyless

import (
	"crypto/ecdh"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
)

// Names of the custom functions (opcode 0x24) of this project.
const (
	// FuncTLSSign asks for a TLS handshake signature. The payload is what AppendTLSSign writes; the server checks it
	// with ParseTLSSign and hashes the message itself. The reply is the signature.
	FuncTLSSign = "keyhaven/tls-sign"
	// FuncRenew asks for a new certificate. The payload is a PKCS#10 request in DER; the reply is the certificates in
	// DER, leaf first, one after the other.
	FuncRenew = "keyhaven/renew"
)

// A TLSMessage is a message that a TLS server signs in a handshake, and nothing else is.
type TLSMessage struct {
	Scheme  tls.SignatureScheme
	Message []byte // what is hashed and signed; aliases the payload
	Version uint16 // tls.VersionTLS12 or tls.VersionTLS13, told by the message's shape
}

// AppendTLSSign writes the payload of a FuncTLSSign request to the end of dst: scheme u16, then the message.
func AppendTLSSign(dst []byte, scheme tls.SignatureScheme, msg []byte) []byte {
	dst = binary.BigEndian.AppendUint16(dst, uint16(scheme))
	return append(dst, msg...)
}

// ParseTLSSign reads the payload of a FuncTLSSign request and accepts exactly two messages:
//
//   - TLS 1.3: 64 spaces, the server's context string, a zero byte, a transcript hash of 32 or 48 bytes (RFC 8446,
//     section 4.4.3);
//   - TLS 1.2: client random, server random, ECDHE parameters with a known named curve and a point of its exact
//     length, on the curve where the curve has invalid points (RFC 8422, section 5.4).
//
// The scheme must be one that the version allows; whether it fits a key is CheckScheme's to say. Errors match
// ErrFormat; their text is for the local log.
func ParseTLSSign(payload []byte) (TLSMessage, error) {
	if len(payload) < 2 {
		return TLSMessage{}, fmt.Errorf("keyless: tls-sign: payload of %d bytes has no signature scheme: %w", len(payload), ErrFormat)
	}
	m := TLSMessage{
		Scheme:  tls.SignatureScheme(binary.BigEndian.Uint16(payload)),
		Message: payload[2:],
	}
	if len(m.Message) >= len(serverContext) && string(m.Message[:len(serverContext)]) == serverContext {
		m.Version = tls.VersionTLS13
		if n := len(m.Message) - len(serverContext); n != sha256.Size && n != sha512.Size384 {
			return TLSMessage{}, fmt.Errorf("keyless: tls-sign: TLS 1.3 transcript hash of %d bytes, want 32 or 48: %w", n, ErrFormat)
		}
	} else {
		m.Version = tls.VersionTLS12
		if err := checkServerKeyExchange(m.Message); err != nil {
			return TLSMessage{}, fmt.Errorf("keyless: tls-sign: neither a TLS 1.3 server CertificateVerify nor TLS 1.2 ECDHE parameters: %w: %w", err, ErrFormat)
		}
	}
	if s, ok := schemes[m.Scheme]; !ok || m.Version < s.minVersion || m.Version > s.maxVersion {
		return TLSMessage{}, fmt.Errorf("keyless: tls-sign: scheme 0x%04x is not allowed in %s: %w", uint16(m.Scheme), tls.VersionName(m.Version), ErrFormat)
	}
	return m, nil
}

// serverContext is what precedes the transcript hash in a server's CertificateVerify (RFC 8446, section 4.4.3).
const serverContext = "                                                                TLS 1.3, server CertificateVerify\x00"

// Layout of the message of a TLS 1.2 ServerKeyExchange (RFC 8422, section 5.4):
//
//	client random 32 | server random 32 | curve_type u8 = 3 | named_curve u16 | length u8 | point
const (
	randomsSize     = 64
	paramsHeader    = 4
	curveTypeNamed  = 3
	uncompressedTag = 0x04
)

// A group is a named curve with the exact size of its points. curve, if not nil, can tell a point from other bytes;
// on the Montgomery curves every string of the right length is one.
type group struct {
	size  int
	curve ecdh.Curve
}

// groups holds the named curves that a TLS 1.2 server may choose (RFC 8422, section 5.1.1).
var groups = map[uint16]group{
	23: {65, ecdh.P256()},
	24: {97, ecdh.P384()},
	25: {133, ecdh.P521()},
	29: {32, nil}, // X25519
	30: {56, nil}, // X448
}

// checkServerKeyExchange accepts the signed part of an ECDHE ServerKeyExchange. The randoms are the peer's to choose, so
// the message is also refused if it could be read as a certificate or another signed DER structure.
func checkServerKeyExchange(msg []byte) error {
	if len(msg) < randomsSize+paramsHeader {
		return fmt.Errorf("message of %d bytes", len(msg))
	}
	params := msg[randomsSize:]
	if params[0] != curveTypeNamed {
		return fmt.Errorf("curve type %d, want named_curve", params[0])
	}
	id := binary.BigEndian.Uint16(params[1:])
	g, ok := groups[id]
	if !ok {
		return fmt.Errorf("unknown group %d", id)
	}
	point := params[paramsHeader:]
	if int(params[3]) != g.size || len(point) != g.size {
		return fmt.Errorf("point of %d bytes announced as %d, group %d has %d", len(point), params[3], id, g.size)
	}
	if g.curve != nil {
		if _, err := g.curve.NewPublicKey(point); err != nil {
			return fmt.Errorf("point is not on group %d", id)
		}
	}
	if isDER(msg) {
		return errors.New("message is a complete DER structure")
	}
	return nil
}

// isDER reports whether b is one SEQUENCE or SET that fills b and whose elements fill it in turn, as every signed ASN.1
// structure is (TBSCertificate, CertificationRequestInfo, TBSCertList, OCSP ResponseData, CMS SignedAttributes).
func isDER(b []byte) bool {
	if len(b) == 0 || b[0] != 0x30 && b[0] != 0x31 {
		return false
	}
	inner, rest, ok := derElement(b)
	if !ok || len(rest) != 0 {
		return false
	}
	for len(inner) > 0 {
		if _, inner, ok = derElement(inner); !ok {
			return false
		}
	}
	return true
}

// derElement splits the first element off b, whatever its tag.
func derElement(b []byte) (value, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n, head := int(b[1]), 2
	switch {
	case n == 0x81 && len(b) >= 3:
		n, head = int(b[2]), 3
	case n == 0x82 && len(b) >= 4:
		n, head = int(binary.BigEndian.Uint16(b[2:])), 4
	case n >= 0x80:
		return nil, nil, false
	}
	if len(b)-head < n {
		return nil, nil, false
	}
	return b[head : head+n], b[head+n:], true
}
