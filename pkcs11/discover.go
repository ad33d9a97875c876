package pkcs11

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// ckkEdwards is CKK_EC_EDWARDS of PKCS #11 v3.0.
const ckkEdwards = 0x40

// maxObjects bounds the objects of one class that are looked at.
const maxObjects = 10000

// private is what a private key object says of itself.
type private struct {
	handle            ck.ObjectHandle
	kind              uint // CKA_KEY_TYPE
	id                []byte
	label             string
	extractable       bool // or not known not to be
	never, local      bool
	always            bool // CKA_ALWAYS_AUTHENTICATE
	signs, decrypts   bool
	modulus, exponent []byte // RSA only
	why               error  // why the key is not used, nil if it is
}

// public is a public key that the token shows, as an object of its own or in a certificate.
type public struct {
	id    []byte
	label string
	pub   crypto.PublicKey
	cert  *x509.Certificate // nil if it is an object of its own
}

// inventory is the result of one discovery.
type inventory struct {
	keys    []*key
	refused []private // their why is set
}

// Keys looks through the token and returns the private keys that can be used: those whose public half is known, from a public key
// object, a certificate or, for RSA, the private object, that the token does not give away, and that pass a test
// signature. The others are logged with the reason. If all keys are refused, the error says why each was.
func (t *Token) Keys(ctx context.Context) ([]signer.Key, error) {
	inv, err := t.discover(ctx)
	if err != nil {
		return nil, named(err)
	}
	keys := make([]signer.Key, len(inv.keys))
	for i, k := range inv.keys {
		keys[i] = k.face()
	}
	if len(keys) == 0 && len(inv.refused) > 0 {
		var all []error
		for _, p := range inv.refused {
			all = append(all, fmt.Errorf("key %q: %w", p.label, p.why))
		}
		return nil, named(fmt.Errorf("token %s has no usable key: %w", t.name, errors.Join(all...)))
	}
	return keys, nil
}

