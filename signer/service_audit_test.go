package signer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/keyhaven/keyhaven/keyless"
)

// auditor keeps records in memory and fails when told to.
type auditor struct {
	mu       sync.Mutex
	ready    error
	commit   error
	hold     chan struct{} // if not nil, Commit waits for it
	list     []*Record
	canceled int // contexts that were over
}

func (a *auditor) Ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ready
}

func (a *auditor) Commit(ctx context.Context, r *Record) error {
	if a.hold != nil {
		<-a.hold
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.list = append(a.list, r)
	if ctx.Err() != nil {
		a.canceled++
	}
	return a.commit
}

func (a *auditor) last(t testing.TB) Record {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.list) == 0 {
		t.Fatal("no record was committed")
	}
	return *a.list[len(a.list)-1]
}

// countingKey counts what reaches it, and keeps what it returns.
type countingKey struct {
	Key
	calls    int
	returned []byte
	panics   bool
}

func (k *countingKey) Sign(ctx context.Context, alg Algorithm, input []byte) ([]byte, error) {
	k.calls++
	if k.panics {
		panic("the backend's secret")
	}
	sig, err := k.Key.Sign(ctx, alg, input)
	k.returned = sig
	return sig, err
}

func (k *countingKey) DecryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error) {
	k.calls++
	return k.Key.(Decrypter).DecryptRaw(ctx, ciphertext)
}

// audited is a service with an auditor and one key, p256.
func audited(t testing.TB, rules ...ClientRule) (*Service, *auditor, *countingKey, *recorded) {
	t.Helper()
	key, a, rec := &countingKey{Key: memoryKey(t, "p256")}, &auditor{}, &recorded{}
	reg := NewRegistry()
	if err := reg.Replace([]Home{{Key: key}}); err != nil {
		t.Fatal(err)
	}
	if len(rules) == 0 {
		rules = []ClientRule{everything(edgeOne)}
	}
	return NewService(ServiceConfig{Registry: reg, Policy: mustPolicy(t, rules...), Recorder: rec, Auditor: a, Sealer: mustSealer(t, sealKeyA),
		Renew: func(context.Context, string, []byte) ([][]byte, error) { return [][]byte{[]byte("chain")}, nil }}), a, key, rec
}

func TestAuditRecords(t *testing.T) {
	s, a, _, rec := audited(t)
	ski := skiOf(t, "p256")
	tlsPayload := keyless.AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, tls13Message(32))
	digest := sha256.Sum256([]byte("digest"))
	sealed, err := ask(t, s, keyless.Operation{Opcode: keyless.OpSeal, Payload: []byte("state")})
	wantCode(t, err, 0)
	tests := []struct {
		name   string
		op     keyless.Operation
		word   string // "" if nothing is kept
		result Result
		hashed []byte
	}{
		{"tls-sign", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: ski, Payload: tlsPayload}, "tls-sign", ResultOK, tlsPayload[2:]},
		{"tls-sign, other message", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: ski, Payload: []byte{4, 3, 'x'}}, "tls-sign", ResultRefused, []byte("x")},
		{"tls-sign, other key", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: keyless.SKI{1}, Payload: tlsPayload}, "tls-sign", ResultRefused, tlsPayload[2:]},
		{"sign", keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: ski, Payload: digest[:]}, "sign", ResultOK, digest[:]},
		{"sign, not allowed", keyless.Operation{Opcode: keyless.OpRSASignSHA256, SKI: ski, Payload: digest[:]}, "sign", ResultRefused, digest[:]},
		{"decrypt, not allowed", keyless.Operation{Opcode: keyless.OpRSADecrypt, SKI: ski, Payload: []byte("c")}, "decrypt", ResultRefused, []byte("c")},
		{"seal", keyless.Operation{Opcode: keyless.OpSeal, Payload: []byte("state")}, "seal", ResultOK, []byte("state")},
		{"unseal", keyless.Operation{Opcode: keyless.OpUnseal, Payload: sealed}, "seal", ResultOK, sealed},
		{"renew", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: []byte("csr")}, "renew", ResultOK, []byte("csr")},
		{"unknown function", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: "x"}, "", ResultRefused, nil},
		{"unknown opcode", keyless.Operation{Opcode: 0x99}, "", ResultRefused, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := len(a.list)
			op := tt.op
			op.SNI, op.ClientIP, op.ServerIP = "www.example.com", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::2")
			op.Context = []byte(`{"request_id":"r-7","traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`)
			addr := netip.MustParseAddrPort("198.51.100.3:4711")
			_, err := s.Handle(t.Context(), &keyless.Request{Operation: op, Peer: keyless.Peer{ID: edgeOne, Addr: addr}})
			if (err == nil) != (tt.result == ResultOK) {
				t.Fatalf("got error %v", err)
			}
			if tt.word == "" {
				if len(a.list) != before || rec.last(t).Op != "unknown" {
					t.Errorf("got %d records, and %+v", len(a.list)-before, rec.last(t))
				}
				return
			}
			if len(a.list) != before+1 {
				t.Fatalf("got %d records, want one", len(a.list)-before)
			}
			r := a.last(t)
			if r.Op != tt.word || r.Result != tt.result || r.Hash != sha256.Sum256(tt.hashed) || (r.Reason == "") != (tt.result == ResultOK) || (r.Cause == "") != (tt.result == ResultOK) {
				t.Errorf("got %+v", r)
			}
			if r.Peer != edgeOne || r.Addr != addr || r.ServerIP != op.ServerIP || r.ClientIP != op.ClientIP || r.SNI != op.SNI || r.Duration <= 0 ||
				r.TraceID != "0af7651916cd43dd8448eb211c80319c" || r.RequestID != "r-7" {
				t.Errorf("got %+v", r)
			}
			usedKey := tt.result == ResultOK && (tt.word == "sign" || tt.word == "tls-sign")
			if (r.Home == "memory") != usedKey || (r.Tries > 0) != usedKey {
				t.Errorf("got home %q, %d tries", r.Home, r.Tries)
			}
		})
	}
}

