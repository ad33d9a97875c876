package gokeyless

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
	"encoding/pem"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
)

// patience bounds what should be quick, on the slowest machine.
const patience = 60 * time.Second

type obj = map[string]any

// A site has a token with keys, files with more of them, and an authority that names servers and clients.
type site struct {
	dir   string
	token *softhsm.Token
	keys  map[string]crypto.PublicKey // by label
}

// Labels of the keys. Those of the token are "rsa", "p256", "p384" and "ed25519".
var (
	inToken = map[string]string{"rsa": "rsa2048", "p256": "p256", "p384": "p384", "ed25519": "ed25519"}
	inFiles = []string{"file-rsa", "file-p256", "file-p384", "file-ed25519"}
)

var theSite = sync.OnceValues(newSite)

// open returns the site that all tests share.
func open(t testing.TB) *site {
	t.Helper()
	return must(theSite())(t)
}

func newSite() (s *site, err error) {
	s = &site{dir: filepath.Join(dir, "site"), keys: map[string]crypto.PublicKey{}}
	if err := os.MkdirAll(filepath.Join(s.dir, "keys"), 0o700); err != nil {
		return nil, err
	}
	if s.token, err = softhsm.Create(filepath.Join(s.dir, "token")); err != nil {
		return nil, err
	}
	ca := s.path("ca")
	for _, args := range [][]string{
		{"ca", "init", "--ca-dir", ca, "--trust-domain", domain},
		{"ca", "issue", "ours", "--ca-dir", ca, "--out", s.path("ours"), "--dns", "localhost"},
		{"ca", "issue", "peer", "--ca-dir", ca, "--out", s.path("peer"), "--dns", "localhost"},
		{"client", "add", "full", "--ca-dir", ca, "--out", s.path("full")},
		{"client", "add", "modern", "--ca-dir", ca, "--out", s.path("modern")},
		{"client", "add", "stranger", "--ca-dir", ca, "--out", s.path("stranger")},
	} {
		if _, err := s.tool(args...); err != nil {
			return nil, err
		}
	}
	for label, typ := range inToken {
		if err := s.generate(label, typ); err != nil {
			return nil, err
		}
	}
	return s, s.writeKeys()
}

const domain = "keys.keyhaven.test"

func (s *site) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

// tool runs a command of our key server's program.
func (s *site) tool(args ...string) ([]byte, error) {
	cmd := exec.Command(filepath.Join(bin, "keyhaven-keyserver"), args...)
	cmd.Env = append(os.Environ(), s.token.Env())
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, &commandError{strings.Join(args, " "), err, errs.String()}
	}
	return out, nil
}

type commandError struct {
	command string
	err     error
	said    string
}

func (e *commandError) Error() string { return e.command + ": " + e.err.Error() + ": " + e.said }
func (e *commandError) Unwrap() error { return e.err }

func (s *site) generate(label, typ string) error {
	generate := []string{"key", "generate", "--uri", s.token.URI(), "--label", label, "--type", typ}
	if typ == "rsa2048" {
		generate = append(generate, "--decrypt")
	}
	if _, err := s.tool(generate...); err != nil {
		return err
	}
	out, err := s.tool("key", "csr", "--uri", s.token.URI(), "--key", label, "--dns", label+".test")
	if err != nil {
		return err
	}
	block, _ := pem.Decode(out)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return err
	}
	s.keys[label] = csr.PublicKey
	return nil
}

// writeKeys makes the keys in files, under names that both servers take.
func (s *site) writeKeys() error {
	for _, label := range inFiles {
		key, err := newKey(label)
		if err != nil {
			return err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		if err := os.WriteFile(s.path("keys", label+".key"), text, 0o600); err != nil {
			return err
		}
		s.keys[label] = key.Public()
	}
	return nil
}

func newKey(label string) (crypto.Signer, error) {
	switch label {
	case "file-rsa":
		return rsa.GenerateKey(rand.Reader, 2048)
	case "file-p256":
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "file-p384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	return key, err
}

// A program is a running key server.
type program struct {
	name, addr string
	log        *bytes.Buffer // complete once the process has ended
	ops        string
}

// start runs a program until the test ends, and waits until it accepts connections.
func (s *site) start(t testing.TB, name, addr string, args ...string) *program {
	t.Helper()
	p := &program{name: name, addr: addr, log: new(bytes.Buffer)}
	cmd := exec.Command(filepath.Join(bin, name), args...)
	cmd.Env = append(os.Environ(), s.token.Env())
	cmd.Stdout, cmd.Stderr = p.log, p.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := <-ended; err != nil {
			t.Errorf("%s ended with %v; it said:\n%s", name, err, s.clean(p.log))
		} else if t.Failed() {
			t.Logf("%s said:\n%s", name, s.clean(p.log))
		}
	})
	deadline := time.Now().Add(patience)
	for {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return p
		}
		select {
		case err := <-ended:
			ended <- nil
			t.Fatalf("%s ended at once: %v; it said:\n%s", name, err, s.clean(p.log))
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen: %v", name, err)
		}
	}
}

