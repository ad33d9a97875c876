package pkcs11

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"

	ck "github.com/miekg/pkcs11"
)

// find returns the objects that fit the template.
func (m *module) find(s *session, template []*ck.Attribute) ([]ck.ObjectHandle, error) {
	var all []ck.ObjectHandle
	err := m.with(s, func(c *ck.Ctx, h ck.SessionHandle) (err error) {
		if err := c.FindObjectsInit(h, template); err != nil {
			return err
		}
		defer func() {
			if final := c.FindObjectsFinal(h); err == nil {
				err = final
			}
		}()
		for {
			some, _, err := c.FindObjects(h, 100)
			if err != nil || len(some) == 0 {
				return err
			}
			all = append(all, some...)
			if len(all) > maxObjects {
				return fmt.Errorf("more than %d objects", maxObjects)
			}
		}
	})
	return all, err
}

// attribute reads one attribute.
func (m *module) attribute(s *session, o ck.ObjectHandle, typ uint) ([]byte, error) {
	var value []byte
	err := m.with(s, func(c *ck.Ctx, h ck.SessionHandle) error {
		a, err := c.GetAttributeValue(h, o, []*ck.Attribute{ck.NewAttribute(typ, nil)})
		if err == nil && len(a) == 1 {
			value = a[0].Value
		}
		return err
	})
	return value, err
}

// attributes reads attributes of one object, some of which it may lack, and keeps the first error that is not about a lack.
type attributes struct {
	m   *module
	s   *session
	o   ck.ObjectHandle
	err error
}

// bytes returns the attribute's value, nil if the object lacks it or does not show it.
func (a *attributes) bytes(typ uint) []byte {
	if a.err != nil {
		return nil
	}
	v, err := a.m.attribute(a.s, a.o, typ)
	switch {
	case err == nil:
		return v
	case errors.Is(err, ck.Error(ck.CKR_ATTRIBUTE_TYPE_INVALID)), errors.Is(err, ck.Error(ck.CKR_ATTRIBUTE_SENSITIVE)):
		return nil
	}
	a.err = err
	return nil
}

// bool returns the attribute's value, and unknown if the object lacks it.
func (a *attributes) bool(typ uint, unknown bool) bool {
	v := a.bytes(typ)
	if len(v) != 1 {
		return unknown
	}
	return v[0] != 0
}

func (a *attributes) ulong(typ uint) (uint, bool) {
	v := a.bytes(typ)
	switch len(v) {
	case 8:
		return uint(binary.NativeEndian.Uint64(v)), true
	case 4:
		return uint(binary.NativeEndian.Uint32(v)), true
	}
	return 0, false
}

// privates reads the private key objects, within the URI's object and id.
func (t *Token) privates(ctx context.Context, s *session) ([]private, error) {
	template := []*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY)}
	if t.cfg.URI.Object != "" {
		template = append(template, ck.NewAttribute(ck.CKA_LABEL, t.cfg.URI.Object))
	}
	if t.cfg.URI.ID != nil {
		template = append(template, ck.NewAttribute(ck.CKA_ID, t.cfg.URI.ID))
	}
	handles, err := t.m.find(s, template)
	if err != nil {
		return nil, err
	}
	all := make([]private, 0, len(handles))
	for _, h := range handles {
		t.progress(ctx)
		p, err := t.readPrivate(s, h)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

func (t *Token) readPrivate(s *session, h ck.ObjectHandle) (private, error) {
	a := attributes{m: t.m, s: s, o: h}
	p := private{handle: h, id: a.bytes(ck.CKA_ID), label: string(a.bytes(ck.CKA_LABEL))}
	p.kind, _ = a.ulong(ck.CKA_KEY_TYPE)
	// What the module does not say counts against the key.
	p.extractable = a.bool(ck.CKA_EXTRACTABLE, true) || !a.bool(ck.CKA_SENSITIVE, false)
	p.never, p.local = a.bool(ck.CKA_NEVER_EXTRACTABLE, false), a.bool(ck.CKA_LOCAL, false)
	p.always = a.bool(ck.CKA_ALWAYS_AUTHENTICATE, false)
	p.signs, p.decrypts = a.bool(ck.CKA_SIGN, true), a.bool(ck.CKA_DECRYPT, false)
	if p.kind == ck.CKK_RSA {
		p.modulus, p.exponent = a.bytes(ck.CKA_MODULUS), a.bytes(ck.CKA_PUBLIC_EXPONENT)
	}
	return p, a.err
}

// publics reads public key objects and certificates. Those that make no sense are left out: they may be another
// program's.
func (t *Token) publics(ctx context.Context, s *session) ([]public, error) {
	var all []public
	for class, read := range map[uint]func(*attributes, *public) error{ck.CKO_PUBLIC_KEY: readPublic, ck.CKO_CERTIFICATE: readCertificate} {
		handles, err := t.m.find(s, []*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, class)})
		if err != nil {
			return nil, err
		}
		for _, h := range handles {
			t.progress(ctx)
			a := attributes{m: t.m, s: s, o: h}
			q := public{id: a.bytes(ck.CKA_ID), label: string(a.bytes(ck.CKA_LABEL))}
			err := read(&a, &q)
			if a.err != nil {
				return nil, a.err
			}
			if err != nil {
				t.log.Debug("object is not used", "label", q.label, "id", fmt.Sprintf("%x", q.id), "err", err)
				continue
			}
			all = append(all, q)
		}
	}
	return all, nil
}

func readPublic(a *attributes, q *public) (err error) {
	q.pub, err = publicOf(a)
	return err
}

// publicOf decodes a public key object.
func publicOf(a *attributes) (crypto.PublicKey, error) {
	kind, _ := a.ulong(ck.CKA_KEY_TYPE)
	switch kind {
	case ck.CKK_RSA:
		return decodeRSA(a.bytes(ck.CKA_MODULUS), a.bytes(ck.CKA_PUBLIC_EXPONENT))
	case ck.CKK_EC, ckkEdwards:
		return decodePoint(a.bytes(ck.CKA_EC_PARAMS), a.bytes(ck.CKA_EC_POINT))
	}
	return nil, fmt.Errorf("key type %#x", kind)
}

func readCertificate(a *attributes, q *public) error {
	cert, err := x509.ParseCertificate(a.bytes(ck.CKA_VALUE))
	if err != nil {
		return err
	}
	q.pub, q.cert = cert.PublicKey, cert
	return nil
}
