package check

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func source(t testing.TB, a *mtls.Authority, kind mtls.Kind, name string) *mtls.Source {
	t.Helper()
	key, csr, err := mtls.NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	chain := must(a.IssueCSR(csr, mtls.Identity{TrustDomain: a.TrustDomain(), Kind: kind, Name: name}, 0))(t)
	dir := t.TempDir()
	if err := mtls.WriteIdentity(dir, key, chain, a.RootPEM()); err != nil {
		t.Fatal(err)
	}
	return must(mtls.OpenDir(dir, nil))(t)
}

// edge runs a listener and returns where.
func edge(t testing.TB, id *mtls.Source) Edge {
	t.Helper()
	ln := must(tunnel.Listen(tunnel.ListenConfig{Addr: "127.0.0.1:0", Identity: id, DrainTimeout: time.Millisecond,
		Admit: func(context.Context, mtls.Identity, *x509.Certificate, tunnel.Registration) error {
			t.Error("the check registered")
			return nil
		}}))(t)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := ln.Serve(ctx); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	at := netip.MustParseAddrPort(ln.Addr().String())
	return Edge{at.Addr().String(), at.Port()}
}

func find(list []Finding, prefix string) Finding {
	for _, f := range list {
		if strings.HasPrefix(f.Check, prefix) {
			return f
		}
	}
	return Finding{}
}

type resolver map[string]string

func (r resolver) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	if a, ok := r[host]; ok {
		return []netip.Addr{netip.MustParseAddr(a)}, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

func TestRun(t *testing.T) {
	ours, others := must(mtls.InitAuthority(t.TempDir(), "test.example"))(t), must(mtls.InitAuthority(t.TempDir(), "other.example"))(t)
	conn := source(t, ours, mtls.KindConnector, "site")
	good, foreign := edge(t, source(t, ours, mtls.KindEdge, "e1")), edge(t, source(t, others, mtls.KindEdge, "e1"))
	deaf, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}) // a port that swallows what comes
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	silent := Edge{"127.0.0.1", deaf.LocalAddr().(*net.UDPAddr).AddrPort().Port()}

	run := func(e Edge, carrier string) []Finding {
		return Run(t.Context(), Config{Identity: conn, Edges: []Edge{e}, Carrier: carrier, Resolver: resolver{"edge.example": "127.0.0.1"}, Timeout: 2 * time.Second})
	}
	list := run(good, "auto")
	for _, check := range []string{"identity", "dns", "udp 127", "tcp 127", "clock"} {
		if f := find(list, check); f.Level != OK || f.Detail == "" || f.Remedy != "" {
			t.Errorf("%s of a good edge: %+v, want ok", check, f)
		}
	}
	for _, tt := range []struct {
		name, check, says string
		list              []Finding
	}{
		{"another installation", "udp", "another installation", run(foreign, "quic")},
		{"another installation over TCP", "tcp", "another installation", run(foreign, "tcp")},
		{"a port that swallows", "udp", "let this host send UDP", run(silent, "quic")},
		{"a closed port", "tcp", "let this host open TCP", run(silent, "tcp")},
		{"a name that is none", "dns", "resolv.conf", run(Edge{"nowhere.example", 7844}, "auto")},
	} {
		if f := find(tt.list, tt.check); f.Level != Fail || !strings.Contains(f.Remedy, tt.says) {
			t.Errorf("%s: %+v, want a failure whose remedy says %q", tt.name, f, tt.says)
		}
		if Worst(tt.list) != Fail {
			t.Errorf("%s: worst is %s, want fail", tt.name, Worst(tt.list))
		}
	}
	if f := find(run(Edge{"nowhere.example", 7844}, "auto"), "udp nowhere"); f.Check != "" {
		t.Errorf("an edge without an address was dialled: %+v", f)
	}
}

func TestRemedy(t *testing.T) {
	for _, tt := range []struct {
		err  error
		says string
	}{
		{x509.CertificateInvalidError{Reason: x509.Expired}, "clock"},
		{x509.UnknownAuthorityError{}, "another installation"},
		{errors.Join(tunnel.ErrCertificate, errors.New("tls: expired certificate")), "clocks of both hosts"},
		{tunnel.ErrCertificate, "right edge"},
		{tunnel.ErrNoAnswer, ""},
	} {
		if got := Remedy(tt.err); !strings.Contains(got, tt.says) || (tt.says == "") != (got == "") {
			t.Errorf("Remedy(%v): got %q, want it to say %q", tt.err, got, tt.says)
		}
	}
	findings := []Finding{{Check: "udp x", Level: Fail, Remedy: Remedy(x509.CertificateInvalidError{Reason: x509.Expired})}}
	if f := clock(findings)[0]; f.Level != Fail || !strings.Contains(f.Remedy, "NTP") {
		t.Errorf("clock: %+v, want a failure", f)
	}
}
