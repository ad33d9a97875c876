package keyless

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // for crypto.SHA256
	_ "crypto/sha512" // for crypto.SHA384 and crypto.SHA512
	"crypto/tls"
	"errors"
	"fmt"
)

type sigKind byte

const (
	kindPKCS1v15 sigKind = iota
	kindPSS
	kindECDSA
	kindEd25519
)

// A scheme is a row of the table of signature schemes (RFC 8446, section 4.2.3) that tls-sign knows.
type scheme struct {
	kind       sigKind
	hash       crypto.Hash    // 0 with Ed25519
	curve      elliptic.Curve // the only curve in TLS 1.3; TLS 1.2 binds none
	minVersion uint16
	maxVersion uint16
	plain      Opcode // the plain operation that makes the same signature
}

// schemes has no row with SHA-1, which no client that is still maintained needs.
var schemes = map[tls.SignatureScheme]scheme{
	tls.PKCS1WithSHA256:        {kindPKCS1v15, crypto.SHA256, nil, tls.VersionTLS12, tls.VersionTLS12, OpRSASignSHA256},
	tls.PKCS1WithSHA384:        {kindPKCS1v15, crypto.SHA384, nil, tls.VersionTLS12, tls.VersionTLS12, OpRSASignSHA384},
	tls.PKCS1WithSHA512:        {kindPKCS1v15, crypto.SHA512, nil, tls.VersionTLS12, tls.VersionTLS12, OpRSASignSHA512},
	tls.PSSWithSHA256:          {kindPSS, crypto.SHA256, nil, tls.VersionTLS12, tls.VersionTLS13, OpRSAPSSSignSHA256},
	tls.PSSWithSHA384:          {kindPSS, crypto.SHA384, nil, tls.VersionTLS12, tls.VersionTLS13, OpRSAPSSSignSHA384},
	tls.PSSWithSHA512:          {kindPSS, crypto.SHA512, nil, tls.VersionTLS12, tls.VersionTLS13, OpRSAPSSSignSHA512},
	tls.ECDSAWithP256AndSHA256: {kindECDSA, crypto.SHA256, elliptic.P256(), tls.VersionTLS12, tls.VersionTLS13, OpECDSASignSHA256},
	tls.ECDSAWithP384AndSHA384: {kindECDSA, crypto.SHA384, elliptic.P384(), tls.VersionTLS12, tls.VersionTLS13, OpECDSASignSHA384},
	tls.ECDSAWithP521AndSHA512: {kindECDSA, crypto.SHA512, elliptic.P521(), tls.VersionTLS12, tls.VersionTLS13, OpECDSASignSHA512},
	tls.Ed25519:                {kindEd25519, 0, nil, tls.VersionTLS12, tls.VersionTLS13, OpEd25519Sign},
}

// CheckScheme reports whether a key with this public half may sign with scheme in the given TLS version. TLS 1.3 binds
// each ECDSA scheme to one curve and has no PKCS#1 v1.5; TLS 1.2 binds neither (RFC 8446, section 4.2.3). SHA-1 schemes
// are never allowed.
func CheckScheme(pub crypto.PublicKey, version uint16, sch tls.SignatureScheme) error {
	s, ok := schemes[sch]
	if !ok || version < s.minVersion || version > s.maxVersion {
		return fmt.Errorf("keyless: scheme 0x%04x is not allowed in %s", uint16(sch), tls.VersionName(version))
	}
	if !s.fits(pub) {
		return fmt.Errorf("keyless: scheme %s does not fit a key of type %T", sch, pub)
	}
	if k, isECDSA := pub.(*ecdsa.PublicKey); isECDSA && version == tls.VersionTLS13 && k.Curve != s.curve {
		return fmt.Errorf("keyless: scheme %s does not fit a key on %s in TLS 1.3", sch, k.Curve.Params().Name)
	}
	return nil
}

func (s scheme) fits(pub crypto.PublicKey) bool {
	switch pub.(type) {
	case *rsa.PublicKey:
		return s.kind == kindPKCS1v15 || s.kind == kindPSS
	case *ecdsa.PublicKey:
		return s.kind == kindECDSA
	case ed25519.PublicKey:
		return s.kind == kindEd25519
	}
	return false
}

// ErrSignature says that a signature did not verify with the key's public half: the other end holds another key, or
// makes wrong signatures.
var ErrSignature = errors.New("keyless: signature does not verify")

// VerifyTLS checks sig over msg as a TLS peer would: msg is hashed with the scheme's hash. It returns ErrSignature for
// a wrong signature, another error if the scheme is unknown or does not fit pub.
func VerifyTLS(pub crypto.PublicKey, sch tls.SignatureScheme, msg, sig []byte) error {
	s, ok := schemes[sch]
	if !ok {
		return fmt.Errorf("keyless: verify: unknown scheme 0x%04x", uint16(sch))
	}
	digest := msg
	if s.hash != 0 {
		digest = sum(s.hash, msg)
	}
	return verify(pub, s.kind, s.hash, digest, sig)
}

// verify checks sig over a digest, or over the message for Ed25519.
func verify(pub crypto.PublicKey, kind sigKind, hash crypto.Hash, digest, sig []byte) error {
	ok := false
	switch k := pub.(type) {
	case *rsa.PublicKey:
		switch kind {
		case kindPKCS1v15:
			ok = rsa.VerifyPKCS1v15(k, hash, digest, sig) == nil
		case kindPSS:
			ok = rsa.VerifyPSS(k, hash, digest, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		default:
			return errors.New("keyless: verify: an RSA key makes no signature of this kind")
		}
	case *ecdsa.PublicKey:
		ok = kind == kindECDSA && ecdsa.VerifyASN1(k, digest, sig)
	case ed25519.PublicKey:
		ok = kind == kindEd25519 && len(k) == ed25519.PublicKeySize && ed25519.Verify(k, digest, sig)
	default:
		return fmt.Errorf("keyless: verify: unknown key type %T", pub)
	}
	if !ok {
		return ErrSignature
	}
	return nil
}

func sum(hash crypto.Hash, msg []byte) []byte {
	h := hash.New()
	h.Write(msg)
	return h.Sum(nil)
}
