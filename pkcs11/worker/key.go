package worker

import (
	"bytes"
	"context"
	"crypto"
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
	return k.ask(ctx, now, &request{typ: frameSign, signRequest: signRequest{now.number, alg, input}, description: now.bytes}, "sign with")
}

// DecryptRaw implements [signer.Decrypter].
func (d decrypter) DecryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error) {
	now := d.now.Load()
	r := &request{typ: frameDecrypt, signRequest: signRequest{key: now.number, input: ciphertext}, description: now.bytes}
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
