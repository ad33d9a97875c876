package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/mtls"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if how := os.Getenv(idleEnv); how != "" {
		idleConnectors(how)
		return
	}
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for something that must happen.
const patience = 20 * time.Second

// pki is an authority with identities for tests.
type pki struct {
	tb  testing.TB
	ca  *mtls.Authority
	dir string
}

func newPKI(tb testing.TB) *pki {
	tb.Helper()
	dir := tb.TempDir()
	ca, err := mtls.InitAuthority(filepath.Join(dir, "ca"), "keyhaven.test")
	if err != nil {
		tb.Fatal(err)
	}
	return &pki{tb: tb, ca: ca, dir: dir}
}

func (p *pki) source(kind mtls.Kind, name string, lifetime time.Duration) *mtls.Source {
	p.tb.Helper()
	key, _, err := mtls.NewKeyCSR()
	if err != nil {
		p.tb.Fatal(err)
	}
	id := mtls.Identity{TrustDomain: p.ca.TrustDomain(), Kind: kind, Name: name}
	chain, err := p.ca.Issue(mtls.IssueRequest{Identity: id, Public: key.Public(), Lifetime: lifetime})
	if err != nil {
		p.tb.Fatal(err)
	}
	dir := filepath.Join(p.dir, string(kind)+"-"+name)
	if err := mtls.WriteIdentity(dir, key, chain, p.ca.RootPEM()); err != nil {
		p.tb.Fatal(err)
	}
	src, err := mtls.OpenDir(dir, nil)
	if err != nil {
		p.tb.Fatal(err)
	}
	return src
}

func admitAll(context.Context, mtls.Identity, *x509.Certificate, Registration) error { return nil }

// edgeFixture is a running listener whose admitted sessions come out of a channel.
type edgeFixture struct {
	tb       testing.TB
	ln       *Listener
	sessions chan *Session
	stop     func() error // ends Serve and waits for it; may be called again
	killed   bool         // Serve may fail
}

// kill ends the edge without a word to anybody.
func (e *edgeFixture) kill() {
	e.killed = true
	e.ln.closeSockets()
	e.stop()
}

func startEdge(tb testing.TB, cfg ListenConfig) *edgeFixture {
	tb.Helper()
	if cfg.Addr == "" {
		cfg.Addr = "127.0.0.1:0"
	}
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = time.Millisecond // tests of the drain say otherwise
	}
	e := &edgeFixture{tb: tb, sessions: make(chan *Session, 64)}
	if cfg.Handle == nil {
		cfg.Handle = func(ctx context.Context, s *Session) {
			e.sessions <- s
			<-ctx.Done()
		}
	}
	ln, err := Listen(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	e.ln = ln
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- ln.Serve(ctx) }()
	e.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-served:
			return err
		case <-time.After(patience):
			return errors.New("Serve does not return")
		}
	})
	tb.Cleanup(func() {
		if err := e.stop(); err != nil && !e.killed {
			tb.Errorf("Serve: %v", err)
		}
	})
	return e
}

func (e *edgeFixture) session() *Session {
	e.tb.Helper()
	select {
	case s := <-e.sessions:
		return s
	case <-time.After(patience):
		e.tb.Fatal("no session came")
		return nil
	}
}

// connectorFixture is a client session that runs.
type connectorFixture struct {
	*ClientSession
	ran  chan struct{} // closed when Run has returned
	err  error         // what it returned
	stop context.CancelFunc
}

var testRegistration = Registration{Instance: "0123456789abcdef", Index: 1, Version: "v0.0.1", Hostname: "site", Arch: "amd64"}

func dialOver(e *edgeFixture, via Carrier, src *mtls.Source, handle func(context.Context, *Incoming)) DialConfig {
	return DialConfig{Addr: e.ln.Addr().String(), Carrier: via, Identity: src, Registration: testRegistration, Handle: handle}
}

