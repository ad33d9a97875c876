package signer

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"strings"
	"testing"
	"unsafe"

	"github.com/keyhaven/keyhaven/keyless"
)

// ask sends one operation of edgeOne to the service.
func ask(t testing.TB, s *Service, op keyless.Operation) ([]byte, error) {
	t.Helper()
	return s.Handle(t.Context(), &keyless.Request{Operation: op, Peer: keyless.Peer{ID: edgeOne}})
}

// wantCode fails unless err is the keyless error of that code.
func wantCode(t testing.TB, err error, code keyless.ErrorCode) {
	t.Helper()
	var ke *keyless.Error
	switch {
	case code == 0:
		if err != nil {
			t.Fatalf("got error %v, want none", err)
		}
	case !errors.As(err, &ke):
		t.Fatalf("got error %v, want a *keyless.Error with %v", err, code)
	case ke.Code != code:
		t.Fatalf("got code %v, want %v", ke.Code, code)
	}
}

func verifyPlain(t *testing.T, pub crypto.PublicKey, alg Algorithm, input, sig []byte) {
	t.Helper()
	ok := false
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, input, sig)
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, input, sig)
	case *rsa.PublicKey:
		if alg.Kind == PSS {
			ok = rsa.VerifyPSS(k, alg.Hash, input, sig, &rsa.PSSOptions{SaltLength: alg.Hash.Size()}) == nil
		} else {
			ok = rsa.VerifyPKCS1v15(k, alg.Hash, input, sig) == nil
		}
	}
	if !ok {
		t.Errorf("%v: the signature is wrong", alg)
	}
}

func TestEveryPlainSignOpcode(t *testing.T) {
	rec := &recorded{}
	s := NewService(ServiceConfig{Registry: testRegistry(t, false), Policy: mustPolicy(t, everything(edgeOne)), Recorder: rec})
	n := 0
	for code := range 256 {
		op := keyless.Opcode(code)
		alg := opcodeAlgorithms[op]
		if (alg.Kind != 0) != op.IsSign() || alg.Hash != op.Hash() {
			t.Errorf("%v: got algorithm %v", op, alg)
		}
		if alg.Kind == 0 {
			continue
		}
		n++
		for label, key := range testKeys() {
			ski := skiOf(t, label)
			size := 100
			if alg.Hash != 0 {
				size = alg.Hash.Size()
			}
			input := make([]byte, size)
			rand.Read(input)
			sig, err := ask(t, s, keyless.Operation{Opcode: op, SKI: ski, Payload: input, SNI: "www.example.com"})
			if !Fits(key.Public(), alg) {
				wantCode(t, err, keyless.CodeCrypto)
				continue
			}
			wantCode(t, err, 0)
			verifyPlain(t, key.Public(), alg, input, sig)
			if r := rec.last(t); r.Result != ResultOK || r.Op != "sign" || r.Scheme != alg.String() || r.SKI != ski || r.Label != label || r.Peer != edgeOne {
				t.Errorf("got record %+v", r)
			}
			if alg.Hash == 0 {
				continue
			}
			for _, wrong := range [][]byte{nil, input[1:], append(bytes.Clone(input), 0)} {
				_, err := ask(t, s, keyless.Operation{Opcode: op, SKI: ski, Payload: wrong})
				wantCode(t, err, keyless.CodeFormat)
			}
		}
	}
	if n != 16 {
		t.Errorf("got %d sign opcodes, want 16", n)
	}
}

