package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
)

// TestHandshakes lets visitors' TLS handshakes be signed in the token, context-bound, as an edge does it.
func TestHandshakes(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256", "rsa:rsa2048", "ec384:p384")
	certs := map[string]*x509.Certificate{}
	for _, label := range []string{"ec", "rsa", "ec384"} {
		certs[label] = s.certificateOf(tok.URI(), label)
	}
	// No plain operation and no other name is allowed.
	text := s.config(fmt.Sprintf("tokens:\n  - uri: %q\nclients:", tok.URI()) + strings.Replace(rule("one", "tls-sign"), `snis: ["*"]`, "snis: [www.example.com]", 1))
	p := s.start(s.write("ks.yaml", 0o600, text))
	c := p.client("one")
	if _, err := do(t, c, &keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: mustSKI(t, certs["ec"].PublicKey), Payload: make([]byte, 32), SNI: "www.example.com"}); err == nil {
		t.Error("a plain operation was served")
	}
	for label, cert := range certs {
		key, err := c.Key(cert.PublicKey, keyless.KeyOptions{Timeout: patience})
		if err != nil {
			t.Fatal(err)
		}
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			for sni, want := range map[string]bool{"www.example.com": true, "other.example.com": false} {
				err := handshake(t, cert, key, version, sni)
				if (err == nil) != want {
					t.Errorf("%s, %s, %s: got %v, want success %v", label, tls.VersionName(version), sni, err, want)
				}
			}
		}
	}
	p.stop()
}

// certificateOf makes a self-signed certificate for a key of a token, by the commands alone.
func (s *site) certificateOf(uri, label string) *x509.Certificate {
	s.t.Helper()
	path := s.path(label + ".csr")
	s.must("key", "csr", "--uri", uri, "--key", label, "--dns", "www.example.com", "--out", path)
	text, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		s.t.Fatal(err)
	}
	cert, err := readCertificate(s.write(label+".pem", 0o644, certify(s.t, req)))
	if err != nil {
		s.t.Fatal(err)
	}
	return cert
}

// handshake makes one TLS handshake between a visitor and an edge whose private key is remote.
func handshake(t *testing.T, cert *x509.Certificate, key *keyless.Key, version uint16, sni string) error {
	t.Helper()
	visitor, edge := net.Pipe()
	defer visitor.Close()
	defer edge.Close()
	ended := make(chan error, 1)
	go func() {
		ended <- tls.Client(visitor, &tls.Config{InsecureSkipVerify: true, ServerName: sni, MaxVersion: version}).HandshakeContext(t.Context())
		visitor.Close()
	}()
	server := tls.Server(edge, &tls.Config{GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{cert.Raw}, Leaf: cert,
			PrivateKey: key.For(h.Context(), h.ServerName, netip.MustParseAddr("192.0.2.7"), netip.Addr{})}, nil
	}})
	err := server.HandshakeContext(t.Context())
	edge.Close()
	if clientErr := <-ended; err == nil {
		err = clientErr
	}
	return err
}
