package signer

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/keyless"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	edgeOne = "spiffe://keys.example/edge/one"
	edgeTwo = "spiffe://keys.example/edge/two"
)

// testKeys makes one key of each type, once.
var testKeys = sync.OnceValue(func() map[string]crypto.Signer {
	keys := map[string]crypto.Signer{}
	for label, curve := range map[string]elliptic.Curve{"p256": elliptic.P256(), "p384": elliptic.P384(), "p521": elliptic.P521()} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			panic(err)
		}
		keys[label] = k
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	keys["rsa"] = r
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	keys["ed"] = ed
	return keys
})

// memoryKey returns the test key of that label as a Key.
func memoryKey(t testing.TB, label string) Key {
	t.Helper()
	k, err := NewMemoryKey(testKeys()[label], label)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// testRegistry holds every test key under its label; "rsa" may decrypt if decrypt is set.
func testRegistry(t testing.TB, decrypt bool) *Registry {
	t.Helper()
	var homes []Home
	for label := range testKeys() {
		homes = append(homes, Home{Key: memoryKey(t, label), Decrypt: decrypt})
	}
	r := NewRegistry()
	if err := r.Replace(homes); err != nil {
		t.Fatal(err)
	}
	return r
}

func skiOf(t testing.TB, label string) keyless.SKI {
	t.Helper()
	ski, err := keyless.SKIOf(testKeys()[label].Public())
	if err != nil {
		t.Fatal(err)
	}
	return ski
}

func mustPolicy(t testing.TB, rules ...ClientRule) *Policy {
	t.Helper()
	p, err := NewPolicy(rules, Options{Legacy: Legacy{SHA1: true, MD5SHA1: true, Decrypt: true}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// everything allows one client all there is.
func everything(id string) ClientRule {
	return ClientRule{ID: id, Keys: []string{"*"}, Operations: opNames[1:], Schemes: allSchemes(), SNIs: []string{"*"}}
}

func allSchemes() []string {
	names := make([]string, len(schemes))
	for i := range schemes {
		names[i] = schemes[i].name
	}
	return names
}

// recorded keeps records in memory.
type recorded struct {
	mu   sync.Mutex
	list []Record
}

func (r *recorded) Record(x Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, x)
}

func (r *recorded) last(t *testing.T) Record {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.list) == 0 {
		t.Fatal("no record was written")
	}
	return r.list[len(r.list)-1]
}

// tls13Message is what a TLS 1.3 server signs.
func tls13Message(hashLen int) []byte {
	msg := make([]byte, 0, 256)
	for range 64 {
		msg = append(msg, ' ')
	}
	msg = append(msg, "TLS 1.3, server CertificateVerify\x00"...)
	transcript := make([]byte, hashLen)
	rand.Read(transcript)
	return append(msg, transcript...)
}

// tls12Message is what a TLS 1.2 server signs for an ECDHE key exchange on X25519.
func tls12Message(t testing.TB) []byte {
	t.Helper()
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	msg := make([]byte, 64)
	rand.Read(msg)
	msg = append(msg, 3, byte(tls.X25519>>8), byte(tls.X25519), 32)
	return append(msg, k.PublicKey().Bytes()...)
}

// faultyKey is a Key whose answers the test decides.
type faultyKey struct {
	Key
	home    string
	healthy bool
	err     error
	calls   int
}

func (k *faultyKey) Info() KeyInfo {
	info := k.Key.Info()
	info.Home = k.home
	return info
}
func (k *faultyKey) Healthy() bool { return k.healthy }
func (k *faultyKey) Sign(ctx context.Context, alg Algorithm, input []byte) ([]byte, error) {
	k.calls++
	if k.err != nil {
		return nil, k.err
	}
	return k.Key.Sign(ctx, alg, input)
}
func (k *faultyKey) DecryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error) {
	k.calls++
	if k.err != nil {
		return nil, k.err
	}
	return k.Key.(Decrypter).DecryptRaw(ctx, ciphertext)
}