// TestAuditMustBeReady holds that no key is used, and nothing counted, while no record could be kept.
func TestAuditMustBeReady(t *testing.T) {
	rule := everything(edgeOne)
	rule.Rate = "2/h burst 2"
	s, a, key, rec := audited(t, rule)
	a.ready = errors.New("no space left on /var/lib/x")
	ops := []keyless.Operation{
		{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)},
		{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: skiOf(t, "p256"), Payload: keyless.AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, tls13Message(32))},
		{Opcode: keyless.OpSeal, Payload: []byte("x")},
		{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: []byte("csr")},
	}
	for _, op := range ops {
		got, err := ask(t, s, op)
		wantCode(t, err, keyless.CodeInternal)
		r := rec.last(t)
		if got != nil || key.calls != 0 || r.Result != ResultRefused || r.Cause != CauseAudit || !strings.Contains(r.Reason, "no space left") {
			t.Errorf("%v: got %q, %d calls, record %+v", op.Opcode, got, key.calls, r)
		}
		if c := a.last(t); c.Cause != CauseAudit {
			t.Errorf("%v: committed %+v", op.Opcode, c)
		}
	}
	a.ready = nil
	for range 2 {
		_, err := ask(t, s, ops[0])
		wantCode(t, err, 0)
	}
	_, err := ask(t, s, ops[0])
	wantCode(t, err, keyless.CodeKeyNotFound)
	if r := rec.last(t); r.Cause != CauseRate || r.Reason != string(RefusedRate) {
		t.Errorf("got %+v, want a rate that was used up by the two signatures alone", r)
	}
}

// TestAuditWithholds holds that an answer without a record does not leave, and that its bytes are gone.
func TestAuditWithholds(t *testing.T) {
	s, a, key, rec := audited(t)
	a.commit = errors.New("disk is gone")
	got, err := ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)})
	wantCode(t, err, keyless.CodeInternal)
	if got != nil || key.calls != 1 || len(key.returned) == 0 || slices.Max(key.returned) != 0 {
		t.Errorf("got %x; the key was asked %d times and its signature is now %x", got, key.calls, key.returned)
	}
	if r := rec.last(t); r.Result != ResultFailed || r.Cause != CauseAudit || !strings.Contains(r.Reason, "disk is gone") {
		t.Errorf("got %+v", r)
	}
	if r := a.last(t); r.Result != ResultOK {
		t.Errorf("the auditor was told %+v, want what the key did", r)
	}
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: keyless.SKI{1}, Payload: make([]byte, 32)})
	wantCode(t, err, keyless.CodeInternal)
	_, err = ask(t, s, keyless.Operation{Opcode: 0x99})
	wantCode(t, err, keyless.CodeBadOpcode)
}

