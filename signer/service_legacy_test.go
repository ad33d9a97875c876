package signer

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"math/big"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// TestLegacySwitches holds each switch to open its own door and no other, with rules that allow everything.
func TestLegacySwitches(t *testing.T) {
	reg := testRegistry(t, true)
	rsaSKI, ecSKI := skiOf(t, "rsa"), skiOf(t, "p256")
	ops := map[string][]keyless.Operation{
		"sha1": {
			{Opcode: keyless.OpRSASignSHA1, SKI: rsaSKI, Payload: make([]byte, 20)},
			{Opcode: keyless.OpECDSASignSHA1, SKI: ecSKI, Payload: make([]byte, 20)},
		},
		"md5sha1": {
			{Opcode: keyless.OpRSASignMD5SHA1, SKI: rsaSKI, Payload: make([]byte, 36)},
			{Opcode: keyless.OpECDSASignMD5SHA1, SKI: ecSKI, Payload: make([]byte, 36)},
		},
		"decrypt": {
			{Opcode: keyless.OpRSADecrypt, SKI: rsaSKI, Payload: make([]byte, 256)},
			{Opcode: keyless.OpRSADecryptRaw, SKI: rsaSKI, Payload: make([]byte, 256)},
		},
		"": {
			{Opcode: keyless.OpRSASignSHA224, SKI: rsaSKI, Payload: make([]byte, 28)},
			{Opcode: keyless.OpRSASignSHA256, SKI: rsaSKI, Payload: make([]byte, 32)},
			{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: ecSKI, Payload: keyless.AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, tls13Message(32))},
		},
	}
	for on, legacy := range map[string]Legacy{"none": {}, "sha1": {SHA1: true}, "md5sha1": {MD5SHA1: true}, "decrypt": {Decrypt: true}} {
		rec := &recorded{}
		s := NewService(ServiceConfig{Registry: reg, Policy: policyOn(t, Options{Legacy: legacy}, everything(edgeOne)), Recorder: rec})
		for name, list := range ops {
			for _, op := range list {
				_, err := ask(t, s, op)
				if name == "" || name == on {
					wantCode(t, err, 0)
					continue
				}
				wantCode(t, err, keyless.CodeKeyNotFound)
				if r := rec.last(t); r.Cause != CauseLegacy || r.Reason != string(RefusedLegacy) {
					t.Errorf("switch %s, opcode %v: got %+v", on, op.Opcode, r)
				}
			}
		}
	}
	// A switch alone allows nothing.
	s := NewService(ServiceConfig{Registry: reg, Policy: mustPolicy(t, ClientRule{ID: edgeOne, Keys: []string{"*"}, Operations: []string{"sign"}, Schemes: []string{"*"}, SNIs: []string{"*"}})})
	for _, name := range []string{"sha1", "md5sha1", "decrypt"} {
		for _, op := range ops[name] {
			_, err := ask(t, s, op)
			wantCode(t, err, keyless.CodeKeyNotFound)
		}
	}
}

// TestDigestSelectsKeyForEverything holds that old clients, which name keys by digest alone, are served.
func TestDigestSelectsKeyForEverything(t *testing.T) {
	s := NewService(ServiceConfig{Registry: testRegistry(t, true), Policy: mustPolicy(t, everything(edgeOne))})
	for label, ops := range map[string][]keyless.Operation{
		"rsa": {
			{Opcode: keyless.OpRSASignSHA1, Payload: make([]byte, 20)},
			{Opcode: keyless.OpRSAPSSSignSHA256, Payload: make([]byte, 32)},
			{Opcode: keyless.OpRSADecryptRaw, Payload: make([]byte, 256)},
		},
		"p256": {
			{Opcode: keyless.OpECDSASignSHA256, Payload: make([]byte, 32)},
			{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, Payload: keyless.AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, tls13Message(32))},
		},
	} {
		digest, err := keyless.DigestOf(testKeys()[label].Public())
		if err != nil {
			t.Fatal(err)
		}
		for _, op := range ops {
			op.Digest = digest
			_, err := ask(t, s, op)
			wantCode(t, err, 0)
			op.Digest[0] ^= 1
			_, err = ask(t, s, op)
			wantCode(t, err, keyless.CodeKeyNotFound)
		}
	}
}

// paddings are blocks of the RSA key's length in every state that an oracle would tell apart (RFC 8017, section 7.2.2).
func paddings(t *testing.T, size int) map[string][]byte {
	t.Helper()
	block := func(edit func([]byte)) []byte {
		b := make([]byte, size)
		for i := range b {
			b[i] = 0xa5
		}
		b[0], b[1], b[size-49] = 0, 2, 0
		edit(b)
		return b
	}
	return map[string][]byte{
		"good":              block(func([]byte) {}),
		"first byte":        block(func(b []byte) { b[0] = 1 }),
		"type":              block(func(b []byte) { b[1] = 1 }),
		"zero in padding":   block(func(b []byte) { b[5] = 0 }),
		"no separator":      block(func(b []byte) { b[size-49] = 1 }),
		"separator at end":  block(func(b []byte) { b[size-49], b[size-1] = 1, 0 }),
		"leading zeros":     block(func(b []byte) { clear(b[:40]) }),
		"other TLS version": block(func(b []byte) { b[size-48], b[size-47] = 9, 9 }),
		"zero":              make([]byte, size),
		"one":               append(make([]byte, size-1), 1),
	}
}

