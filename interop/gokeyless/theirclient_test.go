//lint:file-ignore SA1019 TLS 1.2 without ECDHE has no other padding

package gokeyless

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudflare/gokeyless/client"
	"github.com/cloudflare/gokeyless/protocol"

	"github.com/keyhaven/keyhaven/keyless"
)

var versions = map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13}

// theirs makes the existing client as one of our clients, with one TLS version.
func (s *site) theirs(t testing.TB, name string, version uint16) *client.Client {
	t.Helper()
	c := must(client.NewClientFromFile(s.path(name, "cert.pem"), s.path(name, "key.pem"), s.path("ca", "ca.crt")))(t)
	c.Config.MinVersion, c.Config.MaxVersion = version, version
	return c
}

// server is how the existing client names one of our servers.
func (p *program) server(t testing.TB) string {
	_, port, err := net.SplitHostPort(p.addr)
	if err != nil {
		t.Fatal(err)
	}
	return "localhost:" + port
}

// pooled lets the existing client pool its connections until the test ends, as it does in service. The pool is the
// process's and knows connections by their address: such a test has a server for each client and each TLS version.
func pooled(t *testing.T) {
	atomic.StoreUint32(&client.TestDisableConnectionPool, 0)
	t.Cleanup(func() { atomic.StoreUint32(&client.TestDisableConnectionPool, 1) })
}

// do sends one operation with the existing client and returns the reply.
func do(t testing.TB, c *client.Client, p *program, op protocol.Operation) *protocol.Operation {
	t.Helper()
	remote := must(c.LookupServer(p.server(t)))(t)
	conn := must(remote.Dial(c))(t)
	defer conn.Close()
	return must(conn.DoOperation(t.Context(), op))(t)
}

// A signature is one that the protocol has an operation for.
type signature struct{ opts crypto.SignerOpts }

func (s signature) String() string {
	_, pss := s.opts.(*rsa.PSSOptions)
	switch {
	case s.opts.HashFunc() == 0:
		return "message"
	case pss:
		return "PSS " + s.opts.HashFunc().String()
	}
	return s.opts.HashFunc().String()
}

func pss(h crypto.Hash) signature {
	return signature{&rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: h}}
}

var (
	anyHash = []signature{{crypto.MD5SHA1}, {crypto.SHA1}, {crypto.SHA224}, {crypto.SHA256}, {crypto.SHA384}, {crypto.SHA512}}
	allPSS  = []signature{pss(crypto.SHA256), pss(crypto.SHA384), pss(crypto.SHA512)}
)

// signaturesOf lists every signature that the protocol can ask a key for.
func signaturesOf(pub crypto.PublicKey) []signature {
	switch pub.(type) {
	case *rsa.PublicKey:
		return append(allPSS[:len(allPSS):len(allPSS)], anyHash...)
	case *ecdsa.PublicKey:
		return anyHash
	}
	return []signature{{crypto.Hash(0)}}
}

// digest makes something to sign.
func digest(h crypto.Hash) []byte {
	n := 200 // a message for Ed25519
	if h != 0 {
		n = h.Size()
	}
	return random(n)
}