// TestAuditBeforeAnswer holds the answer until the record is kept.
func TestAuditBeforeAnswer(t *testing.T) {
	s, a, _, rec := audited(t)
	a.hold = make(chan struct{})
	answered := make(chan error)
	go func() {
		_, err := s.Handle(context.Background(), &keyless.Request{Peer: keyless.Peer{ID: edgeOne},
			Operation: keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)}})
		answered <- err
	}()
	select {
	case <-answered:
		t.Error("answered before the record was kept")
	case a.hold <- struct{}{}:
	}
	wantCode(t, <-answered, 0)
	if len(a.list) != 1 || rec.last(t).Result != ResultOK {
		t.Errorf("got %d records", len(a.list))
	}
}

// TestAuditOutlivesClient holds that what a key did is recorded although the client is gone.
func TestAuditOutlivesClient(t *testing.T) {
	s, a, _, _ := audited(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Handle(ctx, &keyless.Request{Peer: keyless.Peer{ID: edgeOne},
		Operation: keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)}})
	wantCode(t, err, keyless.CodeInternal)
	if r := a.last(t); a.canceled != 0 || r.Cause != CauseCanceled {
		t.Errorf("got %+v, with a context that was over %d times", r, a.canceled)
	}
}

// TestPanicIsRecorded holds that a backend's fault leaves a record, without what it said, and goes on to the server's log.
func TestPanicIsRecorded(t *testing.T) {
	s, a, key, rec := audited(t)
	key.panics = true
	func() {
		defer func() {
			v, ok := recover().(*panicked)
			if !ok || v.value != "the backend's secret" || !strings.Contains(v.Error(), "countingKey") {
				t.Errorf("recovered %v", v)
			}
		}()
		_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)})
		t.Errorf("no panic, but error %v", err)
	}()
	for _, r := range []Record{a.last(t), rec.last(t)} {
		if r.Result != ResultFailed || r.Cause != CausePanic || r.SKI != skiOf(t, "p256") || strings.Contains(r.Reason, "secret") {
			t.Errorf("got %+v", r)
		}
	}
	if len(a.list) != 1 || len(rec.list) != 1 {
		t.Errorf("got %d and %d records, want one each", len(a.list), len(rec.list))
	}
}

// TestPanicLeavesNoMark holds a lane's place to be free again after a panic, and the program to live through one in a goroutine of a hedged operation.
func TestPanicLeavesNoMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, r, one, two := hedgedPair(t, HedgeConfig{Percentile: .95})
		one.sign = func(context.Context) error { panic("one") }
		two.sign = func(context.Context) error { panic("two") }
		for range 3 {
			if _, err := signOnce(t, e); !isPanic(err) {
				t.Errorf("hedged: got %v", err)
			}
		}
		wantQuiet(t, e, r)
		e, r = entryOf(t, Home{Key: one, Lane: NewLane(LaneConfig{Capacity: 1})})
		for range 3 {
			if _, err := signOnce(t, e); !isPanic(err) {
				t.Errorf("alone: got %v", err)
			}
		}
		wantQuiet(t, e, r)
	})
}

func isPanic(err error) bool {
	_, ok := errors.AsType[*panicked](err)
	return ok
}

// TestBackendErrors says what becomes of each error of a key's homes.
func TestBackendErrors(t *testing.T) {
	tests := []struct {
		err    error
		code   *keyless.Error
		result Result
		cause  Cause
		reason string
	}{
		{ErrOverloaded, keyless.ErrInternal, ResultRefused, CauseOverloaded, "overloaded"},
		{ErrDeadline, keyless.ErrInternal, ResultRefused, CauseDeadline, "deadline cannot be met"},
		{ErrThrottled, keyless.ErrInternal, ResultFailed, CauseThrottled, "throttled"},
		{errors.Join(ErrDeadline, ErrThrottled), keyless.ErrInternal, ResultFailed, CauseThrottled, "throttled"},
		{ErrUnavailable, keyless.ErrInternal, ResultFailed, CauseUnavailable, ""},
		{context.DeadlineExceeded, keyless.ErrInternal, ResultFailed, CauseTimeout, ""},
		{context.Canceled, keyless.ErrInternal, ResultFailed, CauseCanceled, ""},
		{ErrUnsupported, keyless.ErrCrypto, ResultFailed, CauseBackend, ""},
		{errors.New("CKR_DATA_INVALID"), keyless.ErrCrypto, ResultFailed, CauseBackend, ""},
	}
	for _, tt := range tests {
		err := fmt.Errorf("token x: %w", tt.err)
		if tt.reason == "" {
			tt.reason = err.Error()
		}
		var c call
		got := c.done(Outcome{Home: "x", Waited: 1, Took: 2, Tries: 3, Hedged: true}, err)
		if got != (refusal{tt.code, tt.result, tt.cause, tt.reason}) {
			t.Errorf("%v: got %+v", err, got)
		}
		if r := c.rec; r.Home != "x" || r.Waited != 1 || r.Took != 2 || r.Tries != 3 || !r.Hedged {
			t.Errorf("%v: got record %+v", err, r)
		}
	}
	if got := new(call).done(Outcome{}, nil); got != (refusal{}) {
		t.Errorf("no error: got %+v", got)
	}
}

