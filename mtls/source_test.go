package mtls

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestWriteIdentity(t *testing.T) {
	a := newAuthority(t, testDomain)
	key, csr, err := NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	id := testID(KindConnector, "c1")
	chain, err := a.IssueCSR(csr, id, 0)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := WriteIdentity(dir, key, chain, a.RootPEM()); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{".": 0o700, KeyFileName: 0o600, CertFileName: 0o644, RootsFileName: 0o644} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %04o, want %04o", name, got, want)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 3 {
		t.Errorf("directory holds %v, want three files", entries)
	}
	s, err := OpenDir(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s.Identity() != id || !bytes.Equal(s.Leaf().Raw, chain[0]) || !bytes.Equal(s.RootsPEM(), a.RootPEM()) || !s.NotAfter().Equal(s.Leaf().NotAfter) {
		t.Errorf("opened %v until %s", s.Identity(), s.NotAfter())
	}
	if err := s.Check(); err != nil {
		t.Error(err)
	}

	otherKey, _, _ := NewKeyCSR()
	other := newAuthority(t, testDomain)
	for name, err := range map[string]error{
		"key of another":   WriteIdentity(dir, otherKey, chain, a.RootPEM()),
		"root of another":  WriteIdentity(dir, key, chain, other.RootPEM()),
		"no chain":         WriteIdentity(dir, key, nil, a.RootPEM()),
		"no roots":         WriteIdentity(dir, key, chain, nil),
		"root as identity": WriteIdentity(dir, a.key, [][]byte{a.root.Raw}, a.RootPEM()),
	} {
		if err == nil {
			t.Errorf("%s: was written", name)
		}
	}
	if err := s.Reload(); err != nil {
		t.Errorf("refused writings spoiled the directory: %v", err)
	}
}

func TestOpenSourceRefuses(t *testing.T) {
	a, other := newAuthority(t, testDomain), newAuthority(t, testDomain)
	for _, c := range []struct {
		name, want string
		change     func(t *testing.T, dir string)
	}{
		{"key open to others", "chmod 600", func(t *testing.T, dir string) { chmod(t, dir, KeyFileName, 0o644) }},
		{"key missing", "no such file", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, KeyFileName)) }},
		{"certificate missing", "no such file", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, CertFileName)) }},
		{"roots missing", "no such file", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, RootsFileName)) }},
		{"roots empty", "no PEM certificate", func(t *testing.T, dir string) { overwrite(t, dir, RootsFileName, nil) }},
		{"roots of another", "does not verify under", func(t *testing.T, dir string) { overwrite(t, dir, RootsFileName, other.RootPEM()) }},
		{"key in the certificate's file", "only CERTIFICATE", func(t *testing.T, dir string) { copyTo(t, dir, KeyFileName, CertFileName) }},
		{"certificate in the key's file", "PRIVATE KEY", func(t *testing.T, dir string) { copyTo(t, dir, CertFileName, KeyFileName) }},
		{"key of another", "private key does not match", func(t *testing.T, dir string) {
			copyFile(t, filepath.Dir(newIdentity(t, a, testID(KindEdge, "e2")).files.KeyFile), dir, KeyFileName, 0o600)
		}},
		{"no identity", "exactly one", func(t *testing.T, dir string) {
			c := forge(t, a, testID(KindEdge, "e1"), func(c *x509.Certificate) { c.URIs = nil })
			keyPEM, err := encodeKey(c.PrivateKey.(crypto.Signer))
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, dir, KeyFileName, keyPEM)
			overwrite(t, dir, CertFileName, encodeCerts(c.Certificate))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newIdentity(t, a, testID(KindEdge, "e1"))
			dir := filepath.Dir(s.files.KeyFile)
			c.change(t, dir)
			if _, err := OpenDir(dir, nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("open: got %v, want an error with %q", err, c.want)
			}
			before := s.current.Load()
			if err := s.Reload(); err == nil {
				t.Error("reload found nothing wrong")
			}
			if s.current.Load() != before {
				t.Error("a failed reload replaced the identity")
			}
		})
	}
}

