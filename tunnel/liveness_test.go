package tunnel

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

func TestProbe(t *testing.T) { overBoth(t, testProbe) }

func testProbe(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for side, probe := range map[string]func(context.Context) (time.Duration, error){"edge": s.Probe, "connector": c.Probe} {
		if d, err := probe(ctx); err != nil || d <= 0 {
			t.Errorf("%s: Probe: %v, %v", side, d, err)
		}
	}
	if s.Suspect() || c.Suspect() {
		t.Error("suspect after an answer")
	}
	if since := time.Since(s.LastHeard()); since > patience {
		t.Errorf("heard %v ago", since)
	}
	if s.Carrier() != via || c.Carrier() != via {
		t.Errorf("carriers %q, %q; want %q", s.Carrier(), c.Carrier(), via)
	}
	s.Close(CloseShutdown)
	if _, err := s.Probe(ctx); !errors.Is(err, &SessionError{Reason: CloseShutdown}) {
		t.Errorf("Probe of a closed session: %v", err)
	}
}

// relayed is an edge and a connector whose QUIC packets go through a relay.
func relayed(t *testing.T, edit func(*ListenConfig, *DialConfig)) (*relay, *connectorFixture, *Session) {
	t.Helper()
	p := newPKI(t)
	lc := ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll}
	dc := DialConfig{Carrier: CarrierQUIC, Identity: p.source(mtls.KindConnector, "c1", 0), Registration: testRegistration, Handle: accept(echo)}
	if edit != nil {
		edit(&lc, &dc)
	}
	e := startEdge(t, lc)
	r := newRelay(t, e.ln.Addr().String(), 0)
	dc.Addr = r.addr()
	c := startConnector(t, dc)
	return r, c, e.session()
}

// TestSuspect: a session is suspect while an answer is due and the path is silent, and no longer when it speaks again.
func TestSuspect(t *testing.T) {
	t.Parallel()
	r, _, s := relayed(t, nil)
	flow := open(t, s, testFlow)
	defer flow.Close()
	checkEcho(t, flow, "before")
	if s.Suspect() {
		t.Error("suspect while all is well")
	}
	r.largest.Store(1) // nothing passes
	if s.Suspect() {
		t.Error("suspect while nothing is due")
	}
	// What was still on its way may be heard after the first write or probe, which then is no longer due.
	eventually(t, "suspect", func() bool {
		flow.Write([]byte("."))
		return s.Suspect()
	})
	r.largest.Store(0)
	eventually(t, "no longer suspect", func() bool { return !s.Suspect() })

	r.largest.Store(1)
	eventually(t, "suspect after a probe", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if _, err := s.Probe(ctx); err == nil {
			return false // it had been answered just before
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Probe: %v, want the context's error", err)
		}
		return s.Suspect()
	})
	r.largest.Store(0)
}

// TestBlackHole lets large packets get lost, after they passed, while small ones pass: keep-alives and acknowledgements hold
// the session, so only pings as large as the packets can end it.
func TestBlackHole(t *testing.T) {
	t.Parallel()
	r, c, s := relayed(t, func(lc *ListenConfig, dc *DialConfig) {
		lc.Limits.IdleTimeout, dc.Limits.IdleTimeout = time.Hour, time.Hour
		dc.Limits.KeepAlive = 300 * time.Millisecond
	})
	flow := open(t, s, testFlow)
	defer flow.Close()
	checkEcho(t, flow, strings.Repeat("x", 1<<20)) // both sides find out how large packets may be
	eventually(t, "packets have grown", func() bool { return c.car.maxDatagram() > 1300 && s.car.maxDatagram() > 1300 })
	r.largest.Store(1280)
	if err := c.wait(t); !errors.Is(err, ErrPeerLost) {
		t.Errorf("Run: %v, want ErrPeerLost", err)
	}
	if r.lost.Load() == 0 {
		t.Error("no packet was lost")
	}
}

// TestSmallPackets runs where no packet of more than 1,200 bytes passes.
func TestSmallPackets(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll})
	r := newRelay(t, e.ln.Addr().String(), 0)
	r.largest.Store(smallPacket)
	dc := dialConfig(e, p.source(mtls.KindConnector, "c1", 0), accept(echo))
	dc.Addr, dc.SmallPackets = r.addr(), true
	c := startConnector(t, dc)
	s := e.session()
	flow := open(t, s, testFlow)
	defer flow.Close()
	checkEcho(t, flow, strings.Repeat("x", 1<<20))
	if got := c.car.maxDatagram(); got > smallPacket {
		t.Errorf("the connector sends datagrams of %d bytes", got)
	}
	if _, err := c.Probe(context.Background()); err != nil {
		t.Errorf("Probe: %v", err)
	}
}

// TestRebinding gives a connector another address in the middle of a flow, as a NAT may.
func TestRebinding(t *testing.T) {
	t.Parallel()
	r, c, s := relayed(t, nil)
	flow := open(t, s, testFlow)
	defer flow.Close()
	checkEcho(t, flow, "before")
	before := s.RemoteAddr().String()
	for range 3 {
		r.rebind()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		if _, err := c.Probe(ctx); err != nil {
			t.Fatalf("Probe after the address changed: %v", err)
		}
		cancel()
		checkEcho(t, flow, "the same flow")
	}
	eventually(t, "the edge sends to the new address", func() bool { return s.RemoteAddr().String() != before })
	other := open(t, s, testFlow)
	checkEcho(t, other, strings.Repeat("a new flow", 1000))
	other.Close()
}
