package edge

import (
	"bytes"
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
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"go.uber.org/goleak"

	"go.opentelemetry.io/otel/trace"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority is the public CA that visitors trust.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test Root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(240 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{cert, key}
}

// issue returns a leaf for hosts, valid for a lifetime from an hour ago.
func (a *authority) issue(t testing.TB, pub crypto.PublicKey, lifetime time.Duration, hosts ...string) []byte {
	t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), DNSNames: hosts,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lifetime - time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, pub, a.key)
	must(t, err)
	return der
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func writePEM(t testing.TB, file string, ders ...[]byte) string {
	t.Helper()
	var out []byte
	for _, der := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	must(t, os.WriteFile(file, out, 0o600))
	return file
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newKey(t testing.TB, kind string) crypto.Signer {
	t.Helper()
	var key crypto.Signer
	var err error
	switch kind {
	case "p256":
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "p384":
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "p521":
		key, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	case "rsa2048":
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	case "ed25519":
		_, key, err = ed25519.GenerateKey(rand.Reader)
	}
	must(t, err)
	return key
}

// A vault is a key server's memory: it signs what context-bound signing permits, and plain digests.
type vault struct {
	renew func(csrDER []byte) ([][]byte, error) // nil refuses
	ops   atomic.Int64
	delay atomic.Int64 // nanoseconds before each answer

	mu   sync.Mutex // guards the rest
	keys map[keyless.SKI]crypto.Signer
	last keyless.Operation // copied
}

func (v *vault) put(ski keyless.SKI, key crypto.Signer) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.keys[ski] = key
}

func (v *vault) drop(ski keyless.SKI) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.keys, ski)
}

func (v *vault) Handle(ctx context.Context, req *keyless.Request) ([]byte, error) {
	v.ops.Add(1)
	v.mu.Lock()
	v.last = keyless.Operation{TraceContext: bytes.Clone(req.TraceContext), Context: bytes.Clone(req.Context), Opcode: req.Opcode, SNI: req.SNI, ClientIP: req.ClientIP, CustomFunc: req.CustomFunc}
	key, ok := v.keys[req.SKI]
	v.mu.Unlock()
	if d := time.Duration(v.delay.Load()); d > 0 {
		sleep(ctx, d)
	}
	if req.CustomFunc == keyless.FuncRenew && v.renew != nil {
		chain, err := v.renew(req.Payload)
		return bytes.Join(chain, nil), err
	}
	if !ok {
		return nil, keyless.ErrKeyNotFound
	}
	switch {
	case req.Opcode == keyless.OpCustom && req.CustomFunc == keyless.FuncTLSSign:
		m, err := keyless.ParseTLSSign(req.Payload)
		if err != nil {
			return nil, err
		}
		return signScheme(key, m.Scheme, m.Message)
	case req.Opcode == keyless.OpRSADecrypt:
		k := key.(*rsa.PrivateKey)
		c := new(big.Int).SetBytes(req.Payload)
		return c.Exp(c, k.D, k.N).FillBytes(make([]byte, k.Size())), nil
	case req.Opcode == keyless.OpECDSASignSHA256:
		return key.Sign(rand.Reader, req.Payload, crypto.SHA256)
	}
	return nil, &keyless.Error{Code: keyless.CodeBadOpcode}
}

func (v *vault) lastOp() keyless.Operation {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.last
}

func signScheme(key crypto.Signer, scheme tls.SignatureScheme, msg []byte) ([]byte, error) {
	var opts crypto.SignerOpts
	switch scheme {
	case tls.ECDSAWithP256AndSHA256, tls.PKCS1WithSHA256:
		opts = crypto.SHA256
	case tls.ECDSAWithP384AndSHA384, tls.PKCS1WithSHA384:
		opts = crypto.SHA384
	case tls.ECDSAWithP521AndSHA512, tls.PKCS1WithSHA512:
		opts = crypto.SHA512
	case tls.PSSWithSHA256:
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
	case tls.PSSWithSHA384:
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA384}
	case tls.PSSWithSHA512:
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA512}
	case tls.Ed25519:
		return key.Sign(rand.Reader, msg, crypto.Hash(0))
	default:
		return nil, fmt.Errorf("scheme %v", scheme)
	}
	return crypto.SignMessage(key, rand.Reader, msg, opts)
}

