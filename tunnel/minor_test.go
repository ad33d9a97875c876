package tunnel

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// TestOldPeer has each side meet a peer of minor version 0: all that there was then works, and what came later is refused.
func TestOldPeer(t *testing.T) {
	for name, tt := range map[string]struct{ edge, connector bool }{
		"old edge": {true, false}, "old connector": {false, true}, "both old": {true, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPKI(t)
			src := p.source(mtls.KindConnector, "c1", 0)
			lc := ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll, DrainTimeout: patience, minor0: tt.edge,
				Renew: func(_ context.Context, peer mtls.Identity, csr []byte) ([][]byte, error) {
					return p.ca.IssueCSR(csr, peer, 0)
				}}
			e := startEdge(t, lc)
			dc := dialConfig(e, src, accept(echo))
			dc.minor0 = tt.connector
			dc.Limits.KeepAlive = 50 * time.Millisecond
			dc.OnConfig = func(context.Context, uint64, []byte) error { return nil }
			dc.OnDevice = func([]byte) []byte { t.Error("OnDevice called"); return nil }
			dc.OnBulk = func(int) { t.Error("OnBulk called") }
			dc.OnEdges = func([]string) { t.Error("OnEdges called") }
			c := startConnector(t, dc)
			s := e.session()
			if s.Minor() != 0 || c.Minor() != 0 {
				t.Fatalf("minor versions %d, %d; want 0", s.Minor(), c.Minor())
			}
			flow := open(t, s, testFlow)
			checkEcho(t, flow, "as ever")
			if err := src.Renew(context.Background(), c.Renew); err != nil {
				t.Errorf("Renew: %v", err)
			}
			for _, kind := range []FlowKind{KindUDP, KindICMP, KindIngress, KindIngressUDP} {
				f := Flow{Kind: kind, VNet: "default", Host: "10.0.0.7", Port: 1}
				if kind == KindIngress || kind == KindIngressUDP {
					f.VNet, f.Service = "", "http"
				}
				if _, err := s.Open(context.Background(), f); !errors.Is(err, ErrUnsupported) {
					t.Errorf("kind %d: Open: %v, want ErrUnsupported", kind, err)
				}
			}
			if err := s.Configure(context.Background(), 1, []byte("{}")); !errors.Is(err, ErrUnsupported) {
				t.Errorf("Configure: %v, want ErrUnsupported", err)
			}
			if _, err := s.Device(context.Background(), nil); !errors.Is(err, ErrUnsupported) {
				t.Errorf("Device: %v, want ErrUnsupported", err)
			}
			s.AskBulk(3)
			s.TellEdges([]string{"edge.keyhaven.test:7844"})
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if _, err := c.Probe(ctx); err != nil {
				t.Errorf("connector's Probe: %v", err)
			}
			if _, err := s.Probe(ctx); err != nil {
				t.Errorf("edge's Probe: %v", err)
			}
			time.Sleep(200 * time.Millisecond) // some pings
			checkEcho(t, flow, "still as ever")
			flow.Close()
			if err := c.Drain(ctx); err != nil {
				t.Errorf("Drain: %v", err)
			}
		})
	}
}

// What a program of minor version 0 wrote for testRegistration, and for a flow to 10.20.0.20 port 8080 of the network "default".
const (
	oldRegister = "0100003001010010303132333435363738396162636465660200010103000676302e302e3104000473697465050005616d643634"
	oldFlow     = "0101001c01000764656661756c7402000a31302e32302e302e32300300021f90"
)

