package keyless

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A testCA issues certificates for both ends.
type testCA struct {
	cert *x509.Certificate
	key  crypto.Signer
	pool *x509.CertPool
}

var (
	ca      = sync.OnceValue(newTestCA)
	rsaKey  = sync.OnceValue(func() *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, 2048)) })
	p256Key = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) })
	edKey   = sync.OnceValue(func() ed25519.PrivateKey {
		_, k, err := ed25519.GenerateKey(rand.Reader)
		return must(k, err)
	})
	serverCert = sync.OnceValue(func() tls.Certificate { return ca().issue("", "keyserver.test") })
	clientCert = sync.OnceValue(func() tls.Certificate { return ca().issue("spiffe://test/edge/one", "") })
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newTestCA() *testCA {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Now().AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))
	ca := &testCA{cert: must(x509.ParseCertificate(der)), key: key, pool: x509.NewCertPool()}
	ca.pool.AddCert(ca.cert)
	return ca
}

// issue makes a certificate with a fresh P-256 key.
func (ca *testCA) issue(uri, dns string) tls.Certificate {
	return ca.issueFor(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), uri, dns)
}

func (ca *testCA) issueFor(key crypto.Signer, uri, dns string) tls.Certificate {
	return ca.issueUntil(time.Now().AddDate(5, 0, 0), key, uri, dns)
}

func (ca *testCA) issueUntil(notAfter time.Time, key crypto.Signer, uri, dns string) tls.Certificate {
	// NotBefore lies before the year 2000, in which the clock of a synctest bubble starts.
	tmpl := &x509.Certificate{
		SerialNumber: must(rand.Int(rand.Reader, big.NewInt(1<<62))),
		NotBefore:    time.Unix(0, 0), NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
	}
	if uri != "" {
		tmpl.URIs = []*url.URL{must(url.Parse(uri))}
	}
	if dns != "" {
		tmpl.DNSNames = []string{dns}
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func serverTLS() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{serverCert()},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    ca().pool,
	}
}

func clientTLS(string) *tls.Config { return clientTLSWith(clientCert()) }

func clientTLSWith(cert tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: ca().pool, ServerName: "keyserver.test"}
}

// handlerFunc is a Handler.
type handlerFunc func(ctx context.Context, req *Request) ([]byte, error)

func (f handlerFunc) Handle(ctx context.Context, req *Request) ([]byte, error) { return f(ctx, req) }

// echo answers everything with its payload.
var echo = handlerFunc(func(_ context.Context, req *Request) ([]byte, error) { return req.Payload, nil })

// signingHandler signs with keys in memory, as a key server does.
func signingHandler(keys ...crypto.Signer) Handler {
	bySKI := map[SKI]crypto.Signer{}
	for _, k := range keys {
		bySKI[must(SKIOf(k.Public()))] = k
	}
	return handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		key, ok := bySKI[req.SKI]
		if !ok {
			return nil, ErrKeyNotFound
		}
		switch {
		case req.Opcode == OpCustom && req.CustomFunc == FuncTLSSign:
			m, err := ParseTLSSign(req.Payload)
			if err != nil {
				return nil, err
			}
			if err := CheckScheme(key.Public(), m.Version, m.Scheme); err != nil {
				return nil, ErrFormat
			}
			s := schemes[m.Scheme]
			return key.Sign(rand.Reader, digestOf(s.hash, m.Message), signOpts(s.kind, s.hash))
		case req.Opcode.IsSign():
			kind := kindPKCS1v15
			if req.Opcode >= OpRSAPSSSignSHA256 {
				kind = kindPSS
			}
			return key.Sign(rand.Reader, req.Payload, signOpts(kind, req.Opcode.Hash()))
		case req.Opcode.IsDecrypt():
			return rawDecrypt(key.(*rsa.PrivateKey), req.Payload), nil
		}
		return nil, ErrBadOpcode
	})
}

func signOpts(kind sigKind, hash crypto.Hash) crypto.SignerOpts {
	if kind == kindPSS {
		return &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: hash}
	}
	return hash
}

func rawDecrypt(k *rsa.PrivateKey, ciphertext []byte) []byte {
	m := new(big.Int).Exp(new(big.Int).SetBytes(ciphertext), k.D, k.N)
	return m.FillBytes(make([]byte, k.Size()))
}

// startServer runs s on loopback until the test ends or stop is called; stop waits and returns what Serve did.
func startServer(tb testing.TB, s *Server) (addr string, stop func() error) {
	tb.Helper()
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	return ln.Addr().String(), serveOn(tb, s, ln)
}

func serveOn(tb testing.TB, s *Server, ln net.Listener) (stop func() error) {
	if s.TLS == nil {
		s.TLS = serverTLS()
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	tb.Cleanup(func() {
		if err := stop(); err != nil {
			tb.Errorf("Serve: %v", err)
		}
	})
	return stop
}

func startClient(tb testing.TB, cfg ClientConfig) *Client {
	tb.Helper()
	if cfg.TLS == nil {
		cfg.TLS = clientTLS
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 20 * time.Second // the tests that are about time set their own
	}
	c, err := NewClient(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// dialRaw opens a connection of packets without a Client.
func dialRaw(tb testing.TB, addr string) *tls.Conn {
	tb.Helper()
	conn, err := tls.Dial("tcp", addr, clientTLS(addr))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn
}

// send writes one packet, receive reads one.
func send(tb testing.TB, conn net.Conn, id uint32, op Operation) {
	tb.Helper()
	p := Packet{Major: 1, ID: id, Operation: op}
	if _, err := conn.Write(must(p.Append(nil))); err != nil {
		tb.Fatal(err)
	}
}

func receive(tb testing.TB, r *frameReader) (uint32, Operation) {
	tb.Helper()
	h, body, err := r.next()
	if err != nil {
		tb.Fatalf("read reply: %v", err)
	}
	op, err := ParseBody(body)
	if err != nil {
		tb.Fatalf("parse reply: %v", err)
	}
	return h.ID, op
}

// eventually polls until ok or fails the test after a generous time.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	tb.Fatalf("never: %s", what)
}

func wantErr(tb testing.TB, err, want error) {
	tb.Helper()
	if !errors.Is(err, want) {
		tb.Fatalf("got error %v, want %v", err, want)
	}
}
