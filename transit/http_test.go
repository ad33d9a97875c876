package transit

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// authority makes certificates for the tests.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key}
	a.cert = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, &key.PublicKey)
	return a
}

func (a *authority) sign(tmpl *x509.Certificate, pub any) *x509.Certificate {
	a.t.Helper()
	tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent := a.cert
	if parent == nil {
		parent = tmpl
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

// issue returns PEM of a certificate and its key.
func (a *authority) issue(names ...string) (cert, key string) {
	a.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c := a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "leaf"}, DNSNames: names, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, &k.PublicKey)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return pemOf("CERTIFICATE", c.Raw), pemOf("PRIVATE KEY", der)
}

func pemOf(typ string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}))
}

func TestTLS(t *testing.T) {
	ours, other := newAuthority(t), newAuthority(t)
	f := newFake(t)
	cert, key := ours.issue("vault.example.net")
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ours.cert)
	f.http.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	f.http.EnableHTTP2 = true
	f.http.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	f.http.StartTLS()
	clientCert, clientKey := ours.issue("keyserver")
	strange, strangeKey := other.issue("keyserver")
	good := TLSConfig{
		CA:         write(t, f.dir, "ca.pem", pemOf("CERTIFICATE", ours.cert.Raw), 0o644),
		Cert:       write(t, f.dir, "cert.pem", clientCert, 0o644),
		Key:        write(t, f.dir, "key.pem", clientKey, 0o600),
		ServerName: "vault.example.net",
	}
	for name, test := range map[string]struct {
		set func(*TLSConfig)
		ok  bool
	}{
		"good":               {func(*TLSConfig) {}, true},
		"other authority":    {func(c *TLSConfig) { c.CA = write(t, f.dir, "other.pem", pemOf("CERTIFICATE", other.cert.Raw), 0o644) }, false},
		"system authorities": {func(c *TLSConfig) { c.CA = "" }, false},
		"other name":         {func(c *TLSConfig) { c.ServerName = "elsewhere.example.net" }, false},
		"address as name":    {func(c *TLSConfig) { c.ServerName = "" }, false},
		"no client":          {func(c *TLSConfig) { c.Cert, c.Key = "", "" }, false},
		"strange client": {func(c *TLSConfig) {
			c.Cert, c.Key = write(t, f.dir, "s.pem", strange, 0o644), write(t, f.dir, "s-key.pem", strangeKey, 0o600)
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := f.config()
			cfg.TLS = good
			test.set(&cfg.TLS)
			b, err := Open(context.Background(), cfg)
			if test.ok != (err == nil) || err != nil && !errors.Is(err, signer.ErrUnavailable) {
				t.Fatalf("got %v, want success: %v", err, test.ok)
			}
			if err != nil {
				return
			}
			defer b.Close()
			keys, err := b.Keys(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if err := signVerified(context.Background(), keys[0]); err != nil {
				t.Error(err)
			}
		})
	}
}

// An http.Server that is restarted leaves kept connections behind that are dead. No signature is lost by it.
func TestDeadConnections(t *testing.T) {
	f := newFake(t)
	var mu sync.Mutex
	var conns []net.Conn
	f.http.Config.ConnState = func(c net.Conn, s http.ConnState) {
		if s == http.StateNew {
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
		}
	}
	_, k := f.open(f.config())
	for range 20 {
		if err := signVerified(context.Background(), k); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		for _, c := range conns {
			c.(*net.TCPConn).SetLinger(0) // a reset, as of a host that forgot
			c.Close()
		}
		conns = nil
		mu.Unlock()
	}
}

// A redirection is not followed, not even to the same host: the login would go along.
func TestRedirections(t *testing.T) {
	other := newFake(t)
	other.http.Start()
	other.sign = func(_ http.ResponseWriter, r *http.Request, _ *signRequest) { t.Errorf("followed to %s", r.URL) }
	for _, status := range []int{301, 302, 303, 307, 308} {
		f := newFake(t)
		f.sign = func(w http.ResponseWriter, r *http.Request, _ *signRequest) {
			http.Redirect(w, r, other.http.URL+r.URL.Path, status)
		}
		_, k := f.open(f.config())
		err := signVerified(context.Background(), k)
		if !errors.Is(err, signer.ErrUnavailable) || !strings.Contains(err.Error(), strings.TrimPrefix(other.http.URL, "http://")) {
			t.Errorf("%d: got %v, want ErrUnavailable with the other host", status, err)
		}
	}
}

