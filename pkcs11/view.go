package pkcs11

import (
	"context"
	"crypto"
	"crypto/rsa"
	"fmt"
	"io"

	"github.com/keyhaven/keyhaven/signer"
)

// Signer returns the key as a [crypto.Signer] whose signatures are bound to ctx, for certificate requests and the like. Only
// what the key supports is signed; RSA-PSS with a salt as long as the hash, or with the length left to the signer.
func Signer(ctx context.Context, k signer.Key) crypto.Signer { return view{ctx, k} }

type view struct {
	ctx context.Context
	key signer.Key
}

// Public implements [crypto.Signer].
func (v view) Public() crypto.PublicKey { return v.key.Public() }

// Sign implements [crypto.Signer]. The token makes its own randomness.
func (v view) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	alg := probeAlgorithm(v.key.Public())
	alg.Hash = opts.HashFunc()
	if pss, ok := opts.(*rsa.PSSOptions); ok && alg.Kind == signer.PKCS1v15 {
		if n := pss.SaltLength; n != rsa.PSSSaltLengthEqualsHash && n != rsa.PSSSaltLengthAuto && n != alg.Hash.Size() {
			return nil, fmt.Errorf("%w: a PSS salt of %d bytes; only the hash's length is used", ErrUnsupported, n)
		}
		alg.Kind = signer.PSS
	}
	return v.key.Sign(v.ctx, alg, digest)
}
