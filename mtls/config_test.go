package mtls

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"testing"
	"time"
)

const testALPN = "test/1"

func anyone(Identity) error { return nil }

// as returns the source's client configuration with another certificate in place of its own.
func (s *Source) as(c tls.Certificate) *tls.Config {
	config := s.ClientConfig(ClientOptions{ALPN: []string{testALPN}, Expect: anyone})
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
	return config
}

func TestHandshake(t *testing.T) {
	a := newAuthority(t, testDomain)
	edge, connector := newIdentity(t, a, testID(KindEdge, "e1")), newIdentity(t, a, testID(KindConnector, "c1"))
	r := handshake(t,
		edge.ServerConfig(ServerOptions{ALPN: []string{testALPN}, Accept: AcceptKinds(KindConnector)}),
		connector.ClientConfig(ClientOptions{ALPN: []string{testALPN}, Expect: AcceptIdentities(edge.Identity())}))
	if r.serverErr != nil || r.clientErr != nil {
		t.Fatalf("server: %v, client: %v", r.serverErr, r.clientErr)
	}
	if id, err := PeerIdentity(r.server); err != nil || id != connector.Identity() {
		t.Errorf("server sees %v, %v", id, err)
	}
	if id, err := PeerIdentity(r.client); err != nil || id != edge.Identity() {
		t.Errorf("client sees %v, %v", id, err)
	}
	for side, cs := range map[string]tls.ConnectionState{"server": r.server, "client": r.client} {
		if cs.Version != tls.VersionTLS13 || cs.CurveID != tls.X25519MLKEM768 || cs.NegotiatedProtocol != testALPN {
			t.Errorf("%s: got version %x, key exchange %v, protocol %q", side, cs.Version, cs.CurveID, cs.NegotiatedProtocol)
		}
	}
}

