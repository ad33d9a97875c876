package signer

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"slices"

	"github.com/keyhaven/keyhaven/keyless"
)

// maxCSR is the size above which a certificate request is not looked at.
const maxCSR = 16 << 10

// sign serves the plain opcodes: the payload is a digest, or a message for Ed25519.
func (s *Service) sign(ctx context.Context, c *call) ([]byte, refusal) {
	alg := c.alg
	c.rec.Scheme, c.rec.Hash = alg.String(), sha256.Sum256(c.req.Payload)
	if no := s.find(c); no.code != nil {
		return nil, no
	}
	reason := c.grant.allows(c.op, alg)
	switch {
	case reason != Allowed:
		return nil, refused(keyless.ErrKeyNotFound, reason)
	case !Fits(c.entry.public, alg):
		return nil, refused(keyless.ErrCrypto, RefusedType)
	case alg.Hash != 0 && len(c.req.Payload) != alg.Hash.Size():
		return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, "digest has the wrong length"}
	}
	// A copy, so that a backend that outlives its deadline cannot sign bytes of a later request.
	return s.signed(ctx, c, alg, slices.Clone(c.req.Payload))
}

// tlsSign serves context-bound requests: the payload is all that TLS signs, and the hashing is done here.
func (s *Service) tlsSign(ctx context.Context, c *call) ([]byte, refusal) {
	if len(c.req.Payload) >= 2 {
		c.rec.Hash = sha256.Sum256(c.req.Payload[2:]) // the message, behind the scheme
	}
	if no := s.find(c); no.code != nil {
		return nil, no
	}
	m, err := keyless.ParseTLSSign(c.req.Payload)
	if err != nil {
		return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, err.Error()}
	}
	alg, ok := AlgorithmOf(m.Scheme)
	if !ok {
		return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, "unknown signature scheme"}
	}
	c.rec.Scheme = alg.String()
	if reason := c.grant.allows(c.op, alg); reason != Allowed {
		return nil, refused(keyless.ErrKeyNotFound, reason)
	}
	if err := keyless.CheckScheme(c.entry.public, m.Version, m.Scheme); err != nil {
		return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, err.Error()}
	}
	input := hashed(alg.Hash, m.Message, &c.rec.Hash)
	if input == nil {
		return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, "no such hash in TLS"}
	}
	return s.signed(ctx, c, alg, input)
}

// hashed returns the digest of msg, a copy of msg for hash 0, and nil for a hash that TLS signatures do not use. sum is the SHA-256 of
// msg.
func hashed(h crypto.Hash, msg []byte, sum *[32]byte) []byte {
	switch h {
	case 0:
		return slices.Clone(msg)
	case crypto.SHA256:
		return slices.Clone(sum[:])
	case crypto.SHA384:
		d := sha512.Sum384(msg)
		return d[:]
	case crypto.SHA512:
		d := sha512.Sum512(msg)
		return d[:]
	}
	return nil
}

func (s *Service) signed(ctx context.Context, c *call, alg Algorithm, input []byte) ([]byte, refusal) {
	if no := s.admit(c, keyless.ErrKeyNotFound, alg); no.code != nil {
		return nil, no
	}
	sig, outcome, err := c.entry.Sign(ctx, c.caller(), alg, input)
	return s.outcome(c, alg, sig, outcome, err)
}

// outcome lets a key's result go, unless what allowed it is gone.
func (s *Service) outcome(c *call, alg Algorithm, result []byte, o Outcome, err error) ([]byte, refusal) {
	no := c.done(o, err)
	if no.code == nil {
		no = s.revoked(c, alg)
	}
	if no.code != nil {
		clear(result)
		return nil, no
	}
	return result, refusal{}
}

