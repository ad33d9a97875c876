package signer

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// ServiceConfig is what a [Service] works with. The Service keeps no reference to it.
type ServiceConfig struct {
	// Registry finds the keys; nil has none.
	Registry *Registry
	// Policy is the first policy; nil admits nobody. See [Service.SetPolicy].
	Policy *Policy
	// Sealer seals blobs; nil turns sealing off. See [Service.SetSealer].
	Sealer *Sealer
	// Recorder keeps a record of each operation; nil keeps none.
	Recorder Recorder
	// Auditor keeps the records of private-key operations, sealing and renewal, refused ones too, before they are answered; nil keeps none.
	Auditor Auditor
	// Renew issues a certificate for the client's own identity over the public key of the CSR, and returns the chain with the leaf
	// first. It must check the CSR and ignore the names in it. Nil turns renewal off.
	Renew func(ctx context.Context, id string, csrDER []byte) ([][]byte, error)
}

// Service answers requests of keyless clients. It implements [keyless.Handler]; all methods may be called from several goroutines at once.
type Service struct {
	registry *Registry
	policy   atomic.Pointer[Policy]
	sealer   atomic.Pointer[Sealer]
	recorder Recorder
	renew    func(ctx context.Context, id string, csrDER []byte) ([][]byte, error)
}

// maxCSR is the size above which a certificate request is not looked at.
const maxCSR = 16 << 10

// NewService returns a service.
func NewService(c ServiceConfig) *Service {
	s := &Service{registry: c.Registry, recorder: c.Recorder, renew: c.Renew}
	if s.registry == nil {
		s.registry = NewRegistry()
	}
	if s.recorder == nil {
		s.recorder = Recorders(nil)
	}
	s.policy.Store(c.Policy)
	s.sealer.Store(c.Sealer)
	return s
}

// SetPolicy puts a policy in place of the present one; requests that come after it returns are judged by it. Nil admits nobody.
func (s *Service) SetPolicy(p *Policy) { s.policy.Store(p) }

// SetSealer puts a sealer in place of the present one. Nil turns sealing off.
func (s *Service) SetSealer(x *Sealer) { s.sealer.Store(x) }

// Admits reports whether the present policy has a rule for the client.
func (s *Service) Admits(id string) bool { return s.policy.Load().Admits(id) }

// refusal ends an operation: code crosses the wire, reason goes to the record.
type refusal struct {
	code   *keyless.Error
	result Result
	reason string
}

// Handle implements [keyless.Handler]. Every error it returns is a *[keyless.Error].
func (s *Service) Handle(ctx context.Context, req *keyless.Request) ([]byte, error) {
	start := time.Now()
	rec := Record{
		Time: start, Peer: req.Peer.ID, Op: "unknown", SKI: req.SKI,
		SNI: req.SNI[:min(len(req.SNI), maxSNI)], ClientIP: req.ClientIP, Result: ResultOK,
	}
	payload, no := s.dispatch(ctx, req, &rec)
	if no.code != nil {
		rec.Result, rec.Reason = no.result, no.reason
	}
	rec.Duration = time.Since(start)
	s.recorder.Record(rec)
	if no.code != nil {
		return nil, no.code
	}
	return payload, nil
}

func (s *Service) dispatch(ctx context.Context, req *keyless.Request, rec *Record) ([]byte, refusal) {
	switch req.Opcode {
	case keyless.OpRSADecrypt, keyless.OpRSADecryptRaw:
		return s.decrypt(ctx, req, rec)
	case keyless.OpSeal, keyless.OpUnseal:
		return s.seal(req, rec)
	case keyless.OpCustom:
		switch req.CustomFunc {
		case keyless.FuncTLSSign:
			return s.tlsSign(ctx, req, rec)
		case keyless.FuncRenew:
			return s.renewal(ctx, req, rec)
		}
		return nil, refusal{keyless.ErrBadOpcode, ResultRefused, "unknown function"}
	case keyless.OpRPC:
		return nil, refusal{keyless.ErrInternal, ResultRefused, "remote procedure calls are not offered"}
	case keyless.OpPong, keyless.OpResponse, keyless.OpError:
		return nil, refusal{keyless.ErrUnexpectedOpcode, ResultRefused, "reply opcode in a request"}
	}
	if alg := opcodeAlgorithms[req.Opcode]; alg.Kind != 0 {
		return s.sign(ctx, req, rec, alg)
	}
	return nil, refusal{keyless.ErrBadOpcode, ResultRefused, "unknown opcode"}
}

