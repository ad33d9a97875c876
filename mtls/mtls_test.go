package mtls

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"net"
	"net/url"
	"os/exec"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testDomain = "keyhaven.test"

func newAuthority(t testing.TB, trustDomain string) *Authority {
	t.Helper()
	a, err := InitAuthority(t.TempDir(), trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func testID(kind Kind, name string) Identity {
	return Identity{TrustDomain: testDomain, Kind: kind, Name: name}
}

// newIdentity issues an identity, writes it to a directory of its own and opens it.
func newIdentity(t testing.TB, a *Authority, id Identity) *Source {
	t.Helper()
	key, csr, err := NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.IssueCSR(csr, id, 0)
	if err != nil {
		t.Fatal(err)
	}
	return writeAndOpen(t, key, chain, a.RootPEM())
}

func writeAndOpen(t testing.TB, key crypto.Signer, chain [][]byte, roots []byte) *Source {
	t.Helper()
	dir := t.TempDir()
	if err := WriteIdentity(dir, key, chain, roots); err != nil {
		t.Fatal(err)
	}
	s, err := OpenDir(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// forge signs a certificate as an authority would never make it: the caller edits the template.
func forge(t testing.TB, a *Authority, id Identity, edit func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, _, err := NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	chain := forgeFor(t, a, id, key.Public(), edit)
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}
}

func forgeFor(t testing.TB, a *Authority, id Identity, pub crypto.PublicKey, edit func(*x509.Certificate)) [][]byte {
	t.Helper()
	serial, err := newSerial()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "forged"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  usagesOf(id.Kind),
		URIs:         []*url.URL{id.url()},
	}
	edit(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, pub, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return [][]byte{der, a.root.Raw}
}

func mustKey(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	text, err := encodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func pkixExtension(san []byte) pkix.Extension {
	return pkix.Extension{Id: oidSubjectAltName, Critical: true, Value: san}
}

// result is how a handshake ended on both sides. A client of TLS 1.3 learns of a refusal only when it reads.
type result struct {
	serverErr, clientErr error
	server, client       tls.ConnectionState
}

func handshake(t testing.TB, server, client *tls.Config) result {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var r result
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := ln.Accept()
		if err != nil {
			r.serverErr = err
			return
		}
		conn := tls.Server(c, server)
		defer conn.Close()
		if r.serverErr = conn.HandshakeContext(ctx); r.serverErr != nil {
			return
		}
		r.server = conn.ConnectionState()
		_, r.serverErr = conn.Write([]byte("k"))
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(c, client)
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if r.clientErr = conn.HandshakeContext(ctx); r.clientErr == nil {
		_, r.clientErr = io.ReadFull(conn, make([]byte, 1))
		r.client = conn.ConnectionState()
	}
	conn.Close()
	<-done
	return r
}

// command runs a program and returns its output; a failure of the program is err.
func command(t testing.TB, stdin, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	if stdin != "" {
		w, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		w.Write([]byte(stdin))
		w.Close()
	}
	out, err := cmd.CombinedOutput()
	if _, ran := err.(*exec.ExitError); err != nil && !ran {
		t.Fatalf("%s: %v", name, err)
	}
	return string(out), err
}
