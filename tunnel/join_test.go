package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// enrolment redeems one token, as an edge's control plane does.
type enrolment struct {
	p *pki

	mu     sync.Mutex
	record mtls.JoinRecord
	seen   JoinRequest
}

func (e *enrolment) join(_ context.Context, r JoinRequest) (JoinReply, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.seen = r
	if err := e.record.Redeem(time.Now(), r.TokenID, r.Secret); err != nil {
		return JoinReply{}, fmt.Errorf("redeem: %w", err)
	}
	id := mtls.Identity{TrustDomain: e.p.ca.TrustDomain(), Kind: mtls.KindConnector, Name: r.Name}
	chain, err := e.p.ca.IssueCSR(r.CSR, id, 0)
	if err != nil {
		return JoinReply{}, err
	}
	e.record.UsedAt, e.record.UsedBy = time.Now(), id.String()
	return JoinReply{Chain: chain, Roots: e.p.ca.RootPEM(), Identity: id, Tunnel: "t1", Edges: []string{"edge.keyhaven.test:7844"}}, nil
}

func newEnrolment(t *testing.T, p *pki, expires time.Time) (*enrolment, mtls.JoinToken) {
	t.Helper()
	tok, err := mtls.NewJoinToken(p.ca.Pin(), []string{"127.0.0.1:7844"})
	if err != nil {
		t.Fatal(err)
	}
	return &enrolment{p: p, record: mtls.JoinRecord{ID: tok.ID, Hash: tok.Hash(), Tunnel: "t1", Expires: expires}}, tok
}

func TestJoin(t *testing.T) { overBoth(t, testJoin) }

func testJoin(t *testing.T, via Carrier) {
	t.Parallel()
	p := newPKI(t)
	en, tok := newEnrolment(t, p, time.Now().Add(time.Hour))
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll, Join: en.join})
	addr := e.ln.Addr().String()
	key, csr, err := mtls.NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	reply, err := JoinWith(context.Background(), DialConfig{Addr: addr, Carrier: via}, tok, csr, "site-7")
	if err != nil {
		t.Fatalf("Join: %v", err)
	}
	if got, want := reply.Identity.String(), "spiffe://keyhaven.test/connector/site-7"; got != want || reply.Tunnel != "t1" || len(reply.Edges) != 1 {
		t.Errorf("reply %s, tunnel %q, edges %q; want %s, t1, one edge", got, reply.Tunnel, reply.Edges, want)
	}
	// What came must be good for a session.
	dir := filepath.Join(t.TempDir(), "id")
	if err := mtls.WriteIdentity(dir, key, reply.Chain, reply.Roots); err != nil {
		t.Fatal(err)
	}
	src, err := mtls.OpenDir(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	startConnector(t, dialOver(e, via, src, accept(echo)))

	if _, err := JoinWith(context.Background(), DialConfig{Addr: addr, Carrier: via}, tok, csr, "site-8"); !errors.Is(err, ErrTokenUsed) {
		t.Errorf("second Join: %v, want ErrTokenUsed", err)
	}
	secret := string(tok.Secret.Reveal())
	en.mu.Lock()
	defer en.mu.Unlock()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
		if s := fmt.Sprintf(verb, en.seen); strings.Contains(s, secret) || strings.Contains(s, fmt.Sprintf("%x", secret)) {
			t.Errorf("%s prints the secret", verb)
		}
	}
	if s := slog.AnyValue(en.seen).Resolve().String(); strings.Contains(s, secret) {
		t.Error("the log gets the secret")
	}
}

func TestJoinRefused(t *testing.T) { overBoth(t, testJoinRefused) }

