package pkcs11

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

func TestExtractableKeyIsRefused(t *testing.T) {
	st := softhsm.New(t)
	for _, tc := range []struct {
		name                   string
		extractable, sensitive bool
	}{{"extractable", true, true}, {"not-sensitive", false, false}} {
		t.Run(tc.name, func(t *testing.T) {
			strict := openToken(t, st, nil)
			putKey(t, strict, newP256(t), tc.name, tc.extractable, tc.sensitive)
			defer removeObjects(t, strict, tc.name)
			if _, err := strict.Keys(t.Context()); !errors.Is(err, ErrExtractable) || !strings.Contains(err.Error(), tc.name) {
				t.Errorf("Keys: %v, want ErrExtractable naming the key", err)
			}
			if _, err := strict.Key(t.Context(), Selector{Label: tc.name}); !errors.Is(err, ErrExtractable) {
				t.Errorf("Key: %v, want ErrExtractable", err)
			}
			// A good key beside it is used.
			good := generate(t, strict, "p256")
			defer removeObjects(t, strict, "test-p256")
			keys, err := strict.Keys(t.Context())
			if err != nil || len(keys) != 1 || keys[0].Info().SKI != good.Info().SKI {
				t.Errorf("Keys beside a refused one: %v, %v, want the good one", keys, err)
			}

			log := &capture{}
			lax := openToken(t, st, func(c *Config) { c.AllowExtractable, c.Logger = true, log.logger() })
			k, err := lax.Key(t.Context(), Selector{Label: tc.name})
			if err != nil {
				t.Fatal(err)
			}
			if !k.Info().Extractable {
				t.Error("the key's info does not say that it is extractable")
			}
			mustSign(t, k)
			if !strings.Contains(log.String(), "private key can leave the token") || !strings.Contains(log.String(), k.Info().SKI.String()) {
				t.Errorf("no warning about the key: %s", log)
			}
		})
	}
}

// certificate makes a self-signed certificate of pub, signed by key.
func certificate(tb testing.TB, key *ecdsa.PrivateKey, pub any, serial int64) *x509.Certificate {
	tb.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Unix(1_700_000_000+serial, 0), NotAfter: time.Unix(4_000_000_000, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

func TestCertificates(t *testing.T) {
	st := softhsm.New(t)
	tok := openToken(t, st, nil)
	issuer := newP256(t)
	k := generate(t, tok, "p256")
	sel := Selector{SKI: k.Info().SKI}
	if k.Info().Certificate != nil {
		t.Error("a new key has a certificate")
	}
	if err := tok.ImportCertificate(t.Context(), sel, certificate(t, issuer, issuer.Public(), 1)); !errors.Is(err, ErrCertificateMismatch) ||
		!strings.Contains(err.Error(), k.Info().SKI.String()) {
		t.Errorf("import of another key's certificate: %v, want ErrCertificateMismatch naming the key", err)
	}
	first, second := certificate(t, issuer, k.Public(), 1), certificate(t, issuer, k.Public(), 2)
	for _, cert := range []*x509.Certificate{first, second, second, first} {
		if err := tok.ImportCertificate(t.Context(), sel, cert); err != nil {
			t.Fatal(err)
		}
		if got := k.Info().Certificate; got == nil || !got.Equal(cert) {
			t.Errorf("the key has certificate %v, want number %v", got, cert.SerialNumber)
		}
		if n := countObjects(t, tok, ck.CKO_CERTIFICATE); n != 1 {
			t.Errorf("%d certificates are on the token, want 1", n)
		}
	}

	// Without its public key object, the key is known by its certificate.
	removeObjects(t, tok, "test-p256", ck.CKO_PUBLIC_KEY)
	again := openToken(t, st, nil)
	found, err := again.Key(t.Context(), sel)
	if err != nil {
		t.Fatal(err)
	}
	mustSign(t, found)

	// Without either, it cannot be used, and the error says why.
	removeObjects(t, tok, "test-p256", ck.CKO_CERTIFICATE)
	third := openToken(t, st, nil)
	if _, err := third.Keys(t.Context()); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "no public key object and no certificate") {
		t.Errorf("Keys without any public half: %v, want ErrUnsupported", err)
	}
}

func countObjects(tb testing.TB, t *Token, class uint) (n int) {
	tb.Helper()
	writeBehind(tb, t, func(c *ck.Ctx, s ck.SessionHandle) error {
		if err := c.FindObjectsInit(s, []*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, class)}); err != nil {
			return err
		}
		found, _, err := c.FindObjects(s, 1000)
		n = len(found)
		return errors.Join(err, c.FindObjectsFinal(s))
	})
	return n
}

// TestWrongPublicKeyBesideKey: a public object with the key's ID but of another key must not name it.
func TestWrongPublicKeyBesideKey(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	own, other := newP256(t), newP256(t)
	putKey(t, tok, other, "two", false, true)
	removeObjects(t, tok, "two", ck.CKO_PRIVATE_KEY)
	if _, err := tok.Keys(t.Context()); err != nil {
		t.Errorf("a public key alone: %v, want no keys and no error", err)
	}
	putKey(t, tok, own, "two", false, true)
	k, err := tok.Key(t.Context(), Selector{Label: "two"})
	if err != nil {
		t.Fatal(err)
	}
	if !equal(k.Public(), own.Public()) {
		t.Error("the key got the public half of another")
	}
}

func TestKeyOnTokenTwice(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	key := newP256(t)
	putKey(t, tok, key, "one", false, true)
	putKey(t, tok, key, "two", false, true)
	keys, err := tok.Keys(t.Context())
	if err != nil || len(keys) != 1 {
		t.Errorf("got %d keys and %v, want one", len(keys), err)
	}
}