// TestWrapTTL sets the one variable that the library asks at each request. With it, answers would be wrapped.
func TestWrapTTL(t *testing.T) {
	t.Setenv("VAULT_WRAP_TTL", "60s")
	f := newFake(t)
	inner := f.http.Config.Handler
	f.http.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ttl := r.Header.Get("X-Vault-Wrap-TTL"); ttl != "" {
			t.Errorf("%s is to be wrapped for %s", r.URL.Path, ttl)
		}
		inner.ServeHTTP(w, r)
	})
	_, k := f.open(f.config())
	if err := signVerified(t.Context(), k); err != nil {
		t.Error(err)
	}
}

func TestReadBounded(t *testing.T) {
	for size, ok := range map[int]bool{0: true, 1: true, maxAnswer: true, maxAnswer + 1: false, 2 * maxAnswer: false} {
		got, err := readBounded(bytes.NewReader(make([]byte, size)))
		if (err == nil) != ok || len(got) != size && ok || got != nil && !ok {
			t.Errorf("%d bytes: got %d, %v", size, len(got), err)
		}
	}
}

// A login that does not come in a request's time is the server's failure, for which another home is asked, and not the end of the caller's time.
func TestNoNewLoginInTime(t *testing.T) {
	f := newFake(t)
	cfg := f.config()
	cfg.Timeout = 300 * time.Millisecond
	f.sign = func(w http.ResponseWriter, _ *http.Request, _ *signRequest) {
		f.silent.Store(true)
		http.Error(w, `{"errors":["permission denied"]}`, http.StatusForbidden)
	}
	b, k := f.open(cfg)
	_, err := k.Sign(t.Context(), p256, make([]byte, 32))
	if !errors.Is(err, signer.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// The configuration's secrets are in no line of the log and in no form of the backend.
func TestCanary(t *testing.T) {
	var log bytes.Buffer
	f := newFake(t)
	cfg := f.config()
	cfg.Logger = slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	f.sign = func(w http.ResponseWriter, r *http.Request, _ *signRequest) {
		http.Error(w, `{"errors":["your token is `+r.Header.Get("X-Vault-Token")+`"]}`, http.StatusForbidden)
	}
	b, k := f.open(cfg)
	err := signVerified(context.Background(), k)
	if !errors.Is(err, ErrPermission) {
		t.Fatalf("got %v, want ErrPermission", err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if text := err.Error() + log.String(); strings.Contains(text, "canary") {
		t.Errorf("a secret is shown: %s", text)
	}
}

// A certificate that is stored with the key is known; one of another key is not.
func TestStoredCertificate(t *testing.T) {
	a := newAuthority(t)
	f := newFake(t)
	cert := a.sign(&x509.Certificate{Subject: pkix.Name{CommonName: "www"}, DNSNames: []string{"www.example.com"}}, &f.key.PublicKey)
	der, err := x509.MarshalPKIXPublicKey(&f.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		chain string
		want  bool
	}{
		"its own":      {pemOf("CERTIFICATE", cert.Raw) + pemOf("CERTIFICATE", a.cert.Raw), true},
		"another's":    {pemOf("CERTIFICATE", a.cert.Raw), false},
		"none":         {"", false},
		"no PEM":       {"canary", false},
		"no X.509":     {pemOf("CERTIFICATE", []byte{1}), false},
		"another type": {pemOf("PRIVATE KEY", cert.Raw), false},
	} {
		t.Run(name, func(t *testing.T) {
			f.info = map[string]any{"keys": map[string]any{"1": map[string]any{"public_key": pemOf("PUBLIC KEY", der), "certificate_chain": test.chain}}}
			_, k := f.open(f.config())
			if got := k.Info().Certificate; (got != nil) != test.want {
				t.Errorf("got %v, want one: %v", got, test.want)
			}
		})
	}
}