func testJoinRefused(t *testing.T, via Carrier) {
	t.Parallel()
	p := newPKI(t)
	edge := p.source(mtls.KindEdge, "e1", 0)
	_, csr, err := mtls.NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("expired", func(t *testing.T) {
		en, tok := newEnrolment(t, p, time.Now().Add(-time.Second))
		e := startEdge(t, ListenConfig{Identity: edge, Admit: admitAll, Join: en.join})
		if _, err := JoinWith(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via}, tok, csr, "c"); !errors.Is(err, ErrTokenExpired) {
			t.Errorf("Join: %v, want ErrTokenExpired", err)
		}
	})
	t.Run("unknown", func(t *testing.T) {
		en, _ := newEnrolment(t, p, time.Now().Add(time.Hour))
		_, tok := newEnrolment(t, p, time.Now().Add(time.Hour))
		e := startEdge(t, ListenConfig{Identity: edge, Admit: admitAll, Join: en.join})
		if _, err := JoinWith(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via}, tok, csr, "c"); !errors.Is(err, ErrTokenUnknown) {
			t.Errorf("Join: %v, want ErrTokenUnknown", err)
		}
	})
	t.Run("no joining", func(t *testing.T) {
		_, tok := newEnrolment(t, p, time.Now().Add(time.Hour))
		e := startEdge(t, ListenConfig{Identity: edge, Admit: admitAll})
		if _, err := JoinWith(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via}, tok, csr, "c"); !errors.Is(err, ErrNotAllowed) {
			t.Errorf("Join: %v, want ErrNotAllowed", err)
		}
	})
	t.Run("wrong pin", func(t *testing.T) {
		en, tok := newEnrolment(t, p, time.Now().Add(time.Hour))
		tok.Pin[0] ^= 1
		e := startEdge(t, ListenConfig{Identity: edge, Admit: admitAll, Join: en.join})
		if _, err := JoinWith(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via}, tok, csr, "c"); err == nil || errors.Is(err, ErrNoAnswer) {
			t.Errorf("Join: %v, want the pin's mismatch", err)
		}
		en.mu.Lock()
		defer en.mu.Unlock()
		if en.seen.Secret != nil {
			t.Error("the secret went to an edge that the token does not pin")
		}
	})
	t.Run("rate", func(t *testing.T) {
		en, tok := newEnrolment(t, p, time.Now().Add(-time.Second))
		e := startEdge(t, ListenConfig{Identity: edge, Admit: admitAll, Join: en.join, JoinRate: 2})
		for i, want := range []error{ErrTokenExpired, ErrTokenExpired, ErrBusy} {
			if _, err := JoinWith(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via}, tok, csr, "c"); !errors.Is(err, want) {
				t.Errorf("Join %d: %v, want %v", i, err, want)
			}
		}
	})
	t.Run("foreign chain", func(t *testing.T) { // an edge that signs for another key
		en, tok := newEnrolment(t, p, time.Now().Add(time.Hour))
		e := startEdge(t, ListenConfig{Identity: edge, Admit: admitAll, Join: func(ctx context.Context, r JoinRequest) (JoinReply, error) {
			_, r.CSR, _ = mtls.NewKeyCSR()
			return en.join(ctx, r)
		}})
		if _, err := JoinWith(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via}, tok, csr, "c"); err == nil {
			t.Error("Join took a certificate for another key")
		}
	})
}

// TestJoinGivesNoSession: who joins has shown no certificate and must get nothing else.
func TestJoinGivesNoSession(t *testing.T) { overBoth(t, testJoinGivesNoSession) }

func testJoinGivesNoSession(t *testing.T, via Carrier) {
	p := newPKI(t)
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0),
		Admit: func(context.Context, mtls.Identity, *x509.Certificate, Registration) error {
			t.Error("Admit was asked about a client without a certificate")
			return nil
		}})
	for _, alpn := range [][]string{{ALPN}, {JoinALPN, ALPN}, {ALPN, JoinALPN}, {"h3"}, {JoinALPN}} {
		st, conn, shut, err := rawDial(t, via, e, mtls.PinnedClientConfig(p.ca.Pin(), alpn...))
		if err != nil {
			continue // refused in the handshake already
		}
		b, _ := appendRegister(nil, testRegistration)
		st.Write(b)
		st.SetReadDeadline(time.Now().Add(patience))
		f, err := readFrame(st, 0)
		if err == nil && f.typ != frameRefused {
			t.Errorf("%q: frame 0x%02x in answer to register", alpn, byte(f.typ))
		}
		conn.close(CloseDone)
		shut()
	}
	if n := e.ln.Sessions(); n != 0 {
		t.Errorf("%d sessions", n)
	}
}

func TestRateLimiter(t *testing.T) {
	now := time.Unix(1e9, 0)
	r := newRateLimiter(3, time.Minute)
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	for i, want := range []bool{true, true, true, false} {
		if got := r.allow(a, now); got != want {
			t.Errorf("event %d: %v, want %v", i, got, want)
		}
	}
	if !r.allow(b, now) {
		t.Error("another source pays for the first")
	}
	if !r.allow(a, now.Add(20*time.Second)) || r.allow(a, now.Add(20*time.Second)) {
		t.Error("a third of the period must bring back one event")
	}
	v6a, v6b := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::ffff:1")
	r.allow(v6a, now)
	r.allow(v6b, now)
	r.allow(v6a, now)
	if r.allow(v6b, now) {
		t.Error("addresses of one /64 count apart")
	}
	if r.allow(netip.Addr{}, now) {
		t.Error("an unknown source is let in")
	}
	for i := range 2 * maxSources {
		r.allow(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now.Add(time.Duration(i)))
	}
	if n := len(r.sources); n > maxSources {
		t.Errorf("table of %d sources, at most %d allowed", n, maxSources)
	}
}
