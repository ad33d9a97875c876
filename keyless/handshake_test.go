package keyless

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// visit makes one handshake and one exchange between a visitor and an edge whose key is remote.
func visit(tb testing.TB, visitor, edge *tls.Config) (tls.ConnectionState, error) {
	tb.Helper()
	a, b := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer b.Close()
		conn := tls.Server(b, edge)
		if err := conn.HandshakeContext(tb.Context()); err == nil {
			io.WriteString(conn, "hello")
			conn.Close()
		}
	})
	defer wg.Wait()
	defer a.Close()
	conn := tls.Client(a, visitor)
	if err := conn.Handshake(); err != nil {
		return tls.ConnectionState{}, err
	}
	got, err := io.ReadAll(conn)
	if err == nil && string(got) != "hello" {
		err = fmt.Errorf("got %q", got)
	}
	return conn.ConnectionState(), err
}

// edgeConfig serves the certificate of local with the remote key, bound to each handshake.
func edgeConfig(local crypto.Signer, key *Key) *tls.Config {
	cert := ca().issueFor(local, "", "www.keyhaven.test")
	return &tls.Config{
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &tls.Certificate{
				Certificate: cert.Certificate,
				PrivateKey:  key.For(hello.Context(), hello.ServerName, netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::1")),
			}, nil
		},
		CipherSuites: []uint16{
			tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_RSA_WITH_AES_128_GCM_SHA256,
		},
	}
}

func TestHandshakes(t *testing.T) {
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	keys := map[string]crypto.Signer{"P-256": p256Key(), "P-384": p384, "RSA-2048": rsaKey(), "Ed25519": edKey()}
	var last atomic.Pointer[Operation]
	inner := signingHandler(p256Key(), p384, rsaKey(), edKey())
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(ctx context.Context, req *Request) ([]byte, error) {
		op := req.Operation
		op.Payload = nil
		last.Store(&op)
		return inner.Handle(ctx, req)
	})})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	for name, local := range keys {
		for _, plain := range []bool{false, true} {
			key := must(c.Key(local.Public(), KeyOptions{Plain: plain}))
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				for _, curve := range []tls.CurveID{tls.X25519, tls.CurveP256, tls.CurveP384, tls.CurveP521, tls.X25519MLKEM768} {
					if curve == tls.X25519MLKEM768 && version == tls.VersionTLS12 {
						continue
					}
					t.Run(fmt.Sprintf("%s/plain=%v/%s/%s", name, plain, tls.VersionName(version), curve), func(t *testing.T) {
						last.Store(nil)
						visitor := &tls.Config{
							RootCAs: ca().pool, ServerName: "www.keyhaven.test",
							MinVersion: version, MaxVersion: version, CurvePreferences: []tls.CurveID{curve},
						}
						cs, err := visit(t, visitor, edgeConfig(local, key))
						if err != nil {
							t.Fatal(err)
						}
						if cs.Version != version || cs.CurveID != curve {
							t.Errorf("got %s with %s", tls.VersionName(cs.Version), cs.CurveID)
						}
						op := last.Load()
						if op == nil {
							t.Fatal("the key server was not asked")
						}
						if (op.CustomFunc == FuncTLSSign) == plain || op.SNI != "www.keyhaven.test" ||
							op.ClientIP.String() != "192.0.2.7" || op.ServerIP.String() != "2001:db8::1" || op.SKI != key.SKI() {
							t.Errorf("the request was %+v", op)
						}
					})
				}
			}
		}
	}
}

// TLS 1.2 without ECDHE: offered only where decryption is allowed.
func TestHandshakeStaticRSA(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: signingHandler(rsaKey())})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	visitor := &tls.Config{
		RootCAs: ca().pool, ServerName: "www.keyhaven.test",
		MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256},
	}
	allowed := must(c.Key(rsaKey().Public(), KeyOptions{AllowDecrypt: true}))
	cs, err := visit(t, visitor, edgeConfig(rsaKey(), allowed))
	if err != nil {
		t.Fatal(err)
	}
	if cs.CipherSuite != tls.TLS_RSA_WITH_AES_128_GCM_SHA256 {
		t.Errorf("got %s", tls.CipherSuiteName(cs.CipherSuite))
	}
	closed := must(c.Key(rsaKey().Public(), KeyOptions{}))
	if _, err := visit(t, visitor, edgeConfig(rsaKey(), closed)); err == nil || !strings.Contains(err.Error(), "handshake failure") {
		t.Errorf("without AllowDecrypt: got %v, want a handshake failure", err)
	}
	if _, ok := closed.For(t.Context(), "", netip.Addr{}, netip.Addr{}).(crypto.Decrypter); ok {
		t.Error("without AllowDecrypt the handshake's signer decrypts")
	}
}

// Visitors who come together while a server dies under them do not notice.
func TestHandshakesSurviveKilledServer(t *testing.T) {
	var addrs []string
	var stops []func() error
	for range 2 {
		addr, stop := startServer(t, &Server{Handler: signingHandler(p256Key())})
		addrs, stops = append(addrs, addr), append(stops, stop)
	}
	c := startClient(t, ClientConfig{Servers: addrs})
	edge := edgeConfig(p256Key(), must(c.Key(p256Key().Public(), KeyOptions{})))
	visitor := &tls.Config{RootCAs: ca().pool, ServerName: "www.keyhaven.test"}
	var wg sync.WaitGroup
	var done atomic.Int32
	for range 8 {
		wg.Go(func() {
			for range 10 {
				if _, err := visit(t, visitor, edge); err != nil {
					t.Error(err)
				}
				if done.Add(1) == 20 {
					wg.Go(func() { stops[0]() })
				}
			}
		})
	}
	wg.Wait()
}