func TestDigestSelectsKey(t *testing.T) {
	s := NewService(ServiceConfig{Registry: testRegistry(t, false), Policy: mustPolicy(t, everything(edgeOne))})
	digest, err := keyless.DigestOf(testKeys()["rsa"].Public())
	if err != nil {
		t.Fatal(err)
	}
	input := sha256.Sum256([]byte("x"))
	sig, err := ask(t, s, keyless.Operation{Opcode: keyless.OpRSASignSHA256, Digest: digest, Payload: input[:]})
	wantCode(t, err, 0)
	verifyPlain(t, testKeys()["rsa"].Public(), Algorithm{PKCS1v15, crypto.SHA256}, input[:], sig)

	// With an SKI the digest does not count, as an unknown SKI must not fall back to another key.
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpRSASignSHA256, SKI: keyless.SKI{1}, Digest: digest, Payload: input[:]})
	wantCode(t, err, keyless.CodeKeyNotFound)
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpRSASignSHA256, Payload: input[:]})
	wantCode(t, err, keyless.CodeFormat)
}

func TestTLSSign(t *testing.T) {
	rec := &recorded{}
	s := NewService(ServiceConfig{Registry: testRegistry(t, false), Policy: mustPolicy(t, everything(edgeOne)), Recorder: rec})
	tests := []struct {
		label  string
		scheme tls.SignatureScheme
		msg    []byte
		code   keyless.ErrorCode
	}{
		{"p256", tls.ECDSAWithP256AndSHA256, tls13Message(32), 0},
		{"p256", tls.ECDSAWithP256AndSHA256, tls13Message(48), 0},
		{"p256", tls.ECDSAWithP256AndSHA256, tls12Message(t), 0},
		{"p384", tls.ECDSAWithP384AndSHA384, tls13Message(48), 0},
		{"p384", tls.ECDSAWithP256AndSHA256, tls12Message(t), 0},
		{"p384", tls.ECDSAWithP256AndSHA256, tls13Message(32), keyless.CodeFormat},
		{"p521", tls.ECDSAWithP521AndSHA512, tls13Message(32), 0},
		{"rsa", tls.PSSWithSHA256, tls13Message(32), 0},
		{"rsa", tls.PSSWithSHA384, tls13Message(48), 0},
		{"rsa", tls.PSSWithSHA512, tls12Message(t), 0},
		{"rsa", tls.PKCS1WithSHA256, tls12Message(t), 0},
		{"rsa", tls.PKCS1WithSHA384, tls12Message(t), 0},
		{"rsa", tls.PKCS1WithSHA512, tls12Message(t), 0},
		{"rsa", tls.PKCS1WithSHA256, tls13Message(32), keyless.CodeFormat},
		{"rsa", tls.PKCS1WithSHA1, tls12Message(t), keyless.CodeFormat},
		{"rsa", tls.ECDSAWithP256AndSHA256, tls13Message(32), keyless.CodeFormat},
		{"p256", tls.PSSWithSHA256, tls13Message(32), keyless.CodeFormat},
		{"ed", tls.Ed25519, tls13Message(32), 0},
		{"ed", tls.Ed25519, tls12Message(t), 0},
		{"p256", tls.Ed25519, tls13Message(32), keyless.CodeFormat},
		{"p256", tls.ECDSAWithP256AndSHA256, tls13Message(31), keyless.CodeFormat},
		{"p256", tls.ECDSAWithP256AndSHA256, tls13Message(32)[1:], keyless.CodeFormat},
		{"p256", tls.ECDSAWithP256AndSHA256, bytes.Replace(tls13Message(32), []byte("server"), []byte("client"), 1), keyless.CodeFormat},
		{"p256", tls.ECDSAWithP256AndSHA256, append(tls12Message(t), 0), keyless.CodeFormat},
		{"p256", tls.ECDSAWithP256AndSHA256, []byte(`{"alg":"ES256"}`), keyless.CodeFormat},
		{"p256", tls.ECDSAWithP256AndSHA256, nil, keyless.CodeFormat},
	}
	for i, tt := range tests {
		t.Run(fmt.Sprintf("%d %s %v", i, tt.label, tt.scheme), func(t *testing.T) {
			sig, err := ask(t, s, keyless.Operation{
				Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: skiOf(t, tt.label), SNI: "www.example.com",
				Payload: keyless.AppendTLSSign(nil, tt.scheme, tt.msg), ClientIP: netip.MustParseAddr("192.0.2.1"),
			})
			wantCode(t, err, tt.code)
			r := rec.last(t)
			if r.Op != "tls-sign" || r.SNI != "www.example.com" || r.ClientIP != netip.MustParseAddr("192.0.2.1") || (r.Result == ResultOK) != (tt.code == 0) || (r.Reason == "") != (tt.code == 0) {
				t.Errorf("got record %+v", r)
			}
			if err == nil {
				if err := keyless.VerifyTLS(testKeys()[tt.label].Public(), tt.scheme, tt.msg, sig); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// A client that may not use a key sees the answer of a key that is not there, whatever is wrong with its request besides.
func TestNoOracle(t *testing.T) {
	rec := &recorded{}
	p := mustPolicy(t, ClientRule{ID: edgeOne, Keys: []string{"p384"}, Operations: []string{"tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"a.example"}})
	s := NewService(ServiceConfig{Registry: testRegistry(t, true), Policy: p, Recorder: rec})
	mine, other, missing := skiOf(t, "p384"), skiOf(t, "p256"), keyless.SKI{9}
	good := keyless.AppendTLSSign(nil, tls.ECDSAWithP384AndSHA384, tls13Message(48))
	tests := []struct {
		name   string
		op     keyless.Operation
		id     string
		reason string
	}{
		{"missing key", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: missing, Payload: good, SNI: "a.example"}, edgeOne, "key not found"},
		{"other key", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: other, Payload: good, SNI: "a.example"}, edgeOne, string(RefusedKey)},
		{"other key, bad payload", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: other, Payload: nil, SNI: "a.example"}, edgeOne, string(RefusedKey)},
		{"missing key, bad payload", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: missing, Payload: nil, SNI: "a.example"}, edgeOne, "key not found"},
		{"other key, plain, bad length", keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: other, Payload: []byte{1}}, edgeOne, string(RefusedOp)},
		{"other key, plain, wrong type", keyless.Operation{Opcode: keyless.OpRSASignSHA256, SKI: other, Payload: []byte{1}}, edgeOne, string(RefusedOp)},
		{"missing key, plain", keyless.Operation{Opcode: keyless.OpRSASignSHA256, SKI: missing, Payload: []byte{1}}, edgeOne, "key not found"},
		{"own key, plain", keyless.Operation{Opcode: keyless.OpECDSASignSHA384, SKI: mine, Payload: make([]byte, 48), SNI: "a.example"}, edgeOne, string(RefusedOp)},
		{"own key, decrypt", keyless.Operation{Opcode: keyless.OpRSADecrypt, SKI: mine, Payload: nil}, edgeOne, string(RefusedOp)},
		{"other key, decrypt", keyless.Operation{Opcode: keyless.OpRSADecryptRaw, SKI: skiOf(t, "rsa"), Payload: make([]byte, 256)}, edgeOne, string(RefusedOp)},
		{"own key, other name", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: mine, Payload: good, SNI: "b.example"}, edgeOne, string(RefusedSNI)},
		{"own key, no name", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: mine, Payload: good}, edgeOne, string(RefusedSNI)},
		{"other client", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: mine, Payload: good, SNI: "a.example"}, edgeTwo, string(RefusedClient)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := s.Handle(t.Context(), &keyless.Request{Operation: tt.op, Peer: keyless.Peer{ID: tt.id}})
			wantCode(t, err, keyless.CodeKeyNotFound)
			if r := rec.last(t); r.Result != ResultRefused || r.Reason != tt.reason {
				t.Errorf("got record %+v, want reason %q", r, tt.reason)
			}
		})
	}
	// The same request, allowed, shows that it was the policy each time.
	_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: mine, Payload: good, SNI: "A.example."})
	wantCode(t, err, 0)
}

