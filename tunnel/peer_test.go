package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

func admitPeers(context.Context, mtls.Identity, *x509.Certificate) error { return nil }

// peers are two edges, the first of which has dialled the second.
func peers(t *testing.T, via Carrier, handle func(context.Context, *Incoming)) (*edgeFixture, *PeerSession) {
	t.Helper()
	p := newPKI(t)
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e2", 0), Admit: admitAll, Peer: admitPeers, HandlePeer: handle, DrainTimeout: patience})
	s, err := DialPeer(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via, Identity: p.source(mtls.KindEdge, "e1", 0)})
	if err != nil {
		t.Fatalf("DialPeer: %v", err)
	}
	t.Cleanup(func() { s.Close(CloseShutdown) })
	return e, s
}

func TestPeer(t *testing.T) { overBoth(t, testPeer) }

func testPeer(t *testing.T, via Carrier) {
	got := make(chan Flow, 1)
	e, s := peers(t, via, func(_ context.Context, in *Incoming) {
		if in.Peer().Name != "e1" {
			t.Errorf("Peer() = %v, want e1", in.Peer())
		}
		got <- in.Flow()
		if in.Flow().Port == 81 {
			in.Reject(ResultNoRoute)
			return
		}
		c, err := in.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		echo(c)
	})
	if s.Peer().Name != "e2" || s.Carrier() != via {
		t.Errorf("Peer() = %v over %q, want e2 over %q", s.Peer(), s.Carrier(), via)
	}
	want := testFlow
	want.Kind, want.Class, want.Connector = KindTCP, ClassBulk, "c7"
	c, err := s.Open(context.Background(), want)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	want.Forwarded = true
	if f := <-got; f != want {
		t.Errorf("Flow() = %+v, want %+v", f, want)
	}
	checkEcho(t, c, strings.Repeat("to another edge", 1<<16))
	ingress := Flow{Kind: KindIngress, Host: "www.keyhaven.test", Port: 443, Service: "http", Tunnel: "t1"}
	i, err := s.Open(context.Background(), ingress)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	i.Close()
	ingress.Forwarded = true
	if f := <-got; f != ingress {
		t.Errorf("Flow() = %+v, want %+v", f, ingress)
	}
	refused := testFlow
	refused.Port = 81
	if _, err := s.Open(context.Background(), refused); !errors.Is(err, ErrNoRoute) {
		t.Errorf("Open: %v, want ErrNoRoute", err)
	}
	<-got
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := s.Probe(ctx); err != nil {
		t.Errorf("Probe: %v", err)
	}
	// The other edge stops: the flow that is open goes on.
	stopped := make(chan error, 1)
	go func() { stopped <- e.stop() }()
	select {
	case <-s.Draining():
	case <-time.After(patience):
		t.Fatal("not told of the drain")
	}
	checkEcho(t, c, "still here")
	c.CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := <-stopped; err != nil {
		t.Errorf("Serve: %v", err)
	}
	<-s.Done()
	if err := s.Err(); !errors.Is(err, &SessionError{Reason: CloseDrained}) && !errors.Is(err, &SessionError{Reason: CloseDrained, Remote: true}) {
		t.Errorf("Err() = %v, want drained", err)
	}
}

// TestPeerRefusals: nobody but an edge that Peer admits becomes one, and no peer edge becomes a connector.
func TestPeerRefusals(t *testing.T) { overBoth(t, testPeerRefusals) }

func testPeerRefusals(t *testing.T, via Carrier) {
	p, other := newPKI(t), newPKI(t)
	listen := func(peer func(context.Context, mtls.Identity, *x509.Certificate) error) *edgeFixture {
		return startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e2", 0), Admit: admitAll, Peer: peer})
	}
	edge, connector := p.source(mtls.KindEdge, "e1", 0), p.source(mtls.KindConnector, "c1", 0)
	for name, tt := range map[string]struct {
		peer func(context.Context, mtls.Identity, *x509.Certificate) error
		src  *mtls.Source
		want error // nil: any
	}{
		"nil Peer":          {nil, edge, nil},
		"refused":           {func(context.Context, mtls.Identity, *x509.Certificate) error { return ErrRevoked }, edge, ErrRevoked},
		"connector":         {admitPeers, connector, ErrCertificate},
		"another authority": {admitPeers, other.source(mtls.KindEdge, "e1", 0), nil},
	} {
		t.Run(name, func(t *testing.T) {
			e := listen(tt.peer)
			s, err := DialPeer(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via, Identity: tt.src})
			if err == nil {
				s.Close(CloseShutdown)
				t.Fatal("DialPeer succeeded")
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("DialPeer: %v, want %v", err, tt.want)
			}
		})
	}
	t.Run("no handler", func(t *testing.T) {
		e := listen(admitPeers)
		s, err := DialPeer(context.Background(), DialConfig{Addr: e.ln.Addr().String(), Carrier: via, Identity: edge})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close(CloseShutdown)
		if _, err := s.Open(context.Background(), testFlow); !errors.Is(err, ErrUnsupported) {
			t.Errorf("Open: %v, want ErrUnsupported", err)
		}
	})
	// A connector has one stream.
	t.Run("connector opens a stream", func(t *testing.T) {
		e := listen(admitPeers)
		st, car, shut, err := rawDial(t, via, e, connectorTLS(connector))
		if err != nil {
			t.Fatal(err)
		}
		defer shut()
		defer car.close(CloseShutdown)
		good, _ := appendRegister(nil, testRegistration)
		if _, err := exchangeRegister(st, good, patience); err != nil {
			t.Fatal(err)
		}
		more, err := car.openStream()
		if err == nil {
			more.Write([]byte("x"))
			<-car.done()
		} else if via == CarrierQUIC {
			t.Errorf("openStream: %v", err)
		}
	})
}
