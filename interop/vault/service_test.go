package vault

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/interop/vault/server"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

const edgeID = "spiffe://keys.example/edge/one"

// authority issues the certificates of a test.
type authority struct {
	t    testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t), pool: x509.NewCertPool()}
	a.cert = a.certify(&a.key.PublicKey, "", "")
	a.pool.AddCert(a.cert)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// certify makes a certificate over any public key; without a name, the authority's own.
func (a *authority) certify(pub crypto.PublicKey, dns, uri string) *x509.Certificate {
	a.t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test " + dns + uri},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
	}
	parent := a.cert
	switch {
	case dns != "":
		tmpl.DNSNames = []string{dns}
	case uri != "":
		u, err := url.Parse(uri)
		if err != nil {
			a.t.Fatal(err)
		}
		tmpl.URIs = []*url.URL{u}
	default:
		tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage, parent = true, true, x509.KeyUsageCertSign, tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

func (a *authority) pair(dns, uri string) tls.Certificate {
	key := newKey(a.t)
	return tls.Certificate{Certificate: [][]byte{a.certify(&key.PublicKey, dns, uri).Raw}, PrivateKey: key}
}

// keyServer serves a registry to one client over mutual TLS and returns the client.
func keyServer(t testing.TB, a *authority, reg *signer.Registry) *keyless.Client {
	t.Helper()
	policy, err := signer.NewPolicy([]signer.ClientRule{{
		ID: edgeID, Keys: []string{"*"}, Operations: []string{"tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"www.example.com"},
	}}, signer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &keyless.Server{
		Handler: signer.NewService(signer.ServiceConfig{Registry: reg, Policy: policy}),
		TLS: &tls.Config{
			Certificates: []tls.Certificate{a.pair("keyserver.test", "")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.pool,
		},
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(ctx, ln); err != nil {
			t.Error(err)
		}
	})
	mine := a.pair("", edgeID)
	client, err := keyless.NewClient(keyless.ClientConfig{
		Servers: []string{ln.Addr().String()}, Timeout: 20 * time.Second, DialTimeout: 20 * time.Second,
		TLS: func(string) *tls.Config {
			return &tls.Config{Certificates: []tls.Certificate{mine}, RootCAs: a.pool, ServerName: "keyserver.test"}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); cancel(); wg.Wait() })
	return client
}

// registry has each key of the lists in one entry per public key, each list a home in a lane of its own.
func registry(t testing.TB, homes ...signer.Home) *signer.Registry {
	t.Helper()
	reg := signer.NewRegistry()
	if err := reg.Replace(homes); err != nil {
		t.Fatal(err)
	}
	return reg
}

// handshake has a visitor meet a TLS server whose key is behind the client.
func handshake(a *authority, client *keyless.Client, pub crypto.PublicKey, version uint16) error {
	key, err := client.Key(pub, keyless.KeyOptions{})
	if err != nil {
		return err
	}
	local := netip.MustParseAddr("127.0.0.1")
	cert := tls.Certificate{
		Certificate: [][]byte{a.certify(pub, "www.example.com", "").Raw},
		PrivateKey:  key.For(context.Background(), "www.example.com", local, local),
	}
	c, s := net.Pipe()
	defer c.Close()
	defer s.Close()
	served := make(chan error, 1)
	go func() {
		defer s.Close() // or a visitor that writes waits for ever for a server that has failed
		served <- tls.Server(s, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: version, MaxVersion: version}).Handshake()
	}()
	conn := tls.Client(c, &tls.Config{RootCAs: a.pool, ServerName: "www.example.com", MinVersion: version, MaxVersion: version})
	err = conn.Handshake()
	if err != nil {
		c.Close()
	}
	return errors.Join(err, <-served)
}

// A visitor's handshake, of both versions and with every kind of key, ends in the engine.
func TestHandshakes(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	for _, typ := range []string{"ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "rsa-2048", "ed25519"} {
		l.make(typ, typ)
	}
	b := l.open(l.config("ecdsa-p256", "ecdsa-p384", "ecdsa-p521", "rsa-2048", "ed25519"))
	all := keys(t, b, 5)
	lane := signer.NewLane(signer.LaneConfig{Name: b.Name(), Capacity: b.Capacity()})
	var homes []signer.Home
	for _, k := range all {
		homes = append(homes, signer.Home{Key: k, Lane: lane})
	}
	a := newAuthority(t)
	client := keyServer(t, a, registry(t, homes...))
	for name, k := range all {
		for version, of := range map[uint16]string{tls.VersionTLS12: "TLS 1.2", tls.VersionTLS13: "TLS 1.3"} {
			t.Run(name+" "+of, func(t *testing.T) {
				if err := handshake(a, client, k.Public(), version); err != nil {
					t.Error(err)
				}
			})
		}
	}
	t.Run("many at once", func(t *testing.T) {
		before := l.Counters()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 8 {
					if err := handshake(a, client, all["ecdsa-p256"].Public(), tls.VersionTLS13); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if got := l.Counters().SignItems - before.SignItems; got != 64 {
			t.Errorf("the engine signed %d times, want 64", got)
		}
	})
}

// The same key in the engine and in a file is one key: whatever happens to the engine, no handshake fails, and it is used again afterwards.
func TestFailOver(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	file := newKey(t)
	l.importKey("web", "ecdsa-p256", file)
	cfg := l.config("web")
	l.appRole(&cfg, lifetime(time.Hour, 0))
	cfg.Timeout = 300 * time.Millisecond
	b := l.open(cfg)
	there := keys(t, b, 1)["web"]
	if info := there.Info(); info.NeverExtractable || info.Local {
		t.Errorf("an imported key was elsewhere before: got %+v", info)
	}
	here, err := signer.NewMemoryKey(file, "web")
	if err != nil {
		t.Fatal(err)
	}
	breaker := signer.BreakerConfig{MinOpen: 50 * time.Millisecond, MaxOpen: 100 * time.Millisecond}
	reg := registry(t,
		signer.Home{Key: there, Lane: signer.NewLane(signer.LaneConfig{Name: b.Name(), Capacity: b.Capacity(), Breaker: breaker})},
		signer.Home{Key: here, Priority: 1, Lane: signer.NewLane(signer.LaneConfig{Name: "file", Capacity: 2})},
	)
	if got := reg.Entries(); len(got) != 1 || len(got[0].Homes) != 2 {
		t.Fatalf("got %v, want one key with two homes", got)
	}
	a := newAuthority(t)
	client := keyServer(t, a, reg)
	shake := func() {
		t.Helper()
		if err := handshake(a, client, &file.PublicKey, tls.VersionTLS13); err != nil {
			t.Fatal(err)
		}
	}
	used := func() bool {
		before := l.Counters().SignItems
		shake()
		return l.Counters().SignItems > before
	}
	if !used() {
		t.Error("the engine was not asked first")
	}
	for name, f := range map[string]server.Fault{
		"sealed": {Status: 503}, "connections lost": {Drop: true}, "slow": {Delay: time.Minute}, "denied": {Status: 403}, "garbage": {Status: 200, Body: "<html>"},
	} {
		t.Run(name, func(t *testing.T) {
			l.Inject(f)
			for range 10 {
				shake()
			}
			l.Clear()
			eventually(t, "the engine is used again", used)
		})
	}
	t.Run("server gone", func(t *testing.T) {
		l.http.CloseClientConnections()
		l.http.Close()
		for range 10 {
			shake()
		}
	})
}