// clean takes the PIN out, which the existing server logs.
func (s *site) clean(log *bytes.Buffer) string {
	return strings.ReplaceAll(log.String(), s.token.PIN, "PIN")
}

// ours runs our key server with the token, the files and the clients "full" and "modern".
func (s *site) ours(t testing.TB, change func(obj)) *program {
	t.Helper()
	addr, ops := freePort(t), freePort(t)
	var files []obj
	for _, label := range inFiles {
		files = append(files, obj{"path": s.path("keys", label+".key"), "decrypt": label == "file-rsa"})
	}
	legacy := []string{"*", "rsa_pkcs1_sha224", "rsa_pkcs1_sha1", "rsa_pkcs1_md5sha1", "ecdsa_sha224", "ecdsa_sha1", "ecdsa_md5sha1"}
	cfg := obj{
		"listen": addr, "ops": obj{"listen": ops}, "seal_key_file": s.path("seal"),
		"tls":       obj{"cert": s.path("ours", "cert.pem"), "key": s.path("ours", "key.pem"), "ca": s.path("ours", "ca.pem"), "allow_tls12": true},
		"tokens":    []obj{{"uri": s.token.URI(), "decrypt": []string{"rsa"}}},
		"modules":   []string{s.token.Module},
		"file_keys": files,
		"legacy":    obj{"sha1": true, "md5sha1": true, "decrypt": true},
		"clients": []obj{
			{"id": clientID("full"), "keys": []string{"*"}, "operations": []string{"sign", "decrypt", "seal"}, "schemes": legacy, "snis": []string{"*"}},
			{"id": clientID("modern"), "keys": []string{"p256", "rsa"}, "operations": []string{"sign"}, "schemes": []string{"*"}, "snis": []string{"*"}},
		},
	}
	if change != nil {
		change(cfg)
	}
	if err := os.WriteFile(s.path("seal"), []byte(strings.Repeat("5a", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "keyserver.yaml")
	if err := os.WriteFile(file, must(yaml.Marshal(cfg))(t), 0o600); err != nil {
		t.Fatal(err)
	}
	p := s.start(t, "keyhaven-keyserver", addr, "run", "--config", file, "--log-level", "error")
	p.ops = ops
	return p
}

func clientID(name string) string { return "spiffe://" + domain + "/edge/" + name }

// peer runs the existing key server with the token's RSA and P-256 keys, and the files.
func (s *site) peer(t testing.TB, args ...string) *program {
	t.Helper()
	addr := freePort(t)
	uris := filepath.Join(t.TempDir(), "uris")
	var text strings.Builder
	for _, label := range []string{"rsa", "p256"} {
		text.WriteString("pkcs11:token=" + s.token.Label + ";object=" + label + "?module-path=" + s.token.Module + "&pin-value=" + s.token.PIN + "\n")
	}
	if err := os.WriteFile(uris, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return s.start(t, "peerserver", addr, append([]string{"--listen", addr, "--uris", uris, "--keys", s.path("keys"), "--extras",
		"--cert", s.path("peer", "cert.pem"), "--key", s.path("peer", "key.pem"), "--ca", s.path("peer", "ca.pem")}, args...)...)
}

func freePort(t testing.TB) string {
	return must(freeport.Addr("127.0.0.1"))(t)
}

// raw opens a connection on which a test writes packets of its own.
func (s *site) raw(t testing.TB, p *program, client string, version uint16) *tls.Conn {
	t.Helper()
	cert := must(tls.LoadX509KeyPair(s.path(client, "cert.pem"), s.path(client, "key.pem")))(t)
	c := must(tls.Dial("tcp", p.addr, &tls.Config{
		Certificates: []tls.Certificate{cert}, RootCAs: s.roots(t), ServerName: "localhost", MinVersion: tls.VersionTLS12, MaxVersion: version,
	}))(t)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

func (s *site) roots(t testing.TB) *x509.CertPool {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(must(os.ReadFile(s.path("ca", "ca.crt")))(t)) {
		t.Fatal("no certificate in the authority's file")
	}
	return pool
}

// client makes our client for a server of either make.
func (s *site) client(t testing.TB, p *program, server, name string, change func(*keyless.ClientConfig)) *keyless.Client {
	t.Helper()
	own := must(mtls.OpenDir(s.path(name), nil))(t)
	want := must(mtls.ParseIdentity("spiffe://" + domain + "/keyserver/" + server))(t)
	cfg := keyless.ClientConfig{Servers: []string{p.addr}, ConnsPerServer: 1, MaxInFlight: 2048, Timeout: patience, TLS: func(string) *tls.Config {
		c := own.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptIdentities(want)})
		c.MinVersion = tls.VersionTLS12
		return c
	}}
	if change != nil {
		change(&cfg)
	}
	c := must(keyless.NewClient(cfg))(t)
	t.Cleanup(func() { c.Close() })
	return c
}

// eventually calls f until it is nil.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
