package pkcs11

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/asn1"
	"math/big"
	"testing"
)

// encodings are the forms in which modules have been seen to give a point.
func encodings(tb testing.TB, point []byte) map[string][]byte {
	tb.Helper()
	octets, err := asn1.Marshal(point)
	if err != nil {
		tb.Fatal(err)
	}
	bits, err := asn1.Marshal(asn1.BitString{Bytes: point, BitLength: 8 * len(point)})
	if err != nil {
		tb.Fatal(err)
	}
	return map[string][]byte{"raw": point, "OCTET STRING": octets, "BIT STRING": bits}
}

// samplePoint returns a public key of the curve and its point.
func samplePoint(tb testing.TB, c *curve) (interface{ Equal(any) bool }, []byte) {
	tb.Helper()
	if c == edwards {
		pub, _, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			tb.Fatal(err)
		}
		return anyEqual{pub}, pub
	}
	key, err := ecdsa.GenerateKey(c.ec, rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		tb.Fatal(err)
	}
	return anyEqual{&key.PublicKey}, point
}

type anyEqual struct{ pub any }

func (a anyEqual) Equal(b any) bool { return equal(a.pub, b) }

func TestDecodePoint(t *testing.T) {
	for _, c := range curves {
		pub, point := samplePoint(t, c)
		for name, enc := range encodings(t, point) {
			got, err := decodePoint(c.params, enc)
			if err != nil {
				t.Errorf("%s as %s: %v", c.name, name, err)
			} else if !pub.Equal(got) {
				t.Errorf("%s as %s: another key", c.name, name)
			}
			bad := map[string][]byte{"truncated": enc[:len(enc)-1], "extended": append(bytes.Clone(enc), 0), "empty": nil}
			if c != edwards {
				off := bytes.Clone(enc)
				off[len(off)-1] ^= 1
				bad["off the curve"] = off
				compressed := bytes.Clone(enc)
				compressed[len(enc)-len(point)] = 2
				bad["marked as compressed"] = compressed
			}
			for what, b := range bad {
				if got, err := decodePoint(c.params, b); err == nil {
					t.Errorf("%s as %s, %s: accepted as %v", c.name, name, what, got)
				}
			}
		}
	}
	if _, err := decodePoint([]byte{6, 5, 0x2b, 0x81, 4, 0, 10}, make([]byte, 65)); err == nil { // secp256k1
		t.Error("an unknown curve is accepted")
	}
	if got, err := decodePoint(edString, make([]byte, 32)); err != nil || len(got.(ed25519.PublicKey)) != 32 {
		t.Errorf("Ed25519 by its curve name: %v, %v", got, err)
	}
}

// FuzzDecodePoint: the attacker is a token, or who can write public objects on it. What is accepted re-encodes to the
// same bytes in one of the three forms.
func FuzzDecodePoint(f *testing.F) {
	for _, c := range curves {
		_, point := samplePoint(f, c)
		for _, enc := range encodings(f, point) {
			f.Add(c.params, enc)
		}
	}
	f.Fuzz(func(t *testing.T, params, value []byte) {
		pub, err := decodePoint(params, value)
		if err != nil {
			return
		}
		var point []byte
		switch pub := pub.(type) {
		case *ecdsa.PublicKey:
			if point, err = pub.Bytes(); err != nil {
				t.Fatal(err)
			}
		case ed25519.PublicKey:
			point = pub
		}
		for _, enc := range encodings(t, point) {
			if bytes.Equal(enc, value) {
				return
			}
		}
		t.Fatalf("%x is accepted, but is no encoding of its point %x", value, point)
	})
}

func TestDecodeRSA(t *testing.T) {
	n := new(big.Int).Lsh(big.NewInt(1), 2047)
	n.SetBit(n, 0, 1)
	e := []byte{1, 0, 1}
	if _, err := decodeRSA(append([]byte{0}, n.Bytes()...), append([]byte{0}, e...)); err != nil {
		t.Errorf("leading zeros: %v", err)
	}
	for name, tc := range map[string]struct{ n, e []byte }{
		"no modulus":    {nil, e},
		"no exponent":   {n.Bytes(), nil},
		"1024 bits":     {append([]byte{0x80}, make([]byte, 127)...), e},
		"even":          {append([]byte{0x80}, make([]byte, 255)...), e},
		"huge":          {bytes.Repeat([]byte{0xff}, 4096), e},
		"exponent 1":    {n.Bytes(), []byte{1}},
		"even exponent": {n.Bytes(), []byte{1, 0, 0}},
		"big exponent":  {n.Bytes(), bytes.Repeat([]byte{0xff}, 5)},
	} {
		if _, err := decodeRSA(tc.n, tc.e); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// rs returns r‖s with the given lengths of significant bytes.
func rs(order, rLen, sLen int) []byte {
	b := make([]byte, 2*order)
	rand.Read(b[order-rLen : order])
	rand.Read(b[2*order-sLen:])
	return b
}

func TestAppendSignature(t *testing.T) {
	for _, c := range []*curve{p256, p384, p521} {
		for i := range 3000 {
			raw := rs(c.order, c.order-i%c.order, c.order-(i/c.order)%c.order)
			r, s := new(big.Int).SetBytes(raw[:c.order]), new(big.Int).SetBytes(raw[c.order:])
			if r.Sign() == 0 || s.Sign() == 0 {
				continue
			}
			want, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
			if err != nil {
				t.Fatal(err)
			}
			got, err := appendSignature(nil, raw, c.order)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: %x becomes %x (%v), want %x", c.name, raw, got, err, want)
			}
			if len(got) > 9+2*c.order {
				t.Fatalf("%s: a signature of %d bytes does not fit its buffer", c.name, len(got))
			}
		}
		zero := make([]byte, c.order)
		one := rs(c.order, c.order, c.order)[:c.order]
		for name, raw := range map[string][]byte{
			"empty": nil, "odd": make([]byte, 2*c.order-1), "short": make([]byte, 2*c.order-2), "long": make([]byte, 2*c.order+2),
			"zero r": append(bytes.Clone(zero), one...), "zero s": append(bytes.Clone(one), zero...),
		} {
			if _, err := appendSignature(nil, raw, c.order); err == nil {
				t.Errorf("%s, %s: accepted", c.name, name)
			}
		}
	}
}

// FuzzAppendSignature: the attacker is a token that answers nonsense. What is accepted is what encoding/asn1 would make of it.
func FuzzAppendSignature(f *testing.F) {
	for _, c := range []*curve{p256, p384, p521} {
		f.Add(rs(c.order, c.order, c.order-1), c.order)
	}
	f.Fuzz(func(t *testing.T, raw []byte, order int) {
		if order < 1 {
			return
		}
		der, err := appendSignature(nil, raw, order)
		if err != nil {
			return
		}
		var sig struct{ R, S *big.Int }
		if rest, err := asn1.Unmarshal(der, &sig); err != nil || len(rest) != 0 {
			t.Fatalf("%x is no DER: %v", der, err)
		}
		back := append(sig.R.FillBytes(make([]byte, order)), sig.S.FillBytes(make([]byte, order))...)
		if !bytes.Equal(back, raw) {
			t.Fatalf("%x becomes %x", raw, back)
		}
	})
}

func TestAppendSignatureDoesNotAllocate(t *testing.T) {
	raw := rs(66, 66, 66)
	buf := make([]byte, 0, 9+2*66)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := appendSignature(buf, raw, 66); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}
