package transit

import (
	"context"
	"crypto"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/keyhaven/keyhaven/signer"
)

// checkEvery is how often a signature is verified here. Who asked for it verifies each; this one is to notice, and to leave the key to another
// home, when someone deleted it and made another by its name.
const checkEvery = time.Second

// illFor is how long a key that the engine denied or lost is passed over for another home.
const illFor = 2 * time.Second

// key is one version of a Transit key.
type key struct {
	b       *Backend
	keyName string
	version int
	pub     crypto.PublicKey
	info    signer.KeyInfo
	ill     atomic.Int64 // Unix nanoseconds until which the key is passed over
	checked atomic.Int64 // Unix nanoseconds at which a signature was last found right
	groups  map[signer.Algorithm]*group
}

// newKey makes a key. Its queues are made here, one for each algorithm, so that signing looks them up without a lock.
func newKey(b *Backend, name string, version int, pub crypto.PublicKey, info signer.KeyInfo) *key {
	k := &key{b: b, keyName: name, version: version, pub: pub, info: info, groups: map[signer.Algorithm]*group{}}
	if _, isRSA := pub.(*rsa.PublicKey); isRSA || b.cfg.Batch == 1 {
		return k
	}
	for h := range hashNames {
		if alg := (signer.Algorithm{Kind: signer.ECDSA, Hash: h}); k.Supports(alg) {
			k.groups[alg] = &group{k: k, alg: alg}
		}
	}
	if alg := (signer.Algorithm{Kind: signer.Ed25519}); k.Supports(alg) {
		k.groups[alg] = &group{k: k, alg: alg}
	}
	return k
}

// hashNames are the engine's names of hashes. MD5SHA1 has none.
var hashNames = map[crypto.Hash]string{
	crypto.SHA1: "sha1", crypto.SHA224: "sha2-224", crypto.SHA256: "sha2-256", crypto.SHA384: "sha2-384", crypto.SHA512: "sha2-512",
}

// Public returns the public key.
func (k *key) Public() crypto.PublicKey { return k.pub }

// Info describes the key.
func (k *key) Info() signer.KeyInfo { return k.info }

// Supports reports whether the engine can sign so.
func (k *key) Supports(alg signer.Algorithm) bool {
	if !signer.Fits(k.pub, alg) {
		return false
	}
	_, known := hashNames[alg.Hash]
	return known || alg.Kind == signer.Ed25519
}

// Healthy reports whether there is a login and the engine did not deny the key a moment ago.
func (k *key) Healthy() bool {
	return k.b.session.healthy() && time.Now().UnixNano() >= k.ill.Load()
}

// Sign signs input. Its errors are those of [signer.Key]; that the engine denied the key is ErrPermission as well, that it has it no
// more signer.ErrNotFound.
func (k *key) Sign(ctx context.Context, alg signer.Algorithm, input []byte) ([]byte, error) {
	if !k.Supports(alg) {
		return nil, fmt.Errorf("transit: key %q version %d: %w", k.keyName, k.version, signer.ErrUnsupported)
	}
	if alg.Hash != 0 && len(input) != alg.Hash.Size() {
		return nil, fmt.Errorf("transit: key %q: digest of %d bytes, %s has %d", k.keyName, len(input), alg.Hash, alg.Hash.Size())
	}
	if g := k.groups[alg]; g != nil && !k.b.single.Load() {
		return g.sign(ctx, input)
	}
	return k.signOne(ctx, alg, input)
}

// signOne signs with a request of its own.
func (k *key) signOne(ctx context.Context, alg signer.Algorithm, input []byte) ([]byte, error) {
	if err := k.b.enter(ctx); err != nil {
		return nil, err
	}
	defer k.b.leave()
	return k.request(ctx, alg, input)
}

