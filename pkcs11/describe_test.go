package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/signer"
)

func TestDescribeAndAdopt(t *testing.T) {
	st := softhsm.New(t)
	first := openToken(t, st, nil)
	for _, typ := range []string{"p256", "p521", "rsa2048", "ed25519"} {
		generate(t, first, typ)
	}
	second := openToken(t, st, nil)
	keys, err := first.Keys(t.Context())
	if err != nil || len(keys) != 4 {
		t.Fatalf("got %d keys and %v, want 4", len(keys), err)
	}
	for _, k := range keys {
		d, err := Describe(k)
		if err != nil {
			t.Fatal(err)
		}
		b, err := d.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseDescription(b)
		if err != nil {
			t.Fatalf("%s: %v", k.Info().Label, err)
		}
		other := second.Adopt(got)
		mustSign(t, other)
		for _, alg := range allAlgorithms {
			if k.Supports(alg) != other.Supports(alg) {
				t.Errorf("%s: %v differs", k.Info().Label, alg)
			}
		}
		_, before := k.(signer.Decrypter)
		if _, after := other.(signer.Decrypter); before != after {
			t.Errorf("%s: the power to decrypt is %v, was %v", k.Info().Label, after, before)
		}
	}
}

// TestLeave: nobody logs in without leave, and the outcome is told.
func TestLeave(t *testing.T) {
	var refuse error
	var asked, done atomic.Int32
	tok := openToken(t, softhsm.New(t), func(c *Config) {
		c.Leave = func(context.Context) (Leave, error) {
			asked.Add(1)
			return Leave{Done: func(err error) {
				if err == nil {
					done.Add(1)
				}
			}}, refuse
		}
	})
	if asked.Load() != 1 || done.Load() != 1 {
		t.Errorf("asked %d times, done %d times; want once each", asked.Load(), done.Load())
	}
	refuse = ErrPINIncorrect
	logout(t, tok)
	if err := tok.Check(t.Context()); !errors.Is(err, ErrPINIncorrect) {
		t.Errorf("check without leave: %v, want its error", err)
	}
	refuse = nil
	if err := tok.Check(t.Context()); err != nil || done.Load() != 2 {
		t.Errorf("check with leave: %v, %d logins, want 2", err, done.Load())
	}
}

// TestUnprovenPIN: a PIN that had no answer is not tried once the token has counted a wrong one.
func TestUnprovenPIN(t *testing.T) {
	st := softhsm.New(t)
	wrong := configFor(t, st)
	wrong.URI.PINSource = ""
	wrong.PIN = func() (PIN, error) { return NewPIN("wrong-" + canary), nil }
	if tok, err := Open(t.Context(), wrong); !errors.Is(err, ErrPINIncorrect) {
		tok.Close()
		t.Fatalf("open with a wrong PIN: %v", err)
	}
	cfg := configFor(t, st)
	unproven := true
	cfg.Leave = func(context.Context) (Leave, error) { return Leave{Unproven: unproven, Done: func(error) {}}, nil }
	if tok, err := Open(t.Context(), cfg); !errors.Is(err, ErrPINIncorrect) {
		tok.Close()
		t.Errorf("open with a PIN that may be the wrong one: %v, want ErrPINIncorrect", err)
	}
	unproven = false
	openToken(t, st, func(c *Config) { c.Leave = cfg.Leave })
}

// FuzzParseDescription: a module that has taken over its worker sends descriptions.
func FuzzParseDescription(f *testing.F) {
	pub := &newP256(f).PublicKey
	alg := probeAlgorithm(pub)
	d := &Description{Public: pub, Info: signer.KeyInfo{Label: "seed", ID: []byte{1}}, kind: 3, Algorithms: []signer.Algorithm{alg},
		methods: map[signer.Algorithm]method{alg: {mechanism: mechanism{id: 0x1041}}}}
	seed, err := d.MarshalBinary()
	if err == nil {
		_, err = ParseDescription(seed)
	}
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseDescription(b)
		if err != nil {
			return
		}
		first, err := d.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseDescription(first)
		if err != nil {
			t.Fatal(err)
		}
		if second, err := again.MarshalBinary(); err != nil || !bytes.Equal(first, second) {
			t.Fatalf("%s became %s, %v", first, second, err)
		}
	})
}
