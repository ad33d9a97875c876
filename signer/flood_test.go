package signer

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// TestRefusalsDoNotFloodTheAudit: a client that is refused without end leaves a bounded number of records, the next of which says
// how many there are none of. Signatures, and other clients, keep theirs.
func TestRefusalsDoNotFloodTheAudit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a, _, rec := audited(t, everything(edgeOne), everything(edgeTwo))
		bad := keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: keyless.SKI{1}, Payload: make([]byte, 32)}
		good := keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)}
		const flood = 5000
		for range flood {
			_, err := ask(t, s, bad)
			wantCode(t, err, keyless.CodeKeyNotFound)
		}
		if got := len(a.list); got != refusalRate.Burst {
			t.Errorf("%d refusals at once left %d records, want %d", flood, got, refusalRate.Burst)
		}
		if got := len(rec.list); got != flood {
			t.Errorf("the recorder was told of %d, want all %d", got, flood)
		}
		_, err := ask(t, s, good)
		wantCode(t, err, 0)
		_, err = s.Handle(t.Context(), &keyless.Request{Operation: bad, Peer: keyless.Peer{ID: edgeTwo}})
		wantCode(t, err, keyless.CodeKeyNotFound)
		if got := len(a.list); got != refusalRate.Burst+2 {
			t.Errorf("a signature and another client's refusal left %d records, want 2", got-refusalRate.Burst)
		}
		time.Sleep(time.Second)
		_, err = ask(t, s, bad)
		wantCode(t, err, keyless.CodeKeyNotFound)
		last := a.list[len(a.list)-1]
		if !strings.Contains(last.Reason, "4800 refusals of this client") {
			t.Errorf("the next record's reason is %q, want how many have none", last.Reason)
		}
	})
}
