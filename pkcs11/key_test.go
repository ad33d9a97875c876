package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"testing"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/signer"
)

func TestSignEveryTypeAndAlgorithm(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	names := map[string]string{"p256": "ECDSA P-256", "p384": "ECDSA P-384", "p521": "ECDSA P-521",
		"rsa2048": "RSA 2048", "rsa3072": "RSA 3072", "ed25519": "Ed25519"}
	for typ, name := range names {
		t.Run(typ, func(t *testing.T) {
			k := generate(t, tok, typ)
			info := k.Info()
			if info.Type != name || info.Label != "test-"+typ || info.Home != tok.Name() {
				t.Errorf("info is %+v", info)
			}
			if !bytes.Equal(info.ID, info.SKI[:]) {
				t.Errorf("CKA_ID is %x, want the SKI %s", info.ID, info.SKI)
			}
			if info.Extractable || !info.NeverExtractable || !info.Local {
				t.Errorf("a key made in the token is reported as %+v", info)
			}
			for _, alg := range allAlgorithms {
				if got, want := k.Supports(alg), signer.Fits(k.Public(), alg); got != want {
					t.Errorf("Supports(%v %v) = %v, want %v", alg.Kind, alg.Hash, got, want)
				}
				in := input(alg)
				sig, err := k.Sign(t.Context(), alg, in)
				if !k.Supports(alg) {
					if !errors.Is(err, signer.ErrUnsupported) {
						t.Errorf("Sign(%v %v): %v, want ErrUnsupported", alg.Kind, alg.Hash, err)
					}
					continue
				}
				if err != nil {
					t.Errorf("Sign(%v %v): %v", alg.Kind, alg.Hash, err)
				} else if !verify(k.Public(), alg, in, sig) {
					t.Errorf("Sign(%v %v): the signature does not verify", alg.Kind, alg.Hash)
				}
			}
		})
	}
}

func TestRSA4096(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	mustSign(t, generate(t, tok, "rsa4096"))
}

func TestSignChecksLengths(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	for _, typ := range []string{"p256", "rsa2048"} {
		k := generate(t, tok, typ)
		alg := probeAlgorithm(k.Public())
		for _, n := range []int{0, 1, 31, 33, 64} {
			if _, err := k.Sign(t.Context(), alg, make([]byte, n)); !errors.Is(err, ErrInput) {
				t.Errorf("%s: sign %d bytes as SHA-256: %v, want ErrInput", typ, n, err)
			}
		}
	}
}

func TestSoftwarePSS(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	k := inner(generate(t, tok, "rsa2048"))
	for _, h := range pssHashes {
		alg := signer.Algorithm{Kind: signer.PSS, Hash: h}
		if m := k.methods[alg]; m.software {
			t.Errorf("PSS with %v is done in software although the token has it", h)
		}
		// As if the self-test had found no CKM_RSA_PKCS_PSS.
		k.methods[alg] = method{mechanism: mechanism{id: ck.CKM_RSA_X_509}, software: true}
		for range 20 {
			sig, err := k.Sign(t.Context(), alg, input(alg))
			if err != nil {
				t.Fatal(err)
			}
			if !verify(k.pub, alg, input(alg), sig) {
				t.Fatalf("software PSS with %v does not verify", h)
			}
		}
	}
}

// TestEncodePSSOddModulus covers moduli whose length is one bit more than whole bytes, where the encoding is a byte shorter.
func TestEncodePSSOddModulus(t *testing.T) {
	for _, bits := range []int{2048, 2049, 2050, 2055} {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range pssHashes {
			digest := bytes.Repeat([]byte{7}, h.Size())
			em, err := encodePSS(&key.PublicKey, h, digest)
			if err != nil {
				t.Fatal(err)
			}
			m := new(big.Int).SetBytes(em)
			sig := m.Exp(m, key.D, key.N).FillBytes(make([]byte, key.Size()))
			if !verify(&key.PublicKey, signer.Algorithm{Kind: signer.PSS, Hash: h}, digest, sig) {
				t.Errorf("%d bits, %v: does not verify", bits, h)
			}
		}
	}
}

