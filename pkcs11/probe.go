package pkcs11

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	"time"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/signer"
)

// ckmEDDSA is CKM_EDDSA of PKCS #11 v3.0, which the 2.40 headers do not have. Without parameters it is pure Ed25519.
const ckmEDDSA = 0x1057

// pkcs1Hashes are those that one working CKM_RSA_PKCS serves: the DigestInfo is ours. ECDSA serves them too.
var pkcs1Hashes = []crypto.Hash{crypto.MD5SHA1, crypto.SHA1, crypto.SHA224, crypto.SHA256, crypto.SHA384, crypto.SHA512}

var pssHashes = []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512}

// selfTest makes a signature with each mechanism that the key might have and verifies it. It returns the methods that work, none
// if pub is not the public half of the object.
func (k *key) selfTest(ctx context.Context, s *session, h ck.ObjectHandle) (map[signer.Algorithm]method, error) {
	works := map[signer.Algorithm]method{}
	add := func(kind signer.Kind, hashes []crypto.Hash, m method) error {
		ok, err := k.try(ctx, s, h, signer.Algorithm{Kind: kind, Hash: hashes[min(3, len(hashes)-1)]}, m)
		if ok {
			for _, hash := range hashes {
				works[signer.Algorithm{Kind: kind, Hash: hash}] = m
			}
		}
		return err
	}
	switch k.pub.(type) {
	case *ecdsa.PublicKey:
		return works, add(signer.ECDSA, pkcs1Hashes, method{mechanism: mechanism{id: ck.CKM_ECDSA}})
	case ed25519.PublicKey:
		return works, add(signer.Ed25519, []crypto.Hash{0}, method{mechanism: mechanism{id: ckmEDDSA}})
	}
	if err := add(signer.PKCS1v15, pkcs1Hashes, method{mechanism: mechanism{id: ck.CKM_RSA_PKCS}}); err != nil {
		return nil, err
	}
	for _, hash := range pssHashes {
		if err := add(signer.PSS, []crypto.Hash{hash}, method{mechanism: pssMechanism(hash)}); err != nil {
			return nil, err
		}
	}
	for _, hash := range pssHashes {
		if _, ok := works[signer.Algorithm{Kind: signer.PSS, Hash: hash}]; ok {
			continue
		}
		if err := add(signer.PSS, []crypto.Hash{hash}, method{mechanism: mechanism{id: ck.CKM_RSA_X_509}, software: true}); err != nil {
			return nil, err
		}
	}
	return works, nil
}

// try signs a random input with the object and verifies the result. It is false if the token does not do that; an error
// means that the answer could not be had.
func (k *key) try(ctx context.Context, s *session, h ck.ObjectHandle, alg signer.Algorithm, m method) (bool, error) {
	input := make([]byte, 32)
	if alg.Hash != 0 {
		input = make([]byte, alg.Hash.Size())
	}
	rand.Read(input)
	in, err := k.prepare(nil, alg, m, input)
	if err != nil {
		return false, nil
	}
	op := operation{mechanism: m.mechanism, in: in}
	if err := k.tryOn(ctx, s, h, &op); err != nil {
		return false, k.t.inconclusive(s, err)
	}
	sig, err := k.finish(alg, op.out[:op.n])
	return err == nil && verify(k.pub, alg, input, sig), nil
}

// tryDecrypt decrypts a random number and compares.
func (k *key) tryDecrypt(ctx context.Context, s *session, h ck.ObjectHandle) (bool, error) {
	pub := k.pub.(*rsa.PublicKey)
	plain, err := rand.Int(rand.Reader, pub.N)
	if err != nil {
		return false, err
	}
	cipher := new(big.Int).Exp(plain, big.NewInt(int64(pub.E)), pub.N)
	op := operation{decrypt: true, mechanism: mechanism{id: ck.CKM_RSA_X_509}, in: cipher.FillBytes(make([]byte, k.order))}
	if err := k.tryOn(ctx, s, h, &op); err != nil {
		return false, k.t.inconclusive(s, err)
	}
	return new(big.Int).SetBytes(op.out[:op.n]).Cmp(plain) == 0, nil
}

// tryOn runs op, again after a pause if the token says that it is busy.
func (k *key) tryOn(ctx context.Context, s *session, h ck.ObjectHandle, op *operation) error {
	for pause := minBusyPause; ; pause *= 4 {
		err := k.operate(ctx, s, h, op)
		if faultOf(err) != faultBusy || pause > maxBusyPause {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Bounds of the pauses of a self-test that a busy token interrupts.
const (
	minBusyPause = 5 * time.Millisecond
	maxBusyPause = 80 * time.Millisecond
)

// inconclusive returns err if a remedy of the ladder may help or the PIN was refused, and nil if the token has said no. After a no, the
// session is exchanged, as modules have been seen to leave the operation active.
func (t *Token) inconclusive(s *session, err error) error {
	var rv ck.Error
	// CKR_FUNCTION_FAILED, again and again, is how some modules refuse a mechanism.
	no := faultOf(err) == faultOther || errors.Is(err, ck.Error(ck.CKR_FUNCTION_FAILED))
	if !no || !errors.As(err, &rv) {
		return err
	}
	return t.pool.exchange(s)
}

// verify checks a signature with Go's own cryptography.
func verify(pub crypto.PublicKey, alg signer.Algorithm, input, sig []byte) bool {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(pub, input, sig)
	case ed25519.PublicKey:
		return ed25519.Verify(pub, input, sig)
	case *rsa.PublicKey:
		if alg.Kind == signer.PSS {
			return rsa.VerifyPSS(pub, alg.Hash, input, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(pub, alg.Hash, input, sig) == nil
	}
	return false
}