// TestServerRefuses shows the server every kind of client that it must not serve. Each differs from one that it serves in
// one point.
func TestServerRefuses(t *testing.T) {
	a, impostor := newAuthority(t, testDomain), newAuthority(t, testDomain)
	edge, connector := newIdentity(t, a, testID(KindEdge, "e1")), newIdentity(t, a, testID(KindConnector, "c1"))
	id := connector.Identity()
	revoked := newIdentity(t, a, testID(KindConnector, "c2"))
	revocations, err := a.Revocations()
	if err != nil {
		t.Fatal(err)
	}
	if err := revocations.RevokeCert(revoked.Leaf(), "stolen"); err != nil {
		t.Fatal(err)
	}
	if err := revocations.RevokeIdentity(testID(KindConnector, "c3"), "gone"); err != nil {
		t.Fatal(err)
	}
	good := ServerOptions{ALPN: []string{testALPN}, Accept: AcceptKinds(KindConnector), AcceptCert: revocations.AcceptCert}
	with := func(edit func(*ServerOptions)) ServerOptions { o := good; edit(&o); return o }
	forged := func(edit func(*x509.Certificate)) *tls.Config { return edge.as(forge(t, a, id, edit)) }
	plain := func(edit func(*tls.Config)) *tls.Config {
		c := connector.ClientConfig(ClientOptions{ALPN: []string{testALPN}, Expect: anyone})
		edit(c)
		return c
	}
	for _, c := range []struct {
		name   string
		server ServerOptions
		client *tls.Config
		is     error  // if not nil, what the server's error is
		want   string // else what it says
	}{
		{"good", good, plain(func(*tls.Config) {}), nil, ""},
		{"good, forged alike", good, forged(func(*x509.Certificate) {}), nil, ""},
		{"no certificate", good, plain(func(c *tls.Config) { c.GetClientCertificate = nil }), nil, "didn't provide a certificate"},
		{"expired", good, forged(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), nil, "expired"},
		{"not yet valid", good, forged(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), nil, "not yet valid"},
		{"another authority of the same name", good, edge.as(forge(t, impostor, id, func(*x509.Certificate) {})), nil, "unknown authority"},
		{"key server's certificate", good, edge.as(forge(t, a, testID(KindKeyServer, "k1"), func(*x509.Certificate) {})), nil, "incompatible key usage"},
		{"operator's certificate", good, edge.as(forge(t, a, testID(KindOperator, "o1"), func(*x509.Certificate) {})), nil, "not of an admitted kind"},
		{"server's usage", good, forged(func(c *x509.Certificate) { c.ExtKeyUsage = usagesOf(KindKeyServer) }), nil, "incompatible key usage"},
		{"another kind", good, edge.as(forge(t, a, testID(KindEdge, "c1"), func(*x509.Certificate) {})), ErrRefused, ""},
		{"no URI", good, forged(func(c *x509.Certificate) { c.URIs = nil }), ErrNoIdentity, ""},
		{"two URIs", good, forged(func(c *x509.Certificate) { c.URIs = append(c.URIs, edge.Identity().url()) }), ErrNoIdentity, ""},
		{"other spelling", good, forged(func(c *x509.Certificate) {
			c.URIs = nil
			c.ExtraExtensions = append(c.ExtraExtensions, pkixExtension(san(t, id.String()+"#")))
		}), ErrNoIdentity, ""},
		{"authority as leaf", good, forged(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), nil, "leaf is an authority"},
		{"the root itself", good, edge.as(tls.Certificate{Certificate: [][]byte{a.root.Raw}, PrivateKey: a.key}), nil, "leaf is an authority"},
		{"chain of many", good, edge.as(lengthen(forge(t, a, id, func(*x509.Certificate) {}), maxPeerChain)), nil, "chain of"},
		{"revoked certificate", good, revoked.ClientConfig(ClientOptions{ALPN: []string{testALPN}, Expect: anyone}), ErrRevoked, ""},
		{"revoked identity", good, newIdentity(t, a, testID(KindConnector, "c3")).ClientConfig(ClientOptions{ALPN: []string{testALPN}, Expect: anyone}), ErrRevoked, ""},
		{"no rule", with(func(o *ServerOptions) { o.Accept, o.AcceptCert = nil, nil }), plain(func(*tls.Config) {}), ErrRefused, ""},
		{"rule says no", with(func(o *ServerOptions) { o.Accept = AcceptIdentities() }), plain(func(*tls.Config) {}), ErrRefused, ""},
		{"rule on the certificate alone", with(func(o *ServerOptions) { o.Accept = nil }), plain(func(*tls.Config) {}), nil, ""},
		{"TLS 1.2", good, plain(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }), nil, "unsupported versions"},
		{"TLS 1.2 of an unknown option", with(func(o *ServerOptions) { o.MinVersion = tls.VersionTLS10 }), plain(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }), nil, "unsupported versions"},
		{"other protocol", good, plain(func(c *tls.Config) { c.NextProtos = []string{"other/1"} }), nil, "unsupported application protocols"},
		{"no protocol", good, plain(func(c *tls.Config) { c.NextProtos = nil; relaxALPN(c, connector) }), ErrRefused, ""},
		{"old key exchange only", good, plain(func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }), nil, "no key exchanges"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := handshake(t, edge.ServerConfig(c.server), c.client)
			switch {
			case c.is == nil && c.want == "":
				if r.serverErr != nil || r.clientErr != nil {
					t.Errorf("server: %v, client: %v, want success", r.serverErr, r.clientErr)
				}
				return
			case c.is != nil && !errors.Is(r.serverErr, c.is):
				t.Errorf("server: got %v, want %v", r.serverErr, c.is)
			case r.serverErr == nil || !strings.Contains(r.serverErr.Error(), c.want):
				t.Errorf("server: got %v, want an error with %q", r.serverErr, c.want)
			}
			if r.clientErr == nil {
				t.Error("client was served")
			}
		})
	}
}

// relaxALPN lets a client accept that no protocol was agreed on.
func relaxALPN(c *tls.Config, s *Source) {
	c.VerifyConnection = s.ClientConfig(ClientOptions{Expect: anyone}).VerifyConnection
}