// TestOldFrames: an old peer must be able to skip all that is new in registrations, and skips the new frames.
func TestOldFrames(t *testing.T) {
	reg := testRegistration
	reg.Minor, reg.Role, reg.Connections = protocolMinor, RoleBulk, 2
	b, err := appendRegister(nil, reg)
	if err != nil {
		t.Fatal(err)
	}
	was, err := hex.DecodeString(oldRegister)
	if err != nil {
		t.Fatal(err)
	}
	old := testRegistration
	old.Connections = 4 // as many as old connectors always had
	if got, err := parseRegister(was[frameHeaderLen:]); err != nil || got != old {
		t.Errorf("an old connector's registration is read as %+v, %v; want %+v", got, err, old)
	}
	if !bytes.HasPrefix(b[frameHeaderLen:], was[frameHeaderLen:]) {
		t.Error("the old items have changed")
	}
	flow := Flow{Kind: KindTCP, VNet: "default", Host: "10.20.0.20", Port: 8080}
	if f, err := appendFlow(nil, flow, false); err != nil || hex.EncodeToString(f) != oldFlow {
		t.Errorf("a flow's header is %x, %v; want %s, as old connectors read it", f, err, oldFlow)
	}
	for it := readItems(b[len(was):], nil); ; {
		tag, _, ok, err := it.next()
		if err != nil || !ok {
			break
		}
		if tag < tagSkippable {
			t.Errorf("item 0x%02x cannot be skipped", tag)
		}
	}
	if got, err := parseRegister(b[frameHeaderLen:]); err != nil || got != reg {
		t.Errorf("parseRegister = %+v, %v; want %+v", got, err, reg)
	}
}

func TestConfigure(t *testing.T) { overBoth(t, testConfigure) }

func testConfigure(t *testing.T, via Carrier) {
	type config struct {
		version uint64
		body    string
	}
	got := make(chan config, 1)
	_, c, s := pairOver(t, via, accept(echo), func(_ *ListenConfig, dc *DialConfig) {
		dc.OnConfig = func(_ context.Context, version uint64, body []byte) error {
			if version == 13 {
				return fmt.Errorf("rule 2: \x1b[31mno service")
			}
			got <- config{version, string(body)}
			return nil
		}
	})
	for _, want := range []config{{1, ""}, {1 << 60, strings.Repeat("x", maxConfigLen)}} {
		if err := s.Configure(context.Background(), want.version, []byte(want.body)); err != nil {
			t.Fatalf("Configure: %v", err)
		}
		if got := <-got; got != want {
			t.Errorf("OnConfig got version %d, %d bytes; want %d, %d", got.version, len(got.body), want.version, len(want.body))
		}
	}
	err := s.Configure(context.Background(), 13, []byte("bad"))
	if ce, ok := errors.AsType[*ConfigError](err); !ok || ce.Version != 13 || ce.Text != "rule 2: ?[31mno service" {
		t.Errorf("Configure: %#v, want the refusal's text", err)
	}
	if err := s.Configure(context.Background(), 1, make([]byte, maxConfigLen+1)); err == nil {
		t.Error("a configuration above the limit was sent")
	}
	eventually(t, "no flows", func() bool { return s.Flows() == 0 && c.Flows() == 0 })

	_, _, plain := pairOver(t, via, accept(echo))
	if err := plain.Configure(context.Background(), 1, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("Configure of a connector without OnConfig: %v, want ErrUnsupported", err)
	}
}

func TestBulkAndEdges(t *testing.T) { overBoth(t, testBulkAndEdges) }

func testBulkAndEdges(t *testing.T, via Carrier) {
	bulk, edges := make(chan int, 1), make(chan []string, 1)
	_, c, s := pairOver(t, via, accept(echo), func(_ *ListenConfig, dc *DialConfig) {
		dc.Registration.Role, dc.Registration.Connections = RoleBulk, 2
		dc.OnBulk = func(n int) { bulk <- n }
		dc.OnEdges = func(addrs []string) { edges <- addrs }
	})
	if s.Role() != RoleBulk || c.Role() != RoleBulk || s.Registration().Connections != 2 {
		t.Errorf("roles %v, %v, %d connections; want bulk, bulk, 2", s.Role(), c.Role(), s.Registration().Connections)
	}
	for n, want := range map[int]int{3: 3, 0: 0, -1: 0, 1000: 255} {
		s.AskBulk(n)
		if got := <-bulk; got != want {
			t.Errorf("AskBulk(%d): told %d, want %d", n, got, want)
		}
	}
	many := make([]string, 300)
	for i := range many {
		many[i] = fmt.Sprintf("edge%d.keyhaven.test:7844", i)
	}
	for _, want := range [][]string{{"a:1", "[2001:db8::1]:7844"}, many} {
		s.TellEdges(want)
		if got := <-edges; !slices.Equal(got, want[:min(len(want), maxEdges)]) {
			t.Errorf("told %q, want %q", got, want)
		}
	}
}
