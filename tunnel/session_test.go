package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

func TestRegistration(t *testing.T) { overBoth(t, testRegisters) }

func testRegisters(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	want := testRegistration
	want.Connections, want.Minor = defaultConnections, protocolMinor
	if got := s.Registration(); got != want {
		t.Errorf("Registration() = %+v, want %+v", got, want)
	}
	if got, want := s.Peer().String(), "spiffe://keyhaven.test/connector/c1"; got != want {
		t.Errorf("Peer() = %s, want %s", got, want)
	}
	if got, want := c.Peer().String(), "spiffe://keyhaven.test/edge/e1"; got != want {
		t.Errorf("client's Peer() = %s, want %s", got, want)
	}
	if id, err := mtls.IdentityOf(s.Cert()); err != nil || id != s.Peer() {
		t.Errorf("Cert() names %v (%v), want %v", id, err, s.Peer())
	}
	for side, car := range map[string]carrier{"edge": s.car, "connector": c.car} {
		cs := car.tlsState()
		if cs.CurveID != tls.X25519MLKEM768 || cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != ALPN {
			t.Errorf("%s: key exchange %v, version %#x, protocol %q; want X25519MLKEM768, TLS 1.3, %q", side, cs.CurveID, cs.Version, cs.NegotiatedProtocol, ALPN)
		}
		if cs.DidResume {
			t.Errorf("%s: the session was resumed", side)
		}
	}
}

func TestRefusals(t *testing.T) { overBoth(t, testRefusals) }

func testRefusals(t *testing.T, via Carrier) {
	p, other := newPKI(t), newPKI(t)
	edge := p.source(mtls.KindEdge, "e1", 0)
	good := p.source(mtls.KindConnector, "c1", 0)
	admit := func(err error) func(context.Context, mtls.Identity, *x509.Certificate, Registration) error {
		return func(context.Context, mtls.Identity, *x509.Certificate, Registration) error { return err }
	}
	// A connector of another authority that would trust this edge.
	foreign := func() *mtls.Source {
		key, _, _ := mtls.NewKeyCSR()
		id := mtls.Identity{TrustDomain: "keyhaven.test", Kind: mtls.KindConnector, Name: "c1"}
		chain, err := other.ca.Issue(mtls.IssueRequest{Identity: id, Public: key.Public()})
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir() + "/id"
		roots := append(other.ca.RootPEM(), p.ca.RootPEM()...)
		if err := mtls.WriteIdentity(dir, key, chain, roots); err != nil {
			t.Fatal(err)
		}
		src, err := mtls.OpenDir(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		return src
	}()

	tests := []struct {
		name  string
		admit func(context.Context, mtls.Identity, *x509.Certificate, Registration) error
		src   *mtls.Source
		want  error
		retry bool
	}{
		{"unknown", admit(ErrUnknown), good, ErrUnknown, false},
		{"revoked", admit(fmt.Errorf("serial 1: %w", ErrRevoked)), good, ErrRevoked, false},
		{"not allowed", admit(ErrNotAllowed), good, ErrNotAllowed, false},
		{"version", admit(ErrVersion), good, ErrVersion, false},
		{"busy", admit(ErrBusy), good, ErrBusy, true},
		{"other error", admit(errors.New("store is away")), good, ErrEdgeInternal, true},
		{"nil Admit", nil, good, ErrNotAllowed, false},
		{"wrong authority", admitAll, foreign, ErrCertificate, false},
		{"wrong kind edge", admitAll, p.source(mtls.KindEdge, "e2", 0), ErrCertificate, false},
		{"wrong kind keyserver", admitAll, p.source(mtls.KindKeyServer, "k1", 0), nil, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := startEdge(t, ListenConfig{Identity: edge, Admit: tt.admit})
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			_, err := Dial(ctx, dialOver(e, via, tt.src, accept(echo)))
			if err == nil {
				t.Fatal("Dial succeeded")
			}
			if tt.want == nil { // the key server's certificate serves no client: either side may notice first
				return
			}
			if !errors.Is(err, tt.want) {
				t.Fatalf("Dial: %v, want %v", err, tt.want)
			}
			if r, ok := errors.AsType[*RefusedError](err); !ok || r.Retriable() != tt.retry {
				t.Errorf("Dial: %v, want a *RefusedError with Retriable() = %v", err, tt.retry)
			}
			if n := e.ln.Sessions(); n != 0 {
				t.Errorf("%d sessions, want none", n)
			}
			eventually(t, "no connection pending", func() bool { return e.ln.pending.Load() == 0 })
		})
	}
}

