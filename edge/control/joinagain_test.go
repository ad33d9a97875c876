package control

import (
	"context"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A connector whose power went before it had stored the answer comes again with the same key, and is the same connector.
// With another key, another secret, or when it was revoked, the token is used up.
func TestJoinAgain(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	join := func(tok mtls.JoinToken, csr []byte) (tunnel.JoinReply, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return tunnel.Join(ctx, e.addr, tok, csr, "p1")
	}
	tok := e.token("plant", 0)
	_, csr, err := mtls.NewKeyCSR()
	must(t, err)
	_, err = join(tok, csr)
	must(t, err)
	before, err := e.Connectors("")
	must(t, err)

	r, err := join(tok, csr)
	must(t, err)
	if r.Identity.Name != "p1" || r.Tunnel != "plant" || len(r.Chain) == 0 {
		t.Errorf("the second answer is %+v", r)
	}
	after, err := e.Connectors("")
	must(t, err)
	if len(after) != 1 || after[0].ID != before[0].ID || !after[0].ValidFrom.Equal(before[0].ValidFrom) {
		t.Errorf("connectors %+v, before %+v", after, before)
	}

	_, other, err := mtls.NewKeyCSR()
	must(t, err)
	_, err = join(tok, other)
	wantErr(t, err, tunnel.ErrTokenUsed)
	stolen := tok
	stolen.Secret = e.token("plant", 0).Secret
	_, err = join(stolen, csr)
	wantErr(t, err, tunnel.ErrTokenUnknown)
	_, err = e.RevokeConnector(t.Context(), "p1")
	must(t, err)
	_, err = join(tok, csr)
	wantErr(t, err, tunnel.ErrTokenUsed)
}

// The second answer is to be had for as long as the first was.
func TestJoinAgainTooLate(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	tok := e.token("plant", 2*time.Second)
	_, csr, err := mtls.NewKeyCSR()
	must(t, err)
	_, err = tunnel.Join(t.Context(), e.addr, tok, csr, "p1")
	must(t, err)
	eventually(t, "the token expires", func() bool {
		_, again, err := e.joinAgain(tunnel.JoinRequest{TokenID: tok.ID, Secret: tok.Secret.Reveal(), CSR: csr})
		return !again && err == nil
	})
}