func TestSchemeOutsideRule(t *testing.T) {
	p := mustPolicy(t, ClientRule{ID: edgeOne, Keys: []string{"*"}, Operations: []string{"tls-sign", "sign"}, Schemes: []string{"ed25519"}, SNIs: []string{"*"}})
	s := NewService(ServiceConfig{Registry: testRegistry(t, false), Policy: p})
	_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: skiOf(t, "p256"), Payload: keyless.AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, tls13Message(32))})
	wantCode(t, err, keyless.CodeKeyNotFound)
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)})
	wantCode(t, err, keyless.CodeKeyNotFound)
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpEd25519Sign, SKI: skiOf(t, "ed"), Payload: []byte("message")})
	wantCode(t, err, 0)
}

func TestDecrypt(t *testing.T) {
	key := testKeys()["rsa"].(*rsa.PrivateKey)
	// RFC 8017 section 7.2.1, as a TLS 1.2 client without ECDHE does it.
	secret := []byte("a premaster secret of 48 bytes as TLS 1.2 has it")
	block := bytes.Repeat([]byte{0xa5}, key.Size())
	block[0], block[1] = 0, 2
	copy(block[key.Size()-len(secret)-1:], append([]byte{0}, secret...))
	ct := new(big.Int).Exp(new(big.Int).SetBytes(block), big.NewInt(int64(key.E)), key.N).FillBytes(make([]byte, key.Size()))
	tooLarge := key.N.Bytes()
	allowed, denied := mustPolicy(t, everything(edgeOne)), mustPolicy(t, ClientRule{
		ID: edgeOne, Keys: []string{"*"}, Operations: []string{"sign", "tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"*"}})
	tests := []struct {
		name   string
		keyOK  bool
		policy *Policy
		op     keyless.Opcode
		label  string
		ct     []byte
		code   keyless.ErrorCode
	}{
		{"raw", true, allowed, keyless.OpRSADecrypt, "rsa", ct, 0},
		{"raw, legacy name", true, allowed, keyless.OpRSADecryptRaw, "rsa", ct, 0},
		{"key does not allow it", false, allowed, keyless.OpRSADecrypt, "rsa", ct, keyless.CodeKeyNotFound},
		{"client is not allowed", true, denied, keyless.OpRSADecrypt, "rsa", ct, keyless.CodeKeyNotFound},
		{"neither", false, denied, keyless.OpRSADecrypt, "rsa", ct, keyless.CodeKeyNotFound},
		{"short", true, allowed, keyless.OpRSADecrypt, "rsa", ct[1:], keyless.CodeFormat},
		{"long", true, allowed, keyless.OpRSADecrypt, "rsa", append([]byte{0}, ct...), keyless.CodeFormat},
		{"empty", true, allowed, keyless.OpRSADecrypt, "rsa", nil, keyless.CodeFormat},
		{"the modulus", true, allowed, keyless.OpRSADecrypt, "rsa", tooLarge, keyless.CodeFormat},
		{"no RSA key", true, allowed, keyless.OpRSADecrypt, "p256", ct, keyless.CodeCrypto},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := NewService(ServiceConfig{Registry: testRegistry(t, tt.keyOK), Policy: tt.policy})
			got, err := ask(t, s, keyless.Operation{Opcode: tt.op, SKI: skiOf(t, tt.label), Payload: tt.ct})
			wantCode(t, err, tt.code)
			if tt.code == 0 && !bytes.Equal(got, block) {
				t.Errorf("got a block of %d bytes that is not the padded secret", len(got))
			}
		})
	}
}

func TestOtherOpcodes(t *testing.T) {
	rec := &recorded{}
	s := NewService(ServiceConfig{Registry: testRegistry(t, false), Policy: mustPolicy(t, everything(edgeOne)), Recorder: rec})
	tests := []struct {
		op   keyless.Operation
		code keyless.ErrorCode
	}{
		{keyless.Operation{}, keyless.CodeBadOpcode},
		{keyless.Operation{Opcode: 0x99}, keyless.CodeBadOpcode},
		{keyless.Operation{Opcode: keyless.OpRPC}, keyless.CodeInternal},
		{keyless.Operation{Opcode: keyless.OpResponse}, keyless.CodeUnexpectedOpcode},
		{keyless.Operation{Opcode: keyless.OpPong}, keyless.CodeUnexpectedOpcode},
		{keyless.Operation{Opcode: keyless.OpError}, keyless.CodeUnexpectedOpcode},
		{keyless.Operation{Opcode: keyless.OpCustom}, keyless.CodeBadOpcode},
		{keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: "someone/else"}, keyless.CodeBadOpcode},
		{keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: []byte{1}}, keyless.CodeBadOpcode},
		{keyless.Operation{Opcode: keyless.OpSeal, Payload: []byte("x")}, keyless.CodeBadOpcode},
		{keyless.Operation{Opcode: keyless.OpUnseal, Payload: []byte("x")}, keyless.CodeBadOpcode},
	}
	for _, tt := range tests {
		_, err := ask(t, s, tt.op)
		wantCode(t, err, tt.code)
		if r := rec.last(t); r.Result != ResultRefused || r.Reason == "" {
			t.Errorf("%v: got record %+v", tt.op.Opcode, r)
		}
	}
}

