package pkcs11

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"fmt"
	"math/big"
	"sync/atomic"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/signer"
)

// key is a private key on the token.
type key struct {
	t      *Token
	pub    crypto.PublicKey
	kind   uint // CKA_KEY_TYPE
	order  int  // bytes of the modulus, or of an ECDSA scalar
	always bool // CKA_ALWAYS_AUTHENTICATE

	methods map[signer.Algorithm]method // what the self-test found to work
	decrypt bool                        // raw decryption works

	info atomic.Pointer[signer.KeyInfo]
	at   atomic.Pointer[location]
}

// method is a way to make a signature.
type method struct {
	mechanism
	software bool // PSS is encoded here and the token does raw RSA
}

// location is where the key's object was found.
type location struct {
	handle ck.ObjectHandle
	epoch  uint64 // of the pool
}

// decrypter is a key that may decrypt.
type decrypter struct{ *key }

var (
	_ signer.Key       = (*key)(nil)
	_ signer.Decrypter = decrypter{}
)

// face is the key as others see it: with the power to decrypt only if it has it.
func (k *key) face() signer.Key {
	if k.decrypt {
		return decrypter{k}
	}
	return k
}

// Public implements [signer.Key].
func (k *key) Public() crypto.PublicKey { return k.pub }

// Info implements [signer.Key].
func (k *key) Info() signer.KeyInfo {
	info := *k.info.Load()
	info.ID = bytes.Clone(info.ID)
	return info
}

// Supports implements [signer.Key]: it reports what the self-test at discovery found to work.
func (k *key) Supports(alg signer.Algorithm) bool {
	_, ok := k.methods[alg]
	return ok
}

// Sign implements [signer.Key]. It waits for a session until ctx ends; once the token works, nothing can stop it.
func (k *key) Sign(ctx context.Context, alg signer.Algorithm, input []byte) ([]byte, error) {
	m, ok := k.methods[alg]
	if !ok {
		return nil, k.fault("sign with", fmt.Errorf("%w: %v with %v", ErrUnsupported, alg.Kind, alg.Hash))
	}
	sig, err := k.sign(ctx, alg, m, input)
	if err != nil {
		return nil, k.fault("sign with", err)
	}
	return sig, nil
}

func (k *key) fault(what string, err error) error {
	return named(fmt.Errorf("%s key %q: %w", what, k.info.Load().Label, err))
}

func (k *key) sign(ctx context.Context, alg signer.Algorithm, m method, input []byte) ([]byte, error) {
	var op operation
	var buf [maxDigestInfo]byte
	in, err := k.prepare(buf[:0], alg, m, input)
	if err != nil {
		return nil, err
	}
	op.mechanism, op.in = m.mechanism, in
	if err := k.perform(ctx, &op); err != nil {
		return nil, unsigned(err)
	}
	return k.finish(alg, op.out[:op.n])
}

// prepare returns what the mechanism signs. It checks lengths before the token is asked: tokens sign what they should not, or answer
// with a general error.
func (k *key) prepare(buf []byte, alg signer.Algorithm, m method, input []byte) ([]byte, error) {
	if alg.Kind == signer.Ed25519 {
		return input, nil
	}
	if want := alg.Hash.Size(); len(input) != want {
		return nil, fmt.Errorf("%w: %d bytes, %v has %d", ErrInput, len(input), alg.Hash, want)
	}
	switch {
	case alg.Kind == signer.PKCS1v15:
		return append(append(buf, digestInfo[alg.Hash]...), input...), nil
	case m.software:
		return encodePSS(k.pub.(*rsa.PublicKey), alg.Hash, input)
	case alg.Kind == signer.ECDSA && len(input) > k.order:
		// FIPS 186-5 section 6.4.1 uses the leftmost bits; not every token cuts by itself. No order here has bits to spare
		// for a longer hash: P-521's is longer than any.
		return input[:k.order], nil
	}
	return input, nil
}

// finish turns the token's result into the form that callers want.
func (k *key) finish(alg signer.Algorithm, raw []byte) ([]byte, error) {
	switch alg.Kind {
	case signer.ECDSA:
		return appendSignature(make([]byte, 0, 9+2*k.order), raw, k.order)
	case signer.Ed25519:
		if len(raw) != 64 {
			return nil, fmt.Errorf("the token gave an Ed25519 signature of %d bytes, want 64", len(raw))
		}
	default:
		if len(raw) != k.order {
			return nil, fmt.Errorf("the token gave an RSA signature of %d bytes, want %d", len(raw), k.order)
		}
	}
	return bytes.Clone(raw), nil
}

// DecryptRaw implements [signer.Decrypter] with CKM_RSA_X_509. A ciphertext of another length than the modulus, or not below
// it, is ErrInput.
func (d decrypter) DecryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error) {
	out, err := d.decryptRaw(ctx, ciphertext)
	if err != nil {
		return nil, d.fault("decrypt with", err)
	}
	return out, nil
}

func (k *key) decryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error) {
	if len(ciphertext) != k.order {
		return nil, fmt.Errorf("%w: %d bytes, the modulus has %d", ErrInput, len(ciphertext), k.order)
	}
	if new(big.Int).SetBytes(ciphertext).Cmp(k.pub.(*rsa.PublicKey).N) >= 0 {
		return nil, fmt.Errorf("%w: the ciphertext is not below the modulus", ErrInput)
	}
	op := operation{decrypt: true, mechanism: mechanism{id: ck.CKM_RSA_X_509}, in: ciphertext}
	defer clear(op.out[:])
	if err := k.perform(ctx, &op); err != nil {
		return nil, err
	}
	if op.n > k.order {
		return nil, fmt.Errorf("the token gave %d bytes, want at most %d", op.n, k.order)
	}
	// Some modules leave leading zeros off.
	out := make([]byte, k.order)
	copy(out[k.order-op.n:], op.out[:op.n])
	return out, nil
}