func TestDecryptRaw(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	k := generate(t, tok, "rsa2048")
	d, ok := k.(signer.Decrypter)
	if !ok {
		t.Fatal("a key made for decryption is no Decrypter")
	}
	pub := k.Public().(*rsa.PublicKey)
	for _, plain := range []*big.Int{big.NewInt(2), new(big.Int).Lsh(big.NewInt(3), 1500), new(big.Int).Sub(pub.N, big.NewInt(1))} {
		c := new(big.Int).Exp(plain, big.NewInt(int64(pub.E)), pub.N).FillBytes(make([]byte, pub.Size()))
		got, err := d.DecryptRaw(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if want := plain.FillBytes(make([]byte, pub.Size())); !bytes.Equal(got, want) {
			t.Errorf("decrypted to %x, want %x", got, want)
		}
	}
	for name, c := range map[string][]byte{
		"short": make([]byte, 255), "long": make([]byte, 257), "modulus": pub.N.Bytes(), "above": bytes.Repeat([]byte{0xff}, 256),
	} {
		if _, err := d.DecryptRaw(t.Context(), c); !errors.Is(err, ErrInput) {
			t.Errorf("%s ciphertext: %v, want ErrInput", name, err)
		}
	}
}

func TestSigningKeyDoesNotDecrypt(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	k, err := tok.Generate(t.Context(), GenerateOptions{Label: "signs", Type: "rsa2048"})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := k.(signer.Decrypter); ok {
		t.Error("a key made for signatures only is a Decrypter")
	}
	mustSign(t, k)
}

func TestConcurrentSigning(t *testing.T) {
	st := softhsm.New(t)
	for _, sessions := range []int{1, 2, 8} {
		t.Run(fmt.Sprint(sessions), func(t *testing.T) {
			tok := openToken(t, st, func(c *Config) { c.Sessions = sessions })
			keys, err := tok.Keys(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(keys) == 0 {
				keys = []signer.Key{generate(t, tok, "p256"), generate(t, tok, "rsa2048"), generate(t, tok, "ed25519")}
			}
			var wg sync.WaitGroup
			for i := range 64 {
				wg.Go(func() {
					for range 5 {
						if err := signOnce(t.Context(), keys[i%len(keys)]); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			if n := len(tok.pool.idle); n < 1 || n > sessions {
				t.Errorf("%d sessions are open, want 1 to %d", n, sessions)
			}
			if n := len(tok.pool.permits); n != sessions {
				t.Errorf("%d permits came back, want %d", n, sessions)
			}
		})
	}
}

func TestContext(t *testing.T) {
	tok := openToken(t, softhsm.New(t), func(c *Config) { c.Sessions = 1 })
	k := generate(t, tok, "p256")
	s, err := tok.pool.take(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("the visitor left")
	ctx, cancel := context.WithCancelCause(t.Context())
	got := make(chan error)
	go func() { got <- signOnce(ctx, k) }()
	cancel(cause)
	if err := <-got; !errors.Is(err, cause) {
		t.Errorf("sign without a free session and with a cancelled context: %v, want the cause", err)
	}
	tok.pool.give(s, nil)
	if err := signOnce(ctx, k); !errors.Is(err, cause) {
		t.Errorf("sign with a cancelled context: %v, want the cause", err)
	}
	mustSign(t, k)
}

func TestClose(t *testing.T) {
	st := softhsm.New(t)
	tok := openToken(t, st, func(c *Config) { c.Sessions = 1 })
	k := generate(t, tok, "p256")
	s, err := tok.pool.take(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error)
	go func() { waiting <- signOnce(t.Context(), k) }()
	closed := make(chan error)
	go func() { closed <- tok.Close() }()
	if err := <-waiting; !errors.Is(err, ErrClosed) || !errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("an operation that waits while the token is closed: %v, want ErrClosed", err)
	}
	select {
	case <-closed:
		t.Error("Close returned while a session was in use")
	default:
	}
	tok.pool.give(s, nil)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if err := signOnce(t.Context(), k); !errors.Is(err, ErrClosed) {
		t.Errorf("sign after Close: %v, want ErrClosed", err)
	}
	if _, err := tok.Keys(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("Keys after Close: %v, want ErrClosed", err)
	}
	if err := tok.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if got := modules.loaded[realPath(st.Module)].tokens; got != 0 {
		t.Errorf("%d tokens of the module are open, want 0", got)
	}
}

func TestAlwaysAuthenticate(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	writeBehind(t, tok, func(c *ck.Ctx, s ck.SessionHandle) error {
		_, _, err := c.GenerateKeyPair(s, []*ck.Mechanism{ck.NewMechanism(ck.CKM_EC_KEY_PAIR_GEN, nil)},
			[]*ck.Attribute{ck.NewAttribute(ck.CKA_EC_PARAMS, p256.params), ck.NewAttribute(ck.CKA_TOKEN, true),
				ck.NewAttribute(ck.CKA_ID, []byte{1}), ck.NewAttribute(ck.CKA_LABEL, "always"), ck.NewAttribute(ck.CKA_PRIVATE, false)},
			[]*ck.Attribute{ck.NewAttribute(ck.CKA_TOKEN, true), ck.NewAttribute(ck.CKA_PRIVATE, true), ck.NewAttribute(ck.CKA_SENSITIVE, true),
				ck.NewAttribute(ck.CKA_EXTRACTABLE, false), ck.NewAttribute(ck.CKA_SIGN, true), ck.NewAttribute(ck.CKA_ALWAYS_AUTHENTICATE, true),
				ck.NewAttribute(ck.CKA_ID, []byte{1}), ck.NewAttribute(ck.CKA_LABEL, "always")})
		return err
	})
	k, err := tok.Key(t.Context(), Selector{Label: "always"})
	if err != nil {
		t.Fatal(err)
	}
	if !inner(k).always {
		t.Fatal("the key does not ask for the PIN each time: the test shows nothing")
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := signOnce(t.Context(), k); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()

	// A wrong PIN here is as terminal as at the login.
	tok.pin = NewPIN("wrong-pin-canary")
	for range 3 {
		if err := signOnce(t.Context(), k); !errors.Is(err, ErrPINIncorrect) {
			t.Errorf("sign with a wrong PIN: %v, want ErrPINIncorrect", err)
		}
	}
	if tok.failed == nil {
		t.Error("the refusal is not remembered")
	}
}

func TestSignerView(t *testing.T) {
	tok := openToken(t, softhsm.New(t), nil)
	k := generate(t, tok, "rsa2048")
	s := Signer(t.Context(), k)
	digest := input(signer.Algorithm{Kind: signer.PSS, Hash: crypto.SHA256})
	for _, salt := range []int{rsa.PSSSaltLengthAuto, rsa.PSSSaltLengthEqualsHash, 32} {
		sig, err := s.Sign(rand.Reader, digest, &rsa.PSSOptions{SaltLength: salt, Hash: crypto.SHA256})
		if err != nil {
			t.Fatalf("salt length %d: %v", salt, err)
		}
		if !verify(k.Public(), signer.Algorithm{Kind: signer.PSS, Hash: crypto.SHA256}, digest, sig) {
			t.Errorf("salt length %d: does not verify", salt)
		}
	}
	if _, err := s.Sign(rand.Reader, digest, &rsa.PSSOptions{SaltLength: 20, Hash: crypto.SHA256}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("salt length 20: %v, want ErrUnsupported", err)
	}
}