// opcodeAlgorithms holds what each plain signing opcode means.
var opcodeAlgorithms = func() (t [256]Algorithm) {
	for i, h := range []crypto.Hash{crypto.MD5SHA1, crypto.SHA1, crypto.SHA224, crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		t[int(keyless.OpRSASignMD5SHA1)+i] = Algorithm{PKCS1v15, h}
		t[int(keyless.OpECDSASignMD5SHA1)+i] = Algorithm{ECDSA, h}
	}
	t[keyless.OpEd25519Sign] = Algorithm{Ed25519, 0}
	t[keyless.OpRSAPSSSignSHA256] = Algorithm{PSS, crypto.SHA256}
	t[keyless.OpRSAPSSSignSHA384] = Algorithm{PSS, crypto.SHA384}
	t[keyless.OpRSAPSSSignSHA512] = Algorithm{PSS, crypto.SHA512}
	return t
}()

// find looks the key up and asks the policy. All that a client may not know ends in one code.
func (s *Service) find(req *keyless.Request, op Op, rec *Record) (*Entry, schemeSet, refusal) {
	rec.Op = op.String()
	var e *Entry
	switch {
	case !req.SKI.IsZero():
		e = s.registry.BySKI(req.SKI)
	case req.Digest != [32]byte{}:
		e = s.registry.ByDigest(req.Digest)
	default:
		return nil, 0, refusal{keyless.ErrFormat, ResultRefused, "request names no key"}
	}
	if e != nil {
		rec.SKI, rec.Label, rec.Home = e.SKI, e.Label(), e.home
	}
	set, reason := s.policy.Load().grant(req.Peer.ID, op, e, req.SNI)
	switch {
	case e == nil:
		return nil, 0, refusal{keyless.ErrKeyNotFound, ResultRefused, "key not found"}
	case reason != Allowed:
		return nil, 0, refusal{keyless.ErrKeyNotFound, ResultRefused, string(reason)}
	}
	return e, set, refusal{}
}

// sign serves the plain opcodes: the payload is a digest, or a message for Ed25519.
func (s *Service) sign(ctx context.Context, req *keyless.Request, rec *Record, alg Algorithm) ([]byte, refusal) {
	rec.Scheme = alg.String()
	e, set, no := s.find(req, OpSign, rec)
	switch {
	case no.code != nil:
		return nil, no
	case set&alg.bit() == 0:
		return nil, refusal{keyless.ErrKeyNotFound, ResultRefused, string(RefusedScheme)}
	case !Fits(e.public, alg):
		return nil, refusal{keyless.ErrCrypto, ResultRefused, "opcode does not fit the key's type"}
	case alg.Hash != 0 && len(req.Payload) != alg.Hash.Size():
		return nil, refusal{keyless.ErrFormat, ResultRefused, "digest has the wrong length"}
	}
	// A copy, so that a backend that outlives its deadline cannot sign bytes of a later request.
	return s.signed(ctx, req, e, alg, slices.Clone(req.Payload))
}

// tlsSign serves context-bound requests: the payload is all that TLS signs, and the hashing is done here.
func (s *Service) tlsSign(ctx context.Context, req *keyless.Request, rec *Record) ([]byte, refusal) {
	e, set, no := s.find(req, OpTLSSign, rec)
	if no.code != nil {
		return nil, no
	}
	m, err := keyless.ParseTLSSign(req.Payload)
	if err != nil {
		return nil, refusal{keyless.ErrFormat, ResultRefused, err.Error()}
	}
	alg, ok := AlgorithmOf(m.Scheme)
	if !ok {
		return nil, refusal{keyless.ErrFormat, ResultRefused, "unknown signature scheme"}
	}
	rec.Scheme = alg.String()
	switch {
	case set&alg.bit() == 0:
		return nil, refusal{keyless.ErrKeyNotFound, ResultRefused, string(RefusedScheme)}
	}
	if err := keyless.CheckScheme(e.public, m.Version, m.Scheme); err != nil {
		return nil, refusal{keyless.ErrFormat, ResultRefused, err.Error()}
	}
	input := hashed(alg.Hash, m.Message)
	if input == nil {
		return nil, refusal{keyless.ErrFormat, ResultRefused, "no such hash in TLS"}
	}
	return s.signed(ctx, req, e, alg, input)
}