func TestDialErrors(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	src := p.source(mtls.KindConnector, "c1", 0)
	t.Run("nobody answers", func(t *testing.T) {
		silent := listenSilent(t)
		cfg := DialConfig{Addr: silent.LocalAddr().String(), Identity: src, Registration: testRegistration, Handle: accept(echo)}
		_, err := Dial(context.Background(), cfg)
		if !errors.Is(err, ErrNoAnswer) {
			t.Errorf("Dial: %v, want ErrNoAnswer", err)
		}
	})
	t.Run("edge of another authority", func(t *testing.T) {
		other := newPKI(t)
		e := startEdge(t, ListenConfig{Identity: other.source(mtls.KindEdge, "e1", 0), Admit: admitAll})
		_, err := Dial(context.Background(), dialOver(e, CarrierQUIC, src, accept(echo)))
		if err == nil || errors.Is(err, ErrNoAnswer) || errors.Is(err, ErrCertificate) {
			t.Errorf("Dial: %v, want the verification's own error", err)
		}
	})
	t.Run("no instance", func(t *testing.T) {
		if _, err := Dial(context.Background(), DialConfig{Addr: "127.0.0.1:1", Identity: src, Handle: accept(echo)}); !errors.Is(err, errMalformed) {
			t.Errorf("Dial without an instance: %v, want errMalformed", err)
		}
	})
	t.Run("context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		cfg := DialConfig{Addr: "127.0.0.1:9", Identity: src, Registration: testRegistration, Handle: accept(echo)}
		if _, err := Dial(ctx, cfg); !errors.Is(err, context.Canceled) {
			t.Errorf("Dial: %v, want context.Canceled", err)
		}
	})
}

func TestPendingBound(t *testing.T) { overBoth(t, testPendingBound) }

func testPendingBound(t *testing.T, via Carrier) {
	p := newPKI(t)
	release := make(chan struct{})
	e := startEdge(t, ListenConfig{
		Identity: p.source(mtls.KindEdge, "e1", 0), MaxPending: 1,
		Admit: func(context.Context, mtls.Identity, *x509.Certificate, Registration) error {
			<-release
			return nil
		},
	})
	src := p.source(mtls.KindConnector, "c1", 0)
	first := make(chan *ClientSession, 1)
	go func() {
		c, err := Dial(context.Background(), dialOver(e, via, src, accept(echo)))
		if err != nil {
			t.Errorf("first Dial: %v", err)
		}
		first <- c
	}()
	eventually(t, "one connection pending", func() bool { return e.ln.pending.Load() == 1 })
	if _, err := Dial(context.Background(), dialOver(e, via, src, accept(echo))); err == nil {
		t.Error("a second connection got in beside a pending one")
	}
	close(release)
	c := <-first
	if c == nil {
		t.FailNow()
	}
	e.session()
	eventually(t, "no connection pending", func() bool { return e.ln.pending.Load() == 0 })
	startConnector(t, dialOver(e, via, src, accept(echo)))
	c.Close(CloseShutdown)
}

// TestAddressValidation: clients must prove their address first while many are pending, and only then.
func TestAddressValidation(t *testing.T) {
	p := newPKI(t)
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll, MaxPending: 4})
	src := p.source(mtls.KindConnector, "c1", 0)
	for _, pending := range []int64{0, 2} {
		relay := newRelay(t, e.ln.Addr().String(), 0)
		dc := dialOver(e, CarrierQUIC, src, accept(echo))
		dc.Addr = relay.addr()
		e.ln.pending.Add(pending)
		startConnector(t, dc)
		e.session()
		e.ln.pending.Add(-pending)
		if got, want := relay.retry.Load(), pending > 1; got != want {
			t.Errorf("%d others pending: Retry sent %v, want %v", pending, got, want)
		}
	}
}

func TestRenewal(t *testing.T) { overBoth(t, testRenewal) }

func testRenewal(t *testing.T, via Carrier) {
	p := newPKI(t)
	asked := make(chan mtls.Identity, 2)
	e := startEdge(t, ListenConfig{
		Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll,
		Renew: func(_ context.Context, peer mtls.Identity, csr []byte) ([][]byte, error) {
			asked <- peer
			return p.ca.IssueCSR(csr, peer, 0)
		},
	})
	src := p.source(mtls.KindConnector, "c1", 0)
	c := startConnector(t, dialOver(e, via, src, accept(echo)))
	before := src.Leaf().SerialNumber
	for range 2 {
		if err := src.Renew(context.Background(), c.Renew); err != nil {
			t.Fatalf("Renew: %v", err)
		}
	}
	if src.Leaf().SerialNumber.Cmp(before) == 0 {
		t.Error("the certificate is the old one")
	}
	if got, want := <-asked, src.Identity(); got != want {
		t.Errorf("renewal for %v, want %v", got, want)
	}
	// The new certificate must be good for a session.
	startConnector(t, dialOver(e, via, src, accept(echo)))
}