// request signs one input. The caller holds a slot.
func (k *key) request(ctx context.Context, alg signer.Algorithm, input []byte) ([]byte, error) {
	r := k.parameters(alg)
	r.Input = input
	a, err := k.post(ctx, &r)
	if err != nil {
		return nil, err
	}
	sig, err := decodeSingle(a.body, k.pub, k.version)
	if err != nil {
		return nil, k.wrong(err)
	}
	if err := k.check(alg, input, sig); err != nil {
		return nil, err
	}
	return sig, nil
}

// check verifies a signature if the last one that was right is a while ago.
func (k *key) check(alg signer.Algorithm, input, sig []byte) error {
	now := time.Now()
	if now.UnixNano()-k.checked.Load() < int64(checkEvery) {
		return nil
	}
	if !verifies(k.pub, alg, input, sig) {
		err := &fault{
			text: fmt.Sprintf("transit: sign with key %q version %d at %s: the signature is another key's: if the key was deleted and made anew, reload",
				k.keyName, k.version, k.b.name),
			classes: []error{signer.ErrNotFound, signer.ErrUnavailable},
		}
		k.note(err)
		return err
	}
	k.checked.Store(now.UnixNano())
	return nil
}

// parameters returns the request without its input.
func (k *key) parameters(alg signer.Algorithm) signRequest {
	r := signRequest{KeyVersion: k.version}
	switch alg.Kind {
	case signer.PKCS1v15:
		r.Signature = "pkcs1v15"
	case signer.PSS:
		// The engine's default is the longest salt, which TLS does not allow (RFC 8446 section 4.2.3).
		r.Signature, r.Salt = "pss", "hash"
	case signer.ECDSA:
		r.Marshalling = "asn1"
	case signer.Ed25519:
		return r
	}
	r.Prehashed, r.Hash = true, hashNames[alg.Hash]
	return r
}

func (k *key) post(ctx context.Context, r *signRequest) (*answer, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("transit: %w", err)
	}
	path := k.b.cfg.Mount + "/sign/" + k.keyName
	a, err := k.b.ask(ctx, fmt.Sprintf("sign with key %q version %d", k.keyName, k.version), k.b.policyFor(k.keyName),
		func(ctx context.Context, l *api.Logical) (*api.Response, error) {
			return l.WriteRawWithContext(ctx, path, body)
		})
	k.note(err)
	return a, err
}

// note remembers that the engine denied the key or has it no more.
func (k *key) note(err error) {
	if errors.Is(err, ErrPermission) || errors.Is(err, signer.ErrNotFound) {
		k.ill.Store(time.Now().Add(illFor).UnixNano())
	}
}

// wrong says that the engine's answer is not what it must be. Another home may do better.
func (k *key) wrong(err error) error {
	return unavailable("sign with key %q version %d at %s: wrong answer: %w", k.keyName, k.version, k.b.name, err)
}

// policyFor returns what a policy must hold for a key to be served.
func (b *Backend) policyFor(name string) string {
	return fmt.Sprintf(`the login's policy must hold: path "%[1]s/keys/%[2]s" { capabilities = ["read"] } path "%[1]s/sign/%[2]s" { capabilities = ["update"] }`,
		b.cfg.Mount, name)
}

// denied says that a new login is denied what the one before was.
func (b *Backend) denied(doing, hint string) error {
	return &fault{
		text:    fmt.Sprintf("transit: %s at %s: permission denied, also after a new login: %s", doing, b.name, hint),
		classes: []error{ErrPermission, signer.ErrUnavailable},
	}
}

// typeOf names what a key of a Transit type is, as [signer.TypeOf] does. Other types are not served.
var typeOf = map[string]string{
	"rsa-2048": "RSA 2048", "rsa-3072": "RSA 3072", "rsa-4096": "RSA 4096",
	"ecdsa-p256": "ECDSA P-256", "ecdsa-p384": "ECDSA P-384", "ecdsa-p521": "ECDSA P-521",
	"ed25519": "Ed25519",
}
