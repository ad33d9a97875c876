package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for something that must happen.
const patience = 20 * time.Second

const trustDomain = "edge.test"

// A bed is a store file, an authority and an edge identity, over which edges are started and stopped. A test with one runs
// beside others.
type bed struct {
	t         *testing.T
	dir       string
	authority *mtls.Authority
	own       *mtls.Source
}

func newBed(t *testing.T) *bed {
	t.Helper()
	t.Parallel()
	dir := t.TempDir()
	a, err := mtls.InitAuthority(filepath.Join(dir, "ca"), trustDomain)
	must(t, err)
	b := &bed{t: t, dir: dir, authority: a}
	key, csr, err := mtls.NewKeyCSR()
	must(t, err)
	chain, err := a.IssueCSR(csr, mtls.Identity{TrustDomain: trustDomain, Kind: mtls.KindEdge, Name: "e1"}, 0)
	must(t, err)
	must(t, mtls.WriteIdentity(filepath.Join(dir, "own"), key, chain, a.RootPEM()))
	b.own, err = mtls.OpenDir(filepath.Join(dir, "own"), nil)
	must(t, err)
	return b
}

// openStore opens the store's file.
func (b *bed) openStore() state.Store {
	b.t.Helper()
	s, err := state.OpenBolt(filepath.Join(b.dir, "state.db"))
	must(b.t, err)
	return s
}

// control opens a Control over s; the test closes it.
func (b *bed) control(s state.Store) *Control {
	b.t.Helper()
	c, err := Open(b.t.Context(), Config{Store: s, Authority: b.authority, Edges: []string{"edge.test:7844"}})
	must(b.t, err)
	return c
}

// only is a Control without sessions, closed by the test's end.
func only(t *testing.T) *Control {
	b := newBed(t)
	s := b.openStore()
	c := b.control(s)
	t.Cleanup(func() {
		must(t, c.Close())
		must(t, s.Close())
	})
	return c
}

// An edge is a Control with a listener that takes sessions.
type edge struct {
	*Control
	b    *bed
	addr string
	stop func()
}

func (b *bed) edge() *edge {
	b.t.Helper()
	s := b.openStore()
	return b.serve(b.control(s), s)
}

// serve takes sessions for c, which is over s.
func (b *bed) serve(c *Control, s state.Store) *edge {
	b.t.Helper()
	ln, err := tunnel.Listen(tunnel.ListenConfig{Addr: "127.0.0.1:0", Identity: b.own, Admit: c.Admit, Handle: c.Handle, Join: c.Join,
		Renew: c.Renew, DrainTimeout: 10 * time.Millisecond, JoinRate: 10_000})
	must(b.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- ln.Serve(ctx) }()
	e := &edge{Control: c, b: b, addr: ln.Addr().String()}
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			b.t.Errorf("Serve: %v", err)
		}
		if err := errors.Join(c.Close(), s.Close()); err != nil {
			b.t.Errorf("Close: %v", err)
		}
	})
	b.t.Cleanup(e.stop)
	return e
}

// token makes a join token that names the edge's real address.
func (e *edge) token(tunnelName string, ttl time.Duration) mtls.JoinToken {
	e.b.t.Helper()
	g, err := e.CreateToken(e.b.t.Context(), tunnelName, ttl)
	must(e.b.t, err)
	tok, err := mtls.ParseJoinToken(g.Token)
	must(e.b.t, err)
	return tok
}

// join enrols a connector and returns its identity's directory.
func (e *edge) join(tok mtls.JoinToken, name string) (string, tunnel.JoinReply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	key, csr, err := mtls.NewKeyCSR()
	if err != nil {
		return "", tunnel.JoinReply{}, err
	}
	r, err := tunnel.Join(ctx, e.addr, tok, csr, name)
	if err != nil {
		return "", r, err
	}
	dir := filepath.Join(e.b.t.TempDir(), "id")
	return dir, r, mtls.WriteIdentity(dir, key, r.Chain, r.Roots)
}

// enrol is a join that must succeed.
func (e *edge) enrol(tunnelName, name string) *mtls.Source {
	e.b.t.Helper()
	dir, _, err := e.join(e.token(tunnelName, 0), name)
	must(e.b.t, err)
	src, err := mtls.OpenDir(dir, nil)
	must(e.b.t, err)
	return src
}

// A link is one session of a connector that answers flows with handle.
type link struct {
	*tunnel.ClientSession
	cut func()
}

func (e *edge) dial(src *mtls.Source, instance string, index int, handle func(context.Context, *tunnel.Incoming)) (*link, error) {
	return e.dialWith(tunnel.DialConfig{Identity: src, Handle: handle,
		Registration: tunnel.Registration{Instance: instance, Index: index, Version: "1.0\u202e", Hostname: "host"}})
}

// dialWith dials with a configuration that lacks the address.
func (e *edge) dialWith(cfg tunnel.DialConfig) (*link, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cfg.Addr = e.addr
	c, err := tunnel.Dial(ctx, cfg)
	if err != nil {
		return nil, err
	}
	run, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Run(run) //nolint:errcheck // however it ends
	}()
	l := &link{c, sync.OnceFunc(func() { stop(); <-done })}
	e.b.t.Cleanup(l.cut)
	return l, nil
}

// link is a dial that must succeed.
func (e *edge) link(src *mtls.Source, instance string, index int, handle func(context.Context, *tunnel.Incoming)) *link {
	e.b.t.Helper()
	l, err := e.dial(src, instance, index, handle)
	must(e.b.t, err)
	eventually(e.b.t, "the session is registered", func() bool {
		for _, r := range e.reg.all() {
			if reg := r.s.Registration(); reg.Instance == instance && reg.Index == index && port(r.s.RemoteAddr()) == port(l.LocalAddr()) {
				return true
			}
		}
		return false
	})
	return l
}

func port(a net.Addr) uint16 { return netip.MustParseAddrPort(a.String()).Port() }

// saying answers each flow with a line that says who answers, and what was asked for.
func saying(who string) func(context.Context, *tunnel.Incoming) {
	return func(_ context.Context, in *tunnel.Incoming) {
		conn, err := in.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		f := in.Flow()
		fmt.Fprintf(conn, "%s %s %s %d\n", who, f.VNet, f.Host, f.Port)
		bufio.NewReader(conn).ReadString('\n') //nolint:errcheck // until the edge has closed
	}
}

func rejecting(r tunnel.Result) func(context.Context, *tunnel.Incoming) {
	return func(_ context.Context, in *tunnel.Incoming) { in.Reject(r) } //nolint:errcheck // the edge sees what comes of it
}

// ask opens a flow and returns the line that the connector says.
func (e *edge) ask(network, host string) (string, error) {
	conn, err := e.open(network, host)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}

func (e *edge) open(network, host string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return e.DialContext(ctx, network, host, 443, netip.AddrPort{})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("%s: still not so after %v", what, patience)
}

// wantErr checks the error's code and that its text holds each of parts.
func wantErr(t *testing.T, err error, want error, parts ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want %v", err, want)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}
