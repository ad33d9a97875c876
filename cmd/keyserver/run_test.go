package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
)

func wantCode(t *testing.T, err error, code keyless.ErrorCode) {
	t.Helper()
	if !errors.Is(err, &keyless.Error{Code: code}) {
		t.Errorf("got %v, want code %v", err, code)
	}
}

// TestServe signs with a token's keys and a file's, reloads, and ends in order.
func TestServe(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256", "rsa:rsa2048")
	list := s.must("key", "list", "--uri", tok.URI())
	s.must("client", "add", "two", "--ca-dir", s.path("ca"), "--out", s.path("two"))
	tokens := fmt.Sprintf("tokens:\n  - uri: %q\n    decrypt: [rsa]\nlegacy: {decrypt: true}\n", tok.URI())
	one, two := rule("one", "tls-sign, sign, decrypt"), rule("two", "sign")
	cfg := s.write("ks.yaml", 0o600, s.config(tokens+"clients:"+one))
	p := s.start(cfg)

	c := p.client("one")
	ec, rsaSKI := skiOf(t, list, "ec"), skiOf(t, list, "rsa")
	if sig, err := do(t, c, signOp(ec)); err != nil || len(sig) == 0 {
		t.Fatalf("got %x, %v", sig, err)
	}
	line := p.wait("operation")
	for k, v := range map[string]string{"peer": "spiffe://keys.example/edge/one", "op": "sign", "key_ski": ec.String(), "label": "ec", "sni": "www.example.com", "result": "ok", "home": tok.Label} {
		if line[k] != v {
			t.Errorf("record: %s is %v, want %s", k, line[k], v)
		}
	}
	_, err := do(t, c, signOp(rsaSKI))
	wantCode(t, err, keyless.CodeCrypto)
	_, err = do(t, c, signOp(keyless.SKI{1}))
	wantCode(t, err, keyless.CodeKeyNotFound)
	ct := make([]byte, 256)
	ct[255] = 1
	if block, err := do(t, c, &keyless.Operation{Opcode: keyless.OpRSADecrypt, SKI: rsaSKI, Payload: ct}); err != nil || len(block) != 256 || block[255] != 1 {
		t.Errorf("1^d is not 1: %x, %v", block, err)
	}
	if code, body := p.get("/readyz"); code != 200 {
		t.Errorf("readyz: %d %s", code, body)
	}

	// Client two is not admitted yet: no rule names it.
	if err := connect(t, p, s.tls("two")); err == nil {
		t.Error("a client without a rule was let in")
	}
	s.write("ks.yaml", 0o600, s.config(tokens+"clients:"+two))
	l := p.reload(reloaded)
	if fmt.Sprint(l["clients_added"]) != "[spiffe://keys.example/edge/two]" || fmt.Sprint(l["clients_removed"]) != "[spiffe://keys.example/edge/one]" {
		t.Errorf("got %v", l)
	}
	if _, err := do(t, p.client("two"), signOp(ec)); err != nil {
		t.Error(err)
	}
	p.wait("closing a connection of a client that may not connect any more")
	if err := connect(t, p, s.tls("one")); err == nil {
		t.Error("a client whose rule is gone was let in")
	}
	_, metrics := p.get("/metrics")
	for _, want := range []string{
		`keyhaven_signer_operations_total{op="sign",result="ok",scheme="ecdsa_secp256r1_sha256"} 2`, "keyhaven_signer_keys 3",
		`keyhaven_signer_operations_total{op="decrypt",result="ok",scheme=""} 1`, "keyhaven_keyserver_token_up{", "keyhaven_keyserver_connections ",
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
	if p.count("stopped") != 1 {
		t.Error("the server did not say that it stopped")
	}
}

// connect makes one connection and reads what comes; the error is that of a refused client.
func connect(t *testing.T, p *program, cfg *tls.Config) error {
	t.Helper()
	conn, err := (&tls.Dialer{Config: cfg}).DialContext(t.Context(), "tcp", p.addr())
	if err != nil {
		return err
	}
	defer conn.Close()
	ping := keyless.Packet{Major: 1, Operation: keyless.Operation{Opcode: keyless.OpPing, Payload: []byte("x")}}
	b, err := ping.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(b); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 8))
	return err
}