func TestRenewalRefused(t *testing.T) { overBoth(t, testRenewalRefused) }

func testRenewalRefused(t *testing.T, via Carrier) {
	for name, tt := range map[string]struct {
		renew func(context.Context, mtls.Identity, []byte) ([][]byte, error)
		want  error
	}{
		"nil Renew": {nil, ErrNotAllowed},
		"revoked":   {func(context.Context, mtls.Identity, []byte) ([][]byte, error) { return nil, ErrRevoked }, ErrRevoked},
		"no chain":  {func(context.Context, mtls.Identity, []byte) ([][]byte, error) { return nil, nil }, ErrEdgeInternal},
		"too long": {func(context.Context, mtls.Identity, []byte) ([][]byte, error) {
			return [][]byte{make([]byte, 40<<10)}, nil
		}, ErrEdgeInternal},
	} {
		t.Run(name, func(t *testing.T) {
			_, c, _ := pairOver(t, via, accept(echo), func(lc *ListenConfig, _ *DialConfig) { lc.Renew = tt.renew })
			_, csr, err := mtls.NewKeyCSR()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.ClientSession.Renew(context.Background(), csr); !errors.Is(err, tt.want) {
				t.Errorf("Renew: %v, want %v", err, tt.want)
			}
			if err := c.Err(); err != nil {
				t.Errorf("the session ended: %v", err)
			}
		})
	}
}

// Who has an answer may ask again at once.
func TestRenewalsInARow(t *testing.T) {
	overBoth(t, func(t *testing.T, via Carrier) {
		_, c, _ := pairOver(t, via, accept(echo), func(lc *ListenConfig, _ *DialConfig) {
			lc.Renew = func(context.Context, mtls.Identity, []byte) ([][]byte, error) { return nil, ErrRevoked }
		})
		for i := range 2000 {
			if _, err := c.Renew(context.Background(), []byte("csr")); !errors.Is(err, ErrRevoked) {
				t.Fatalf("renewal %d: %v, want ErrRevoked", i, err)
			}
		}
	})
}

// TestRenewalGivenUp leaves an answer to a caller that is gone, then renews again.
func TestRenewalGivenUp(t *testing.T) { overBoth(t, testRenewalGivenUp) }