// hashed returns the digest of msg, a copy of msg for hash 0, and nil for a hash that TLS signatures do not use.
func hashed(h crypto.Hash, msg []byte) []byte {
	switch h {
	case 0:
		return slices.Clone(msg)
	case crypto.SHA256:
		d := sha256.Sum256(msg)
		return d[:]
	case crypto.SHA384:
		d := sha512.Sum384(msg)
		return d[:]
	case crypto.SHA512:
		d := sha512.Sum512(msg)
		return d[:]
	}
	return nil
}

func (s *Service) signed(ctx context.Context, req *keyless.Request, e *Entry, alg Algorithm, input []byte) ([]byte, refusal) {
	sig, _, err := e.Sign(ctx, Caller{Peer: req.Peer.ID, SNI: req.SNI}, alg, input)
	if err != nil {
		return nil, failed(err)
	}
	return sig, refusal{}
}

// decrypt serves raw RSA decryption, which must be allowed for the key and for the client.
func (s *Service) decrypt(ctx context.Context, req *keyless.Request, rec *Record) ([]byte, refusal) {
	e, _, no := s.find(req, OpDecrypt, rec)
	if no.code != nil {
		return nil, no
	}
	if !e.MayDecrypt() {
		return nil, refusal{keyless.ErrKeyNotFound, ResultRefused, "decryption is off for this key"}
	}
	pub, ok := e.public.(*rsa.PublicKey)
	if !ok {
		return nil, refusal{keyless.ErrCrypto, ResultRefused, "opcode does not fit the key's type"}
	}
	if len(req.Payload) != pub.Size() {
		return nil, refusal{keyless.ErrFormat, ResultRefused, "ciphertext is not as long as the modulus"}
	}
	if modulus := pub.N.FillBytes(make([]byte, pub.Size())); slices.Compare(req.Payload, modulus) >= 0 {
		return nil, refusal{keyless.ErrFormat, ResultRefused, "ciphertext is not below the modulus"}
	}
	block, _, err := e.DecryptRaw(ctx, Caller{Peer: req.Peer.ID, SNI: req.SNI}, slices.Clone(req.Payload))
	if err != nil {
		return nil, failed(err)
	}
	return block, refusal{}
}

// seal serves both directions. Off and not allowed look the same from outside.
func (s *Service) seal(req *keyless.Request, rec *Record) ([]byte, refusal) {
	rec.Op = OpSeal.String()
	if _, reason := s.policy.Load().grant(req.Peer.ID, OpSeal, nil, ""); reason != Allowed {
		return nil, refusal{keyless.ErrBadOpcode, ResultRefused, string(reason)}
	}
	sealer := s.sealer.Load()
	if sealer == nil {
		return nil, refusal{keyless.ErrBadOpcode, ResultRefused, "no seal key is configured"}
	}
	if req.Opcode == keyless.OpSeal {
		out, err := sealer.Seal(req.Peer.ID, req.Payload)
		if err != nil {
			return nil, refusal{keyless.ErrFormat, ResultRefused, err.Error()}
		}
		return out, refusal{}
	}
	out, err := sealer.Unseal(req.Peer.ID, req.Payload)
	if err != nil {
		return nil, refusal{keyless.ErrCrypto, ResultRefused, err.Error()}
	}
	return out, refusal{}
}

// renewal serves keyless.FuncRenew: a CSR in, the chain's certificates one after the other out.
func (s *Service) renewal(ctx context.Context, req *keyless.Request, rec *Record) ([]byte, refusal) {
	rec.Op = OpRenew.String()
	if _, reason := s.policy.Load().grant(req.Peer.ID, OpRenew, nil, ""); reason != Allowed {
		return nil, refusal{keyless.ErrBadOpcode, ResultRefused, string(reason)}
	}
	if s.renew == nil {
		return nil, refusal{keyless.ErrBadOpcode, ResultRefused, "no authority is configured"}
	}
	if len(req.Payload) == 0 || len(req.Payload) > maxCSR {
		return nil, refusal{keyless.ErrFormat, ResultRefused, fmt.Sprintf("certificate request of %d bytes; 1 to %d are looked at", len(req.Payload), maxCSR)}
	}
	chain, err := s.renew(ctx, req.Peer.ID, slices.Clone(req.Payload))
	if err != nil {
		return nil, refusal{keyless.ErrCrypto, ResultFailed, err.Error()}
	}
	return slices.Concat(chain...), refusal{}
}

// failed maps a backend's error. A client may try another key server on an internal error; a cryptography failure would come again.
func failed(err error) refusal {
	code := keyless.ErrCrypto
	if errors.Is(err, ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		code = keyless.ErrInternal
	}
	return refusal{code, ResultFailed, err.Error()}
}