func TestTheirClientSigns(t *testing.T) {
	pooled(t)
	s := open(t)
	for name, version := range versions {
		p, c := s.ours(t, nil), s.theirs(t, "full", version)
		for label, pub := range s.keys {
			signer := must(c.NewRemoteSignerByPublicKey(t.Context(), p.server(t), pub))(t)
			for _, sig := range signaturesOf(pub) {
				t.Run(name+"/"+label+"/"+sig.String(), func(t *testing.T) {
					d := digest(sig.opts.HashFunc())
					got, err := signer.Sign(rand.Reader, d, sig.opts)
					if err != nil {
						t.Fatal(err)
					}
					if err := verify(pub, d, got, sig.opts); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// TestTheirClientIsRefused asks for what the client or the server must not do; a refusal must be one that the existing
// client understands.
func TestTheirClientIsRefused(t *testing.T) {
	s := open(t)
	lenient, strict := s.ours(t, nil), s.ours(t, func(cfg obj) { delete(cfg, "legacy") })
	modern, full := s.theirs(t, "modern", tls.VersionTLS13), s.theirs(t, "full", tls.VersionTLS13)
	for _, tc := range []struct {
		name   string
		client *client.Client
		server *program
		key    string
		opts   crypto.SignerOpts
	}{
		{"a key of others", modern, lenient, "p384", crypto.SHA384},
		{"SHA-1 without a rule", modern, lenient, "rsa", crypto.SHA1},
		{"MD5SHA1 without a rule", modern, lenient, "rsa", crypto.MD5SHA1},
		{"SHA-1 without the switch", full, strict, "rsa", crypto.SHA1},
		{"MD5SHA1 without the switch", full, strict, "rsa", crypto.MD5SHA1},
		{"ECDSA with SHA-1 without the switch", full, strict, "p256", crypto.SHA1},
		{"ECDSA with MD5SHA1 without the switch", full, strict, "file-p256", crypto.MD5SHA1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			signer := must(tc.client.NewRemoteSignerByPublicKey(t.Context(), tc.server.server(t), s.keys[tc.key]))(t)
			sig, err := signer.Sign(rand.Reader, digest(tc.opts.HashFunc()), tc.opts)
			if err == nil {
				t.Fatalf("got a signature of %d bytes, want a refusal", len(sig))
			}
			if !strings.Contains(err.Error(), protocol.ErrKeyNotFound.Error()) {
				t.Errorf("got %v, want %v", err, protocol.ErrKeyNotFound)
			}
		})
	}
	t.Run("all else goes on", func(t *testing.T) {
		for _, c := range []*client.Client{modern, full} {
			signer := must(c.NewRemoteSignerByPublicKey(t.Context(), strict.server(t), s.keys["rsa"]))(t)
			must(signer.Sign(rand.Reader, digest(crypto.SHA256), crypto.SHA256))(t)
		}
	})
	t.Run("a client that no rule names", func(t *testing.T) {
		signer := must(s.theirs(t, "stranger", tls.VersionTLS13).NewRemoteSignerByPublicKey(t.Context(), lenient.server(t), s.keys["p256"]))(t)
		if _, err := signer.Sign(rand.Reader, digest(crypto.SHA256), crypto.SHA256); err == nil {
			t.Error("got a signature, want a refusal")
		}
	})
}

func TestTheirClientDecrypts(t *testing.T) {
	s := open(t)
	p, strict := s.ours(t, nil), s.ours(t, func(cfg obj) { delete(cfg, "legacy") })
	secret := digest(crypto.SHA384) // 48 bytes, as a premaster secret
	for name, version := range versions {
		for _, label := range []string{"rsa", "file-rsa"} {
			t.Run(name+"/"+label, func(t *testing.T) {
				pub := s.keys[label].(*rsa.PublicKey)
				sealed := must(rsa.EncryptPKCS1v15(rand.Reader, pub, secret))(t)
				c := s.theirs(t, "full", version)
				key, ok := must(c.NewRemoteSignerByPublicKey(t.Context(), p.server(t), pub))(t).(crypto.Decrypter)
				if !ok {
					t.Fatal("the existing client does not take the key for one that decrypts")
				}
				got, err := key.Decrypt(rand.Reader, sealed, &rsa.PKCS1v15DecryptOptions{SessionKeyLen: len(secret)})
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, secret) {
					t.Error("got other bytes than were encrypted")
				}
				ski := must(protocol.GetSKI(pub))(t)
				for _, opcode := range []protocol.Op{protocol.OpRSADecrypt, protocol.Op(keyless.OpRSADecryptRaw)} {
					reply := do(t, c, p, protocol.Operation{Opcode: opcode, SKI: ski, Payload: sealed})
					if reply.Opcode != protocol.OpResponse || len(reply.Payload) != pub.Size() {
						t.Errorf("opcode 0x%02x: got %v with %d bytes, want a block of %d", byte(opcode), reply.Opcode, len(reply.Payload), pub.Size())
					} else if !bytes.HasSuffix(reply.Payload, append([]byte{0}, secret...)) {
						t.Errorf("opcode 0x%02x: the block does not end in what was encrypted", byte(opcode))
					}
				}
			})
		}
	}
	ski := must(protocol.GetSKI(s.keys["rsa"]))(t)
	block := make([]byte, 256)
	for _, tc := range []struct {
		name, client string
		server       *program
	}{{"without a rule", "modern", p}, {"without the switch", "full", strict}} {
		reply := do(t, s.theirs(t, tc.client, tls.VersionTLS13), tc.server, protocol.Operation{Opcode: protocol.OpRSADecrypt, SKI: ski, Payload: block})
		if got, want := reply.ErrorVal(), protocol.ErrKeyNotFound; reply.Opcode != protocol.OpError || got != want {
			t.Errorf("%s: got %v, want %v", tc.name, got, want)
		}
	}
}

// TestTheirClientHandshakes serves TLS with keys that the existing client reaches in our server.
func TestTheirClientHandshakes(t *testing.T) {
	pooled(t)
	s := open(t)
	p := s.ours(t, nil)
	for name, version := range versions {
		for label, pub := range s.keys {
			t.Run(name+"/"+label, func(t *testing.T) {
				signer := must(s.theirs(t, "full", tls.VersionTLS13).NewRemoteSignerByPublicKey(t.Context(), p.server(t), pub))(t)
				handshake(t, version, signer)
			})
		}
	}
}

// certify issues a certificate for "visited.test" under an authority of its own.
func certify(t *testing.T, pub crypto.PublicKey) (root *x509.Certificate, der []byte) {
	t.Helper()
	from, until := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	ca := must(newKey("file-p256"))(t)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "visitors' authority"}, NotBefore: from, NotAfter: until,
		IsCA: true, BasicConstraintsValid: true}
	root = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, ca.Public(), ca))(t)))(t)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{"visited.test"}, NotBefore: from, NotAfter: until}
	return root, must(x509.CreateCertificate(rand.Reader, leaf, root, pub, ca))(t)
}

