//lint:file-ignore SA1019 TLS 1.2 without ECDHE has no other padding; the oracle is what this file is about

package keyless

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/subtle"
	"errors"
	"fmt"
)

// minPadding is the number of bytes of a PKCS#1 v1.5 encryption block that are not message: 0x00, 0x02, at least 8
// non-zero bytes, 0x00 (RFC 8017, section 7.2.1).
const minPadding = 11

// decrypt has the ciphertext decrypted raw and takes the padding off here. What depends on the padding must show
// nowhere: not in the result's length, not in an error, not in time. So the session key starts out random and is
// replaced, by a constant-time copy, only if the block was good; a server that says "cryptography failure", or that
// returns a block of another length because it took padding or leading zeros off, counts as bad padding, too.
func (b *boundKey) decrypt(ciphertext []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	pub, ok := b.key.pub.(*rsa.PublicKey)
	if !ok || !b.key.opts.AllowDecrypt {
		return nil, errors.New("keyless: decryption is not allowed with this key")
	}
	o, ok := opts.(*rsa.PKCS1v15DecryptOptions)
	if !ok || o.SessionKeyLen <= 0 {
		return nil, errors.New("keyless: only session keys are decrypted: want *rsa.PKCS1v15DecryptOptions with a SessionKeyLen")
	}
	size := pub.Size()
	if o.SessionKeyLen > size-minPadding {
		return nil, fmt.Errorf("keyless: session key of %d bytes does not fit a block of %d", o.SessionKeyLen, size)
	}
	// The ciphertext is public, so these two may fail openly.
	if len(ciphertext) != size {
		return nil, fmt.Errorf("keyless: ciphertext of %d bytes, want %d", len(ciphertext), size)
	}
	if !belowModulus(ciphertext, pub) {
		return nil, errors.New("keyless: ciphertext is not below the modulus")
	}
	key := make([]byte, o.SessionKeyLen)
	rand.Read(key) //nolint:errcheck // documented never to fail
	block, err := b.do(&Operation{Opcode: OpRSADecrypt, Payload: ciphertext})
	if err != nil && !errors.Is(err, ErrCrypto) {
		return nil, err
	}
	if err == nil && len(block) == size {
		unpadSessionKey(key, block)
	}
	clear(block)
	return key, nil
}

// belowModulus compares public values.
func belowModulus(ciphertext []byte, pub *rsa.PublicKey) bool {
	n := pub.N.FillBytes(make([]byte, len(ciphertext)))
	for i := range n {
		if ciphertext[i] != n[i] {
			return ciphertext[i] < n[i]
		}
	}
	return false
}

// unpadSessionKey copies the message of a PKCS#1 v1.5 encryption block to key if the block is good and its message has
// exactly the length of key, and leaves key alone if not. Time and memory access depend on the two lengths only.
//
// Since the length of the message is known, so is the place of everything: block = 0x00 0x02 ‖ non-zero bytes ‖ 0x00 ‖
// key. The caller makes sure that len(block) >= len(key) + minPadding.
func unpadSessionKey(key, block []byte) {
	end := len(block) - len(key) - 1
	good := subtle.ConstantTimeByteEq(block[0], 0x00)
	good &= subtle.ConstantTimeByteEq(block[1], 0x02)
	for _, p := range block[2:end] {
		good &= 1 ^ subtle.ConstantTimeByteEq(p, 0x00)
	}
	good &= subtle.ConstantTimeByteEq(block[end], 0x00)
	subtle.ConstantTimeCopy(good, key, block[end+1:])
}
