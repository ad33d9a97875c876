package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// ckmEdwardsGen is CKM_EC_EDWARDS_KEY_PAIR_GEN of PKCS #11 v3.0.
const ckmEdwardsGen = 0x1055

// GenerateOptions says what key to make.
type GenerateOptions struct {
	Label   string // required; must be new on the token
	ID      []byte // CKA_ID; if empty, the SKI
	Type    string // one of KeyTypes
	Decrypt bool   // RSA only: the key may also decrypt
}

// KeyTypes lists what GenerateOptions.Type may be.
func KeyTypes() []string {
	return []string{"p256", "p384", "p521", "rsa2048", "rsa3072", "rsa4096", "ed25519"}
}

// keyPair is how the token is asked for a kind of key.
type keyPair struct {
	generate uint // the mechanism
	kind     uint // CKA_KEY_TYPE
	public   []*ck.Attribute
}

func keyPairOf(typ string) (keyPair, error) {
	rsa := func(bits int) (keyPair, error) {
		return keyPair{ck.CKM_RSA_PKCS_KEY_PAIR_GEN, ck.CKK_RSA, []*ck.Attribute{
			ck.NewAttribute(ck.CKA_MODULUS_BITS, bits), ck.NewAttribute(ck.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
		}}, nil
	}
	switch typ {
	case "rsa2048":
		return rsa(2048)
	case "rsa3072":
		return rsa(3072)
	case "rsa4096":
		return rsa(4096)
	}
	for _, c := range curves {
		if c.name != typ {
			continue
		}
		p := keyPair{ck.CKM_EC_KEY_PAIR_GEN, ck.CKK_EC, []*ck.Attribute{ck.NewAttribute(ck.CKA_EC_PARAMS, c.params)}}
		if c == edwards {
			p.generate, p.kind = ckmEdwardsGen, ckkEdwards
		}
		return p, nil
	}
	return keyPair{}, fmt.Errorf("unknown key type %q: give one of %q", typ, KeyTypes())
}

// Generate makes a key pair inside the token: sensitive, not extractable, private, for signatures only unless o.Decrypt. A label or ID
// that the token already has for a private key is ErrExists, a type that it cannot make ErrUnsupported. A pair
// that cannot be used is removed again.
func (t *Token) Generate(ctx context.Context, o GenerateOptions) (signer.Key, error) {
	k, err := t.generateKey(ctx, o)
	if err != nil {
		return nil, named(err)
	}
	return k.face(), nil
}

func (t *Token) generateKey(ctx context.Context, o GenerateOptions) (*key, error) {
	pair, err := keyPairOf(o.Type)
	if err != nil {
		return nil, err
	}
	if o.Label == "" {
		return nil, errors.New("generate: the key needs a label")
	}
	if len(o.ID) > maxID {
		return nil, fmt.Errorf("generate: the ID is longer than %d bytes", maxID)
	}
	if o.Decrypt && pair.kind != ck.CKK_RSA {
		return nil, fmt.Errorf("generate: only RSA keys decrypt, not %s", o.Type)
	}
	var made *generated
	err = t.write(ctx, func(s *session) error {
		if err := t.unused(s, o); err != nil {
			return err
		}
		made, err = t.generate(s, pair, o)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("generate %s key %q on %s: %w", o.Type, o.Label, t.name, err)
	}
	k, err := t.key(ctx, Selector{SKI: made.ski, Label: o.Label})
	if err != nil {
		remove := func(s *session) error { return t.destroy(s, made.pub, made.priv) }
		err = errors.Join(err, t.write(context.WithoutCancel(ctx), remove))
		return nil, fmt.Errorf("generate: key %q was made but cannot be used, and is removed: %w", o.Label, err)
	}
	return k, nil
}

// generated is a key pair just made.
type generated struct {
	pub, priv ck.ObjectHandle
	ski       keyless.SKI
}

// unused checks that no private key has the label or the ID.
func (t *Token) unused(s *session, o GenerateOptions) error {
	names := []*ck.Attribute{ck.NewAttribute(ck.CKA_LABEL, o.Label)}
	if len(o.ID) > 0 {
		names = append(names, ck.NewAttribute(ck.CKA_ID, o.ID))
	}
	for _, name := range names {
		found, err := t.m.find(s, []*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), name})
		if err != nil {
			return err
		}
		if len(found) > 0 {
			return fmt.Errorf("%w: the token has a private key with this label or ID; choose another", ErrExists)
		}
	}
	return nil
}

