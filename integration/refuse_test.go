//go:build netns

package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
)

// identity writes an identity for a connector, issued by the authority in caDir, that trusts the true edge.
func (w *world) identity(t *testing.T, caDir, name string, lifetime time.Duration) string {
	t.Helper()
	ca, err := mtls.OpenAuthority(caDir)
	must(t, err)
	key, csr, err := mtls.NewKeyCSR()
	must(t, err)
	chain, err := ca.IssueCSR(csr, mtls.Identity{TrustDomain: lab.EdgeDomain, Kind: mtls.KindConnector, Name: name}, lifetime)
	must(t, err)
	edgeCA, err := mtls.OpenAuthority(w.Path("edge-ca"))
	must(t, err)
	// Both roots, so that the connector itself finds no fault with a certificate of another authority.
	dir := filepath.Join(t.TempDir(), "identity")
	must(t, mtls.WriteIdentity(dir, key, chain, append(ca.RootPEM(), edgeCA.RootPEM()...)))
	return dir
}

// Connectors that must not come in: each keeps trying, and none gets a session.
func TestConnectorsRefused(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	must(t, w.Sites[0].Connector.Stop())
	otherCA := t.TempDir()
	_, err := mtls.InitAuthority(filepath.Join(otherCA, "ca"), lab.EdgeDomain)
	must(t, err)
	expired := w.identity(t, w.Path("edge-ca"), "a", time.Second)
	time.Sleep(1500 * time.Millisecond)
	for i, tt := range []struct{ name, dir, says string }{
		{"another authority's certificate for the same name", w.identity(t, filepath.Join(otherCA, "ca"), "a", time.Hour), "certificate"},
		{"expired", expired, "expired"},
		{"never enrolled", w.identity(t, w.Path("edge-ca"), "stranger", time.Hour), "does not know this connector"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := w.connector(t, fmt.Sprintf("refused-%d", i), tt.dir)
			must(t, p.Start())
			defer p.Kill()
			eventually(t, "a refusal in the log", func(context.Context) error {
				for line := range strings.Lines(p.Log()) {
					if strings.Contains(line, "no session to the edge") && strings.Contains(line, tt.says) {
						return nil
					}
				}
				return fmt.Errorf("the connector says:\n%s", p.Log())
			})
			if err := w.fetches(t.Context()); err == nil {
				t.Error("a page came through it")
			}
			if strings.Contains(p.Log(), `"session up"`) {
				t.Errorf("it has a session:\n%s", p.Log())
			}
		})
	}
	t.Run("revoked while it runs", func(t *testing.T) {
		must(t, w.Sites[0].Connector.Start())
		eventually(t, "the tunnel", w.fetches)
		_, err := w.Edge(t.Context(), "connector", "revoke", "a")
		must(t, err)
		eventually(t, "the tunnel closes", func(ctx context.Context) error {
			if w.fetches(ctx) == nil {
				return errors.New("pages still come")
			}
			return nil
		})
		must(t, w.Sites[0].Connector.Stop())
		must(t, w.Sites[0].Connector.Start())
		eventually(t, "it is told why", func(context.Context) error {
			if !strings.Contains(w.Sites[0].Connector.Log(), "revoked") {
				return errors.New("no word of it in the log")
			}
			return nil
		})
		if err := w.fetches(t.Context()); err == nil {
			t.Error("a revoked connector carries requests")
		}
	})
}

// connector prepares one more connector of site a with the identity in dir.
func (w *world) connector(t *testing.T, name, dir string) *lab.Process {
	t.Helper()
	cfg := t.Name()
	cfg = strings.NewReplacer("/", "-", " ", "-", "'", "").Replace(cfg) + ".yaml"
	must(t, w.WriteYAML(cfg, map[string]any{
		"identity": map[string]any{"dir": dir}, "edges": []string{edgeTunnel},
		"allow": []map[string]any{{"to": "10.20.0.0/24", "ports": []int{2407, 8080}}},
	}))
	return w.Process(name, w.sites[0], "keyhaven-connector", "run", "--config", w.Path(cfg))
}

func TestJoinTokens(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	join := func(token, name string) error {
		return w.Join(t.Context(), w.Sites[0], token, filepath.Join(t.TempDir(), "id"), name)
	}
	if err := join(w.Path("token-a"), "again"); err == nil || !strings.Contains(err.Error(), "used") {
		t.Errorf("a used token: got %v", err)
	}
	short := w.Path("short")
	_, err := w.Edge(t.Context(), "tunnel", "token", "create", "a", "--ttl", "1s", "--out", short)
	must(t, err)
	time.Sleep(1500 * time.Millisecond)
	if err := join(short, "late"); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an expired token: got %v", err)
	}
	token, err := os.ReadFile(w.Path("token-a"))
	must(t, err)
	if logs := w.Logs(); strings.Contains(logs, strings.TrimSpace(string(token))) {
		t.Error("the join token is in a log")
	}
	for _, p := range []*lab.Process{w.EdgeProc, w.Sites[0].Connector, w.KeyServer} {
		for _, file := range []string{"cmdline", "environ"} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.PID(), file))
			if p == w.KeyServer && errors.Is(err, fs.ErrPermission) {
				continue // it shows its memory to the system's root alone, who is not the root of a user namespace
			}
			must(t, err)
			if bytes.Contains(b, bytes.TrimSpace(token)) || bytes.Contains(b, []byte(w.Token.PIN)) {
				t.Errorf("%s shows a secret in its %s", p.Name(), file)
			}
		}
	}
}