func testRenewalGivenUp(t *testing.T, via Carrier) {
	hold := make(chan struct{})
	var calls atomic.Int32
	_, c, _ := pairOver(t, via, accept(echo), func(lc *ListenConfig, _ *DialConfig) {
		lc.Renew = func(context.Context, mtls.Identity, []byte) ([][]byte, error) {
			if calls.Add(1) == 1 {
				<-hold
			}
			return nil, ErrRevoked
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Renew(ctx, []byte("csr")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Renew: %v, want the context's error", err)
	}
	if _, err := c.Renew(context.Background(), []byte("csr")); !errors.Is(err, ErrBusy) {
		t.Errorf("second Renew: %v, want ErrBusy", err)
	}
	close(hold)
	eventually(t, "renewals work again", func() bool {
		_, err := c.Renew(context.Background(), []byte("csr"))
		return errors.Is(err, ErrRevoked)
	})
}

// TestCertificateEnds: a session takes no new flows once its certificate is out of date, and lets the open ones end.
func TestCertificateEnds(t *testing.T) { overBoth(t, testCertificateEnds) }

func testCertificateEnds(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	flow := open(t, s, testFlow)
	s.expiry.Reset(0)
	select {
	case <-c.Draining():
	case <-time.After(patience):
		t.Fatal("the connector was not told")
	}
	if _, err := s.Open(context.Background(), testFlow); !errors.Is(err, ErrDraining) {
		t.Errorf("Open: %v, want ErrDraining", err)
	}
	checkEcho(t, flow, "still here")
	flow.Close()
	if err := c.wait(t); err != nil {
		t.Errorf("Run: %v, want nil", err)
	}
}

func TestDrainByConnector(t *testing.T) { overBoth(t, testDrainByConnector) }

func testDrainByConnector(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	flow := open(t, s, testFlow)
	drained := make(chan error, 1)
	go func() { drained <- c.Drain(context.Background()) }()
	eventually(t, "edge knows", s.Draining)
	if _, err := s.Open(context.Background(), testFlow); !errors.Is(err, ErrDraining) {
		t.Errorf("Open: %v, want ErrDraining", err)
	}
	checkEcho(t, flow, strings.Repeat("drain", 1000))
	select {
	case err := <-drained:
		t.Fatalf("Drain returned (%v) with a flow open", err)
	default:
	}
	flow.Close()
	if err := <-drained; err != nil {
		t.Errorf("Drain: %v, want nil", err)
	}
	if err := c.wait(t); err != nil {
		t.Errorf("Run: %v, want nil", err)
	}
	<-s.Done()
	if err := s.Err(); !errors.Is(err, &SessionError{Reason: CloseDrained}) {
		t.Errorf("edge's Err() = %v, want drained", err)
	}
}

// TestDrainLosesNothing drains while the last bytes of big answers are on their way to a reader that has not begun.
func TestDrainLosesNothing(t *testing.T) { overBoth(t, testDrainLosesNothing) }

func testDrainLosesNothing(t *testing.T, via Carrier) {
	const size = 3 << 20
	written := make(chan struct{})
	_, c, s := pairOver(t, via, accept(func(c Conn) {
		c.Write(make([]byte, size))
		close(written)
	}), func(lc *ListenConfig, _ *DialConfig) {
		lc.Limits.FlowWindow = 2 * size
	})
	flow := open(t, s, testFlow)
	if _, err := io.ReadFull(flow, make([]byte, size-initialFlowWindow/2)); err != nil {
		t.Fatal(err)
	}
	<-written
	drained := make(chan error, 1)
	go func() { drained <- c.Drain(context.Background()) }()
	eventually(t, "the connector's last flow ended", func() bool { return c.Flows() == 0 })
	eventually(t, "edge knows", s.Draining)
	n, err := io.Copy(io.Discard, flow)
	if err != nil || n != initialFlowWindow/2 {
		t.Errorf("read %d bytes, %v; want %d, nil", n, err, initialFlowWindow/2)
	}
	flow.Close()
	if err := <-drained; err != nil {
		t.Errorf("Drain: %v", err)
	}
}

func TestDrainByEdge(t *testing.T) { overBoth(t, testDrainByEdge) }

func testDrainByEdge(t *testing.T, via Carrier) {
	e, c, s := pairOver(t, via, accept(echo), func(lc *ListenConfig, _ *DialConfig) { lc.DrainTimeout = patience })
	flow := open(t, s, testFlow)
	stopped := make(chan error, 1)
	go func() { stopped <- e.stop() }()
	select {
	case <-c.Draining():
	case <-time.After(patience):
		t.Fatal("the connector was not told")
	}
	checkEcho(t, flow, "still here")
	flow.Close()
	if err := <-stopped; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := c.wait(t); err != nil {
		t.Errorf("Run: %v, want nil", err)
	}
}

func TestDrainCut(t *testing.T) { overBoth(t, testDrainCut) }

func testDrainCut(t *testing.T, via Carrier) {
	for _, side := range []string{"connector", "edge"} {
		t.Run(side, func(t *testing.T) {
			_, c, s := pairOver(t, via, accept(echo))
			flow := open(t, s, testFlow)
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			drain := c.Drain
			if side == "edge" {
				drain = s.Drain
			}
			if err := drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Drain: %v, want the context's error", err)
			}
			if _, err := flow.Read(make([]byte, 1)); !errors.Is(err, ErrSessionLost) || !errors.Is(err, net.ErrClosed) {
				t.Errorf("Read: %v, want ErrSessionLost, net.ErrClosed", err)
			}
			if err := c.wait(t); !errors.Is(err, &SessionError{Reason: CloseShutdown, Remote: side == "edge"}) {
				t.Errorf("Run: %v, want the end of the session", err)
			}
			flow.Close()
			if s.Flows() != 0 {
				t.Errorf("%d flows counted after the end", s.Flows())
			}
		})
	}
}

func TestBothDrain(t *testing.T) { overBoth(t, testBothDrain) }

func testBothDrain(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	errs := make(chan error, 2)
	go func() { errs <- c.Drain(context.Background()) }()
	go func() { errs <- s.Drain(context.Background()) }()
	for range 2 {
		select {
		case err := <-errs:
			if err != nil {
				t.Errorf("Drain: %v", err)
			}
		case <-time.After(patience):
			t.Fatal("Drain hangs")
		}
	}
}

func TestRunContext(t *testing.T) { overBoth(t, testRunContext) }

func testRunContext(t *testing.T, via Carrier) {
	handlerDone := make(chan struct{})
	_, c, s := pairOver(t, via, func(ctx context.Context, in *Incoming) {
		defer close(handlerDone)
		if _, err := in.Accept(); err != nil {
			t.Error(err)
		}
		<-ctx.Done()
	})
	flow := open(t, s, testFlow)
	c.stop()
	if err := c.wait(t); !errors.Is(err, context.Canceled) {
		t.Errorf("Run: %v, want context.Canceled", err)
	}
	select {
	case <-handlerDone:
	default:
		t.Error("Run returned before its handler")
	}
	if _, err := flow.Read(make([]byte, 1)); !errors.Is(err, ErrSessionLost) {
		t.Errorf("Read: %v, want ErrSessionLost", err)
	}
	<-s.Done()
	if err := s.Err(); !errors.Is(err, &SessionError{Reason: CloseShutdown, Remote: true}) {
		t.Errorf("edge's Err() = %v, want a shutdown by the peer", err)
	}
	if _, err := s.Open(context.Background(), testFlow); !errors.Is(err, ErrSessionLost) {
		t.Errorf("Open: %v, want ErrSessionLost", err)
	}
}

func TestCloseReason(t *testing.T) { overBoth(t, testCloseReason) }

func testCloseReason(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	s.Close(CloseRevoked)
	if err := c.wait(t); !errors.Is(err, &SessionError{Reason: CloseRevoked, Remote: true}) {
		t.Errorf("Run: %v, want revoked by the peer", err)
	}
}

// TestPeerKilled takes the connector's socket away without a word.
func TestPeerKilled(t *testing.T) { overBoth(t, testPeerKilled) }

func testPeerKilled(t *testing.T, via Carrier) {
	t.Parallel()
	_, c, s := pairOver(t, via, accept(echo), func(lc *ListenConfig, dc *DialConfig) {
		lc.Limits.IdleTimeout = time.Second
		dc.Limits.KeepAlive = 200 * time.Millisecond
	})
	flow := open(t, s, testFlow)
	time.Sleep(1500 * time.Millisecond) // idle for longer than the timeout: keep-alives must hold it
	checkEcho(t, flow, "kept alive")
	if m, ok := c.car.(*mux); ok {
		m.raw.Close()
	} else {
		c.shut()
	}
	select {
	case <-s.Done():
	case <-time.After(patience):
		t.Fatal("the edge does not notice")
	}
	if err := s.Err(); !errors.Is(err, ErrPeerLost) || !errors.Is(err, net.ErrClosed) {
		t.Errorf("Err() = %v, want ErrPeerLost", err)
	}
	if _, err := flow.Read(make([]byte, 1)); !errors.Is(err, ErrSessionLost) {
		t.Errorf("Read: %v, want ErrSessionLost", err)
	}
}

// TestEdgeRestarted kills an edge without a word and starts it anew at its address: a connector must notice by the
// stateless reset, long before its idle timeout.
func TestEdgeRestarted(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	cfg := ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll, Limits: Limits{IdleTimeout: time.Hour}}
	e := startEdge(t, cfg)
	cfg.Addr = e.ln.Addr().String()
	dc := dialOver(e, CarrierQUIC, p.source(mtls.KindConnector, "c1", 0), accept(echo))
	dc.Limits = Limits{IdleTimeout: time.Hour, KeepAlive: 200 * time.Millisecond}
	c := startConnector(t, dc)
	flow := open(t, e.session(), testFlow)
	checkEcho(t, flow, strings.Repeat("x", 1<<20)) // the path's packet size is known then
	flow.Close()
	time.Sleep(time.Second) // what that leaves to send is sent
	e.kill()
	startEdge(t, cfg)
	if err := c.wait(t); !errors.Is(err, ErrPeerLost) {
		t.Errorf("Run: %v, want ErrPeerLost", err)
	}
}

// TestAnswersFromDialledAddress dials the second of two addresses of a wildcard listener through a connected socket, which
// hears nobody else.
func TestAnswersFromDialledAddress(t *testing.T) {
	for _, listen := range []string{"0.0.0.0:0", ":0"} {
		t.Run(listen, func(t *testing.T) {
			p := newPKI(t)
			e := startEdge(t, ListenConfig{Addr: listen, Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll})
			port := e.ln.Addr().(*net.UDPAddr).Port
			relay := newRelay(t, fmt.Sprintf("127.0.0.2:%d", port), 0)
			dc := dialOver(e, CarrierQUIC, p.source(mtls.KindConnector, "c1", 0), accept(echo))
			dc.Addr = relay.addr()
			startConnector(t, dc)
			flow := open(t, e.session(), testFlow)
			checkEcho(t, flow, "from the second address")
			flow.Close()
		})
	}
}