func lengthen(c tls.Certificate, n int) tls.Certificate {
	for range n {
		c.Certificate = append(c.Certificate, c.Certificate[1])
	}
	return c
}

func TestClientRefuses(t *testing.T) {
	a, impostor := newAuthority(t, testDomain), newAuthority(t, testDomain)
	connector := newIdentity(t, a, testID(KindConnector, "c1"))
	edgeID := testID(KindEdge, "e1")
	serve := func(c tls.Certificate) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{c}, NextProtos: []string{testALPN}}
	}
	forged := func(a *Authority, id Identity, edit func(*x509.Certificate)) *tls.Config {
		return serve(forge(t, a, id, edit))
	}
	same := func(*x509.Certificate) {}
	good := ClientOptions{ALPN: []string{testALPN}, Expect: AcceptIdentities(edgeID)}
	for _, c := range []struct {
		name   string
		client ClientOptions
		server *tls.Config
		is     error
		want   string
	}{
		{"good", good, forged(a, edgeID, same), nil, ""},
		{"another edge", good, forged(a, testID(KindEdge, "e2"), same), ErrRefused, ""},
		{"another authority", good, forged(impostor, edgeID, same), nil, "unknown authority"},
		{"connector as server", ClientOptions{Expect: anyone}, forged(a, testID(KindConnector, "c2"), same), nil, "incompatible key usage"},
		{"expired", good, forged(a, edgeID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), nil, "expired"},
		{"no rule", ClientOptions{ALPN: []string{testALPN}}, forged(a, edgeID, same), ErrRefused, ""},
		{"rule on the certificate", ClientOptions{ExpectCert: func(id Identity, leaf *x509.Certificate) error {
			if leaf == nil || id != edgeID {
				return errors.New("wrong")
			}
			return nil
		}}, forged(a, edgeID, same), nil, ""},
		{"rule on the certificate says no", ClientOptions{Expect: anyone, ExpectCert: func(Identity, *x509.Certificate) error { return ErrRevoked }}, forged(a, edgeID, same), ErrRevoked, ""},
		{"host name instead of identity", good, forged(a, edgeID, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"localhost"} }), ErrNoIdentity, ""},
		{"no protocol", good, func() *tls.Config { c := forged(a, edgeID, same); c.NextProtos = nil; return c }(), ErrRefused, ""},
		{"TLS 1.2", good, func() *tls.Config { c := forged(a, edgeID, same); c.MaxVersion = tls.VersionTLS12; return c }(), nil, "protocol version"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := handshake(t, c.server, connector.ClientConfig(c.client))
			switch {
			case c.is == nil && c.want == "":
				if r.clientErr != nil {
					t.Errorf("got %v, want success", r.clientErr)
				}
			case c.is != nil && !errors.Is(r.clientErr, c.is):
				t.Errorf("got %v, want %v", r.clientErr, c.is)
			case r.clientErr == nil || !strings.Contains(r.clientErr.Error(), c.want):
				t.Errorf("got %v, want an error with %q", r.clientErr, c.want)
			}
		})
	}
}

// TestForeignTrustDomain trusts, on top of its own, the root of an authority without constraints: identities of another
// trust domain are still refused.
func TestForeignTrustDomain(t *testing.T) {
	a, other := newAuthority(t, testDomain), newAuthority(t, "other.test")
	key, csr, err := NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.IssueCSR(csr, testID(KindEdge, "e1"), 0)
	if err != nil {
		t.Fatal(err)
	}
	edge := writeAndOpen(t, key, chain, append(a.RootPEM(), other.RootPEM()...))
	stranger := newIdentity(t, other, Identity{"other.test", KindConnector, "c1"})
	r := handshake(t, edge.ServerConfig(ServerOptions{ALPN: []string{testALPN}, Accept: anyone}), edge.as(*stranger.current.Load().cert))
	if !errors.Is(r.serverErr, ErrRefused) {
		t.Errorf("got %v, want ErrRefused", r.serverErr)
	}
}