// The key server's policy and the shapes that it signs, asked directly inside the site with valid certificates.
func TestKeyServerRefuses(t *testing.T) {
	w := up(t, []lab.ZonePlan{{Host: plain, KeyType: "p256"}, {Host: "rsa.keyhaven.test", KeyType: "rsa2048"}}, (*world).siteA)
	_, err := w.Tool(t.Context(), "keyhaven-keyserver", "client", "add", "edge2", "--ca-dir", w.Path("key-ca"), "--out", w.Path("edge2"))
	must(t, err)
	allowed := w.keyless(t, "edge-client")
	eventually(t, "the client connects", func(context.Context) error {
		if !allowed.Healthy() {
			return errors.New("no connection")
		}
		return nil
	})
	// A valid certificate without a rule does not even get a connection.
	stranger := w.keyless(t, "edge2")
	leaf := leafOf(t, w.Chain(plain))
	ski, err := keyless.SKIOf(leaf.PublicKey)
	must(t, err)
	rsaSKI, err := keyless.SKIOf(leafOf(t, w.Chain("rsa.keyhaven.test")).PublicKey)
	must(t, err)
	const es = tls.ECDSAWithP256AndSHA256
	good := append(append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...), make([]byte, 32)...)
	asClient := bytes.Replace(good, []byte("server"), []byte("client"), 1)
	ecdhe := append(make([]byte, 64), append([]byte{3, 0, 0x1d, 32}, make([]byte, 32)...)...)
	tlsSign := func(ski keyless.SKI, sni string, scheme tls.SignatureScheme, msg []byte) keyless.Operation {
		return keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: ski, SNI: sni, Payload: keyless.AppendTLSSign(nil, scheme, msg)}
	}
	tests := []struct {
		name   string
		client *keyless.Client
		op     keyless.Operation
		want   error // nil: signed
	}{
		{"a TLS 1.3 handshake", allowed, tlsSign(ski, plain, es, good), nil},
		{"a TLS 1.2 key exchange", allowed, tlsSign(ski, plain, es, ecdhe), nil},
		{"an identity without a rule", stranger, tlsSign(ski, plain, es, good), keyless.ErrUnavailable},
		{"a name outside the rule", allowed, tlsSign(ski, "other.keyhaven.test", es, good), keyless.ErrKeyNotFound},
		{"no name", allowed, tlsSign(ski, "", es, good), keyless.ErrKeyNotFound},
		{"a digest, without context", allowed, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: ski, SNI: plain, Payload: make([]byte, 32)}, keyless.ErrKeyNotFound},
		{"decryption", allowed, keyless.Operation{Opcode: keyless.OpRSADecrypt, SKI: rsaSKI, SNI: "rsa.keyhaven.test", Payload: make([]byte, 256)}, keyless.ErrKeyNotFound},
		{"a certificate", allowed, tlsSign(ski, plain, es, leaf.RawTBSCertificate), keyless.ErrFormat},
		{"a JWT", allowed, tlsSign(ski, plain, es, []byte(base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES256"}`))+"."+base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"root"}`)))), keyless.ErrFormat},
		{"an SSH challenge", allowed, tlsSign(ski, plain, es, append([]byte{0, 0, 0, 32}, bytes.Repeat([]byte{7}, 60)...)), keyless.ErrFormat},
		{"TLS client authentication", allowed, tlsSign(ski, plain, es, asClient), keyless.ErrFormat},
		{"a TLS 1.3 handshake, truncated", allowed, tlsSign(ski, plain, es, good[:len(good)-1]), keyless.ErrFormat},
		{"a TLS 1.3 handshake, extended", allowed, tlsSign(ski, plain, es, append(bytes.Clone(good), 0)), keyless.ErrFormat},
		{"a TLS 1.2 key exchange, truncated", allowed, tlsSign(ski, plain, es, ecdhe[:len(ecdhe)-1]), keyless.ErrFormat},
		{"a TLS 1.2 key exchange, extended", allowed, tlsSign(ski, plain, es, append(bytes.Clone(ecdhe), 0)), keyless.ErrFormat},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sig, err := tt.client.Do(t.Context(), &tt.op)
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("got %d bytes and error %v, want %v", len(sig), err, tt.want)
			}
			if tt.want == nil && (err != nil || len(sig) == 0) {
				t.Errorf("got %d bytes and error %v, want a signature", len(sig), err)
			}
		})
	}
}

// keyless makes a client inside site a with the identity in a directory of the lab.
func (w *world) keyless(t *testing.T, dir string) *keyless.Client {
	t.Helper()
	src, err := mtls.OpenDir(w.Path(dir), nil)
	must(t, err)
	c, err := keyless.NewClient(keyless.ClientConfig{
		Servers: []string{keyServer},
		Dial:    func(ctx context.Context, addr string) (net.Conn, error) { return w.sites[0].Dial(ctx, addr) },
		TLS: func(string) *tls.Config {
			return src.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptKinds(mtls.KindKeyServer)})
		},
		Timeout: 5 * time.Second,
	})
	must(t, err)
	t.Cleanup(func() { check(t, c.Close()) })
	return c
}

func leafOf(t *testing.T, file string) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(file)
	must(t, err)
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	return cert
}