// TestCallerIsCanonical holds one visitor's name to be one name for the queue.
func TestCallerIsCanonical(t *testing.T) {
	for sni, want := range map[string]string{"": "", "www.example.com": "www.example.com", "WWW.example.com.": "www.example.com", "www.example.com.": "www.example.com"} {
		c := call{req: &keyless.Request{Operation: keyless.Operation{SNI: sni}, Peer: keyless.Peer{ID: edgeOne}}}
		if got := c.caller(); got != (Caller{Peer: edgeOne, SNI: want}) {
			t.Errorf("%q: got %+v", sni, got)
		}
	}
}

// TestLimitsCountSignatures holds that a request that could not be served takes nothing.
func TestLimitsCountSignatures(t *testing.T) {
	rule := everything(edgeOne)
	rule.Daily = 1
	s, _, key, rec := audited(t, rule)
	ski := skiOf(t, "p256")
	for _, bad := range []keyless.Operation{
		{Opcode: keyless.OpECDSASignSHA256, SKI: ski, Payload: make([]byte, 31)},
		{Opcode: keyless.OpRSASignSHA256, SKI: ski, Payload: make([]byte, 32)},
		{Opcode: keyless.OpECDSASignSHA256, SKI: keyless.SKI{1}, Payload: make([]byte, 32)},
		{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: ski, Payload: []byte{4, 3}},
		{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: make([]byte, maxCSR+1)},
		{Opcode: keyless.OpRSADecrypt, SKI: ski},
	} {
		if _, err := ask(t, s, bad); err == nil {
			t.Fatalf("%v was served", bad.Opcode)
		}
	}
	good := keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: ski, Payload: make([]byte, 32)}
	_, err := ask(t, s, good)
	wantCode(t, err, 0)
	_, err = ask(t, s, good)
	wantCode(t, err, keyless.CodeKeyNotFound)
	if r := rec.last(t); r.Cause != CauseDaily || key.calls != 1 {
		t.Errorf("got %+v and %d calls", r, key.calls)
	}
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpSeal, Payload: []byte("x")})
	wantCode(t, err, keyless.CodeBadOpcode)
}

// TestAuditAllocations bounds what an auditor costs: one copy of the record, which is its to keep.
func TestAuditAllocations(t *testing.T) {
	s, req := instantService(t)
	s.auditor = noAuditor{}
	n := testing.AllocsPerRun(200, func() {
		if _, err := s.Handle(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	})
	if n > 2 {
		t.Errorf("got %v allocations for a signature, want at most 2", n)
	}
}

type noAuditor struct{}

func (noAuditor) Ready() error                          { return nil }
func (noAuditor) Commit(context.Context, *Record) error { return nil }

// TestRecordsHoldNoInput searches records for what was signed.
func TestRecordsHoldNoInput(t *testing.T) {
	s, a, _, rec := audited(t)
	canary := bytes.Repeat([]byte{0xca, 0x4a, 0x27, 0x19}, 8)
	for _, op := range []keyless.Operation{
		{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: canary},
		{Opcode: keyless.OpSeal, Payload: canary},
		{Opcode: keyless.OpUnseal, Payload: canary},
		{Opcode: keyless.OpRSADecrypt, SKI: skiOf(t, "p256"), Payload: canary},
		{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: skiOf(t, "p256"), Payload: canary},
		{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: canary},
	} {
		_, _ = ask(t, s, op)
		for _, r := range []Record{a.last(t), rec.last(t)} {
			r.key = nil
			if text := fmt.Sprintf("%+v %x", r, r.Reason); strings.Contains(text, hex.EncodeToString(canary[:8])) || strings.Contains(text, string(canary[:4])) {
				t.Errorf("%v: the input is in %s", op.Opcode, text)
			}
		}
	}
}