// A loopback is the way behind the tunnel: it dials what a test permits. Everything is in a vnet of its own.
type loopback struct {
	mu    sync.Mutex
	fail  map[string]error // by host:port
	dials map[string]int   // by vnet/host:port
	open  map[net.Conn]string

	hang    string                                     // an address whose dials never end
	ingress map[string]string                          // by tunnel
	asked   []control.Query                            // for an ingress
	wrap    func(q control.Query, c net.Conn) net.Conn // if not nil, changes what Dial returns
}

func newLoopback() *loopback {
	return &loopback{fail: map[string]error{}, dials: map[string]int{}, open: map[net.Conn]string{}, ingress: map[string]string{}}
}

func (l *loopback) Dial(ctx context.Context, q control.Query) (net.Conn, error) {
	addr := net.JoinHostPort(q.Host, strconv.Itoa(int(q.Port)))
	if q.Tunnel != "" {
		l.mu.Lock()
		l.asked = append(l.asked, q)
		addr = l.ingress[q.Tunnel]
		l.mu.Unlock()
	}
	l.mu.Lock()
	l.dials[q.VNet+"/"+addr]++
	err := l.fail[addr]
	wrap, hangs := l.wrap, l.hang == addr
	l.mu.Unlock()
	if hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.open[c] = addr
	l.mu.Unlock()
	if wrap != nil {
		return wrap(q, c), nil
	}
	return c, nil
}

func (l *loopback) Echo(context.Context, control.Query, tunnel.EchoRequest) (tunnel.EchoReply, error) {
	return tunnel.EchoReply{}, errAway
}

// DialPacket sends packets to the address itself.
func (l *loopback) DialPacket(ctx context.Context, q control.Query) (tunnel.PacketConn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "udp", net.JoinHostPort(q.Host, strconv.Itoa(int(q.Port))))
	if err != nil {
		return nil, err
	}
	return udpFlow{c.(*net.UDPConn)}, nil
}

// A udpFlow is a socket as a flow of packets.
type udpFlow struct{ *net.UDPConn }

func (u udpFlow) ReadPacket(p []byte) (int, error) {
	n, err := u.Read(p)
	if errors.Is(err, syscall.ECONNREFUSED) {
		err = &tunnel.UnreachableError{Code: tunnel.UnreachablePort}
	}
	return n, err
}

func (u udpFlow) WritePacket(p []byte) error {
	_, err := u.Write(p)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil // it is for the reader
	}
	return err
}

func (udpFlow) Unreachable(byte) {}

// cut makes dials to addr fail with err, and breaks what is open. A nil err heals it.
func (l *loopback) cut(addr string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		delete(l.fail, addr)
		return
	}
	l.fail[addr] = err
	for c, a := range l.open {
		if a == addr {
			_ = c.Close()
			delete(l.open, c)
		}
	}
}

// A world is an edge with what it needs: a key server, a CA, a store.
type world struct {
	t        testing.TB
	dir      string
	ca       *authority
	owner    *mtls.Authority // the key owner's
	vault    *vault
	loop     *loopback
	identity *mtls.Source
	keyAddr  string
	cfg      Config
	registry *prometheus.Registry
	dialer   Dialer // loop, unless a test replaces it

	server *Server
	stop   func() // ends the server and waits
	tracer trace.Tracer
	listen func(network, addr string) (net.Listener, error) // nil: net.Listen
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), ca: newAuthority(t), loop: newLoopback(), registry: prometheus.NewRegistry()}
	w.dialer = w.loop
	w.vault = &vault{keys: map[keyless.SKI]crypto.Signer{}}
	owner, err := mtls.InitAuthority(filepath.Join(w.dir, "owner"), "owner.test")
	must(t, err)
	w.owner = owner
	w.identity = enrol(t, owner, filepath.Join(w.dir, "id-edge"), mtls.KindEdge, "edge1")
	w.keyAddr = serveKeys(t, w.hsm(), w.vault)
	w.cfg = Defaults()
	w.cfg.Listen.TLS = []string{"127.0.0.1:0"}
	w.cfg.Limits.DrainTimeout = 3 * time.Second
	w.cfg.KeyServers = []KeyServer{{Name: "hsm", VNet: "vault", Servers: []string{w.keyAddr}, Expect: []string{"spiffe://owner.test/keyserver/hsm1"}, Timeout: time.Second}}
	return w
}

// hsm returns the key server's identity.
func (w *world) hsm() *mtls.Source {
	return enrol(w.t, w.owner, filepath.Join(w.t.TempDir(), "id-hsm"), mtls.KindKeyServer, "hsm1")
}