// TestReloadIsAllOrNothing changes everything a configuration can get wrong, and the old one goes on.
func TestReloadIsAllOrNothing(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	list := s.must("key", "list", "--uri", tok.URI())
	good := s.config(fmt.Sprintf("tokens:\n  - uri: %q\nclients:", tok.URI()) + rule("one", "sign"))
	cfg := s.write("ks.yaml", 0o600, good)
	p := s.start(cfg)
	c := p.client("one")
	ec := skiOf(t, list, "ec")

	for name, text := range map[string]string{
		"no YAML":              "listen: [",
		"unknown key":          good + "\nsurprise: 1\n",
		"unknown operation":    strings.Replace(good, "[sign]", "[sing]", 1),
		"no clients":           strings.Split(good, "clients:")[0],
		"other address":        strings.Replace(good, "listen: 127.0.0.1:0", "listen: 127.0.0.1:1", 1),
		"other limits":         good + "\nlimits: {connections: 2}\n",
		"missing key file":     strings.Replace(good, "filekey.pem", "nokey.pem", 1),
		"missing certificate":  strings.Replace(good, "tls/cert.pem", "tls/none.pem", 1),
		"client's certificate": strings.ReplaceAll(good, "/tls/", "/one/"),
	} {
		s.write("ks.yaml", 0o600, text)
		if l := p.reload(refused); l["err"] == nil {
			t.Errorf("%s: got %v", name, l)
		}
		if _, err := do(t, c, signOp(ec)); err != nil {
			t.Fatalf("%s: after the refusal: %v", name, err)
		}
	}
	if n := p.count(reloaded); n != 0 {
		t.Errorf("%d of the bad configurations were taken", n)
	}
	if got := p.count("closing a connection of a client that may not connect any more"); got != 0 {
		t.Error("a refused configuration closed a connection")
	}
	s.write("ks.yaml", 0o600, strings.Replace(good, "  - path: "+s.path("filekey.pem"), "  - path: "+s.path("other.pem"), 1))
	other := s.writeKey("other.pem")
	p.reload(reloaded)
	if _, err := do(t, c, signOp(mustSKI(t, other))); err != nil {
		t.Errorf("the new key: %v", err)
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
}

// TestWrongPIN starts with a token whose PIN is wrong: the rest is served, the PIN is not tried again until SIGHUP.
func TestWrongPIN(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	list := s.must("key", "list", "--uri", tok.URI())
	pin, err := os.ReadFile(tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tok.PINFile, []byte("canary-wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := s.writeKey("filekey.pem")
	cfg := s.write("ks.yaml", 0o600, s.config(fmt.Sprintf("tokens:\n  - uri: %q\nclients:", tok.URI())+rule("one", "sign")))

	code, out := s.try("check", "--config", cfg)
	if code != 0 {
		t.Errorf("offline check: got %d, %s", code, out)
	}
	code, out = s.try("check", "--online", "--config", cfg)
	if code != 3 || !strings.Contains(out, "ks.yaml:11: tokens[0].uri") || !strings.Contains(out, "correct it") {
		t.Errorf("online check: got %d, %s", code, out)
	}
	saidOnce(t, "online check", out)
	code, out = s.try("key", "list", "--config", cfg)
	if code != 1 {
		t.Errorf("key list: got %d, %s", code, out)
	}
	saidOnce(t, "key list", out)

	p := s.start(cfg)
	const failed = "home cannot be used; correct the cause, then run keyhaven-keyserver token retry, or reload"
	if l := p.wait(failed); !strings.Contains(fmt.Sprint(l["err"]), "PIN refused") || l["home"] != tok.Label || l["config"] != cfg+":11: tokens[0].uri" {
		t.Errorf("got %v", l)
	}
	c := p.client("one")
	if _, err := do(t, c, signOp(mustSKI(t, file))); err != nil {
		t.Errorf("the file key: %v", err)
	}
	if code, body := p.get("/readyz"); code != 503 || !strings.Contains(body, "PIN refused") || !strings.Contains(body, tok.Label) {
		t.Errorf("readyz: %d %s", code, body)
	}
	if code, _ := p.get("/healthz"); code != 200 {
		t.Errorf("healthz: %d", code)
	}
	_, err = do(t, c, signOp(skiOf(t, list, "ec")))
	wantCode(t, err, keyless.CodeKeyNotFound)

	p.reload(reloaded) // tries the PIN once more
	if err := os.WriteFile(tok.PINFile, pin, 0o600); err != nil {
		t.Fatal(err)
	}
	if n := p.count(failed); n != 2 {
		t.Errorf("the PIN was tried %d times, want at start and at SIGHUP", n)
	}
	p.reload(reloaded)
	if _, err := do(t, c, signOp(skiOf(t, list, "ec"))); err != nil {
		t.Errorf("after the PIN was corrected: %v", err)
	}
	if code, body := p.get("/readyz"); code != 200 {
		t.Errorf("readyz: %d %s", code, body)
	}
	p.stop()
}

// saidOnce holds output to tell of a refused PIN once, without repeating itself within the line.
func saidOnce(t *testing.T, what, out string) {
	t.Helper()
	if n := strings.Count(out, "PIN refused"); n != 1 {
		t.Errorf("%s: the refused PIN is told %d times, want once: %s", what, n, out)
	}
	for line := range strings.Lines(out) {
		if strings.Count(line, "pkcs11: ") > 1 {
			t.Errorf("%s: a prefix is repeated: %s", what, line)
		}
	}
}

// TestAbsentToken starts without the token, which comes by itself later.
func TestAbsentToken(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	list := s.must("key", "list", "--uri", tok.URI())
	away, home := s.path("away"), filepath.Join(tok.Dir, "tokens")
	if err := os.Rename(home, away); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	file := s.writeKey("filekey.pem")
	cfg := s.write("ks.yaml", 0o600, s.config(fmt.Sprintf("tokens:\n  - uri: %q\nclients:", tok.URI())+rule("one", "sign")))
	if code, out := s.try("check", "--online", "--config", cfg); code != 3 || !strings.Contains(out, "token not found") {
		t.Errorf("online check: got %d, %s", code, out)
	}
	p := s.start(cfg)
	if l := p.wait("home is away; it is tried again"); !strings.Contains(fmt.Sprint(l["err"]), "token not found") {
		t.Errorf("got %v", l)
	}
	c := p.client("one")
	if _, err := do(t, c, signOp(mustSKI(t, file))); err != nil {
		t.Errorf("the file key: %v", err)
	}
	if code, body := p.get("/readyz"); code != 503 || !strings.Contains(body, tok.Label) {
		t.Errorf("readyz: %d %s", code, body)
	}
	if err := os.Remove(home); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(away, home); err != nil {
		t.Fatal(err)
	}
	p.wait("home is open")
	eventually(t, "the token's key signs", func() bool {
		_, err := do(t, c, signOp(skiOf(t, list, "ec")))
		return err == nil
	})
	p.stop()
}

// TestRevoke refuses a revoked client at once, and closes its connections on SIGHUP.
func TestRevoke(t *testing.T) {
	s := newSite(t)
	s.must("client", "add", "two", "--ca-dir", s.path("ca"), "--out", s.path("two"))
	file := mustSKI(t, s.writeKey("filekey.pem"))
	p := s.start(s.write("ks.yaml", 0o600, s.config("clients:"+rule("one", "sign")+rule("two", "sign"))))
	one, two := p.client("one"), p.client("two")
	for _, c := range []*keyless.Client{one, two} {
		if _, err := do(t, c, signOp(file)); err != nil {
			t.Fatal(err)
		}
	}
	s.must("client", "revoke", "one", "--ca-dir", s.path("ca"), "--reason", "test")
	if err := connect(t, p, s.tls("one")); err == nil {
		t.Error("a revoked client was let in")
	}
	if _, err := do(t, one, signOp(file)); err != nil {
		t.Errorf("the open connection ended before SIGHUP: %v", err)
	}
	p.reload(reloaded)
	eventually(t, "the revoked client has no connection", func() bool { return !one.Healthy() })
	if _, err := do(t, two, signOp(file)); err != nil {
		t.Errorf("the other client: %v", err)
	}
	list := s.must("client", "list", "--ca-dir", s.path("ca"))
	for _, want := range []string{"edge/one  revoked", "edge/two  valid"} {
		if !strings.Contains(list, want) {
			t.Errorf("client list lacks %q: %s", want, list)
		}
	}
	if code, out := s.try("client", "revoke", "nobody", "--ca-dir", s.path("ca")); code != 1 || !strings.Contains(out, "nobody") {
		t.Errorf("got %d, %s", code, out)
	}
	if code, out := s.try("client", "add", "one", "--ca-dir", s.path("ca"), "--out", s.path("again")); code != 1 || !strings.Contains(out, "revoked") {
		t.Errorf("got %d, %s", code, out)
	}
	p.stop()
}

// TestRenew gives a client a certificate for its own identity, over its connection.
func TestRenew(t *testing.T) {
	s := newSite(t)
	p := s.start(s.write("ks.yaml", 0o600, s.config("clients:"+rule("one", "renew")+"\n  - id: spiffe://keys.example/edge/none\n    operations: [ping]\n")))
	c := p.client("one")
	src, err := mtls.OpenDir(s.path("one"), nil)
	if err != nil {
		t.Fatal(err)
	}
	before := src.Leaf()
	err = src.Renew(t.Context(), func(ctx context.Context, csr []byte) ([][]byte, error) {
		der, err := do(t, c, &keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: csr})
		if err != nil {
			return nil, err
		}
		certs, err := x509.ParseCertificates(der)
		var chain [][]byte
		for _, cert := range certs {
			chain = append(chain, cert.Raw)
		}
		return chain, err
	})
	if err != nil {
		t.Fatal(err)
	}
	if src.Leaf().Equal(before) || src.Identity().String() != "spiffe://keys.example/edge/one" {
		t.Errorf("got the identity %s", src.Identity())
	}
	if err := connect(t, p, src.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptKinds(mtls.KindKeyServer)})); err != nil {
		t.Errorf("with the new certificate: %v", err)
	}
	s.must("client", "revoke", "one", "--ca-dir", s.path("ca"))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	_, err = do(t, c, &keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: csr})
	wantCode(t, err, keyless.CodeCrypto)
	p.stop()
}

