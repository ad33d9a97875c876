//lint:file-ignore SA1019 TLS 1.2 without ECDHE has no other padding; the oracle is what this file is about

package keyless

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"testing"
)

// block builds 0x00 0x02 ‖ padding ‖ 0x00 ‖ message, filled to 256 bytes.
func block(message []byte) []byte {
	b := bytes.Repeat([]byte{0xEE}, 256)
	b[0], b[1] = 0, 2
	b[256-len(message)-1] = 0
	copy(b[256-len(message):], message)
	return b
}

func TestUnpadSessionKey(t *testing.T) {
	message := bytes.Repeat([]byte{0x42}, 48)
	change := func(at int, v byte) []byte {
		b := block(message)
		b[at] = v
		return b
	}
	for _, tt := range []struct {
		name  string
		block []byte
		good  bool
	}{
		{"good", block(message), true},
		{"good, other padding", change(100, 1), true},
		{"first byte", change(0, 1), false},
		{"block type 1", change(1, 1), false},
		{"block type 0", change(1, 0), false},
		{"zero at the start of the padding", change(2, 0), false},
		{"zero in the eighth byte", change(9, 0), false},
		{"zero in the middle", change(100, 0), false},
		{"zero just before the separator", change(256-50, 0), false},
		{"no separator", change(256-49, 9), false},
		{"message one shorter", block(message[1:]), false},
		{"message one longer", block(append(bytes.Clone(message), 7)), false},
		{"empty message", block(nil), false},
		{"all zero", make([]byte, 256), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			random := bytes.Repeat([]byte{0x99}, 48)
			got := bytes.Clone(random)
			unpadSessionKey(got, tt.block)
			want := random
			if tt.good {
				want = message
			}
			if !bytes.Equal(got, want) {
				t.Errorf("got %x, want %x", got, want)
			}
		})
	}
}

// With the least padding that is allowed, each byte of the block has its role.
func TestUnpadSessionKeyShortestPadding(t *testing.T) {
	want := bytes.Repeat([]byte{0x42}, 48)
	b := append([]byte{0, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0}, want...)
	got := make([]byte, 48)
	unpadSessionKey(got, b)
	if !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
}

// Attacker: a visitor who sends ciphertexts to learn about the padding. The library is the reference.
func FuzzUnpadSessionKey(f *testing.F) {
	f.Add(block(bytes.Repeat([]byte{0x42}, 48)))
	f.Add(block(nil))
	f.Add(make([]byte, 256))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) != 256 || raw[0] != 0 { // raw[0] != 0 may pass the modulus
			return
		}
		k := rsaKey()
		random := bytes.Repeat([]byte{0x99}, 48)
		got, want := bytes.Clone(random), bytes.Clone(random)
		unpadSessionKey(got, raw)
		if err := rsa.DecryptPKCS1v15SessionKey(nil, k, rawEncrypt(&k.PublicKey, raw), want); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%x: got %x, want %x", raw, got, want)
		}
	})
}

// BenchmarkUnpad is for comparing good and bad padding, which must take the same time.
func BenchmarkUnpad(b *testing.B) {
	good := bytes.Repeat([]byte{0xa5}, 256)
	good[0], good[1], good[256-49] = 0, 2, 0
	key := make([]byte, 48)
	for name, at := range map[string]int{"good": -1, "first byte": 0, "type": 1, "early zero": 2, "late zero": 200, "no separator": 256 - 49} {
		block := bytes.Clone(good)
		if at >= 0 {
			block[at] ^= 0xa5
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				unpadSessionKey(key, block)
			}
		})
	}
}