func TestRenew(t *testing.T) {
	var gotID string
	fail := error(nil)
	cfg := ServiceConfig{Policy: mustPolicy(t, everything(edgeOne), ClientRule{ID: edgeTwo, Operations: []string{"ping"}}),
		Renew: func(_ context.Context, id string, csr []byte) ([][]byte, error) {
			gotID = id
			return [][]byte{csr, []byte("-root")}, fail
		}}
	s := NewService(cfg)
	op := keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: []byte("csr")}
	got, err := ask(t, s, op)
	wantCode(t, err, 0)
	if string(got) != "csr-root" || gotID != edgeOne {
		t.Errorf("got %q for %s", got, gotID)
	}
	_, err = s.Handle(t.Context(), &keyless.Request{Operation: op, Peer: keyless.Peer{ID: edgeTwo}})
	wantCode(t, err, keyless.CodeBadOpcode)
	fail = errors.New("bad request")
	_, err = ask(t, s, op)
	wantCode(t, err, keyless.CodeCrypto)
	for _, n := range []int{0, maxCSR + 1} {
		op.Payload = make([]byte, n)
		_, err = ask(t, s, op)
		wantCode(t, err, keyless.CodeFormat)
	}
}

func TestBackendFailures(t *testing.T) {
	rec := &recorded{}
	k := &faultyKey{Key: memoryKey(t, "p256"), healthy: true}
	reg := NewRegistry()
	if err := reg.Replace([]Home{{Key: k}}); err != nil {
		t.Fatal(err)
	}
	s := NewService(ServiceConfig{Registry: reg, Policy: mustPolicy(t, everything(edgeOne)), Recorder: rec})
	for _, tt := range []struct {
		err  error
		code keyless.ErrorCode
	}{
		{fmt.Errorf("token: %w", ErrUnavailable), keyless.CodeInternal},
		{context.DeadlineExceeded, keyless.CodeInternal},
		{errors.New("mechanism refused"), keyless.CodeCrypto},
		{ErrUnsupported, keyless.CodeCrypto},
	} {
		k.err = tt.err
		_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)})
		wantCode(t, err, tt.code)
		if r := rec.last(t); r.Result != ResultFailed || !strings.Contains(r.Reason, tt.err.Error()) {
			t.Errorf("got record %+v", r)
		}
	}
}

