package edge

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/state"
)

// echoOrigin answers with the host and the path that it saw.
func echoOrigin(t testing.TB) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "host=%s uri=%s", r.Host, r.RequestURI)
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

// rootFile writes the visitors' CA for curl and openssl.
func (w *world) rootFile() string {
	return writePEM(w.t, filepath.Join(w.dir, "root.pem"), w.ca.cert.Raw)
}

// sClient runs openssl s_client to the end of the handshake and returns what it prints.
func (w *world) sClient(args ...string) (string, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "openssl", append([]string{"s_client", "-connect", w.addr(), "-CAfile", w.rootFile(), "-verify_return_error"}, args...)...)
	cmd.Stdin = strings.NewReader("")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (w *world) curl(args ...string) (string, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 60*time.Second)
	defer cancel()
	_, port, _ := net.SplitHostPort(w.addr())
	cmd := exec.CommandContext(ctx, "curl", append([]string{"-sS", "--cacert", w.rootFile(), "--connect-to", "::127.0.0.1:" + port}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestKeyTypesWithOpenSSLAndCurl(t *testing.T) {
	w := newWorld(t)
	origin := echoOrigin(t)
	kinds := []string{"p256", "p384", "p521", "rsa2048", "ed25519"}
	for _, k := range kinds {
		w.addZone(k, k, origin, k+".test")
	}
	w.start()
	for _, k := range kinds {
		for _, vers := range []string{"-tls1_2", "-tls1_3"} {
			t.Run(k+vers, func(t *testing.T) {
				before := w.vault.ops.Load()
				out, err := w.sClient("-servername", k+".test", vers)
				if err != nil || !strings.Contains(out, "Verify return code: 0 (ok)") {
					t.Fatalf("s_client: %v\n%s", err, out)
				}
				if w.vault.ops.Load() == before {
					t.Error("the key server was not asked")
				}
				op := w.vault.lastOp()
				if op.CustomFunc != keyless.FuncTLSSign || op.SNI != k+".test" || op.ClientIP.String() != "127.0.0.1" {
					t.Errorf("asked for %+v", op)
				}
			})
		}
		if k == "ed25519" {
			continue // curl's OpenSSL takes it as well, but p521 and it add nothing over s_client
		}
		for _, vers := range []string{"--http1.1", "--http2"} {
			t.Run(k+vers, func(t *testing.T) {
				out, err := w.curl(vers, "-w", " %{http_version}", "https://"+k+".test/x")
				want := map[string]string{"--http1.1": " 1.1", "--http2": " 2"}[vers]
				if err != nil || out != "host="+k+".test uri=/x"+want {
					t.Fatalf("curl: %v\n%s", err, out)
				}
			})
		}
	}
}

func TestPlainDigestMode(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test").PlainDigest = true
	w.start()
	if out, err := w.sClient("-servername", "a.test", "-tls1_3"); err != nil {
		t.Fatalf("s_client: %v\n%s", err, out)
	}
	if op := w.vault.lastOp(); op.Opcode != keyless.OpECDSASignSHA256 {
		t.Errorf("opcode %v", op.Opcode)
	}
}

func TestRSAKeyExchangeOnlyWhereAllowed(t *testing.T) {
	w := newWorld(t)
	w.addZone("yes", "rsa2048", echoOrigin(t), "yes.test").AllowRSADecrypt = true
	w.addZone("no", "rsa2048", echoOrigin(t), "no.test")
	w.start()
	out, err := w.sClient("-servername", "yes.test", "-tls1_2", "-cipher", "AES128-GCM-SHA256")
	if err != nil || !strings.Contains(out, "Cipher is AES128-GCM-SHA256") {
		t.Errorf("allowed: %v\n%s", err, out)
	}
	if op := w.vault.lastOp(); op.Opcode != keyless.OpRSADecrypt {
		t.Errorf("opcode %v, want decrypt", op.Opcode)
	}
	before := w.vault.ops.Load()
	if out, err := w.sClient("-servername", "no.test", "-tls1_2", "-cipher", "AES128-GCM-SHA256"); err == nil || !strings.Contains(out, "handshake failure") {
		t.Errorf("not allowed: %v\n%s", err, out)
	}
	if w.vault.ops.Load() != before {
		t.Error("the key server was asked for a zone that does not allow it")
	}
	for _, cipher := range []string{"AES128-SHA", "AES256-GCM-SHA384", "ECDHE-RSA-AES128-SHA"} {
		if out, err := w.sClient("-servername", "yes.test", "-tls1_2", "-cipher", cipher); err == nil {
			t.Errorf("%s was accepted:\n%s", cipher, out)
		}
	}
	if out, err := w.sClient("-servername", "yes.test", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"); err == nil {
		t.Errorf("TLS 1.1 was accepted:\n%s", out)
	}
}

// alertOf is the text of the alert that a dial ended with.
func (w *world) dialTLS(cfg *tls.Config) (*tls.Conn, error) {
	return tls.DialWithDialer(&net.Dialer{Timeout: 20 * time.Second}, "tcp", w.addr(), cfg)
}

func (w *world) dialQUIC(cfg *tls.Config) (*quic.Conn, error) {
	cfg = cfg.Clone()
	cfg.NextProtos = []string{"h3"}
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	return quic.DialAddr(ctx, w.addr(), cfg, nil)
}

const alertUnrecognizedName = 112

func TestUnknownNamesAreRefused(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test", "*.b.test")
	z := w.addZone("tcp-only", "p256", echoOrigin(t), "tcp.test")
	z.HTTP = []string{"1.1", "2"}
	w.start()
	for _, name := range []string{"", "b.test", "x.y.b.test", "nobody.test", "a.test.evil.test", "192.0.2.1"} {
		for _, vers := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			cfg := w.tlsConfig(name)
			cfg.InsecureSkipVerify, cfg.MaxVersion = true, vers
			_, err := w.dialTLS(cfg)
			var alert tls.AlertError
			if !errors.As(err, &alert) || alert != alertUnrecognizedName {
				if err == nil || !strings.Contains(err.Error(), "unrecognized name") {
					t.Errorf("%q %s: %v, want unrecognized_name", name, tls.VersionName(vers), err)
				}
			}
		}
	}
	for _, name := range []string{"nobody.test", "tcp.test"} {
		cfg := w.tlsConfig(name)
		cfg.InsecureSkipVerify = true
		_, err := w.dialQUIC(cfg)
		var te *quic.TransportError
		if !errors.As(err, &te) || te.ErrorCode != 0x100+alertUnrecognizedName {
			t.Errorf("%q over QUIC: %v, want unrecognized_name", name, err)
		}
	}
	if n := w.vault.ops.Load(); n != 0 {
		t.Errorf("the key server was asked %d times", n)
	}
}

// fragmented writes each record in small ones (RFC 8446, section 5.1), each in a packet of its own.
type fragmented struct {
	net.Conn
	records int
}

func (c *fragmented) Write(p []byte) (int, error) {
	for rest := p; len(rest) >= 5; {
		n := 5 + int(rest[3])<<8 + int(rest[4])
		if rest[0] != 22 || n > len(rest) {
			_, err := c.Conn.Write(rest)
			return len(p), err
		}
		for body := rest[5:n]; len(body) > 0; {
			k := min(7, len(body))
			if _, err := c.Conn.Write(append([]byte{22, rest[1], rest[2], 0, byte(k)}, body[:k]...)); err != nil {
				return 0, err
			}
			c.records++
			body = body[k:]
		}
		rest = rest[n:]
	}
	return len(p), nil
}

func TestOneCanonicalName(t *testing.T) {
	w := newWorld(t)
	w.addZone("exact", "p256", echoOrigin(t), "www.b.test")
	w.addZone("wild", "rsa2048", echoOrigin(t), "*.b.test")
	w.start()
	for _, tt := range []struct{ sni, want string }{
		{"www.b.test", "ECDSA"},
		{"WWW.b.Test", "ECDSA"},
		{"api.b.test", "RSA"},
		{"API.B.TEST", "RSA"},
	} {
		for _, split := range []bool{false, true} {
			raw, err := net.Dial("tcp", w.addr())
			must(t, err)
			var frag *fragmented
			if split {
				frag = &fragmented{Conn: raw}
				raw = frag
			}
			c := tls.Client(raw, w.tlsConfig(tt.sni))
			if err := c.HandshakeContext(t.Context()); err != nil {
				t.Errorf("%s, fragmented %v: %v", tt.sni, split, err)
			} else if got := c.ConnectionState().PeerCertificates[0].PublicKeyAlgorithm.String(); got != tt.want {
				t.Errorf("%s, fragmented %v: key %s, want %s", tt.sni, split, got, tt.want)
			}
			if split && frag.records < 10 {
				t.Errorf("only %d records: the test split nothing", frag.records)
			}
			_ = c.Close()
			if op := w.vault.lastOp(); op.SNI != strings.ToLower(tt.sni) {
				t.Errorf("%s: the key server was told %q", tt.sni, op.SNI)
			}
		}
		q, err := w.dialQUIC(w.tlsConfig(tt.sni))
		if err != nil {
			t.Errorf("%s over QUIC: %v", tt.sni, err)
			continue
		}
		if got := q.ConnectionState().TLS.PeerCertificates[0].PublicKeyAlgorithm.String(); got != tt.want {
			t.Errorf("%s over QUIC: key %s, want %s", tt.sni, got, tt.want)
		}
		_ = q.CloseWithError(0, "")
	}
	// RFC 6066 has no final dot in a server name. Refused is right, served under that name would be right, another zone
	// would not.
	before := w.vault.ops.Load()
	if out, err := w.sClient("-servername", "www.b.test.", "-tls1_3"); err == nil || w.vault.ops.Load() != before {
		t.Errorf("final dot: %v\n%s", err, out)
	}
}

// resumes makes a request on a connection of its own and says whether its session was resumed.
func resumes(t *testing.T, c *http.Client, host string) bool {
	t.Helper()
	r, err := c.Get("https://" + host + "/")
	must(t, err)
	_, err = io.Copy(io.Discard, r.Body)
	must(t, err)
	_ = r.Body.Close()
	c.CloseIdleConnections()
	return r.TLS.DidResume
}

func TestTicketsOverEveryVersion(t *testing.T) {
	w := newWorld(t)
	origin := echoOrigin(t)
	w.addZone("a", "p256", origin, "a.test", "a2.test")
	w.start()
	for _, v := range versions {
		c := w.client(v)
		if resumes(t, c, "a.test") {
			t.Fatalf("HTTP/%s: the first connection resumed", v)
		}
		eventually(t, "HTTP/"+v+" resumes", func() bool {
			before := w.vault.ops.Load()
			if !resumes(t, c, "a.test") {
				return false
			}
			if n := w.vault.ops.Load(); n != before {
				t.Errorf("HTTP/%s: a resumed visitor cost %d operations", v, n-before)
			}
			return true
		})
	}
	// A key server that is away costs resumed visitors nothing.
	clients := map[string]*http.Client{}
	for _, v := range versions {
		clients[v] = w.client(v)
		eventually(t, "HTTP/"+v+" resumes", func() bool { return resumes(t, clients[v], "a.test") })
	}
	w.loop.cut(w.keyAddr, errAway)
	for _, v := range versions {
		if !resumes(t, clients[v], "a.test") {
			t.Errorf("HTTP/%s: not resumed while the key server is away", v)
		}
	}
	w.loop.cut(w.keyAddr, nil)
	// Another epoch, and every ticket is void.
	w.cfg.Zones[0].KeyEpoch++
	must(t, w.server.Reload(w.cfg))
	eventually(t, "the key server is back", func() bool { return w.server.Ready(t.Context()) == nil })
	for _, v := range versions {
		if resumes(t, clients[v], "a.test") {
			t.Errorf("HTTP/%s: resumed with a ticket of another key epoch", v)
		}
	}
}

func TestTicketsWithOpenSSL(t *testing.T) {
	w := newWorld(t)
	origin := echoOrigin(t)
	w.addZone("a", "p256", origin, "a.test", "a2.test")
	w.addZone("b", "p256", origin, "b.test")
	w.cfg.Listen.TLS = []string{deadAddr(t)} // for both starts
	w.start()
	for _, vers := range []string{"-tls1_2", "-tls1_3"} {
		sess := filepath.Join(w.dir, "sess"+vers)
		w.saveSession(sess, vers)
		for _, tt := range []struct {
			sni  string
			want bool
		}{{"a.test", true}, {"A.TEST", true}, {"a2.test", false}, {"b.test", false}} {
			before := w.vault.ops.Load()
			out, err := w.sClient("-servername", tt.sni, vers, "-sess_in", sess)
			if err != nil {
				t.Errorf("%s %s: %v\n%s", vers, tt.sni, err, out)
				continue
			}
			if got := strings.Contains(out, "Reused, TLS"); got != tt.want {
				t.Errorf("%s %s: resumed %v, want %v", vers, tt.sni, got, tt.want)
			}
			if asked := w.vault.ops.Load() > before; asked == tt.want {
				t.Errorf("%s %s: key server asked %v", vers, tt.sni, asked)
			}
		}
	}
	// A restart of the edge keeps the keys.
	sess := filepath.Join(w.dir, "sess-restart")
	w.saveSession(sess, "-tls1_3")
	w.stop()
	w.start()
	if out, err := w.sClient("-servername", "a.test", "-tls1_3", "-sess_in", sess); err != nil || !strings.Contains(out, "Reused, TLS") {
		t.Errorf("after a restart: %v\n%s", err, out)
	}
}

// saveSession connects to a.test and keeps the session that a ticket brought.
func (w *world) saveSession(file, vers string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	// The request makes openssl read on, so that the ticket of TLS 1.3 arrives; the answer closes the connection.
	cmd := exec.CommandContext(ctx, "openssl", "s_client", "-connect", w.addr(), "-CAfile", w.rootFile(), "-servername", "a.test", "-ign_eof", "-sess_out", file, vers)
	cmd.Stdin = strings.NewReader("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("s_client: %v\n%s", err, out)
	}
	if data, err := os.ReadFile(file); err != nil || func() bool { b, _ := pem.Decode(data); return b == nil }() {
		w.t.Fatalf("no session saved: %v", err)
	}
}

func TestKeyServerAway(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.start()
	w.loop.cut(w.keyAddr, errAway)
	eventually(t, "the edge notices", func() bool { return w.server.Ready(t.Context()) != nil })
	for i := range 5 {
		began := time.Now()
		_, err := w.dialTLS(w.tlsConfig("a.test"))
		if err == nil || !strings.Contains(err.Error(), "internal error") {
			t.Fatalf("TCP: %v, want the alert internal_error", err)
		}
		tcp := time.Since(began)
		began = time.Now()
		_, err = w.dialQUIC(w.tlsConfig("a.test"))
		var te *quic.TransportError
		if !errors.As(err, &te) || te.ErrorCode != 0x100+80 {
			t.Fatalf("QUIC: %v, want the alert internal_error", err)
		}
		if i == 0 {
			t.Logf("refused after %v over TCP, %v over QUIC", tcp, time.Since(began))
		}
	}
	w.loop.cut(w.keyAddr, nil)
	eventually(t, "service is back", func() bool {
		c, err := w.dialTLS(w.tlsConfig("a.test"))
		if err != nil {
			return false
		}
		_ = c.Close()
		return true
	})
}

// A key server that answers too late must cost the waiting visitor its handshake, and nobody else anything: not other
// QUIC connections on the same socket, and not streams of connections that are up.
func TestSlowKeyServerStallsNobodyElse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.start()
	up := w.client("3")
	get := func() error {
		r, err := up.Get("https://a.test/")
		if err != nil {
			return err
		}
		defer r.Body.Close()
		_, err = io.Copy(io.Discard, r.Body)
		return err
	}
	must(t, get())
	w.vault.delay.Store(int64(30 * time.Second))
	const waiting = 20
	failed := make(chan error, waiting)
	for range waiting {
		go func() {
			c, err := w.dialQUIC(w.tlsConfig("a.test"))
			if err == nil {
				_ = c.CloseWithError(0, "")
			}
			failed <- err
		}()
	}
	asked := w.vault.ops.Load()
	eventually(t, "handshakes wait for the key server", func() bool { return w.vault.ops.Load() >= asked+waiting/2 || len(failed) > 0 })
	done := 0
	for len(failed) < waiting {
		must(t, get())
		if done++; done > 100000 {
			break
		}
	}
	if done == 0 {
		t.Error("no request got through while handshakes waited")
	}
	for range waiting {
		if err := <-failed; err == nil {
			t.Error("a handshake succeeded without a signature")
		} else if te := (*quic.TransportError)(nil); !errors.As(err, &te) {
			t.Errorf("a waiting visitor got %v, want an alert", err)
		}
	}
	t.Logf("%d requests on another connection while %d handshakes waited", done, waiting)
	w.vault.delay.Store(0)
}

