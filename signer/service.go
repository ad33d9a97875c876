package signer

import (
	"context"
	"crypto"
	"errors"
	"strings"
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
	registry   *Registry
	policy     atomic.Pointer[Policy]
	sealer     atomic.Pointer[Sealer]
	recorder   Recorder
	auditor    Auditor
	renew      func(ctx context.Context, id string, csrDER []byte) ([][]byte, error)
	inProgress atomic.Int64
	refusals   refusals
}

// lateCommit is how long a record may take to be kept after the time of its operation is over.
const lateCommit = 2 * time.Second

// NewService returns a service.
func NewService(c ServiceConfig) *Service {
	s := &Service{registry: c.Registry, recorder: c.Recorder, auditor: c.Auditor, renew: c.Renew}
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

// SetPolicy puts a policy in place of the present one; requests that come after it returns are judged by it, and results that are there after
// it returns are kept back if it does not allow them. Nil admits nobody.
func (s *Service) SetPolicy(p *Policy) { s.policy.Store(p) }

// Policy returns the present policy.
func (s *Service) Policy() *Policy { return s.policy.Load() }

// SetSealer puts a sealer in place of the present one. Nil turns sealing off.
func (s *Service) SetSealer(x *Sealer) { s.sealer.Store(x) }

// Admits reports whether the present policy has a rule for the client.
func (s *Service) Admits(id string) bool { return s.policy.Load().Admits(id) }

// InProgress returns how many requests are being served and have yet to hand their record to the auditor.
func (s *Service) InProgress() int { return int(s.inProgress.Load()) }

// A call is one request on its way through a [Service].
type call struct {
	req    *keyless.Request
	op     Op
	alg    Algorithm // of the plain signing opcodes
	policy *Policy   // one for the whole request
	entry  *Entry    // once found
	grant  grant
	rec    Record
}

// A refusal ends an operation: code crosses the wire, the rest goes to the record. The zero value is none.
type refusal struct {
	code   *keyless.Error
	result Result
	cause  Cause
	reason string
}

// Handle implements [keyless.Handler]. Every error it returns is a *[keyless.Error]. A panic of a key goes through it after it was recorded.
func (s *Service) Handle(ctx context.Context, req *keyless.Request) ([]byte, error) {
	c := call{req: req, policy: s.policy.Load(), rec: Record{
		Time: time.Now(), Peer: req.Peer.ID, Addr: req.Peer.Addr, Op: "unknown", SKI: req.SKI,
		SNI: clipped(req.SNI), ClientIP: req.ClientIP, ServerIP: req.ServerIP, Result: ResultOK,
	}}
	if c.op, c.alg = operation(req); c.op != OpNone {
		c.rec.Op = c.op.String()
	}
	if c.policy.Admits(req.Peer.ID) {
		c.rec.client = req.Peer.ID
	}
	if len(req.TraceContext) > 0 || len(req.Context) > 0 {
		span, id := req.Trace()
		if c.rec.RequestID = id; span.IsValid() {
			c.rec.TraceID = span.TraceID().String()
		}
	}
	s.inProgress.Add(1)
	ended := false
	defer func() {
		if !ended { // but panics, on the way to keyless.Server, which logs what it was
			_, _ = s.finish(ctx, &c, nil, refusal{keyless.ErrInternal, ResultFailed, CausePanic, "the operation panicked; the log of this time says where"})
		}
	}()
	payload, no := s.dispatch(ctx, &c)
	ended = true
	return s.finish(ctx, &c, payload, no)
}

// clipped returns as much of a server name as a record holds, without what is behind it: records may wait for long, and in great number.
func clipped(name string) string {
	if len(name) > maxSNI {
		return strings.Clone(name[:maxSNI])
	}
	return name
}

// finish keeps the record, and then lets the result go.
func (s *Service) finish(ctx context.Context, c *call, payload []byte, no refusal) ([]byte, error) {
	if no.code != nil {
		c.rec.Result, c.rec.Cause, c.rec.Reason = no.result, no.cause, no.reason
	}
	c.rec.Duration = time.Since(c.rec.Time)
	s.inProgress.Add(-1)
	if err := s.commit(ctx, c); err != nil {
		clear(payload)
		no.code = keyless.ErrInternal
		c.rec.Result, c.rec.Cause, c.rec.Reason = ResultFailed, CauseAudit, "the answer is withheld, as its record was not kept: "+err.Error()
	}
	s.recorder.Record(c.rec)
	if no.code != nil {
		return nil, no.code
	}
	return payload, nil
}

// commit has the auditor keep a copy of the record, which it owns. A client that is gone, or a time that is over, does not keep the record out; that
// its client is refused time and again does, if no key was used.
func (s *Service) commit(ctx context.Context, c *call) error {
	if s.auditor == nil || c.op == OpNone {
		return nil
	}
	if ctx.Err() != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), lateCommit)
		defer cancel()
	}
	rec := c.rec
	if rec.Result == ResultRefused && rec.Tries == 0 {
		ok, without := s.refusals.admit(rec.client, rec.Time)
		if !ok {
			return nil
		}
		rec.note(without)
	}
	return s.auditor.Commit(ctx, &rec)
}