func TestPolicyIsReplacedAtOnce(t *testing.T) {
	s := NewService(ServiceConfig{Registry: testRegistry(t, false), Policy: mustPolicy(t, everything(edgeOne))})
	op := keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)}
	_, err := ask(t, s, op)
	wantCode(t, err, 0)
	s.SetPolicy(mustPolicy(t, everything(edgeTwo)))
	if s.Admits(edgeOne) || !s.Admits(edgeTwo) {
		t.Error("the new policy does not decide who may connect")
	}
	_, err = ask(t, s, op)
	wantCode(t, err, keyless.CodeKeyNotFound)
	s.SetPolicy(nil)
	if s.Admits(edgeTwo) {
		t.Error("no policy admits somebody")
	}
}

// TestRevokedWhileUnderWay has a rule go while an operation waits in the key's home.
func TestRevokedWhileUnderWay(t *testing.T) {
	other := everything(edgeOne)
	other.Keys = []string{"rsa"}
	for name, tt := range map[string]struct {
		rule ClientRule
		want keyless.ErrorCode
	}{"the key is revoked": {other, keyless.CodeKeyNotFound}, "the rules are as they were": {everything(edgeOne), 0}} {
		t.Run(name, func(t *testing.T) {
			var s *Service
			k := script(t, "hsm", func(context.Context) error {
				s.SetPolicy(mustPolicy(t, tt.rule))
				return nil
			})
			reg := NewRegistry()
			if err := reg.Replace([]Home{{Key: k}}); err != nil {
				t.Fatal(err)
			}
			rec := new(recorded)
			s = NewService(ServiceConfig{Registry: reg, Policy: mustPolicy(t, everything(edgeOne)), Recorder: rec})
			sig, err := ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)})
			wantCode(t, err, tt.want)
			if r := rec.last(t); (sig == nil) != (tt.want != 0) || (r.Result == ResultOK) != (tt.want == 0) || r.Home != "hsm" {
				t.Errorf("got signature %q, record %+v", sig, r)
			}
		})
	}
}