// perform runs op, with the remedies of the ladder.
func (k *key) perform(ctx context.Context, op *operation) error {
	if k.always {
		if err := k.t.fresh.enter(ctx); err != nil {
			return err
		}
		defer k.t.fresh.leave()
	}
	var l ladder
	for {
		err := k.attempt(ctx, &l, op)
		if err == nil {
			return nil
		}
		if err := k.t.climb(ctx, &l, err); err != nil {
			return err
		}
	}
}

func (k *key) attempt(ctx context.Context, l *ladder, op *operation) error {
	t := k.t
	s, err := t.pool.take(ctx, l.session)
	if err != nil {
		return err
	}
	err = k.attemptOn(ctx, s, l, op)
	t.pool.give(s, err)
	return err
}

func (k *key) attemptOn(ctx context.Context, s *session, l *ladder, op *operation) error {
	t := k.t
	if l.login {
		if err := t.ensureLogin(ctx, s); err != nil {
			return err
		}
	}
	at := k.at.Load()
	if at == nil || at.epoch != t.pool.epoch.Load() {
		var err error
		if at, err = k.locate(ctx, s); err != nil {
			return err
		}
		k.at.Store(at)
	}
	return k.operate(ctx, s, at.handle, op)
}

// operate runs op, with the context-specific login if the key wants it.
func (k *key) operate(ctx context.Context, s *session, h ck.ObjectHandle, op *operation) error {
	t := k.t
	if !k.always {
		return t.m.operate(s, h, op)
	}
	// In this order: ensureLogin holds the gate that freshPIN passes while it waits for leave.
	pin, err := t.freshPIN(ctx)
	if err != nil {
		return err
	}
	defer clear(pin)
	leave, err := t.leave(ctx)
	if err != nil {
		return err
	}
	op.pin = pin
	err = t.m.operate(s, h, op)
	op.pin = nil
	if faultOf(err) == faultPIN {
		leave.Done(pinError(err))
	} else {
		leave.Done(nil)
	}
	return err
}

// freshPIN returns the PIN for a context-specific login, unless the token refused it before.
func (t *Token) freshPIN(ctx context.Context) ([]byte, error) {
	if err := t.login.enter(ctx); err != nil {
		return nil, err
	}
	defer t.login.leave()
	if t.failed != nil {
		return nil, t.failed
	}
	return []byte(t.pin.value()), nil
}

// locate finds the key's object again, after a login, a lost session or a change on the token. Identifier and label
// lead to candidates; the public key decides.
func (k *key) locate(ctx context.Context, s *session) (*location, error) {
	t := k.t
	at := &location{epoch: t.pool.epoch.Load()}
	if err := t.ensureLogin(ctx, s); err != nil {
		return nil, err
	}
	info := k.info.Load()
	template := []*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), ck.NewAttribute(ck.CKA_KEY_TYPE, k.kind)}
	if len(info.ID) > 0 {
		template = append(template, ck.NewAttribute(ck.CKA_ID, info.ID))
	} else {
		template = append(template, ck.NewAttribute(ck.CKA_LABEL, info.Label))
	}
	handles, err := t.m.find(s, template)
	if err != nil {
		return nil, fmt.Errorf("find the key again: %w", err)
	}
	if len(handles) == 0 {
		// Who is not logged in sees no private keys: the login may have gone since it was looked at.
		if info, err := t.m.sessionInfo(s); err != nil || !loggedIn(info) {
			return nil, cmp.Or[error](err, ck.Error(ck.CKR_USER_NOT_LOGGED_IN))
		}
		// Modules have been seen to forget all that is on the token when it was away for a moment; a new process finds it again.
		all, err := t.m.find(s, template[:1])
		if err == nil && len(all) == 0 {
			return nil, fmt.Errorf("%w: %w: no private key is on token %s any more", ErrDevice, ErrKeyNotFound, t.name)
		}
	}
	for _, h := range handles {
		ok, err := k.is(ctx, s, h)
		if err != nil {
			return nil, fmt.Errorf("find the key again: %w", err)
		}
		if ok {
			at.handle = h
			return at, nil
		}
	}
	return nil, fmt.Errorf("%w: %w", ErrKeyNotFound, &kind{"it is gone from token " + t.name + ", or another took its place; list the keys again", signer.ErrUnavailable})
}

// is reports whether the private key object is this key: by its modulus, or, as EC objects do not hold their public half, by
// a signature.
func (k *key) is(ctx context.Context, s *session, h ck.ObjectHandle) (bool, error) {
	if pub, ok := k.pub.(*rsa.PublicKey); ok {
		modulus, err := k.t.m.attribute(s, h, ck.CKA_MODULUS)
		return err == nil && new(big.Int).SetBytes(modulus).Cmp(pub.N) == 0, err
	}
	alg := probeAlgorithm(k.pub)
	return k.try(ctx, s, h, alg, k.methods[alg])
}

// probeAlgorithm is an algorithm that every key of this type should have.
func probeAlgorithm(pub crypto.PublicKey) signer.Algorithm {
	switch pub.(type) {
	case *ecdsa.PublicKey:
		return signer.Algorithm{Kind: signer.ECDSA, Hash: crypto.SHA256}
	case *rsa.PublicKey:
		return signer.Algorithm{Kind: signer.PKCS1v15, Hash: crypto.SHA256}
	}
	return signer.Algorithm{Kind: signer.Ed25519}
}
