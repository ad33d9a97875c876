package worker

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// key is a key of the token. It stays the same while workers, and what is known of the key, change.
type key struct {
	p   *Pool
	pub crypto.PublicKey
	now atomic.Pointer[knowledge]
}

// knowledge is what the last discovery found out about a key.
type knowledge struct {
	number     uint32 // what workers call it
	info       signer.KeyInfo
	algorithms []signer.Algorithm
	decrypt    bool
	bytes      []byte // the description as workers read it
}

// decrypter is a key that may decrypt.
type decrypter struct{ *key }

var (
	_ signer.Key       = (*key)(nil)
	_ signer.Healther  = (*key)(nil)
	_ signer.Decrypter = decrypter{}
	_ signer.Backend   = (*Pool)(nil)
	_ signer.Capacitor = (*Pool)(nil)
)

// Keys returns the keys that can be used now, as pkcs11.Token.Keys does. They stay valid while workers come and go.
func (p *Pool) Keys(ctx context.Context) ([]signer.Key, error) {
	_, listed, err := p.do(ctx, &request{typ: frameList})
	if err != nil {
		return nil, named(err)
	}
	all := make([]signer.Key, 0, len(listed))
	for _, b := range listed {
		d, err := pkcs11.ParseDescription(b)
		if err != nil {
			return nil, named(fmt.Errorf("list keys of %s: %w", p.name, err))
		}
		k := p.learn(d, b)
		if d.Decrypt {
			all = append(all, decrypter{k})
		} else {
			all = append(all, k)
		}
	}
	return all, nil
}

// learn returns the key of a description. A key known from before is kept, with what is new about it.
func (p *Pool) learn(d *pkcs11.Description, b []byte) *key {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := p.keys[d.Info.SKI]
	if k == nil {
		k = &key{p: p, pub: d.Public}
		p.keys[d.Info.SKI] = k
	} else if bytes.Equal(k.now.Load().bytes, b) {
		return k
	}
	d.Info.Home = p.name // whatever the worker calls it
	p.numbers++
	k.now.Store(&knowledge{number: p.numbers, info: d.Info, algorithms: d.Algorithms, decrypt: d.Decrypt, bytes: b})
	return k
}

// Public implements [signer.Key].
func (k *key) Public() crypto.PublicKey { return k.pub }

// Info implements [signer.Key].
func (k *key) Info() signer.KeyInfo {
	info := k.now.Load().info
	info.ID = bytes.Clone(info.ID)
	return info
}

// Supports implements [signer.Key]: it reports what the self-test at discovery found to work.
func (k *key) Supports(alg signer.Algorithm) bool {
	return slices.Contains(k.now.Load().algorithms, alg)
}

// Healthy implements [signer.Healther]: it reports whether a worker is ready.
func (k *key) Healthy() bool { return len(*k.p.ready.Load()) > 0 }

// Sign implements [signer.Key]. It waits for a worker until ctx ends; what a worker has begun, nothing can stop.
func (k *key) Sign(ctx context.Context, alg signer.Algorithm, input []byte) ([]byte, error) {
	now := k.now.Load()
	if !slices.Contains(now.algorithms, alg) {
		return nil, k.fault(now, "sign with", fmt.Errorf("%w: %v with %v", pkcs11.ErrUnsupported, alg.Kind, alg.Hash))
	}
	r := &request{typ: frameSign, signRequest: signRequest{now.number, alg, input}, description: now.bytes, of: k}
	return k.ask(ctx, now, r, "sign with")
}

// admits reports whether a result has the form of a signature, or of a decrypted block. Whether a signature is right, the client
// that asked for it verifies.
func (k *key) admits(typ frameType, result []byte) bool {
	switch pub := k.pub.(type) {
	case *rsa.PublicKey:
		return len(result) == pub.Size()
	case *ecdsa.PublicKey:
		return typ == frameSign && isPair(result, (pub.Curve.Params().BitSize+7)/8)
	}
	return typ == frameSign && len(result) == ed25519.SignatureSize
}

// isPair reports whether b is the DER form of a sequence of two positive integers of at most size bytes, as in RFC 3279 section 2.2.3.
func isPair(b []byte, size int) bool {
	head := 2
	if len(b) > 2 && b[1] == 0x81 {
		head = 3
	}
	if len(b) < head || b[0] != 0x30 || int(b[head-1]) != len(b)-head || head == 2 && b[1] > 0x7f {
		return false
	}
	b = b[head:]
	for range 2 {
		if len(b) < 3 || b[0] != 0x02 || b[1] == 0 || b[2] > 0x7f {
			return false
		}
		n := int(b[1])
		if n > size+1 || n > len(b)-2 {
			return false
		}
		b = b[2+n:]
	}
	return len(b) == 0
}

// DecryptRaw implements [signer.Decrypter].
func (d decrypter) DecryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error) {
	now := d.now.Load()
	r := &request{typ: frameDecrypt, signRequest: signRequest{key: now.number, input: ciphertext}, description: now.bytes, of: d.key}
	return d.ask(ctx, now, r, "decrypt with")
}

func (k *key) ask(ctx context.Context, now *knowledge, r *request, what string) ([]byte, error) {
	if len(r.input) > maxInput {
		return nil, k.fault(now, what, fmt.Errorf("%w: %d bytes, %d can be", pkcs11.ErrInput, len(r.input), maxInput))
	}
	out, _, err := k.p.do(ctx, r)
	if err != nil {
		return nil, k.fault(now, what, err)
	}
	return out, nil
}

// fault names the key, unless the worker has.
func (k *key) fault(now *knowledge, what string, err error) error {
	var remote *remoteError
	if errors.As(err, &remote) && remote == err {
		return named(err)
	}
	return named(fmt.Errorf("%s key %q: %w", what, now.info.Label, err))
}