func copyTo(t *testing.T, dir, from, to string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, from))
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, dir, to, data)
}

func TestCheck(t *testing.T) {
	a := newAuthority(t, testDomain)
	for _, c := range []struct {
		name string
		edit func(*x509.Certificate)
		want error
	}{
		{"good", func(*x509.Certificate) {}, nil},
		{"expired", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, ErrExpired},
		{"future", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }, ErrNotYetValid},
	} {
		cert := forge(t, a, testID(KindEdge, "e1"), c.edit)
		s := writeAndOpen(t, cert.PrivateKey.(crypto.Signer), cert.Certificate, a.RootPEM())
		if err := s.Check(); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
	}
}

// TestCrashPoints stops the writing of an identity after each step. What is found then must be whole: the old identity
// before the step that changes the certificate, the new one from there on. Then it is written again, to the end.
func TestCrashPoints(t *testing.T) {
	a, b := newAuthority(t, testDomain), newAuthority(t, testDomain)
	id := testID(KindConnector, "c1")
	type parts struct{ key, cert, roots []byte }
	make := func(a *Authority, roots []byte) parts {
		key, csr, err := NewKeyCSR()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := a.IssueCSR(csr, id, 0)
		if err != nil {
			t.Fatal(err)
		}
		keyPEM, err := encodeKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return parts{keyPEM, encodeCerts(chain), roots}
	}
	holds := func(c SourceConfig) string {
		s, err := OpenSource(c)
		if errors.Is(err, os.ErrNotExist) {
			return "nothing"
		}
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf("%x", s.Leaf().SerialNumber)
	}
	serial := func(p parts) string {
		certs, err := parseCerts(p.cert)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%x", certs[0].SerialNumber)
	}
	for _, c := range []struct {
		name     string
		fresh    bool
		to       *Authority
		newRoots bool
		commit   int // the step that changes the identity
		steps    int
	}{
		{"first", true, a, true, 3, 6},
		{"renewed", false, a, false, 2, 4},
		{"of another authority", false, b, true, 3, 6},
	} {
		for stop := range c.steps + 1 {
			for _, again := range []int{c.steps, c.commit, c.commit - 1} {
				name := fmt.Sprintf("%s, stopped after %d, then after %d", c.name, stop, again)
				files := DirConfig(t.TempDir())
				before := "nothing"
				if !c.fresh {
					old := make(a, a.RootPEM())
					if err := writeFiles(files, old.key, old.cert, old.roots); err != nil {
						t.Fatal(err)
					}
					before = serial(old)
				}
				// Two interrupted writings, then one to the end.
				for i, limit := range []int{stop, again, c.steps} {
					var roots []byte
					if c.newRoots {
						roots = c.to.RootPEM()
					}
					p := make(c.to, roots)
					steps := writeSteps(files, p.key, p.cert, p.roots)
					if len(steps) != c.steps {
						t.Fatalf("%s: writing has %d steps, this test knows %d", name, len(steps), c.steps)
					}
					for _, step := range steps[:limit] {
						if err := step(); err != nil {
							t.Fatalf("%s: %v", name, err)
						}
					}
					want := before
					if limit > c.commit {
						want = serial(p)
					}
					if got := holds(files); got != want {
						t.Fatalf("%s: round %d: found %s, want %s", name, i, got, want)
					}
					before = want
				}
				if entries, _ := os.ReadDir(filepath.Dir(files.KeyFile)); len(entries) != 3 {
					t.Errorf("%s: directory holds %v in the end", name, entries)
				}
			}
		}
	}
}

// TestStaleStagedRoots leaves staged roots behind, as a writing that stopped early does: they count for nothing once the
// key in its place fits.
func TestStaleStagedRoots(t *testing.T) {
	a, b := newAuthority(t, testDomain), newAuthority(t, testDomain)
	s := newIdentity(t, a, testID(KindEdge, "e1"))
	dir := filepath.Dir(s.files.KeyFile)
	overwrite(t, dir, RootsFileName+stagedSuffix, a.RootPEM())
	overwrite(t, dir, RootsFileName, b.RootPEM()) // the operator no longer trusts a
	if err := s.Reload(); err == nil {
		t.Error("roots that are not in their place were used")
	}
}