// TestNoResumption has a client that wants to resume: each of its connections is verified anew.
func TestNoResumption(t *testing.T) {
	a := newAuthority(t, testDomain)
	edge, connector := newIdentity(t, a, testID(KindEdge, "e1")), newIdentity(t, a, testID(KindConnector, "c1"))
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		asked := 0
		server := edge.ServerConfig(ServerOptions{MinVersion: tls.VersionTLS12, Accept: func(Identity) error { asked++; return nil }})
		client := connector.ClientConfig(ClientOptions{Expect: anyone})
		client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
		client.SessionTicketsDisabled = false
		client.ServerName = "e1"
		client.MinVersion, client.MaxVersion = version, version
		for range 3 {
			r := handshake(t, server, client)
			if r.serverErr != nil || r.clientErr != nil || r.server.DidResume || r.server.Version != version {
				t.Fatalf("server: %v, client: %v, resumed %v, version %x", r.serverErr, r.clientErr, r.server.DidResume, r.server.Version)
			}
		}
		if asked != 3 {
			t.Errorf("version %x: the rule was asked %d times for 3 connections", version, asked)
		}
	}
}

func TestAnonymousALPN(t *testing.T) {
	const join = "join/1"
	a, impostor := newAuthority(t, testDomain), newAuthority(t, testDomain)
	edge, connector := newIdentity(t, a, testID(KindEdge, "e1")), newIdentity(t, a, testID(KindConnector, "c1"))
	server := edge.ServerConfig(ServerOptions{ALPN: []string{testALPN}, AnonymousALPN: []string{join}, Accept: AcceptKinds(KindConnector)})

	r := handshake(t, server, PinnedClientConfig(a.Pin(), join))
	if r.serverErr != nil || r.clientErr != nil {
		t.Fatalf("join: server: %v, client: %v", r.serverErr, r.clientErr)
	}
	if r.server.NegotiatedProtocol != join || len(r.server.PeerCertificates) != 0 {
		t.Errorf("join: got protocol %q, %d certificates", r.server.NegotiatedProtocol, len(r.server.PeerCertificates))
	}
	r = handshake(t, server, connector.ClientConfig(ClientOptions{ALPN: []string{testALPN}, Expect: anyone}))
	if r.serverErr != nil || r.clientErr != nil || r.server.NegotiatedProtocol != testALPN {
		t.Errorf("with identity: server: %v, client: %v, protocol %q", r.serverErr, r.clientErr, r.server.NegotiatedProtocol)
	}
	for _, c := range []struct {
		name   string
		server *tls.Config
		pin    [32]byte
		alpn   []string
		edit   func(*tls.Config)
		want   string // in the error of either side
	}{
		{"both protocols, no certificate", server, a.Pin(), []string{join, testALPN}, nil, "provide a certificate"},
		{"named protocol, no certificate", server, a.Pin(), []string{testALPN}, nil, "provide a certificate"},
		{"no protocol, no certificate", server, a.Pin(), nil, nil, "provide a certificate"},
		{"TLS 1.2", server, a.Pin(), []string{join}, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, "versions"},
		{"another pin", server, impostor.Pin(), []string{join}, nil, "pins"},
		{"zero pin", server, [32]byte{}, []string{join}, nil, "pins"},
	} {
		client := PinnedClientConfig(c.pin, c.alpn...)
		if c.edit != nil {
			c.edit(client)
		}
		r := handshake(t, c.server, client)
		if err := errors.Join(r.serverErr, r.clientErr); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", c.name, err, c.want)
		}
		if r.clientErr == nil {
			t.Errorf("%s: client was served", c.name)
		}
	}
}