func TestSignatureFromAnotherKeyIsNotUsed(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	for ski := range w.vault.keys {
		w.vault.keys[ski] = newKey(t, "p256")
	}
	w.start()
	if _, err := w.dialTLS(w.tlsConfig("a.test")); err == nil || !strings.Contains(err.Error(), "internal error") {
		t.Errorf("%v, want the alert internal_error before anything is sent", err)
	}
}

func TestWrongKeyServerIsNotTrusted(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.cfg.KeyServers[0].Expect = []string{"spiffe://owner.test/keyserver/other"}
	store, err := state.OpenBolt(filepath.Join(w.dir, "state.db"))
	must(t, err)
	defer store.Close()
	s, err := New(w.cfg, w.deps(store))
	must(t, err)
	defer s.Close()
	eventually(t, "a dial", func() bool {
		w.loop.mu.Lock()
		defer w.loop.mu.Unlock()
		return w.loop.dials["vault/"+w.keyAddr] > 0
	})
	time.Sleep(100 * time.Millisecond)
	if s.Ready(t.Context()) == nil {
		t.Error("a key server of another identity is in use")
	}
	if n := w.vault.ops.Load(); n != 0 {
		t.Errorf("it was sent %d operations", n)
	}
}

func TestHelloWithoutEnd(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.cfg.Limits.HandshakeTimeout = 300 * time.Millisecond
	w.start()
	c, err := net.Dial("tcp", w.addr())
	must(t, err)
	defer c.Close()
	_, err = c.Write([]byte{22, 3, 1, 1, 0, 1})
	must(t, err)
	must(t, c.SetReadDeadline(time.Now().Add(20*time.Second)))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a handshake without an end is held open")
	}
	eventually(t, "its place is given back", func() bool {
		m, err := w.registry.Gather()
		must(t, err)
		for _, f := range m {
			if f.GetName() == "keyhaven_edge_connections" {
				return f.GetMetric()[0].GetGauge().GetValue() == 0
			}
		}
		return false
	})
}

func TestMetricsOfHandshakes(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.start()
	for _, v := range versions {
		c := w.client(v)
		eventually(t, "HTTP/"+v+" resumes", func() bool { return resumes(t, c, "a.test") })
	}
	cfg := w.tlsConfig("nobody.test")
	_, _ = w.dialTLS(cfg)
	var text bytes.Buffer
	eventually(t, "all metrics", func() bool {
		text.Reset()
		m, err := w.registry.Gather()
		must(t, err)
		for _, f := range m {
			for _, m := range f.GetMetric() {
				fmt.Fprint(&text, f.GetName())
				for _, l := range m.GetLabel() {
					fmt.Fprintf(&text, " %s=%s", l.GetName(), l.GetValue())
				}
				fmt.Fprintln(&text)
			}
		}
		for _, want := range []string{
			"handshakes_total result=ok resumed=true transport=quic zone=a",
			"handshakes_total result=ok resumed=true transport=tcp zone=a",
			"handshakes_total result=no_zone resumed=false transport=tcp zone=",
			"signature_seconds result=ok zone=a",
			"requests_total code=200 version=3 zone=a",
			"key_server_up group=hsm",
		} {
			if !strings.Contains(text.String(), want) {
				return false
			}
		}
		return true
	})
}
