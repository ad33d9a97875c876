package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// maxPeerChain bounds the certificates that a peer may send.
const maxPeerChain = 6

// tls12Suites are the suites offered where TLS 1.2 is allowed and none are named.
var tls12Suites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
}

// ServerOptions says whom a server serves.
type ServerOptions struct {
	// ALPN lists the protocols served, most preferred first. If not empty, a client must agree on one.
	ALPN []string
	// AnonymousALPN lists protocols that need no client certificate, such as enrolment. A connection that agreed on one
	// has no peer identity and is not shown to Accept.
	AnonymousALPN []string
	// MinVersion is tls.VersionTLS12 or tls.VersionTLS13. Zero, and any other value, is TLS 1.3.
	MinVersion uint16
	// CipherSuites are those of TLS 1.2, if MinVersion allows it. If empty, ECDHE with AES-256-GCM, for ECDSA and RSA.
	CipherSuites []uint16
	// Accept decides about a verified identity of the source's own trust domain; nil error admits. It is called in every
	// handshake and must be fast and safe for concurrent use.
	Accept func(Identity) error
	// AcceptCert is like Accept and sees the verified leaf too, as a check for revocation needs it. If both are set, both
	// must admit. If neither is set, everybody is refused.
	AcceptCert func(Identity, *x509.Certificate) error
}

// ClientOptions says which servers a client trusts.
type ClientOptions struct {
	// ALPN lists the protocols offered, most preferred first. If not empty, the server must agree on one.
	ALPN []string
	// ServerName is sent as SNI if not empty. The server's certificate is verified by identity, not by this name.
	ServerName string
	// Expect decides about the server's verified identity; nil error accepts. Safe for concurrent use.
	Expect func(Identity) error
	// ExpectCert is like Expect and sees the verified leaf too. If both are set, both must accept. If neither is set, every
	// server is refused.
	ExpectCert func(Identity, *x509.Certificate) error
}

// baseConfig holds what all our links have in common: TLS 1.3, the hybrid post-quantum key exchange first, and neither
// tickets nor a session cache, so that no connection skips the verification of the peer.
func baseConfig(alpn []string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             slices.Clone(alpn),
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768, tls.X25519},
		SessionTicketsDisabled: true,
	}
}

// ServerConfig returns a configuration that presents the source's certificate and serves the clients that o admits.
func (s *Source) ServerConfig(o ServerOptions) *tls.Config {
	accept := both(o.Accept, o.AcceptCert)
	c := baseConfig(o.ALPN)
	if o.MinVersion == tls.VersionTLS12 {
		c.MinVersion = tls.VersionTLS12
		c.CurvePreferences = append(c.CurvePreferences, tls.CurveP256)
		c.CipherSuites = slices.Clone(o.CipherSuites)
		if len(c.CipherSuites) == 0 {
			c.CipherSuites = slices.Clone(tls12Suites)
		}
	}
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.current.Load().cert, nil }
	c.ClientAuth = tls.RequireAnyClientCert // verified in VerifyConnection, against the roots of that moment
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := checkALPN(cs, o.ALPN); err != nil {
			return err
		}
		return s.verifyPeer(cs, x509.ExtKeyUsageClientAuth, accept)
	}
	if len(o.AnonymousALPN) == 0 {
		return c
	}
	anonymous := baseConfig(o.AnonymousALPN)
	anonymous.GetCertificate = c.GetCertificate
	anonymous.VerifyConnection = func(cs tls.ConnectionState) error { return checkALPN(cs, o.AnonymousALPN) }
	named := c.Clone()
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		// A client that offers a protocol with identity as well is held to it.
		if overlaps(hello.SupportedProtos, o.AnonymousALPN) && !overlaps(hello.SupportedProtos, o.ALPN) {
			return anonymous, nil
		}
		return named, nil
	}
	return c
}

// ClientConfig returns a configuration that presents the source's certificate and trusts the servers that o expects: the
// chain must verify under the source's roots, and the identity takes the place of a host name.
func (s *Source) ClientConfig(o ClientOptions) *tls.Config {
	expect := both(o.Expect, o.ExpectCert)
	c := baseConfig(o.ALPN)
	c.ServerName = o.ServerName
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return s.current.Load().cert, nil }
	c.InsecureSkipVerify = true // verified in VerifyConnection, by identity and against the roots of that moment
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := checkALPN(cs, o.ALPN); err != nil {
			return err
		}
		return s.verifyPeer(cs, x509.ExtKeyUsageServerAuth, expect)
	}
	return c
}