// handshake makes a TLS connection whose server has this key.
func handshake(t *testing.T, version uint16, key crypto.Signer) {
	t.Helper()
	root, der := certify(t, key.Public())
	roots := x509.NewCertPool()
	roots.AddCert(root)
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	served := make(chan error, 1)
	go func() {
		served <- tls.Server(b, &tls.Config{MinVersion: version, MaxVersion: version, SessionTicketsDisabled: true,
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}).HandshakeContext(t.Context())
	}()
	if err := tls.Client(a, &tls.Config{RootCAs: roots, ServerName: "visited.test", MinVersion: version, MaxVersion: version}).HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
}

func TestTheirClientPingsAndSeals(t *testing.T) {
	s := open(t)
	p := s.ours(t, nil)
	for name, version := range versions {
		t.Run(name, func(t *testing.T) {
			c := s.theirs(t, "full", version)
			remote := must(c.LookupServer(p.server(t)))(t)
			conn := must(remote.Dial(c))(t)
			defer conn.Close()
			for _, size := range []int{0, 1, 900, 1013, 4096, 60000} {
				if err := conn.Ping(t.Context(), random(size)); err != nil {
					t.Errorf("ping of %d bytes: %v", size, err)
				}
			}
			blob := random(300)
			sealed := must(conn.DoOperation(t.Context(), protocol.Operation{Opcode: protocol.OpSeal, Payload: blob}))(t)
			if sealed.Opcode != protocol.OpResponse {
				t.Fatalf("seal: got %v, %v", sealed.Opcode, sealed.ErrorVal())
			}
			if bytes.Contains(sealed.Payload, blob) {
				t.Error("the sealed blob shows what it holds")
			}
			opened := must(conn.DoOperation(t.Context(), protocol.Operation{Opcode: protocol.OpUnseal, Payload: sealed.Payload}))(t)
			if opened.Opcode != protocol.OpResponse || !bytes.Equal(opened.Payload, blob) {
				t.Errorf("unseal: got %v with other bytes", opened.Opcode)
			}
			sealed.Payload[len(sealed.Payload)-1] ^= 1
			forged := must(conn.DoOperation(t.Context(), protocol.Operation{Opcode: protocol.OpUnseal, Payload: sealed.Payload}))(t)
			if got, want := forged.ErrorVal(), protocol.ErrCrypto; forged.Opcode != protocol.OpError || got != want {
				t.Errorf("unseal of a changed blob: got %v, want %v", got, want)
			}
		})
	}
	reply := do(t, s.theirs(t, "modern", tls.VersionTLS13), p, protocol.Operation{Opcode: protocol.OpSeal, Payload: random(10)})
	if reply.ErrorVal() != protocol.ErrBadOpcode {
		t.Errorf("seal without a rule: got %v, want %v", reply.ErrorVal(), protocol.ErrBadOpcode)
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// TestTheirClientReadsErrors sends what no good client sends and wants the code that says so.
func TestTheirClientReadsErrors(t *testing.T) {
	s := open(t)
	p := s.ours(t, nil)
	c := s.theirs(t, "full", tls.VersionTLS13)
	rsaSKI, ecSKI := must(protocol.GetSKI(s.keys["rsa"]))(t), must(protocol.GetSKI(s.keys["p256"]))(t)
	for _, tc := range []struct {
		name string
		op   protocol.Operation
		want protocol.Error
	}{
		{"unknown key", protocol.Operation{Opcode: protocol.OpECDSASignSHA256, SKI: protocol.SKI{1}, Payload: digest(crypto.SHA256)}, protocol.ErrKeyNotFound},
		{"no key", protocol.Operation{Opcode: protocol.OpECDSASignSHA256, Payload: digest(crypto.SHA256)}, protocol.ErrFormat},
		{"digest too short", protocol.Operation{Opcode: protocol.OpECDSASignSHA256, SKI: ecSKI, Payload: digest(crypto.SHA1)}, protocol.ErrFormat},
		{"digest too long", protocol.Operation{Opcode: protocol.OpRSASignSHA256, SKI: rsaSKI, Payload: digest(crypto.SHA512)}, protocol.ErrFormat},
		{"RSA opcode, EC key", protocol.Operation{Opcode: protocol.OpRSASignSHA256, SKI: ecSKI, Payload: digest(crypto.SHA256)}, protocol.ErrCrypto},
		{"EC opcode, RSA key", protocol.Operation{Opcode: protocol.OpECDSASignSHA256, SKI: rsaSKI, Payload: digest(crypto.SHA256)}, protocol.ErrCrypto},
		{"ciphertext too short", protocol.Operation{Opcode: protocol.OpRSADecrypt, SKI: rsaSKI, Payload: make([]byte, 255)}, protocol.ErrFormat},
		{"ciphertext above the modulus", protocol.Operation{Opcode: protocol.OpRSADecrypt, SKI: rsaSKI, Payload: bytes.Repeat([]byte{0xff}, 256)}, protocol.ErrFormat},
		{"remote procedure call", protocol.Operation{Opcode: protocol.OpRPC, Payload: []byte{1}}, protocol.ErrInternal},
		{"unknown function", protocol.Operation{Opcode: protocol.OpCustom, CustomFuncName: "echo", Payload: []byte{1}}, protocol.ErrBadOpcode},
		{"unknown opcode", protocol.Operation{Opcode: 0x77, Payload: []byte{1}}, protocol.ErrBadOpcode},
		{"response as a request", protocol.Operation{Opcode: protocol.OpResponse, Payload: []byte{1}}, protocol.ErrUnexpectedOpcode},
		{"pong as a request", protocol.Operation{Opcode: protocol.OpPong, Payload: []byte{1}}, protocol.ErrUnexpectedOpcode},
		{"error as a request", protocol.Operation{Opcode: protocol.OpError, Payload: []byte{1}}, protocol.ErrUnexpectedOpcode},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reply := do(t, c, p, tc.op)
			if reply.Opcode != protocol.OpError {
				t.Fatalf("got %v, want an error", reply.Opcode)
			}
			if got := reply.ErrorVal(); got != tc.want {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
	t.Run("by the digest of older clients", func(t *testing.T) {
		d := digest(crypto.SHA256)
		name := must(protocol.GetDigest(s.keys["rsa"]))(t)
		reply := do(t, c, p, protocol.Operation{Opcode: protocol.OpRSASignSHA256, Digest: name, Payload: d})
		if err := verify(s.keys["rsa"], d, reply.Payload, crypto.SHA256); err != nil {
			t.Errorf("%v: %v", reply.Opcode, err)
		}
	})
	t.Run("with everything that a request can carry", func(t *testing.T) {
		d := digest(crypto.SHA256)
		reply := do(t, c, p, protocol.Operation{
			Opcode: protocol.OpECDSASignSHA256, SKI: ecSKI, Payload: d, SNI: "visited.test", ClientIP: net.IPv4(192, 0, 2, 7), ServerIP: net.ParseIP("2001:db8::1"),
			CertID: "certificate", Extra: []byte("extra"), JaegerSpan: []byte("no span"), ReqContext: []byte(`{"request_id":"r1"}`), ComplianceRegion: protocol.ComplianceRegionFedRAMPHigh,
		})
		if err := verify(s.keys["p256"], d, reply.Payload, crypto.SHA256); err != nil {
			t.Errorf("%v: %v", reply.Opcode, err)
		}
	})
}

func TestTheirClientPipelines(t *testing.T) {
	s := open(t)
	p := s.ours(t, nil)
	c := s.theirs(t, "full", tls.VersionTLS13)
	remote := must(c.LookupServer(p.server(t)))(t)
	conn := must(remote.Dial(c))(t)
	defer conn.Close()
	pub := s.keys["p256"]
	ski := must(protocol.GetSKI(pub))(t)
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(func() {
			d := digest(crypto.SHA256)
			reply, err := conn.DoOperation(t.Context(), protocol.Operation{Opcode: protocol.OpECDSASignSHA256, SKI: ski, Payload: d})
			if err != nil {
				t.Error(err)
			} else if err := verify(pub, d, reply.Payload, crypto.SHA256); err != nil {
				t.Errorf("%v: %v", reply.Opcode, err)
			}
		})
	}
	wg.Wait()
}

// TestTheirClientFindsBack lets our server close connections on which nothing happens; the existing client's next
// operation must not notice.
func TestTheirClientFindsBack(t *testing.T) {
	pooled(t)
	s := open(t)
	p := s.ours(t, func(cfg obj) { cfg["timeouts"] = obj{"idle": "200ms"} })
	signer := must(s.theirs(t, "full", tls.VersionTLS13).NewRemoteSignerByPublicKey(t.Context(), p.server(t), s.keys["p256"]))(t)
	for range 3 {
		d := digest(crypto.SHA256)
		sig, err := signer.Sign(rand.Reader, d, crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(s.keys["p256"], d, sig, crypto.SHA256); err != nil {
			t.Error(err)
		}
		eventually(t, func() error { return p.connections(0) })
	}
}

// connections asks our server how many connections it has.
func (p *program) connections(want int) error {
	resp, err := http.Get("http://" + p.ops + "/metrics")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if line := fmt.Sprintf("\nkeyhaven_keyserver_connections %d\n", want); !strings.Contains(string(text), line) {
		return fmt.Errorf("the metrics have no line%q", line)
	}
	return nil
}