// discover runs one discovery and remembers the keys, so that those already known keep their self-test.
func (t *Token) discover(ctx context.Context) (*inventory, error) {
	if err := t.scans.enter(ctx); err != nil {
		return nil, fmt.Errorf("list keys of %s: %w", t.name, err)
	}
	defer t.scans.leave()
	var inv *inventory
	err := t.do(ctx, func(ctx context.Context, s *session) (err error) {
		if err := t.ensureLogin(ctx, s); err != nil {
			return err
		}
		inv, err = t.scan(ctx, s)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list keys of %s: %w", t.name, err)
	}
	clear(t.keys)
	for _, k := range inv.keys {
		t.keys[k.info.Load().SKI] = k
	}
	return inv, nil
}

func (t *Token) scan(ctx context.Context, s *session) (*inventory, error) {
	privates, err := t.privates(ctx, s)
	if err != nil {
		return nil, err
	}
	publics, err := t.publics(ctx, s)
	if err != nil {
		return nil, err
	}
	inv := &inventory{}
	seen := map[keyless.SKI]bool{}
	for _, p := range privates {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		t.progress(ctx)
		k, err := t.admit(ctx, s, &p, publics)
		if err != nil {
			return nil, err
		}
		if k != nil && seen[k.info.Load().SKI] {
			p.why = fmt.Errorf("%w: the key is on the token twice; the other object is used", ErrAmbiguous)
		}
		if p.why != nil {
			t.log.Warn("key is not used", "label", p.label, "id", fmt.Sprintf("%x", p.id), "err", p.why)
			inv.refused = append(inv.refused, p)
			continue
		}
		seen[k.info.Load().SKI] = true
		inv.keys = append(inv.keys, k)
	}
	slices.SortFunc(inv.keys, func(a, b *key) int {
		x, y := a.info.Load(), b.info.Load()
		return cmp.Or(cmp.Compare(x.Label, y.Label), bytes.Compare(x.SKI[:], y.SKI[:]))
	})
	return inv, nil
}

// admit makes a key of a private object, or sets its why.
func (t *Token) admit(ctx context.Context, s *session, p *private, publics []public) (*key, error) {
	if p.extractable && !t.cfg.AllowExtractable {
		p.why = fmt.Errorf("%w (CKA_EXTRACTABLE is not false or CKA_SENSITIVE not true): generate it in the token", ErrExtractable)
		return nil, nil
	}
	candidates, err := p.candidates(publics)
	if err != nil {
		p.why = err
		return nil, nil
	}
	for _, pub := range candidates {
		ski, err := keyless.SKIOf(pub)
		if err != nil {
			continue
		}
		k := &key{t: t, pub: pub, kind: p.kind, order: orderOf(pub), always: p.always}
		info := signer.KeyInfo{
			SKI: ski, Label: p.label, ID: p.id, Home: t.name, Type: signer.TypeOf(pub), Extractable: p.extractable,
			NeverExtractable: p.never, Local: p.local, Certificate: newest(publics, pub),
		}
		k.info.Store(&info)
		ok, err := t.test(ctx, s, k, p)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		if p.extractable {
			t.log.Warn("private key can leave the token", "label", p.label, "key_ski", ski.String())
		}
		return t.settle(s, k, p), nil
	}
	p.why = fmt.Errorf("%w: no test signature verifies with a public key of the token", ErrUnsupported)
	return nil, nil
}

// test finds out what the key can do. A key known from before is not tested again if the object is surely the same: an RSA object
// holds its modulus; an EC object of the same ID and label may be another key's.
func (t *Token) test(ctx context.Context, s *session, k *key, p *private) (bool, error) {
	if old := t.keys[k.info.Load().SKI]; old != nil && sameObject(old, k) {
		at := old.at.Load()
		if p.kind == ck.CKK_RSA || *at == (location{p.handle, s.epoch}) {
			k.methods, k.decrypt = old.methods, old.decrypt
			return true, nil
		}
	}
	if k.always {
		if err := t.fresh.enter(ctx); err != nil {
			return false, err
		}
		defer t.fresh.leave()
	}
	var err error
	if p.signs {
		if k.methods, err = k.selfTest(ctx, s, p.handle); err != nil {
			return false, err
		}
	}
	if p.kind == ck.CKK_RSA && p.decrypts {
		if k.decrypt, err = k.tryDecrypt(ctx, s, p.handle); err != nil {
			return false, err
		}
	}
	return len(k.methods) > 0 || k.decrypt, nil
}

func sameObject(a, b *key) bool {
	x, y := a.info.Load(), b.info.Load()
	return x.Label == y.Label && bytes.Equal(x.ID, y.ID) && x.Extractable == y.Extractable && a.always == b.always
}

// settle records where the key is. A key known from before is kept, with what is new about it.
func (t *Token) settle(s *session, k *key, p *private) *key {
	info := k.info.Load()
	if old := t.keys[info.SKI]; old != nil && sameObject(old, k) {
		old.info.Store(info)
		k = old
	}
	k.at.Store(&location{handle: p.handle, epoch: s.epoch})
	return k
}

// candidates returns the public keys that may belong to the private one. For RSA the object says which; otherwise those with
// the same CKA_ID, or, if it has none or nothing has it, the same label. The self-test decides.
func (p *private) candidates(publics []public) ([]crypto.PublicKey, error) {
	switch p.kind {
	case ck.CKK_RSA:
		if p.exponent == nil {
			p.exponent = exponentOf(publics, p.modulus)
		}
		pub, err := decodeRSA(p.modulus, p.exponent)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
		return []crypto.PublicKey{pub}, nil
	case ck.CKK_EC, ckkEdwards:
	default:
		return nil, fmt.Errorf("%w: key type %#x", ErrUnsupported, p.kind)
	}
	var found []crypto.PublicKey
	collect := func(match func(public) bool) {
		for _, q := range publics {
			if p.sameKind(q.pub) && match(q) && !slices.ContainsFunc(found, func(f crypto.PublicKey) bool { return equal(f, q.pub) }) {
				found = append(found, q.pub)
			}
		}
	}
	if len(p.id) > 0 {
		collect(func(q public) bool { return bytes.Equal(p.id, q.id) })
	}
	if len(found) == 0 && p.label != "" {
		collect(func(q public) bool { return p.label == q.label })
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w: the token shows no public key for it: no public key object and no certificate has its CKA_ID or label", ErrUnsupported)
	}
	return found, nil
}

// exponentOf finds the public exponent of a modulus among the public keys; without any, the usual one is tried.
func exponentOf(publics []public, modulus []byte) []byte {
	for _, q := range publics {
		if pub, ok := q.pub.(*rsa.PublicKey); ok && bytes.Equal(pub.N.Bytes(), bytes.TrimLeft(modulus, "\x00")) {
			return binary.BigEndian.AppendUint32(nil, uint32(pub.E))
		}
	}
	return []byte{1, 0, 1}
}

func (p *private) sameKind(pub crypto.PublicKey) bool {
	switch pub.(type) {
	case *ecdsa.PublicKey:
		return p.kind == ck.CKK_EC
	case ed25519.PublicKey:
		return p.kind == ckkEdwards
	}
	return false
}

// orderOf is the length of an RSA modulus or of a curve's scalars, in bytes.
func orderOf(pub crypto.PublicKey) int {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		return k.Size()
	case *ecdsa.PublicKey:
		return (k.Curve.Params().BitSize + 7) / 8
	}
	return ed25519.PublicKeySize
}

func equal(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// newest returns the certificate of pub that was made last, nil if there is none.
func newest(publics []public, pub crypto.PublicKey) *x509.Certificate {
	var best *x509.Certificate
	for _, q := range publics {
		if q.cert != nil && equal(q.pub, pub) && (best == nil || q.cert.NotBefore.After(best.NotBefore)) {
			best = q.cert
		}
	}
	return best
}