// TestDecryptionIsNoOracle holds that the server's raw decryption tells nothing of the padding: what comes back is the block, of the modulus' length,
// whatever is in it, and the record is the same.
func TestDecryptionIsNoOracle(t *testing.T) {
	priv := testKeys()["rsa"].(*rsa.PrivateKey)
	a, rec := &auditor{}, &recorded{}
	s := NewService(ServiceConfig{Registry: testRegistry(t, true), Policy: mustPolicy(t, everything(edgeOne)), Recorder: rec, Auditor: a})
	var first *Record // without what differs from one operation to the next
	for name, block := range paddings(t, priv.Size()) {
		m := new(big.Int).SetBytes(block)
		if m.Cmp(priv.N) >= 0 {
			t.Fatalf("%s: the block is above the modulus", name)
		}
		ct := m.Exp(m, big.NewInt(int64(priv.E)), priv.N).FillBytes(make([]byte, priv.Size()))
		for _, opcode := range []keyless.Opcode{keyless.OpRSADecrypt, keyless.OpRSADecryptRaw} {
			got, err := ask(t, s, keyless.Operation{Opcode: opcode, SKI: skiOf(t, "rsa"), Payload: ct})
			wantCode(t, err, 0)
			if !bytes.Equal(got, block) {
				t.Errorf("%s: got %d bytes that are not the block", name, len(got))
			}
			r := a.last(t)
			if r.Hash != sha256.Sum256(ct) {
				t.Errorf("%s: the record's hash is not that of the ciphertext", name)
			}
			r.Hash, r.Time, r.Duration, r.Took, r.Waited = [32]byte{}, time.Time{}, 0, 0, 0
			if first == nil {
				first = &r
			} else if r != *first {
				t.Errorf("%s: got record %+v, want %+v", name, r, *first)
			}
		}
	}
}

// TestCiphertextRange holds that a ciphertext out of range is refused alike whatever it holds, and before a key sees it: its length, and whether it is below the modulus,
// can be seen from outside.
func TestCiphertextRange(t *testing.T) {
	priv := testKeys()["rsa"].(*rsa.PrivateKey)
	key := &countingKey{Key: memoryKey(t, "rsa")}
	reg := NewRegistry()
	if err := reg.Replace([]Home{{Key: key, Decrypt: true}}); err != nil {
		t.Fatal(err)
	}
	s := NewService(ServiceConfig{Registry: reg, Policy: mustPolicy(t, everything(edgeOne))})
	n := priv.N.FillBytes(make([]byte, priv.Size()))
	above := func(delta int64) []byte {
		return new(big.Int).Add(priv.N, big.NewInt(delta)).FillBytes(make([]byte, priv.Size()))
	}
	random := make([]byte, priv.Size()-1)
	rand.Read(random)
	for name, ct := range map[string][]byte{
		"the modulus": n, "one more": above(1), "much more": bytes.Repeat([]byte{0xff}, priv.Size()),
		"short": random, "shorter": random[:10], "empty": nil, "long": append([]byte{0, 0}, random...), "twice as long": append(n, n...),
	} {
		_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpRSADecrypt, SKI: skiOf(t, "rsa"), Payload: ct})
		if wantCode(t, err, keyless.CodeFormat); key.calls != 0 {
			t.Fatalf("%s: the key was asked", name)
		}
	}
	for name, ct := range map[string][]byte{"one less": above(-1), "zero": make([]byte, priv.Size()), "random": append([]byte{0}, random...)} {
		calls := key.calls
		_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpRSADecrypt, SKI: skiOf(t, "rsa"), Payload: ct})
		if wantCode(t, err, 0); key.calls != calls+1 {
			t.Errorf("%s: the key was asked %d times", name, key.calls-calls)
		}
	}
}

// instantDecrypter answers with the block that the test sets.
type instantDecrypter struct {
	Key
	block []byte
}

func (k *instantDecrypter) DecryptRaw(context.Context, []byte) ([]byte, error) { return k.block, nil }

// TestDecryptionWorkIsTheSame counts what a decryption allocates: work that depends on the block would show.
func TestDecryptionWorkIsTheSame(t *testing.T) {
	priv := testKeys()["rsa"].(*rsa.PrivateKey)
	key := &instantDecrypter{Key: memoryKey(t, "rsa")}
	reg := NewRegistry()
	if err := reg.Replace([]Home{{Key: key, Decrypt: true}}); err != nil {
		t.Fatal(err)
	}
	s := NewService(ServiceConfig{Registry: reg, Policy: mustPolicy(t, everything(edgeOne))})
	req := &keyless.Request{Peer: keyless.Peer{ID: edgeOne}, Operation: keyless.Operation{Opcode: keyless.OpRSADecrypt, SKI: skiOf(t, "rsa"), Payload: make([]byte, priv.Size())}}
	want := -1.0
	for name, block := range paddings(t, priv.Size()) {
		key.block = block
		n := testing.AllocsPerRun(50, func() {
			if got, err := s.Handle(t.Context(), req); err != nil || &got[0] != &block[0] {
				t.Fatalf("got %d bytes, %v", len(got), err)
			}
		})
		if want < 0 {
			want = n
		}
		if n != want {
			t.Errorf("%s: %v allocations, and %v for another block", name, n, want)
		}
	}
}