func enrol(t testing.TB, owner *mtls.Authority, dir string, kind mtls.Kind, name string) *mtls.Source {
	t.Helper()
	key, csr, err := mtls.NewKeyCSR()
	must(t, err)
	chain, err := owner.IssueCSR(csr, mtls.Identity{TrustDomain: owner.TrustDomain(), Kind: kind, Name: name}, 0)
	must(t, err)
	must(t, mtls.WriteIdentity(dir, key, chain, owner.RootPEM()))
	src, err := mtls.OpenDir(dir, nil)
	must(t, err)
	return src
}

func serveKeys(t testing.TB, id *mtls.Source, h keyless.Handler) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	srv := &keyless.Server{Handler: h, TLS: id.ServerConfig(mtls.ServerOptions{Accept: mtls.AcceptKinds(mtls.KindEdge)}), DrainTimeout: time.Second}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("key server: %v", err)
		}
	})
	return ln.Addr().String()
}

// addKey makes a key and a certificate for hosts, whose file it returns.
func (w *world) addKey(name, kind string, lifetime time.Duration, hosts ...string) (file string, ski keyless.SKI) {
	w.t.Helper()
	key := newKey(w.t, kind)
	ski, err := keyless.SKIOf(key.Public())
	must(w.t, err)
	w.vault.put(ski, key)
	return writePEM(w.t, filepath.Join(w.dir, name+".pem"), w.ca.issue(w.t, key.Public(), lifetime, hosts...)), ski
}

// addZone makes a key and a certificate for hosts and a zone that sends everything to origin.
func (w *world) addZone(name, kind, origin string, hosts ...string) *zone.Config {
	w.t.Helper()
	file, _ := w.addKey(name, kind, 90*24*time.Hour, hosts...)
	w.cfg.Zones = append(w.cfg.Zones, zone.Config{
		Name: name, Hosts: hosts, Certificate: file, KeyServer: "hsm", Origins: []zone.Origin{{URL: origin}},
	})
	return &w.cfg.Zones[len(w.cfg.Zones)-1]
}

func (w *world) deps(store state.Store) Deps {
	return Deps{Dialer: w.dialer, Store: store, KeyIdentity: w.identity, Logger: slog.New(slog.DiscardHandler), Tracer: w.tracer, Registry: w.registry, Listen: w.listen}
}

// start runs the edge until the test ends or stop is called.
func (w *world) start() *world {
	w.t.Helper()
	store, err := state.OpenBolt(filepath.Join(w.dir, "state.db"))
	must(w.t, err)
	w.server, err = New(w.cfg, w.deps(store))
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.server.Run(ctx) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Run: %v", err)
		}
		_ = store.Close()
	})
	w.t.Cleanup(w.stop)
	eventually(w.t, "the key server is connected", func() bool { return w.server.Ready(ctx) == nil })
	return w
}

func (w *world) addr() string { return w.server.Addrs()[0].String() }

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// tlsConfig is a visitor's, who asks for host.
func (w *world) tlsConfig(host string) *tls.Config {
	return &tls.Config{RootCAs: w.ca.pool(), ServerName: host}
}

// client returns an HTTP client that speaks one version and reaches the edge whatever the host of a URL.
func (w *world) client(version string) *http.Client {
	w.t.Helper()
	addr := w.addr()
	tlsConfig := &tls.Config{RootCAs: w.ca.pool(), ClientSessionCache: tls.NewLRUClientSessionCache(8)}
	if version == "3" {
		udp, err := net.ListenPacket("udp", "127.0.0.1:0")
		must(w.t, err)
		qt := &quic.Transport{Conn: udp}
		tr := &http3.Transport{
			TLSClientConfig: tlsConfig,
			Dial: func(ctx context.Context, _ string, tc *tls.Config, qc *quic.Config) (*quic.Conn, error) {
				ua, err := net.ResolveUDPAddr("udp", addr)
				if err != nil {
					return nil, err
				}
				return qt.Dial(ctx, ua, tc, qc)
			},
		}
		w.t.Cleanup(func() { _ = tr.Close(); _ = qt.Close(); _ = udp.Close() })
		return &http.Client{Transport: tr}
	}
	var p http.Protocols
	p.SetHTTP1(version == "1.1")
	p.SetHTTP2(version == "2")
	tr := &http.Transport{
		TLSClientConfig: tlsConfig, Protocols: &p, DisableCompression: true, ExpectContinueTimeout: 10 * time.Second,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
	}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

var versions = []string{"1.1", "2", "3"}

var errAway = errors.New("the site is away")