func TestPinnedServer(t *testing.T) {
	a, impostor := newAuthority(t, testDomain), newAuthority(t, testDomain)
	edgeID := testID(KindEdge, "e1")
	same := func(*x509.Certificate) {}
	cut := func(c tls.Certificate) tls.Certificate { c.Certificate = c.Certificate[:1]; return c }
	graft := func(c tls.Certificate) tls.Certificate { c.Certificate[1] = a.root.Raw; return c }
	// A certificate of the pinned key that is no authority's.
	template := &x509.Certificate{SerialNumber: a.root.SerialNumber, NotBefore: a.root.NotBefore, NotAfter: a.root.NotAfter, BasicConstraintsValid: true}
	plain, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	demote := func(c tls.Certificate) tls.Certificate { c.Certificate[1] = plain; return c }
	for _, c := range []struct {
		name, want string
		cert       tls.Certificate
	}{
		{"good", "", forge(t, a, edgeID, same)},
		{"of a root that is no authority", "pins", demote(forge(t, a, edgeID, func(c *x509.Certificate) { c.Issuer.CommonName = "" }))},
		{"without its root", "did not send its root", cut(forge(t, a, edgeID, same))},
		{"of another authority", "pins", forge(t, impostor, edgeID, same)},
		{"of another authority, with our root added", "verify server", graft(forge(t, impostor, edgeID, same))},
		{"a connector's", "incompatible key usage", forge(t, a, testID(KindConnector, "c1"), same)},
		{"a key server's", "not of an admitted kind", forge(t, a, testID(KindKeyServer, "k1"), same)},
		{"expired", "expired", forge(t, a, edgeID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })},
		{"of another trust domain", "not permitted", forge(t, a, Identity{"other.test", KindEdge, "e1"}, same)},
	} {
		r := handshake(t, &tls.Config{Certificates: []tls.Certificate{c.cert}}, PinnedClientConfig(a.Pin()))
		if c.want == "" && r.clientErr != nil || c.want != "" && (r.clientErr == nil || !strings.Contains(r.clientErr.Error(), c.want)) {
			t.Errorf("%s: got %v, want %q", c.name, r.clientErr, c.want)
		}
	}
}

// TestOpenSSLClient lets OpenSSL talk to a server that also offers TLS 1.2, and to one that does not.
func TestOpenSSLClient(t *testing.T) {
	a := newAuthority(t, testDomain)
	server, client := newIdentity(t, a, testID(KindKeyServer, "k1")), newIdentity(t, a, testID(KindEdge, "e1"))
	for _, c := range []struct {
		name string
		min  uint16
		args []string
		want string // in OpenSSL's output, if it is to succeed
	}{
		{"1.3", 0, []string{"-tls1_3", "-groups", "X25519"}, "TLSv1.3"},
		{"1.2 refused", 0, []string{"-tls1_2"}, ""},
		{"1.2", tls.VersionTLS12, []string{"-tls1_2"}, "ECDHE-ECDSA-AES256-GCM-SHA384"},
		{"1.2, P-256", tls.VersionTLS12, []string{"-tls1_2", "-groups", "P-256"}, "ECDHE-ECDSA-AES256-GCM-SHA384"},
		{"1.2, other suite", tls.VersionTLS12, []string{"-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"}, ""},
		{"1.1", tls.VersionTLS12, []string{"-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := server.ServerConfig(ServerOptions{MinVersion: c.min, Accept: AcceptIdentities(client.Identity())})
			ln, err := tls.Listen("tcp", "127.0.0.1:0", config)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			done := make(chan error, 1)
			go func() { done <- serveOne(ln) }()
			args := append([]string{"s_client", "-connect", ln.Addr().String(), "-CAfile", server.files.RootsFile,
				"-cert", client.files.CertFile, "-key", client.files.KeyFile, "-verify_return_error", "-ign_eof"}, c.args...)
			out, err := command(t, "hello\n", "openssl", args...)
			serveErr := <-done
			if c.want == "" {
				if serveErr == nil {
					t.Errorf("was served:\n%s", out)
				}
				return
			}
			if serveErr != nil || err != nil || !strings.Contains(out, c.want) || !strings.Contains(out, "welcome") {
				t.Errorf("server: %v, openssl: %v, want %q and a welcome:\n%s", serveErr, err, c.want, out)
			}
		})
	}
}

func serveOne(ln net.Listener) error {
	c, err := ln.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = c.Write([]byte("welcome\n"))
	return err
}