// decrypt serves raw RSA decryption, which must be allowed on the server, for the key and for the client. The block goes out as it is: nothing here looks at
// padding, so that there is nothing for a client to learn from how long it takes or what comes back.
func (s *Service) decrypt(ctx context.Context, c *call) ([]byte, refusal) {
	c.rec.Hash = sha256.Sum256(c.req.Payload)
	if no := s.find(c); no.code != nil {
		return nil, no
	}
	if reason := c.grant.allows(c.op, Algorithm{}); reason != Allowed {
		return nil, refused(keyless.ErrKeyNotFound, reason)
	}
	if !c.entry.MayDecrypt() {
		return nil, refused(keyless.ErrKeyNotFound, RefusedDecrypt)
	}
	pub, ok := c.entry.public.(*rsa.PublicKey)
	if !ok {
		return nil, refused(keyless.ErrCrypto, RefusedType)
	}
	if len(c.req.Payload) != pub.Size() {
		return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, "ciphertext is not as long as the modulus"}
	}
	if modulus := pub.N.FillBytes(make([]byte, pub.Size())); slices.Compare(c.req.Payload, modulus) >= 0 {
		return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, "ciphertext is not below the modulus"}
	}
	if no := s.admit(c, keyless.ErrKeyNotFound, Algorithm{}); no.code != nil {
		return nil, no
	}
	block, outcome, err := c.entry.DecryptRaw(ctx, c.caller(), slices.Clone(c.req.Payload))
	return s.outcome(c, Algorithm{}, block, outcome, err)
}

// withoutKey reports why an operation that uses no key of the registry is refused. Off and not allowed look the same from outside.
func (s *Service) withoutKey(c *call, off string) refusal {
	c.rec.Hash = sha256.Sum256(c.req.Payload)
	c.grant = c.policy.grant(c.req.Peer.ID, c.op, nil, "")
	switch reason := c.grant.allows(c.op, Algorithm{}); {
	case reason != Allowed:
		return refused(keyless.ErrBadOpcode, reason)
	case off != "":
		return refusal{keyless.ErrBadOpcode, ResultRefused, CauseOff, off}
	}
	return refusal{}
}

// seal serves both directions.
func (s *Service) seal(c *call) ([]byte, refusal) {
	sealer, off := s.sealer.Load(), ""
	if sealer == nil {
		off = "no seal key is configured"
	}
	if no := s.withoutKey(c, off); no.code != nil {
		return nil, no
	}
	if no := s.admit(c, keyless.ErrBadOpcode, Algorithm{}); no.code != nil {
		return nil, no
	}
	if c.req.Opcode == keyless.OpSeal {
		out, err := sealer.Seal(c.req.Peer.ID, c.req.Payload)
		if err != nil {
			return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, err.Error()}
		}
		return out, refusal{}
	}
	out, err := sealer.Unseal(c.req.Peer.ID, c.req.Payload)
	if err != nil {
		return nil, refusal{keyless.ErrCrypto, ResultRefused, CauseFormat, err.Error()}
	}
	return out, refusal{}
}

// renewal serves keyless.FuncRenew: a CSR in, the chain's certificates one after the other out.
func (s *Service) renewal(ctx context.Context, c *call) ([]byte, refusal) {
	off := ""
	if s.renew == nil {
		off = "no authority is configured"
	}
	if no := s.withoutKey(c, off); no.code != nil {
		return nil, no
	}
	if n := len(c.req.Payload); n == 0 || n > maxCSR {
		return nil, refusal{keyless.ErrFormat, ResultRefused, CauseFormat, fmt.Sprintf("certificate request of %d bytes; 1 to %d are looked at", n, maxCSR)}
	}
	if no := s.admit(c, keyless.ErrBadOpcode, Algorithm{}); no.code != nil {
		return nil, no
	}
	chain, err := s.renew(ctx, c.req.Peer.ID, slices.Clone(c.req.Payload))
	if err != nil {
		return nil, refusal{keyless.ErrCrypto, ResultFailed, CauseBackend, err.Error()}
	}
	return slices.Concat(chain...), refusal{}
}