// dialConfig is dialOver QUIC.
func dialConfig(e *edgeFixture, src *mtls.Source, handle func(context.Context, *Incoming)) DialConfig {
	return dialOver(e, CarrierQUIC, src, handle)
}

func startConnector(tb testing.TB, cfg DialConfig) *connectorFixture {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := Dial(ctx, cfg)
	if err != nil {
		tb.Fatalf("Dial: %v", err)
	}
	runCtx, stop := context.WithCancel(context.Background())
	f := &connectorFixture{ClientSession: c, ran: make(chan struct{}), stop: stop}
	go func() {
		f.err = c.Run(runCtx)
		close(f.ran)
	}()
	tb.Cleanup(func() {
		stop()
		f.wait(tb)
	})
	return f
}

func (f *connectorFixture) wait(tb testing.TB) error {
	tb.Helper()
	select {
	case <-f.ran:
		return f.err
	case <-time.After(patience):
		tb.Fatal("Run does not return")
		return nil
	}
}

// pair is pairOver QUIC.
func pair(tb testing.TB, handle func(context.Context, *Incoming), edit ...func(*ListenConfig, *DialConfig)) (*edgeFixture, *connectorFixture, *Session) {
	tb.Helper()
	return pairOver(tb, CarrierQUIC, handle, edit...)
}

// pairOver is an edge and one connector with a session between them.
func pairOver(tb testing.TB, via Carrier, handle func(context.Context, *Incoming), edit ...func(*ListenConfig, *DialConfig)) (*edgeFixture, *connectorFixture, *Session) {
	tb.Helper()
	p := newPKI(tb)
	lc := ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll}
	dc := DialConfig{Carrier: via, Identity: p.source(mtls.KindConnector, "c1", 0), Registration: testRegistration, Handle: handle}
	for _, f := range edit {
		f(&lc, &dc)
	}
	e := startEdge(tb, lc)
	dc.Addr = e.ln.Addr().String()
	c := startConnector(tb, dc)
	return e, c, e.session()
}

// accept is a handler that accepts and hands the flow to serve.
func accept(serve func(Conn)) func(context.Context, *Incoming) {
	return func(_ context.Context, in *Incoming) {
		c, err := in.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		serve(c)
	}
}

// echo sends back what comes and then half-closes.
func echo(c Conn) {
	if _, err := io.Copy(c, c); err == nil {
		c.CloseWrite()
	}
}

var testFlow = Flow{VNet: "default", Host: "10.0.0.7", Port: 80, Visitor: netip.MustParseAddrPort("192.0.2.1:4711")}

func open(tb testing.TB, s *Session, f Flow) Conn {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := s.Open(ctx, f)
	if err != nil {
		tb.Fatalf("Open: %v", err)
	}
	c.SetDeadline(time.Now().Add(2 * patience))
	return c
}

// overBoth runs a test over each carrier.
func overBoth(t *testing.T, test func(t *testing.T, via Carrier)) {
	t.Parallel()
	for _, via := range []Carrier{CarrierQUIC, CarrierTCP} {
		t.Run(string(via), func(t *testing.T) { test(t, via) })
	}
}

// eventually polls until ok.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	tb.Fatalf("%s: still not so after %v", what, patience)
}

func testLogger(tb testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// freeAddr is an address where nothing listens, by UDP or TCP, but what the test has listen there.
func freeAddr(tb testing.TB) string {
	tb.Helper()
	addr, err := freeport.Addr("127.0.0.1")
	if err != nil {
		tb.Fatal(err)
	}
	return addr
}

// listenSilent is a UDP socket whose TCP port is free. It is closed with the test.
func listenSilent(tb testing.TB) *net.UDPConn {
	tb.Helper()
	c, err := net.ListenPacket("udp4", freeAddr(tb))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

func tcpPair(tb testing.TB) (*net.TCPConn, *net.TCPConn) {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	return a.(*net.TCPConn), b.(*net.TCPConn)
}