func TestDecrypt(t *testing.T) {
	k := rsaKey()
	reply := func(f func(ciphertext []byte) ([]byte, error)) *Client {
		addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
			if req.Opcode != OpRSADecrypt {
				return nil, ErrBadOpcode
			}
			return f(req.Payload)
		})})
		return startClient(t, ClientConfig{Servers: []string{addr}})
	}
	premaster := bytes.Repeat([]byte{3}, 48)
	good := must(rsa.EncryptPKCS1v15(rand.Reader, &k.PublicKey, premaster))
	short := must(rsa.EncryptPKCS1v15(rand.Reader, &k.PublicKey, premaster[:47]))
	raw := func(c []byte) ([]byte, error) { return rawDecrypt(k, c), nil }
	opts := &rsa.PKCS1v15DecryptOptions{SessionKeyLen: 48}

	for _, tt := range []struct {
		name       string
		ciphertext []byte
		server     func([]byte) ([]byte, error)
		recovered  bool
	}{
		{"good", good, raw, true},
		{"message of another length", short, raw, false},
		{"random ciphertext", append([]byte{0}, bytes.Repeat([]byte{0x5A}, 255)...), raw, false},
		{"server took leading zeros off", good, func(c []byte) ([]byte, error) { return rawDecrypt(k, c)[1:], nil }, false},
		{"server took the padding off", good, func(c []byte) ([]byte, error) { return premaster, nil }, false},
		{"server reports bad padding", good, func(c []byte) ([]byte, error) { return nil, ErrCrypto }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			key := must(reply(tt.server).Key(k.Public(), KeyOptions{AllowDecrypt: true}))
			a, err := key.Decrypt(nil, tt.ciphertext, opts)
			if err != nil {
				t.Fatal(err)
			}
			b := must(key.Decrypt(nil, tt.ciphertext, opts))
			switch {
			case len(a) != 48 || len(b) != 48:
				t.Errorf("keys of %d and %d bytes, want 48", len(a), len(b))
			case tt.recovered && (!bytes.Equal(a, premaster) || !bytes.Equal(b, premaster)):
				t.Errorf("got %x, want the session key", a)
			case !tt.recovered && (bytes.Equal(a, premaster) || bytes.Equal(a, b)):
				t.Errorf("got %x and %x, want two random keys", a, b)
			}
		})
	}
	t.Run("refusals", func(t *testing.T) {
		c := reply(func([]byte) ([]byte, error) { return nil, ErrKeyNotFound })
		key := must(c.Key(k.Public(), KeyOptions{AllowDecrypt: true}))
		_, err := key.Decrypt(nil, good, opts)
		wantErr(t, err, ErrKeyNotFound)
		closed := must(c.Key(k.Public(), KeyOptions{}))
		for name, try := range map[string]func() ([]byte, error){
			"not allowed":      func() ([]byte, error) { return closed.Decrypt(nil, good, opts) },
			"no options":       func() ([]byte, error) { return key.Decrypt(nil, good, nil) },
			"no length":        func() ([]byte, error) { return key.Decrypt(nil, good, &rsa.PKCS1v15DecryptOptions{}) },
			"OAEP":             func() ([]byte, error) { return key.Decrypt(nil, good, &rsa.OAEPOptions{Hash: crypto.SHA256}) },
			"ciphertext short": func() ([]byte, error) { return key.Decrypt(nil, good[1:], opts) },
			"ciphertext large": func() ([]byte, error) { return key.Decrypt(nil, bytes.Repeat([]byte{0xff}, 256), opts) },
			"the modulus":      func() ([]byte, error) { return key.Decrypt(nil, k.N.FillBytes(make([]byte, 256)), opts) },
			"key too long": func() ([]byte, error) {
				return key.Decrypt(nil, good, &rsa.PKCS1v15DecryptOptions{SessionKeyLen: 246})
			},
		} {
			if got, err := try(); err == nil {
				t.Errorf("%s: got %x", name, got)
			}
		}
		if _, err := c.Key(p256Key().Public(), KeyOptions{AllowDecrypt: true}); err == nil {
			t.Error("AllowDecrypt with an ECDSA key succeeded")
		}
	})
}

// rawEncrypt is RSA without padding.
func rawEncrypt(pub *rsa.PublicKey, block []byte) []byte {
	c := new(big.Int).Exp(new(big.Int).SetBytes(block), big.NewInt(int64(pub.E)), pub.N)
	return c.FillBytes(make([]byte, pub.Size()))
}
