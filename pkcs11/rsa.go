package pkcs11

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/subtle"
	"encoding/binary"
	"fmt"

	ck "github.com/miekg/pkcs11"
)

// digestInfo holds what precedes a digest in a PKCS#1 v1.5 signature, RFC 8017 section 9.2. TLS up to 1.1 signs MD5 and SHA-1
// side by side with nothing before them.
var digestInfo = map[crypto.Hash][]byte{
	crypto.MD5SHA1: {},
	crypto.SHA1:    {0x30, 0x21, 0x30, 0x09, 0x06, 0x05, 0x2b, 0x0e, 0x03, 0x02, 0x1a, 0x05, 0x00, 0x04, 0x14},
	crypto.SHA224:  {0x30, 0x2d, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x04, 0x05, 0x00, 0x04, 0x1c},
	crypto.SHA256:  {0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20},
	crypto.SHA384:  {0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30},
	crypto.SHA512:  {0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00, 0x04, 0x40},
}

// maxDigestInfo is the size of the longest DigestInfo: SHA-512's.
const maxDigestInfo = 19 + 64

// pssMechanism returns CKM_RSA_PKCS_PSS with the salt as long as the hash.
func pssMechanism(h crypto.Hash) mechanism {
	m := mechanism{id: ck.CKM_RSA_PKCS_PSS, salt: uint(h.Size())}
	switch h {
	case crypto.SHA256:
		m.hash, m.mgf = ck.CKM_SHA256, ck.CKG_MGF1_SHA256
	case crypto.SHA384:
		m.hash, m.mgf = ck.CKM_SHA384, ck.CKG_MGF1_SHA384
	case crypto.SHA512:
		m.hash, m.mgf = ck.CKM_SHA512, ck.CKG_MGF1_SHA512
	}
	return m
}

// encodePSS returns the encoded message for raw RSA, as long as the modulus: EMSA-PSS-ENCODE of RFC 8017 section 9.1.1 with a
// salt as long as the hash. It is for tokens without CKM_RSA_PKCS_PSS.
func encodePSS(pub *rsa.PublicKey, h crypto.Hash, digest []byte) ([]byte, error) {
	bits, size := pub.N.BitLen()-1, h.Size()
	length := (bits + 7) / 8
	if length < 2*size+2 {
		return nil, fmt.Errorf("%w: the key is too short for PSS with %v", ErrUnsupported, h)
	}
	out := make([]byte, pub.Size())
	em := out[len(out)-length:]
	db, mac := em[:length-size-1], em[length-size-1:length-1]
	salt := db[len(db)-size:]
	rand.Read(salt)
	db[len(db)-size-1] = 1

	hash := h.New()
	hash.Write(make([]byte, 8))
	hash.Write(digest)
	hash.Write(salt)
	hash.Sum(mac[:0])
	maskMGF1(db, mac, h)
	db[0] &= 0xff >> (8*length - bits)
	em[length-1] = 0xbc
	return out, nil
}

// maskMGF1 xors MGF1 (RFC 8017 section B.2.1) of seed onto dst.
func maskMGF1(dst, seed []byte, h crypto.Hash) {
	hash := h.New()
	var counter [4]byte
	var block []byte
	for i := uint32(0); len(dst) > 0; i++ {
		binary.BigEndian.PutUint32(counter[:], i)
		hash.Reset()
		hash.Write(seed)
		hash.Write(counter[:])
		block = hash.Sum(block[:0])
		n := subtle.XORBytes(dst, dst, block)
		dst = dst[n:]
	}
}