// PinnedClientConfig returns a configuration for enrolment, when a client has nothing but the pin of its token: the
// server's chain must end in a root whose SubjectPublicKeyInfo has that SHA-256, and name an edge of the root's trust
// domain. The client presents no certificate.
func PinnedClientConfig(pin [32]byte, alpn ...string) *tls.Config {
	c := baseConfig(alpn)
	c.InsecureSkipVerify = true // verified in VerifyConnection, against the pin
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := checkALPN(cs, alpn); err != nil {
			return err
		}
		return verifyPinned(cs.PeerCertificates, pin)
	}
	return c
}

func verifyPinned(chain []*x509.Certificate, pin [32]byte) error {
	if len(chain) < 2 {
		return errors.New("mtls: server did not send its root, so the join token's pin cannot be checked")
	}
	root := chain[len(chain)-1]
	if got := spkiPin(root); got != pin || !root.IsCA {
		return fmt.Errorf("%w: server's root %x is not the one that the join token pins; the token is for another installation, or someone is in between", ErrRefused, got[:8])
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	if err := verifyChain(chain, pool, time.Now(), x509.ExtKeyUsageServerAuth); err != nil {
		return fmt.Errorf("mtls: verify server: %w", err)
	}
	id, err := IdentityOf(chain[0])
	if err != nil {
		return err
	}
	return AcceptKinds(KindEdge)(id)
}

// verifyPeer verifies the peer's chain under the roots of this moment and asks accept about its identity.
func (s *Source) verifyPeer(cs tls.ConnectionState, usage x509.ExtKeyUsage, accept func(Identity, *x509.Certificate) error) error {
	own := s.current.Load()
	if err := verifyChain(cs.PeerCertificates, own.roots, time.Now(), usage); err != nil {
		return fmt.Errorf("mtls: verify peer: %w", err)
	}
	leaf := cs.PeerCertificates[0]
	id, err := IdentityOf(leaf)
	if err != nil {
		return err
	}
	if id.TrustDomain != own.identity.TrustDomain {
		return fmt.Errorf("%w: %s is not of the trust domain %q", ErrRefused, id, own.identity.TrustDomain)
	}
	return accept(id, leaf)
}

// verifyChain verifies chain[0] with the rest as intermediates.
func verifyChain(chain []*x509.Certificate, roots *x509.CertPool, now time.Time, usage x509.ExtKeyUsage) error {
	if len(chain) == 0 || len(chain) > maxPeerChain {
		return fmt.Errorf("chain of %d certificates; want 1 to %d", len(chain), maxPeerChain)
	}
	if chain[0].IsCA {
		return errors.New("leaf is an authority")
	}
	opts := x509.VerifyOptions{
		Roots:         roots,
		Intermediates: x509.NewCertPool(),
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{usage},
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(opts)
	return err
}

// both joins the two forms of a check. With neither it refuses everybody.
func both(byID func(Identity) error, byCert func(Identity, *x509.Certificate) error) func(Identity, *x509.Certificate) error {
	return func(id Identity, leaf *x509.Certificate) error {
		if byID == nil && byCert == nil {
			return fmt.Errorf("%w: %s, because no rule admits anybody", ErrRefused, id)
		}
		if byID != nil {
			if err := byID(id); err != nil {
				return err
			}
		}
		if byCert != nil {
			return byCert(id, leaf)
		}
		return nil
	}
}

func checkALPN(cs tls.ConnectionState, alpn []string) error {
	if len(alpn) == 0 || slices.Contains(alpn, cs.NegotiatedProtocol) {
		return nil
	}
	return fmt.Errorf("%w: peer agreed on protocol %q, want one of %q", ErrRefused, cs.NegotiatedProtocol, alpn)
}

func overlaps(a, b []string) bool {
	return slices.ContainsFunc(a, func(s string) bool { return slices.Contains(b, s) })
}