func (t *Token) generate(s *session, pair keyPair, o GenerateOptions) (*generated, error) {
	id := o.ID
	if len(id) == 0 {
		// A place-holder until the public key, and so the SKI, is known.
		id = make([]byte, 20)
		rand.Read(id)
	}
	public := append([]*ck.Attribute{
		ck.NewAttribute(ck.CKA_CLASS, ck.CKO_PUBLIC_KEY), ck.NewAttribute(ck.CKA_KEY_TYPE, pair.kind),
		ck.NewAttribute(ck.CKA_TOKEN, true), ck.NewAttribute(ck.CKA_PRIVATE, false), ck.NewAttribute(ck.CKA_VERIFY, true),
		ck.NewAttribute(ck.CKA_LABEL, o.Label), ck.NewAttribute(ck.CKA_ID, id),
	}, pair.public...)
	private := []*ck.Attribute{
		ck.NewAttribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY), ck.NewAttribute(ck.CKA_KEY_TYPE, pair.kind),
		ck.NewAttribute(ck.CKA_TOKEN, true), ck.NewAttribute(ck.CKA_PRIVATE, true), ck.NewAttribute(ck.CKA_SENSITIVE, true),
		ck.NewAttribute(ck.CKA_EXTRACTABLE, false), ck.NewAttribute(ck.CKA_SIGN, true), ck.NewAttribute(ck.CKA_DERIVE, false),
		ck.NewAttribute(ck.CKA_LABEL, o.Label), ck.NewAttribute(ck.CKA_ID, id),
	}
	if pair.kind == ck.CKK_RSA {
		public = append(public, ck.NewAttribute(ck.CKA_ENCRYPT, o.Decrypt))
		private = append(private, ck.NewAttribute(ck.CKA_DECRYPT, o.Decrypt), ck.NewAttribute(ck.CKA_UNWRAP, false))
	}
	g := &generated{}
	err := t.m.with(s, func(c *ck.Ctx, h ck.SessionHandle) (err error) {
		g.pub, g.priv, err = c.GenerateKeyPair(h, []*ck.Mechanism{ck.NewMechanism(pair.generate, nil)}, public, private)
		return err
	})
	if err != nil {
		if errors.Is(err, ck.Error(ck.CKR_MECHANISM_INVALID)) || errors.Is(err, ck.Error(ck.CKR_MECHANISM_PARAM_INVALID)) {
			err = fmt.Errorf("%w: the token does not make keys of this type: %w", ErrUnsupported, err)
		}
		return nil, err
	}
	if err := t.identify(s, g, o); err != nil {
		return nil, errors.Join(err, t.destroy(s, g.pub, g.priv))
	}
	return g, nil
}

// identify computes the SKI of a new pair and, unless an ID was asked for, makes it the CKA_ID of both halves.
func (t *Token) identify(s *session, g *generated, o GenerateOptions) error {
	a := attributes{m: t.m, s: s, o: g.pub}
	pub, err := publicOf(&a)
	if err = errors.Join(a.err, err); err != nil {
		return fmt.Errorf("read the public key: %w", err)
	}
	if g.ski, err = keyless.SKIOf(pub); err != nil {
		return err
	}
	if len(o.ID) > 0 {
		return nil
	}
	return t.m.with(s, func(c *ck.Ctx, h ck.SessionHandle) error {
		for _, o := range []ck.ObjectHandle{g.pub, g.priv} {
			if err := c.SetAttributeValue(h, o, []*ck.Attribute{ck.NewAttribute(ck.CKA_ID, g.ski[:])}); err != nil {
				return fmt.Errorf("set CKA_ID: %w", coded(err))
			}
		}
		return nil
	})
}

func (t *Token) destroy(s *session, objects ...ck.ObjectHandle) error {
	return t.m.with(s, func(c *ck.Ctx, h ck.SessionHandle) error {
		var all error
		for _, o := range objects {
			if err := c.DestroyObject(h, o); err != nil {
				all = errors.Join(all, fmt.Errorf("remove object: %w", coded(err)))
			}
		}
		return all
	})
}

// ImportCertificate puts the certificate beside its key, in place of older ones for the same key. A certificate for another key is
// ErrCertificateMismatch, and nothing is changed.
func (t *Token) ImportCertificate(ctx context.Context, sel Selector, cert *x509.Certificate) error {
	return named(t.importCertificate(ctx, sel, cert))
}