// TestReadersMeetWholeIdentities reloads while another writes.
func TestReadersMeetWholeIdentities(t *testing.T) {
	a := newAuthority(t, testDomain)
	writer := newIdentity(t, a, testID(KindEdge, "e1"))
	issue := issuer(a, writer.Identity())
	done := make(chan struct{})
	var reading sync.WaitGroup
	for range 2 {
		reading.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if _, err := OpenSource(writer.files); err != nil {
					t.Errorf("open while another renews: %v", err)
					return
				}
			}
		})
	}
	for range 40 {
		if err := writer.Renew(t.Context(), issue); err != nil {
			t.Error(err)
		}
	}
	close(done)
	reading.Wait()
}

// issuer answers renewals as an authority does.
func issuer(a *Authority, id Identity) func(context.Context, []byte) ([][]byte, error) {
	return func(_ context.Context, csr []byte) ([][]byte, error) { return a.IssueCSR(csr, id, 0) }
}

// TestReloadMidTraffic replaces certificate and roots under a running server and a running client: connections that
// stand stay, later ones meet the new identity, and who the new roots do not cover is refused.
func TestReloadMidTraffic(t *testing.T) {
	a, b := newAuthority(t, testDomain), newAuthority(t, testDomain)
	edge, connector := newIdentity(t, a, testID(KindEdge, "e1")), newIdentity(t, a, testID(KindConnector, "c1"))
	server := edge.ServerConfig(ServerOptions{Accept: AcceptKinds(KindConnector)})
	client := connector.ClientConfig(ClientOptions{Expect: AcceptKinds(KindEdge)})
	ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { defer c.Close(); io.Copy(c, c) })
		}
	})
	defer serving.Wait()
	defer ln.Close()
	dial := func() (*tls.Conn, error) {
		c, err := tls.Dial("tcp", ln.Addr().String(), client)
		if err != nil {
			return nil, err
		}
		if err := echo(c); err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	}
	first, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()

	// The server's certificate is renewed.
	if err := edge.Renew(t.Context(), issuer(a, edge.Identity())); err != nil {
		t.Fatal(err)
	}
	second, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if got, want := second.ConnectionState().PeerCertificates[0], edge.Leaf(); !got.Equal(want) || got.Equal(first.ConnectionState().PeerCertificates[0]) {
		t.Error("the new connection did not meet the new certificate")
	}
	if err := echo(first); err != nil {
		t.Errorf("the standing connection broke: %v", err)
	}

	// The server moves to another authority: the client, still of the first one, is refused, and accepted when it follows.
	moveTo := func(s *Source) {
		t.Helper()
		key, csr, err := NewKeyCSR()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := b.IssueCSR(csr, s.Identity(), 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := WriteIdentity(filepath.Dir(s.files.KeyFile), key, chain, b.RootPEM()); err != nil {
			t.Fatal(err)
		}
		if err := s.Reload(); err != nil {
			t.Fatal(err)
		}
	}
	moveTo(edge)
	if c, err := dial(); err == nil {
		c.Close()
		t.Error("a server and a client of two authorities met")
	}
	moveTo(connector)
	third, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	third.Close()
	if err := echo(second); err != nil {
		t.Errorf("the standing connection broke: %v", err)
	}
}

func echo(c net.Conn) error {
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write([]byte("ping")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 4))
	return err
}

func TestSourceLogs(t *testing.T) {
	a := newAuthority(t, testDomain)
	cert := forge(t, a, testID(KindEdge, "e1"), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	s := writeAndOpen(t, cert.PrivateKey.(crypto.Signer), cert.Certificate, a.RootPEM())
	var log bytes.Buffer
	if _, err := OpenDir(filepath.Dir(s.files.KeyFile), slog.New(slog.NewTextHandler(&log, nil))); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "out of its time") || !strings.Contains(log.String(), "e1") {
		t.Errorf("the log does not warn: %s", log.String())
	}
}