func TestKeySignsOnlyTLS(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: signingHandler(p256Key(), rsaKey(), edKey())})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	ec, ed, rs := must(c.Key(p256Key().Public(), KeyOptions{})), must(c.Key(edKey().Public(), KeyOptions{})), must(c.Key(rsaKey().Public(), KeyOptions{}))
	digest := sha256.Sum256(tls13Message(32))
	pss := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	for name, try := range map[string]func() ([]byte, error){
		"digest, ECDSA":  func() ([]byte, error) { return ec.Sign(nil, digest[:], crypto.SHA256) },
		"digest, RSA":    func() ([]byte, error) { return rs.Sign(nil, digest[:], pss) },
		"message, ECDSA": func() ([]byte, error) { return ec.SignMessage(nil, []byte("pay to the bearer"), crypto.SHA256) },
		"message, Ed":    func() ([]byte, error) { return ed.Sign(nil, []byte("pay to the bearer"), crypto.Hash(0)) },
		"PKCS#1 in 1.3":  func() ([]byte, error) { return rs.SignMessage(nil, tls13Message(32), crypto.SHA256) },
		"SHA-1":          func() ([]byte, error) { return rs.SignMessage(nil, tls12Message(29), crypto.SHA1) },
		"a certificate request": func() ([]byte, error) {
			return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, ec)
		},
		"a client's auth": func() ([]byte, error) {
			return ec.SignMessage(nil, bytes.Replace(tls13Message(32), []byte("server"), []byte("client"), 1), crypto.SHA256)
		},
	} {
		if _, err := try(); !errors.Is(err, ErrNotTLS) {
			t.Errorf("%s: got %v, want ErrNotTLS", name, err)
		}
	}
	if _, err := ed.Sign(nil, tls13Message(32), crypto.Hash(0)); err != nil {
		t.Errorf("Ed25519's Sign of a TLS message: %v", err)
	}
	if _, err := rs.SignMessage(nil, tls13Message(48), pss); err != nil {
		t.Errorf("PSS: %v", err)
	}
}

func TestKeyOptionsRefused(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: signingHandler(p256Key(), rsaKey(), edKey())})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	plain := func(k crypto.Signer) *Key { return must(c.Key(k.Public(), KeyOptions{Plain: true})) }
	ec, ed, rs := plain(p256Key()), plain(edKey()), plain(rsaKey())
	for name, try := range map[string]func() ([]byte, error){
		"PSS salt auto": func() ([]byte, error) { return rs.Sign(nil, make([]byte, 32), &rsa.PSSOptions{Hash: crypto.SHA256}) },
		"PSS salt 20": func() ([]byte, error) {
			return rs.Sign(nil, make([]byte, 32), &rsa.PSSOptions{SaltLength: 20, Hash: crypto.SHA256})
		},
		"PSS with SHA-224": func() ([]byte, error) {
			return rs.Sign(nil, make([]byte, 28), &rsa.PSSOptions{SaltLength: -1, Hash: crypto.SHA224})
		},
		"RSA, no hash":   func() ([]byte, error) { return rs.Sign(nil, make([]byte, 32), crypto.Hash(0)) },
		"ECDSA, no hash": func() ([]byte, error) { return ec.Sign(nil, make([]byte, 32), nil) },
		"ECDSA, short":   func() ([]byte, error) { return ec.Sign(nil, make([]byte, 31), crypto.SHA256) },
		"ECDSA, SHA3":    func() ([]byte, error) { return ec.Sign(nil, make([]byte, 32), crypto.SHA3_256) },
		"Ed25519ph":      func() ([]byte, error) { return ed.Sign(nil, make([]byte, 64), crypto.SHA512) },
	} {
		if got, err := try(); err == nil {
			t.Errorf("%s: got %x", name, got)
		}
	}
	if _, err := rs.Sign(nil, make([]byte, 36), crypto.MD5SHA1); err != nil {
		t.Errorf("MD5SHA1, as TLS 1.1 signs: %v", err)
	}
	if _, err := c.Key("not a key", KeyOptions{}); err == nil {
		t.Error("a key of type string was accepted")
	}
}

// A server with another key, or one that signs wrongly, is found out before the signature is used.
func TestKeyVerifies(t *testing.T) {
	wrong := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		digest := sha256.Sum256(req.Payload[2:])
		return wrong.Sign(rand.Reader, digest[:], crypto.SHA256)
	})})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	_, err := must(c.Key(p256Key().Public(), KeyOptions{})).SignMessage(nil, tls13Message(32), crypto.SHA256)
	wantErr(t, err, ErrSignature)
	if _, err := must(c.Key(p256Key().Public(), KeyOptions{NoVerify: true})).SignMessage(nil, tls13Message(32), crypto.SHA256); err != nil {
		t.Errorf("NoVerify: %v", err)
	}
}

// The handshake's context ends the wait for a signature.
func TestKeyForHonoursContext(t *testing.T) {
	started := make(chan struct{})
	addr, _ := startServer(t, &Server{DrainTimeout: time.Millisecond, Handler: handlerFunc(func(ctx context.Context, _ *Request) ([]byte, error) {
		close(started)
		<-ctx.Done()
		return nil, ctx.Err()
	})})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-started
		cancel()
	}()
	key := must(c.Key(p256Key().Public(), KeyOptions{}))
	_, err := crypto.SignMessage(key.For(ctx, "x.test", netip.Addr{}, netip.Addr{}), nil, tls13Message(32), crypto.SHA256)
	wantErr(t, err, context.Canceled)
}
