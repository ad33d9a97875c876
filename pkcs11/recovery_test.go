package pkcs11

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"strings"
	"sync"
	"testing"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/signer"
)

// logout ends the login of the whole process, as a token that forgets it after a while does.
func logout(tb testing.TB, t *Token) {
	tb.Helper()
	s, err := t.pool.take(tb.Context(), false)
	if err != nil {
		tb.Fatal(err)
	}
	defer t.pool.give(s, nil)
	behind(tb, t, func(c *ck.Ctx, _ uint) error { return c.Logout(s.handle) })
}

// fill makes the pool open all its sessions.
func fill(tb testing.TB, t *Token) {
	tb.Helper()
	var all []*session
	for range cap(t.pool.permits) {
		s, err := t.pool.take(tb.Context(), false)
		if err != nil {
			tb.Fatal(err)
		}
		all = append(all, s)
	}
	for _, s := range all {
		t.pool.give(s, nil)
	}
}

func TestRecovery(t *testing.T) {
	st := softhsm.New(t)
	tok := openToken(t, st, func(c *Config) { c.Sessions = 4 })
	keys := []signer.Key{generate(t, tok, "p256"), generate(t, tok, "rsa2048"), generate(t, tok, "ed25519")}
	for _, tc := range []struct {
		name  string
		fault func()
	}{
		{"logout", func() { logout(t, tok) }},
		{"all sessions closed", func() { behind(t, tok, func(c *ck.Ctx, slot uint) error { return c.CloseAllSessions(slot) }) }},
		{"one session closed", func() {
			behind(t, tok, func(c *ck.Ctx, _ uint) error { return c.CloseSession(tok.pool.idle[len(tok.pool.idle)-1].handle) })
		}},
		{"all but one session closed", func() {
			behind(t, tok, func(c *ck.Ctx, _ uint) error {
				for _, s := range tok.pool.idle[1:] {
					if err := c.CloseSession(s.handle); err != nil {
						return err
					}
				}
				return nil
			})
		}},
		{"operation left active", func() {
			behind(t, tok, func(c *ck.Ctx, _ uint) error {
				k := inner(keys[0])
				for _, s := range tok.pool.idle {
					if err := c.SignInit(s.handle, []*ck.Mechanism{ck.NewMechanism(ck.CKM_ECDSA, nil)}, k.at.Load().handle); err != nil {
						return err
					}
				}
				return nil
			})
		}},
		{"module finalised and initialised", func() {
			behind(t, tok, func(c *ck.Ctx, _ uint) error { return errors.Join(c.Finalize(), c.Initialize()) })
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fill(t, tok)
			for _, k := range keys {
				mustSign(t, k)
			}
			tc.fault()
			var wg sync.WaitGroup
			for i := range 16 {
				wg.Go(func() {
					if err := signOnce(t.Context(), keys[i%len(keys)]); err != nil {
						t.Errorf("sign: %v", err)
					}
				})
			}
			wg.Wait()
			if err := tok.Check(t.Context()); err != nil {
				t.Errorf("check: %v", err)
			}
			if n := len(tok.pool.permits); n != 4 {
				t.Errorf("%d permits came back, want 4", n)
			}
		})
	}
}

// putKey puts a known P-256 key on the token behind the package's back.
func putKey(tb testing.TB, t *Token, key *ecdsa.PrivateKey, label string, extractable, sensitive bool) {
	tb.Helper()
	d, err := key.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	q, err := key.PublicKey.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	point, err := asn1.Marshal(q)
	if err != nil {
		tb.Fatal(err)
	}
	common := []*ck.Attribute{ck.NewAttribute(ck.CKA_KEY_TYPE, ck.CKK_EC), ck.NewAttribute(ck.CKA_TOKEN, true),
		ck.NewAttribute(ck.CKA_LABEL, label), ck.NewAttribute(ck.CKA_ID, []byte(label)), ck.NewAttribute(ck.CKA_EC_PARAMS, p256.params)}
	writeBehind(tb, t, func(c *ck.Ctx, s ck.SessionHandle) error {
		_, err := c.CreateObject(s, append([]*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, ck.CKO_PUBLIC_KEY),
			ck.NewAttribute(ck.CKA_PRIVATE, false), ck.NewAttribute(ck.CKA_EC_POINT, point)}, common...))
		if err != nil {
			return err
		}
		_, err = c.CreateObject(s, append([]*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY),
			ck.NewAttribute(ck.CKA_PRIVATE, true), ck.NewAttribute(ck.CKA_SIGN, true), ck.NewAttribute(ck.CKA_EXTRACTABLE, extractable),
			ck.NewAttribute(ck.CKA_SENSITIVE, sensitive), ck.NewAttribute(ck.CKA_VALUE, d)}, common...))
		return err
	})
}

// removeObjects removes everything with the label and, if classes are given, of these classes.
func removeObjects(tb testing.TB, t *Token, label string, classes ...uint) {
	tb.Helper()
	templates := [][]*ck.Attribute{{ck.NewAttribute(ck.CKA_LABEL, label)}}
	if len(classes) > 0 {
		templates = nil
		for _, class := range classes {
			templates = append(templates, []*ck.Attribute{ck.NewAttribute(ck.CKA_LABEL, label), ck.NewAttribute(ck.CKA_CLASS, class)})
		}
	}
	writeBehind(tb, t, func(c *ck.Ctx, s ck.SessionHandle) error {
		for _, template := range templates {
			if err := c.FindObjectsInit(s, template); err != nil {
				return err
			}
			objects, _, err := c.FindObjects(s, 10)
			if err := errors.Join(err, c.FindObjectsFinal(s)); err != nil {
				return err
			}
			if len(objects) == 0 {
				tb.Errorf("nothing to remove with label %q", label)
			}
			for _, o := range objects {
				if err := c.DestroyObject(s, o); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func newP256(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func TestObjectDeletedAndRecreated(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	private := newP256(t)
	putKey(t, tok, private, "moving", false, true)
	k, err := tok.Key(t.Context(), Selector{Label: "moving"})
	if err != nil {
		t.Fatal(err)
	}
	mustSign(t, k)
	old := inner(k).at.Load().handle
	removeObjects(t, tok, "moving")
	// No key is left: perhaps the module has forgotten the token.
	if err := signOnce(t.Context(), k); !errors.Is(err, ErrKeyNotFound) || !errors.Is(err, ErrDevice) {
		t.Errorf("sign with a deleted key: %v, want ErrKeyNotFound and ErrDevice", err)
	}
	putKey(t, tok, newP256(t), "another", false, true)
	if err := signOnce(t.Context(), k); !errors.Is(err, ErrKeyNotFound) || errors.Is(err, ErrDevice) {
		t.Errorf("sign with a deleted key beside another: %v, want ErrKeyNotFound alone", err)
	}
	putKey(t, tok, private, "moving", false, true)
	mustSign(t, k)
	if got := inner(k).at.Load().handle; got == old {
		t.Error("the new object has the old handle: the test shows nothing")
	}

	// Another key in its place, under the same label and ID, must not sign for it.
	removeObjects(t, tok, "moving")
	putKey(t, tok, newP256(t), "moving", false, true)
	if err := signOnce(t.Context(), k); !errors.Is(err, ErrKeyNotFound) || !strings.Contains(err.Error(), "another took its place") {
		t.Errorf("sign with a key that was replaced: %v, want ErrKeyNotFound", err)
	}
}