func (t *Token) importCertificate(ctx context.Context, sel Selector, cert *x509.Certificate) error {
	k, err := t.key(ctx, sel)
	if err != nil {
		return err
	}
	info := k.info.Load()
	if !equal(k.pub, cert.PublicKey) {
		other := "of an unknown type"
		if ski, err := keyless.SKIOf(cert.PublicKey); err == nil {
			other = fmt.Sprintf("%s with SKI %s", signer.TypeOf(cert.PublicKey), ski)
		}
		return fmt.Errorf("%w: key %q is %s with SKI %s, the certificate's is %s", ErrCertificateMismatch, info.Label, info.Type, info.SKI, other)
	}
	err = t.write(ctx, func(s *session) error { return t.putCertificate(s, info, cert) })
	if err != nil {
		return fmt.Errorf("import certificate for key %q: %w", info.Label, err)
	}
	_, err = t.discover(ctx)
	return err
}

// putCertificate writes the new certificate before it removes the old ones, so that the key is never without.
func (t *Token) putCertificate(s *session, info *signer.KeyInfo, cert *x509.Certificate) error {
	old, present, err := t.certificatesOf(s, cert.PublicKey, cert.Raw)
	if err != nil {
		return err
	}
	if !present {
		serial, err := asn1.Marshal(cert.SerialNumber)
		if err != nil {
			return err
		}
		template := []*ck.Attribute{
			ck.NewAttribute(ck.CKA_CLASS, ck.CKO_CERTIFICATE), ck.NewAttribute(ck.CKA_CERTIFICATE_TYPE, ck.CKC_X_509),
			ck.NewAttribute(ck.CKA_TOKEN, true), ck.NewAttribute(ck.CKA_PRIVATE, false),
			ck.NewAttribute(ck.CKA_LABEL, info.Label), ck.NewAttribute(ck.CKA_ID, info.ID),
			ck.NewAttribute(ck.CKA_SUBJECT, cert.RawSubject), ck.NewAttribute(ck.CKA_ISSUER, cert.RawIssuer),
			ck.NewAttribute(ck.CKA_SERIAL_NUMBER, serial), ck.NewAttribute(ck.CKA_VALUE, cert.Raw),
		}
		err = t.m.with(s, func(c *ck.Ctx, h ck.SessionHandle) error {
			_, err := c.CreateObject(h, template)
			return err
		})
		if err != nil {
			return err
		}
	}
	return t.destroy(s, old...)
}

// certificatesOf returns the certificates for pub other than raw, and whether raw is there.
func (t *Token) certificatesOf(s *session, pub crypto.PublicKey, raw []byte) (old []ck.ObjectHandle, present bool, err error) {
	handles, err := t.m.find(s, []*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, ck.CKO_CERTIFICATE)})
	if err != nil {
		return nil, false, err
	}
	for _, h := range handles {
		a := attributes{m: t.m, s: s, o: h}
		value := a.bytes(ck.CKA_VALUE)
		if a.err != nil {
			return nil, false, a.err
		}
		cert, err := x509.ParseCertificate(value)
		switch {
		case err != nil || !equal(cert.PublicKey, pub):
		case bytes.Equal(value, raw) && !present:
			present = true
		default:
			old = append(old, h)
		}
	}
	return old, present, nil
}

// write runs f on a session that may change the token. Such a session lives for f only; a session of the pool gives
// way to it, so that their number stays within the bound. Nothing is tried twice: a key made twice is worse than an error.
func (t *Token) write(ctx context.Context, f func(*session) error) error {
	if err := t.do(ctx, t.ensureLogin); err != nil {
		return err
	}
	s, err := t.pool.take(ctx, false)
	if err != nil {
		return err
	}
	w, err := t.pool.open(true)
	if errors.Is(err, ck.Error(ck.CKR_SESSION_COUNT)) {
		// The token has only one: ours gives way, and with it the login.
		t.m.closeSession(s)
		if w, err = t.pool.open(true); err == nil {
			err = t.ensureLogin(ctx, w)
		}
		t.pool.doubt()
	}
	if err == nil {
		err = f(w)
	}
	if w != nil {
		t.m.closeSession(w)
	}
	t.pool.give(s, nil)
	return err
}