func TestRecordsHoldNoMoreThanTheyShow(t *testing.T) {
	rec := new(recorded)
	s := NewService(ServiceConfig{Policy: mustPolicy(t, everything(edgeOne)), Recorder: rec})
	name := strings.Repeat("a", 60000)
	_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), SNI: name, Payload: make([]byte, 32)})
	wantCode(t, err, keyless.CodeKeyNotFound)
	if got := rec.last(t).SNI; len(got) != maxSNI || unsafe.StringData(got) == unsafe.StringData(name) {
		t.Errorf("got a name of %d bytes, which may keep all %d of the request", len(got), len(name))
	}
}

// instantKey signs in no time, so that what is left is the service's own cost.
type instantKey struct{ Key }

func (k instantKey) Sign(context.Context, Algorithm, []byte) ([]byte, error) { return instantSig, nil }

var instantSig = []byte("signature")

func instantService(t testing.TB) (*Service, *keyless.Request) {
	t.Helper()
	reg := NewRegistry()
	if err := reg.Replace([]Home{{Key: instantKey{memoryKey(t, "p256")}}}); err != nil {
		t.Fatal(err)
	}
	s := NewService(ServiceConfig{Registry: reg, Policy: mustPolicy(t, everything(edgeOne))})
	return s, &keyless.Request{Peer: keyless.Peer{ID: edgeOne}, Operation: keyless.Operation{
		Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: skiOf(t, "p256"), SNI: "www.example.com",
		Payload: keyless.AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, tls13Message(32)),
	}}
}

func TestSignPathAllocations(t *testing.T) {
	s, req := instantService(t)
	n := testing.AllocsPerRun(200, func() {
		if _, err := s.Handle(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	})
	// One for the digest, which a backend may hold on to.
	if n > 1 {
		t.Errorf("got %v allocations for a signature, want at most 1", n)
	}
}

func BenchmarkTLSSign(b *testing.B) {
	s, req := instantService(b)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Handle(ctx, req); err != nil {
			b.Fatal(err)
		}
	}
}
