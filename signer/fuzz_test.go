package signer

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"errors"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
)

// FuzzService is a client with a good certificate and a narrow rule that sends whatever it likes. It must never get a signature that is not a TLS
// handshake's, and never an error without a code.
func FuzzService(f *testing.F) {
	rec := &recorded{}
	keys := testRegistry(f, true)
	s := NewService(ServiceConfig{
		Registry: keys, Recorder: Recorders{rec}, Sealer: mustSealer(f, sealKeyA),
		Policy: mustPolicy(f, ClientRule{ID: edgeOne, Keys: []string{"p256", "rsa", "ed"}, Operations: []string{"tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"*.example.com"}}),
	})
	labels := []string{"p256", "rsa", "ed", "p384"}
	for i, scheme := range []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256, tls.PSSWithSHA256, tls.Ed25519, tls.ECDSAWithP384AndSHA384} {
		f.Add(byte(keyless.OpCustom), keyless.FuncTLSSign, byte(i), "www.example.com", keyless.AppendTLSSign(nil, scheme, tls13Message(32)))
		f.Add(byte(keyless.OpCustom), keyless.FuncTLSSign, byte(i), "www.example.com", keyless.AppendTLSSign(nil, scheme, tls12Message(f)))
	}
	f.Add(byte(keyless.OpECDSASignSHA256), "", byte(0), "www.example.com", make([]byte, 32))
	f.Add(byte(keyless.OpRSADecrypt), "", byte(1), "www.example.com", make([]byte, 256))
	f.Add(byte(keyless.OpSeal), "", byte(1), "", []byte("blob"))
	f.Fuzz(func(t *testing.T, op byte, fn string, which byte, sni string, payload []byte) {
		label := labels[int(which)%len(labels)]
		rec.list = rec.list[:0]
		got, err := ask(t, s, keyless.Operation{Opcode: keyless.Opcode(op), CustomFunc: fn, SKI: skiOf(t, label), SNI: sni, Payload: payload})
		if len(rec.list) != 1 {
			t.Fatalf("got %d records, want one", len(rec.list))
		}
		if err != nil {
			var ke *keyless.Error
			if !errors.As(err, &ke) || got != nil {
				t.Errorf("got %x and error %v", got, err)
			}
			return
		}
		m, err := keyless.ParseTLSSign(payload)
		if err != nil || op != byte(keyless.OpCustom) || fn != keyless.FuncTLSSign || label == "p384" {
			t.Fatalf("opcode %#x, function %q, key %s: signed what is no TLS handshake", op, fn, label)
		}
		if err := keyless.VerifyTLS(testKeys()[label].Public(), m.Scheme, m.Message, got); err != nil {
			t.Error(err)
		}
	})
}

// FuzzPlain is a client that may use the plain opcodes: only digests of the right length go to a key of the right type.
func FuzzPlain(f *testing.F) {
	s := NewService(ServiceConfig{Registry: testRegistry(f, true), Policy: mustPolicy(f, everything(edgeOne))})
	labels := []string{"p256", "rsa", "ed"}
	f.Add(byte(keyless.OpECDSASignSHA256), byte(0), make([]byte, 32))
	f.Add(byte(keyless.OpRSAPSSSignSHA512), byte(1), make([]byte, 64))
	f.Add(byte(keyless.OpEd25519Sign), byte(2), []byte("message"))
	f.Fuzz(func(t *testing.T, code, which byte, payload []byte) {
		op := keyless.Opcode(code)
		label := labels[int(which)%len(labels)]
		_, err := ask(t, s, keyless.Operation{Opcode: op, SKI: skiOf(t, label), Payload: payload})
		if err != nil || !op.IsSign() {
			return
		}
		alg := opcodeAlgorithms[op]
		fits := false
		switch testKeys()[label].(type) {
		case *ecdsa.PrivateKey:
			fits = alg.Kind == ECDSA
		case *rsa.PrivateKey:
			fits = alg.Kind == PKCS1v15 || alg.Kind == PSS
		default:
			fits = alg.Kind == Ed25519
		}
		if !fits || alg.Hash != 0 && len(payload) != alg.Hash.Size() {
			t.Errorf("%v with %d bytes was signed by %s", op, len(payload), label)
		}
	})
}