func (s *Service) dispatch(ctx context.Context, c *call) ([]byte, refusal) {
	switch c.op {
	case OpSign:
		return s.sign(ctx, c)
	case OpTLSSign:
		return s.tlsSign(ctx, c)
	case OpDecrypt:
		return s.decrypt(ctx, c)
	case OpSeal:
		return s.seal(c)
	case OpRenew:
		return s.renewal(ctx, c)
	}
	switch c.req.Opcode {
	case keyless.OpCustom:
		return nil, refusal{keyless.ErrBadOpcode, ResultRefused, CauseOpcode, "unknown function"}
	case keyless.OpRPC:
		return nil, refusal{keyless.ErrInternal, ResultRefused, CauseOpcode, "remote procedure calls are not offered"}
	case keyless.OpPong, keyless.OpResponse, keyless.OpError:
		return nil, refusal{keyless.ErrUnexpectedOpcode, ResultRefused, CauseOpcode, "reply opcode in a request"}
	}
	return nil, refusal{keyless.ErrBadOpcode, ResultRefused, CauseOpcode, "unknown opcode"}
}

// operation returns what the request asks for, OpNone for what no policy can allow, and the algorithm of a plain signing opcode.
func operation(req *keyless.Request) (Op, Algorithm) {
	switch req.Opcode {
	case keyless.OpRSADecrypt, keyless.OpRSADecryptRaw:
		return OpDecrypt, Algorithm{}
	case keyless.OpSeal, keyless.OpUnseal:
		return OpSeal, Algorithm{}
	case keyless.OpCustom:
		switch req.CustomFunc {
		case keyless.FuncTLSSign:
			return OpTLSSign, Algorithm{}
		case keyless.FuncRenew:
			return OpRenew, Algorithm{}
		}
		return OpNone, Algorithm{}
	}
	if alg := opcodeAlgorithms[req.Opcode]; alg.Kind != 0 {
		return OpSign, alg
	}
	return OpNone, Algorithm{}
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
func (s *Service) find(c *call) refusal {
	switch req := c.req; {
	case !req.SKI.IsZero():
		c.entry = s.registry.BySKI(req.SKI)
	case req.Digest != [32]byte{}:
		c.entry = s.registry.ByDigest(req.Digest)
	default:
		return refusal{keyless.ErrFormat, ResultRefused, CauseFormat, "request names no key"}
	}
	if c.entry != nil {
		c.rec.SKI, c.rec.Label, c.rec.key = c.entry.SKI, c.entry.Label(), c.entry
	}
	c.grant = c.policy.grant(c.req.Peer.ID, c.op, c.entry, c.req.SNI)
	switch {
	case c.entry == nil:
		return refusal{keyless.ErrKeyNotFound, ResultRefused, CauseNotFound, "key not found"}
	case c.grant.reason != Allowed:
		return refused(keyless.ErrKeyNotFound, c.grant.reason)
	}
	return refusal{}
}

// refused is a policy's refusal.
func refused(code *keyless.Error, r Reason) refusal {
	return refusal{code, ResultRefused, causes[r], string(r)}
}

// admit is the last word before a key is used, once nothing else speaks against it: a record could be kept, and the rules have something left.
// What it counts is not given back, whatever becomes of the operation.
func (s *Service) admit(c *call, code *keyless.Error, alg Algorithm) refusal {
	if s.auditor != nil {
		if err := s.auditor.Ready(); err != nil {
			return refusal{keyless.ErrInternal, ResultRefused, CauseAudit, "no record could be kept: " + err.Error()}
		}
	}
	if c.grant.limited(c.op, alg) {
		if reason := c.policy.take(c.req.Peer.ID, c.op, c.entry, alg, c.req.SNI); reason != Allowed {
			return refused(code, reason)
		}
	}
	return refusal{}
}

// revoked takes a result back that the policy of now, which may have come while the operation was under way, would not allow any more.
func (s *Service) revoked(c *call, alg Algorithm) refusal {
	now := s.policy.Load()
	if now == c.policy {
		return refusal{}
	}
	entry := c.entry
	if e := s.registry.BySKI(entry.SKI); e != nil {
		entry = e // it may have other labels
	}
	g := now.grant(c.req.Peer.ID, c.op, entry, c.req.SNI)
	reason := g.allows(c.op, alg)
	if reason == Allowed {
		return refusal{}
	}
	return refusal{keyless.ErrKeyNotFound, ResultFailed, causes[reason], "taken back, as the policy was replaced meanwhile: " + string(reason)}
}

// caller says for whom the key is used.
func (c *call) caller() Caller {
	name := c.req.SNI
	for i := range len(name) {
		if 'A' <= name[i] && name[i] <= 'Z' || name[i] == '.' && i == len(name)-1 {
			var buf [maxSNI]byte
			canonical, _ := canonicalSNI(buf[:0], name)
			return Caller{Peer: c.req.Peer.ID, SNI: string(canonical)}
		}
	}
	return Caller{Peer: c.req.Peer.ID, SNI: name}
}

// done notes what became of the operation in the key's homes.
func (c *call) done(o Outcome, err error) refusal {
	c.rec.Home, c.rec.Waited, c.rec.Took, c.rec.Tries, c.rec.Hedged = o.Home, o.Waited, o.Took, o.Tries, o.Hedged
	if p, ok := errors.AsType[*panicked](err); ok {
		panic(p) // Handle records it, keyless.Server logs it
	}
	switch {
	case err == nil:
		return refusal{}
	case errors.Is(err, ErrThrottled):
		return refusal{keyless.ErrInternal, ResultFailed, CauseThrottled, "throttled"}
	case errors.Is(err, ErrOverloaded):
		return refusal{keyless.ErrInternal, ResultRefused, CauseOverloaded, "overloaded"}
	case errors.Is(err, ErrDeadline):
		return refusal{keyless.ErrInternal, ResultRefused, CauseDeadline, "deadline cannot be met"}
	// A client may try another key server after an internal error; a cryptography failure would come again.
	case errors.Is(err, ErrUnavailable):
		return refusal{keyless.ErrInternal, ResultFailed, CauseUnavailable, err.Error()}
	case errors.Is(err, context.DeadlineExceeded):
		return refusal{keyless.ErrInternal, ResultFailed, CauseTimeout, err.Error()}
	case errors.Is(err, context.Canceled):
		return refusal{keyless.ErrInternal, ResultFailed, CauseCanceled, err.Error()}
	}
	return refusal{keyless.ErrCrypto, ResultFailed, CauseBackend, err.Error()}
}