func TestKeySelection(t *testing.T) {
	st := softhsm.New(t)
	tok := openToken(t, st, nil)
	putKey(t, tok, newP256(t), "twin", false, true)
	a, err := tok.Key(t.Context(), Selector{Label: "twin"})
	if err != nil {
		t.Fatal(err)
	}
	putKey(t, tok, newP256(t), "twin", false, true)
	if _, err := tok.Key(t.Context(), Selector{Label: "twin"}); !errors.Is(err, ErrAmbiguous) || !errors.Is(err, signer.ErrAmbiguous) ||
		!strings.Contains(err.Error(), a.Info().SKI.String()) {
		t.Errorf("a label that two keys have: %v, want ErrAmbiguous naming both", err)
	}
	if k, err := tok.Key(t.Context(), Selector{SKI: a.Info().SKI}); err != nil || k.Info().SKI != a.Info().SKI {
		t.Errorf("by SKI: %v", err)
	}
	if _, err := tok.Key(t.Context(), Selector{Label: "absent"}); !errors.Is(err, ErrKeyNotFound) {
		t.Errorf("an absent label: %v, want ErrKeyNotFound", err)
	}
	if _, err := tok.Key(t.Context(), Selector{}); err == nil {
		t.Error("the empty selector names a key")
	}
	// Two keys with one ID and label: the object handle lost, each is found again by its own signature.
	keys, err := tok.Keys(t.Context())
	if err != nil || len(keys) != 2 {
		t.Fatalf("got %d keys and %v, want 2", len(keys), err)
	}
	logout(t, tok)
	for _, k := range keys {
		mustSign(t, k)
	}

	narrow := openToken(t, st, func(c *Config) { c.URI.Object = "nothing" })
	if keys, err := narrow.Keys(t.Context()); err != nil || len(keys) != 0 {
		t.Errorf("a URI with an absent object: %d keys and %v, want none", len(keys), err)
	}
	byID := openToken(t, st, func(c *Config) { c.URI.ID = []byte("twin") })
	if keys, err := byID.Keys(t.Context()); err != nil || len(keys) != 2 {
		t.Errorf("a URI with an id: %d keys and %v, want 2", len(keys), err)
	}
}

func TestParseSelector(t *testing.T) {
	ski := keyless.SKI{1, 2, 3}
	for in, want := range map[string]Selector{
		ski.String(): {SKI: ski}, "www": {Label: "www"}, "id:0aff": {ID: []byte{10, 255}}, "id": {Label: "id"},
	} {
		got, err := ParseSelector(in)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(want) || got.String() != in {
			t.Errorf("ParseSelector(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "id:", "id:xyz"} {
		if got, err := ParseSelector(in); err == nil {
			t.Errorf("ParseSelector(%q) = %v, want an error", in, got)
		}
	}
}

func TestGenerate(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	k, err := tok.Generate(t.Context(), GenerateOptions{Label: "own-id", ID: []byte("an id"), Type: "p256"})
	if err != nil {
		t.Fatal(err)
	}
	if got := string(k.Info().ID); got != "an id" {
		t.Errorf("CKA_ID is %q", got)
	}
	for name, tc := range map[string]struct {
		o  GenerateOptions
		is error
	}{
		"same label":       {GenerateOptions{Label: "own-id", Type: "p384"}, ErrExists},
		"same ID":          {GenerateOptions{Label: "x", ID: []byte("an id"), Type: "p384"}, ErrExists},
		"no label":         {GenerateOptions{Type: "p256"}, nil},
		"unknown type":     {GenerateOptions{Label: "x", Type: "rsa1024"}, nil},
		"EC to decrypt":    {GenerateOptions{Label: "x", Type: "p256", Decrypt: true}, nil},
		"endless ID":       {GenerateOptions{Label: "x", ID: make([]byte, 300), Type: "p256"}, nil},
		"type in capitals": {GenerateOptions{Label: "x", Type: "P256"}, nil},
	} {
		if _, err := tok.Generate(t.Context(), tc.o); err == nil || tc.is != nil && !errors.Is(err, tc.is) {
			t.Errorf("%s: %v, want an error %v", name, err, tc.is)
		}
	}
	if n := countObjects(t, tok, ck.CKO_PRIVATE_KEY); n != 1 {
		t.Errorf("%d private keys are on the token, want 1", n)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}}, Signer(t.Context(), k))
	if err != nil {
		t.Fatal(err)
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	if err := req.CheckSignature(); err != nil {
		t.Errorf("the certificate request: %v", err)
	}
}

// TestKnownKeyIsNotTestedAgain: a reload must not sign with every key of a large token.
func TestKnownKeyIsNotTestedAgain(t *testing.T) {
	st := softhsm.New(t)
	spy, calls := spyModule(t, st.Module)
	tok := openToken(t, st, func(c *Config) { c.URI.ModulePath, c.Module = "", spy })
	known := map[*key]bool{inner(generate(t, tok, "rsa2048")): true, inner(generate(t, tok, "p256")): true}
	before := calls("C_Sign")
	if before == 0 {
		t.Fatal("no test signature was made")
	}
	keys, err := tok.Keys(t.Context())
	if err != nil || len(keys) != 2 {
		t.Fatal(keys, err)
	}
	if got := calls("C_Sign"); got != before {
		t.Errorf("a second look at the token made %d signatures", got-before)
	}
	for _, k := range keys {
		if !known[inner(k)] {
			t.Error("the second look made a new key")
		}
	}
}