// TestTLSVersions: 1.3 alone unless the switch is on, and then two suites of 1.2.
func TestTLSVersions(t *testing.T) {
	s := newSite(t)
	text := s.config("clients:" + rule("one", "sign"))
	p := s.start(s.write("ks.yaml", 0o600, text))
	with := func(max uint16, suites ...uint16) *tls.Config {
		c := s.tls("one")
		c.MinVersion, c.MaxVersion, c.CipherSuites, c.CurvePreferences = tls.VersionTLS12, max, suites, nil
		return c
	}
	strong := uint16(tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384)
	tests := []struct {
		name      string
		cfg       *tls.Config
		off, on12 bool
	}{
		{"1.3", with(tls.VersionTLS13), true, true},
		{"1.2", with(tls.VersionTLS12, strong), false, true},
		{"1.2 with AES-128", with(tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256), false, false},
		{"1.2 with ChaCha20", with(tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256), false, false},
		{"no certificate", &tls.Config{InsecureSkipVerify: true}, false, false},
	}
	for _, tt := range tests {
		if err := connect(t, p, tt.cfg); (err == nil) != tt.off {
			t.Errorf("%s, switch off: got %v", tt.name, err)
		}
	}
	s.write("ks.yaml", 0o600, strings.Replace(text, "tls:\n", "tls:\n  allow_tls12: true\n", 1))
	p.reload(reloaded)
	for _, tt := range tests {
		if err := connect(t, p, tt.cfg); (err == nil) != tt.on12 {
			t.Errorf("%s, switch on: got %v", tt.name, err)
		}
	}
	p.stop()
}

