package main

import (
	"context"
	"crypto/x509"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// installation is an authority with an edge that takes joins.
type installation struct {
	authority *mtls.Authority
	source    *mtls.Source
	addr      string
	stop      func()

	mu       sync.Mutex
	tokens   map[string]mtls.JoinRecord
	sessions map[*tunnel.Session]bool
	refuse   error // what connectors are told; nil admits them
}

func install(t *testing.T) *installation {
	t.Helper()
	authority, err := mtls.InitAuthority(t.TempDir(), "test.example")
	if err != nil {
		t.Fatal(err)
	}
	key, csr, err := mtls.NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := authority.IssueCSR(csr, mtls.Identity{TrustDomain: "test.example", Kind: mtls.KindEdge, Name: "edge-1"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := mtls.WriteIdentity(dir, key, chain, authority.RootPEM()); err != nil {
		t.Fatal(err)
	}
	source, err := mtls.OpenDir(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	in := &installation{authority: authority, source: source, tokens: map[string]mtls.JoinRecord{}, sessions: map[*tunnel.Session]bool{}}
	in.start(t)
	return in
}

func (in *installation) start(t *testing.T) {
	t.Helper()
	ln, err := tunnel.Listen(tunnel.ListenConfig{
		Addr: "127.0.0.1:0", Identity: in.source, DrainTimeout: time.Millisecond, JoinRate: 1000, Join: in.join,
		Admit: func(context.Context, mtls.Identity, *x509.Certificate, tunnel.Registration) error {
			in.mu.Lock()
			defer in.mu.Unlock()
			return in.refuse
		},
		Handle: func(ctx context.Context, s *tunnel.Session) {
			in.mu.Lock()
			in.sessions[s] = true
			in.mu.Unlock()
			<-ctx.Done()
			in.mu.Lock()
			delete(in.sessions, s)
			in.mu.Unlock()
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	in.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ln.Serve(ctx) }()
	in.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the edge's listener: %v", err)
		}
	})
	t.Cleanup(in.stop)
}

func (in *installation) join(_ context.Context, r tunnel.JoinRequest) (tunnel.JoinReply, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	rec, ok := in.tokens[r.TokenID]
	if !ok {
		return tunnel.JoinReply{}, tunnel.ErrTokenUnknown
	}
	switch err := rec.Redeem(time.Now(), r.TokenID, r.Secret); {
	case errors.Is(err, mtls.ErrTokenUsed):
		return tunnel.JoinReply{}, tunnel.ErrTokenUsed
	case errors.Is(err, mtls.ErrTokenExpired):
		return tunnel.JoinReply{}, tunnel.ErrTokenExpired
	case err != nil:
		return tunnel.JoinReply{}, tunnel.ErrTokenUnknown
	}
	id := mtls.Identity{TrustDomain: "test.example", Kind: mtls.KindConnector, Name: "site-1"}
	if r.Name != "" {
		id.Name = r.Name
	}
	chain, err := in.authority.IssueCSR(r.CSR, id, 0)
	if err != nil {
		return tunnel.JoinReply{}, err
	}
	rec.UsedAt, rec.UsedBy = time.Now(), id.Name
	in.tokens[r.TokenID] = rec
	return tunnel.JoinReply{Chain: chain, Roots: in.authority.RootPEM(), Identity: id, Tunnel: "tunnel-1", Edges: []string{in.addr}}, nil
}

// token returns a fresh token's text.
func (in *installation) token(t *testing.T, expires time.Time, edges ...string) string {
	t.Helper()
	if edges == nil {
		edges = []string{in.addr}
	}
	tok, err := mtls.NewJoinToken(in.authority.Pin(), edges)
	if err != nil {
		t.Fatal(err)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.tokens[tok.ID] = mtls.JoinRecord{ID: tok.ID, Hash: tok.Hash(), Tunnel: "tunnel-1", Expires: expires}
	return tok.Reveal()
}

func (in *installation) session(t *testing.T) *tunnel.Session {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		in.mu.Lock()
		for s := range in.sessions {
			in.mu.Unlock()
			return s
		}
		in.mu.Unlock()
	}
	t.Fatal("no session came up")
	return nil
}

// joined enrols a connector and returns its directory.
func (in *installation) joined(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "identity")
	out, code := runProgram(t, in.token(t, time.Now().Add(time.Hour))+"\n", "join", "--token-file", "-", "--dir", dir)
	if code != 0 {
		t.Fatalf("join: exit code %d: %s", code, out)
	}
	return dir
}
