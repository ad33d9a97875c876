package connector

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/connector/ingress"
	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/tunnel"
)

// Rules from an edge reach what the list permits in any network, and nothing special by its name.
func TestIngressPermit(t *testing.T) {
	t.Parallel()
	a, err := NewAllow([]Rule{
		{VNet: "red", To: "10.1.0.0/16", Ports: []Ports{{80, 80}}},
		{To: "*.corp", Ports: []Ports{{443, 443}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	p := permit{a}
	for _, tt := range []struct {
		name, to string
		want     bool
	}{
		{"", "10.1.2.3:80", true},
		{"", "10.1.2.3:81", false},
		{"", "10.2.0.1:80", false},
		{"web.corp", "192.0.2.1:443", true},
		{"web.corp", "10.1.2.3:80", true},
		{"web.corp", "127.0.0.1:443", false},
		{"web.corp", "169.254.169.254:443", false},
		{"web.other", "192.0.2.1:443", false},
	} {
		if got := p.Addr(tt.name, netip.MustParseAddrPort(tt.to)); got != tt.want {
			t.Errorf("%s at %s: got %t, want %t", tt.name, tt.to, got, tt.want)
		}
	}
	if !p.Name("web.corp", 443) || p.Name("web.corp", 444) || !p.Name("anything", 80) {
		t.Error("names: got something else than what could resolve to a permitted address")
	}
	if none := (permit{nil}); none.Name("a", 80) || none.Addr("", netip.MustParseAddrPort("10.1.2.3:80")) {
		t.Error("without a list something is permitted")
	}
}

// answer is what an edge's flow came to.
type answer struct {
	flow   tunnel.Flow
	result tunnel.Result
	conn   tunnel.Conn
}

func (a *answer) Flow() tunnel.Flow          { return a.flow }
func (a *answer) Cancelled() <-chan struct{} { return nil }
func (a *answer) Accept() (tunnel.Conn, error) {
	if a.conn == nil {
		return nil, errors.New("gone")
	}
	return a.conn, nil
}
func (a *answer) AcceptPacket() (tunnel.PacketConn, error) { return nil, errors.New("no packets") }
func (a *answer) Reject(r tunnel.Result) error             { a.result = r; return nil }

func TestIngressFlows(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c) //nolint:errcheck // an echo
			c.Close()
		}
	}()
	down := freeAddr(t)
	rules, err := ingressconf.Parse(fmt.Appendf(nil, `ingress:
  - {hostname: bytes.test, service: "tcp://%s"}
  - {hostname: down.test, service: "tcp://%s"}
  - service: hello_world
`, ln.Addr(), down))
	if err != nil {
		t.Fatal(err)
	}
	h, err := ingress.New(ingress.HandlerConfig{Local: rules})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close() //nolint:errcheck // nothing is left
	serve := func(h *ingress.Handler, service, host, say string) (tunnel.Result, string) {
		c := &Connector{cfg: Config{Ingress: h}, log: slog.New(slog.DiscardHandler), metrics: newMetrics()}
		c.SetLimits(Limits{})
		mine, theirs := tcpPair(t)
		defer mine.Close()
		a := &answer{flow: tunnel.Flow{Kind: tunnel.KindIngress, Service: service, Host: host, Port: 443}, conn: theirs}
		done := make(chan struct{})
		go func() { defer close(done); c.handle(context.Background(), a) }()
		fmt.Fprint(mine, say)
		mine.CloseWrite() //nolint:errcheck // the answer shows it
		if host == "bytes.test" || service == "http" {
			b, _ := io.ReadAll(mine)
			<-done
			return a.result, string(b)
		}
		<-done
		theirs.Close()
		return a.result, ""
	}
	if r, got := serve(h, "tcp", "bytes.test", "hello"); r != tunnel.ResultOK || got != "hello" {
		t.Errorf("bytes: got %v, %q", r, got)
	}
	if r, got := serve(h, "http", "a.test", "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n"); r != tunnel.ResultOK || !strings.Contains(got, "Hello, world") {
		t.Errorf("requests: got %v, %q", r, got)
	}
	for _, tt := range []struct {
		h             *ingress.Handler
		service, host string
		want          tunnel.Result
	}{
		{h, "tcp", "a.test", tunnel.ResultNoRoute},
		{h, "tcp", "down.test", tunnel.ResultRefused},
		{h, "udp", "a.test", tunnel.ResultUnsupported},
		{nil, "tcp", "a.test", tunnel.ResultUnsupported},
	} {
		if r, _ := serve(tt.h, tt.service, tt.host, ""); r != tt.want {
			t.Errorf("%s %s: got %v, want %v", tt.service, tt.host, r, tt.want)
		}
	}
}

func tcpPair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

func startIngress(t *testing.T, cfg ingress.HandlerConfig) *ingress.Handler {
	t.Helper()
	h, err := ingress.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// Packets reach the service of the rule for their host, which moves from session to session with its flow as an association
// in a network does.
func TestIngressPackets(t *testing.T) {
	o := startUDP(t, "127.0.0.1:0")
	for _, bandwidth := range []string{"", ", bandwidth: 1MB/s"} {
		rules, err := ingressconf.Parse(fmt.Appendf(nil, "ingress:\n  - {hostname: coap.test, service: 'udp://%s'%s}\n  - {hostname: bytes.test, service: 'tcp://127.0.0.1:1'}\n  - service: hello_world\n", o.addr, bandwidth))
		if err != nil {
			t.Fatal(err)
		}
		// The rules of the connector's own file are its owner's word: the empty allow-list does not bound them.
		e, c := udpSite(t, Config{Ingress: startIngress(t, ingress.HandlerConfig{Local: rules}), Allow: mustAllow(t)})
		flow := tunnel.Flow{Kind: tunnel.KindIngressUDP, Service: "udp", Host: "coap.test", Port: 5683, ID: [16]byte{1}}
		before := len(o.sources())
		f := openPackets(t, e.session(t), flow)
		for _, n := range []int{0, 1, 1200, 9000, 60_000} {
			ask(t, f, make([]byte, n))
		}
		again := openPackets(t, e.session(t), flow)
		f.SetReadDeadline(time.Now().Add(patience))
		if _, err := tunnel.ReceivePacket(f); err != io.EOF {
			t.Errorf("the older flow: got %v, want io.EOF", err)
		}
		ask(t, again, []byte("hello"))
		if got := len(o.sources()) - before; got != 1 {
			t.Errorf("packets came from %d ports, want one", got)
		}
		for host, want := range map[string]error{"bytes.test": tunnel.ErrNoRoute, "other.test": tunnel.ErrNoRoute} {
			flow := flow
			flow.Host, flow.ID = host, [16]byte{}
			if _, err := tryPackets(t, e.session(t), flow); !errors.Is(err, want) {
				t.Errorf("%s: got %v, want %v", host, err, want)
			}
		}
		flow.Service, flow.ID = "tcp", [16]byte{}
		if _, err := tryPackets(t, e.session(t), flow); !errors.Is(err, tunnel.ErrUnsupported) {
			t.Errorf("packets of another service: got %v, want ErrUnsupported", err)
		}
		again.Close()
		eventually(t, "no flow is left", func() bool { return c.flows.len() == 0 })
	}
	e, _ := udpSite(t, Config{})
	if _, err := tryPackets(t, e.session(t), tunnel.Flow{Kind: tunnel.KindIngressUDP, Service: "udp", Host: "coap.test", Port: 1}); !errors.Is(err, tunnel.ErrUnsupported) {
		t.Errorf("without an ingress: got %v, want ErrUnsupported", err)
	}
}

// Rules from the edge reach with packets what the allow-list permits, as long as it does.
func TestIngressPacketsOfTheEdge(t *testing.T) {
	o := startUDP(t, "127.0.0.1:0")
	h := startIngress(t, ingress.HandlerConfig{Remote: true})
	e, c := udpSite(t, Config{Ingress: h})
	if err := h.Configure(t.Context(), 1, fmt.Appendf(nil, `{"ingress":[{"hostname":"coap.test","service":"udp://%s"},{"service":"http_status:404"}]}`, o.addr)); err != nil {
		t.Fatal(err)
	}
	flow := tunnel.Flow{Kind: tunnel.KindIngressUDP, Service: "udp", Host: "coap.test", Port: 5683, ID: [16]byte{1}}
	f := openPackets(t, e.session(t), flow)
	ask(t, f, []byte("hello"))
	c.SetAllow(nil)
	f.SetReadDeadline(time.Now().Add(patience))
	if _, err := tunnel.ReceivePacket(f); err != io.EOF {
		t.Errorf("after the allow-list was emptied: got %v, want io.EOF", err)
	}
	if _, err := tryPackets(t, e.session(t), flow); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("a new flow: got %v, want ErrDenied", err)
	}
}