// TestDrain ends the server under load: what was begun is finished, and the exit is clean.
func TestDrain(t *testing.T) {
	s := newSite(t)
	tok := s.token("rsa:rsa2048")
	list := s.must("key", "list", "--uri", tok.URI())
	p := s.start(s.write("ks.yaml", 0o600, s.config(fmt.Sprintf("tokens:\n  - uri: %q\nclients:", tok.URI())+rule("one", "sign"))))
	c := p.client("one")
	op := &keyless.Operation{Opcode: keyless.OpRSASignSHA256, SKI: skiOf(t, list, "rsa"), Payload: make([]byte, 32)}
	if _, err := do(t, c, op); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, err := c.Do(t.Context(), op)
				var refusal *keyless.Error
				if errors.As(err, &refusal) {
					t.Errorf("an operation was begun and not finished: %v", err)
				}
				if err != nil {
					return
				}
			}
		})
	}
	p.waitNth("operation", 50)
	code := p.stop()
	close(stop)
	wg.Wait()
	if code != 0 || p.count("stopped") != 1 {
		t.Errorf("got exit code %d: %s", code, s.output())
	}
}

// TestNewAuthority changes the roots: when one is gone, whoever is connected may have been verified by it, and has to come again.
func TestNewAuthority(t *testing.T) {
	s := newSite(t)
	text := s.config("clients:" + rule("one", "sign"))
	p := s.start(s.write("ks.yaml", 0o600, text))
	c := p.client("one")
	ping := &keyless.Operation{Opcode: keyless.OpPing}
	if _, err := do(t, c, ping); err != nil {
		t.Fatal(err)
	}
	p.reload(reloaded)
	const closing = "closing a connection, as its client must be verified by the authorities that are left"
	s.must("ca", "init", "--ca-dir", s.path("ca2"), "--trust-domain", domain)
	var bundle []byte
	for _, name := range []string{"ca/ca.crt", "ca2/ca.crt"} {
		b, err := os.ReadFile(s.path(name))
		if err != nil {
			t.Fatal(err)
		}
		bundle = append(bundle, b...)
	}
	s.write("bundle.pem", 0o644, string(bundle))
	s.write("ks.yaml", 0o600, strings.Replace(text, s.path("tls/ca.pem"), s.path("bundle.pem"), 1))
	p.reload(reloaded)
	if _, err := do(t, c, ping); err != nil {
		t.Error(err)
	}
	if p.count(closing) != 0 {
		t.Error("another authority beside the old one closed a connection")
	}
	s.write("ks.yaml", 0o600, text)
	p.reload(reloaded)
	p.wait(closing)
	if _, err := do(t, c, ping); err != nil {
		t.Errorf("the client does not come back: %v", err)
	}
}
