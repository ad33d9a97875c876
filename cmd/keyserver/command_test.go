package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/pkcs11/worker"
	auditlog "github.com/keyhaven/keyhaven/signer/audit"
	"github.com/keyhaven/keyhaven/transit"
)

// TestCheckNamesTheFault holds each fault of a configuration to its line, its key and a remedy.
func TestCheckNamesTheFault(t *testing.T) {
	s := newSite(t)
	s.must("ca", "issue", "other", "--ca-dir", s.path("ca"), "--out", s.path("other"))
	s.must("ca", "init", "--ca-dir", s.path("ca2"), "--trust-domain", "elsewhere.example")
	s.must("ca", "issue", "hsm", "--ca-dir", s.path("ca"), "--out", s.path("old"), "--lifetime", "1s")
	mustEnd := time.Now().Add(1500 * time.Millisecond)
	open := s.write("open.pem", 0o644, "x")
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	badSeal := s.write("seal", 0o600, "tooshort\n")
	module := s.write("module.so", 0o600, "")
	good := s.config("clients:" + rule("one", "sign, tls-sign"))
	swap := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("no %q in the configuration", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	token := func(text string) string { return good + "\ntokens:\n  - " + text + "\n" }
	tests := []struct {
		name, text string
		want       []string
	}{
		{"good", good, nil},
		{"unknown key", good + "\nlimit: {}\n", []string{":16: limit: unknown key", "limits"}},
		{"unknown nested key", swap("  ca: ", "  roots: "), []string{":7: tls.roots: unknown key"}},
		{"wrong type", swap("[sign, tls-sign]", "sign"), []string{":13: clients[0].operations:", "list"}},
		{"duration without unit", good + "\ntimeouts:\n  idle: 5\n", []string{":17: timeouts.idle:", "5s"}},
		{"duration out of range", good + "\ntimeouts:\n  idle: 5h\n", []string{":17: timeouts.idle:", "1h"}},
		{"limit out of range", good + "\nlimits:\n  in_flight: 0\n", []string{":17: limits.in_flight:"}},
		{"address", swap("listen: 127.0.0.1:0", "listen: here"), []string{":1: listen:", "host:port"}},
		{"ops not on loopback", swap("ops: {listen: 127.0.0.1:0}", "ops: {listen: 0.0.0.0:9000}"), []string{":2: ops.listen:", "127.0.0.1"}},
		{"unknown operation", swap("tls-sign]", "tlssign]"), []string{":13: clients[0].operations[1]:", `"tlssign"`, "tls-sign"}},
		{"empty list", swap(`snis: ["*"]`, "snis: []"), []string{":15: clients[0].snis:", "admits nobody"}},
		{"no clients", s.config(""), []string{"clients: is empty and admits nobody"}},
		{"identity of another domain", swap("//keys.example/", "//other.example/"), []string{":11: clients[0].id:", "keys.example"}},
		{"identity with two spellings", swap("/edge/one", "/edge/One"), []string{":11: clients[0].id:"}},
		{"certificate not there", swap("/tls/cert.pem", "/nocert.pem"), []string{":4: tls:", "nocert.pem", "ca issue"}},
		{"certificate not named", swap("  cert: "+s.path("tls/cert.pem")+"\n", ""), []string{"tls.cert: is missing"}},
		{"certificate does not fit the key", swap("/tls/key.pem", "/other/key.pem"), []string{":4: tls:", "other/key.pem", "private key does not match public key", "ca issue"}},
		{"certificate of a client", strings.ReplaceAll(good, "/tls/", "/one/"), []string{":5: tls.cert:", "no key server"}},
		{"authority not there", swap("/ca\n", "/noca\n"), []string{":3: ca_dir:", "ca init"}},
		{"other authority", swap("/ca\n", "/ca2\n"), []string{":3: ca_dir:", "elsewhere.example"}},
		{"key file not there", swap("filekey.pem", "none.pem"), []string{":9: file_keys[0].path:", "none.pem", "correct the path"}},
		{"key file open to others", swap("filekey.pem", "open.pem"), []string{":9: file_keys[0].path:", "0644", "chmod 600"}},
		{"key file twice", swap("clients:", "  - path: "+s.path("filekey.pem")+"\nclients:"), []string{":10: file_keys[1].path:", "file_keys[0]"}},
		{"seal key", good + "\nseal_key_file: " + badSeal + "\n", []string{":16: seal_key_file:", "64 hex digits"}},
		{"token without URI", token("sessions: 1"), []string{":17: tokens[0].uri: is missing"}},
		{"token with PIN", token("uri: pkcs11:token=a?pin-value=canary-wrong"), []string{":17: tokens[0].uri:", "pin-source"}},
		{"token without PIN", token("uri: pkcs11:token=a?module-path=" + module), []string{":17: tokens[0].uri: no PIN", "pin-source"}},
		{"PIN file not there", token("uri: pkcs11:token=a?pin-source=/no/such&module-path=" + module), []string{":17: tokens[0].uri:", "/no/such", "correct the path"}},
		{"PIN file open to others", token("uri: pkcs11:token=a?pin-source=file://" + open + "&module-path=" + module), []string{":17: tokens[0].uri:", "0644", "chmod 600"}},
		{"token named twice over", token("uri: pkcs11:token=a;serial=b?pin-source=/p&module-path=" + module), []string{":17: tokens[0].uri:", "exactly one"}},
		{"token without module", token("uri: pkcs11:token=a?pin-source=/p"), []string{"tokens[0].module:", "module-path"}},
		{"module not there", token("uri: pkcs11:token=a?pin-source=/p&module-path=/no/such.so"), []string{":17: tokens[0].uri:", "/no/such.so", "install"}},
		{"too many sessions", token("uri: pkcs11:token=a?pin-source=/p&module-path=" + module + "\n    sessions: 1000"), []string{":18: tokens[0].sessions:", "256"}},
		{"module not in the list", token("uri: pkcs11:token=a?pin-source=/p&module-path=" + module + "\nmodules: [/no/such.so]"), []string{":17: tokens[0].uri:", "not allowed"}},
		{"other objects than keys", token("uri: pkcs11:token=a;type=cert?pin-source=/p&module-path=" + module), []string{":17: tokens[0].uri:", "only private keys"}},
		{"decryption with every key", token("uri: pkcs11:token=a?pin-source=/p&module-path=" + module + "\n    decrypt: ['*']"), []string{":18: tokens[0].decrypt[0]:", "SKI"}},
		{"sandbox of no kind", token("uri: pkcs11:token=a?pin-source=/p&module-path=" + module + "\n    sandbox: {mode: tight}"), []string{":18: tokens[0].sandbox.mode:", "strict"}},
		{"paths without a strict sandbox", token("uri: pkcs11:token=a?pin-source=/p&module-path=" + module + "\n    sandbox: {read_paths: [/x]}"), []string{":18: tokens[0].sandbox:", "mode: strict"}},
		{"little memory", token("uri: pkcs11:token=a?pin-source=/p&module-path=" + module + "\n    sandbox: {max_memory: 1MiB}"), []string{":18: tokens[0].sandbox.max_memory:"}},
		{"workers out of range", token("uri: pkcs11:token=a?pin-source=/p&module-path=" + module + "\n    workers: 65"), []string{":18: tokens[0].workers:", "64"}},
		{"unknown credential", token("uri: pkcs11:token=a?pin-source=credential:..&module-path=" + module), []string{":17: tokens[0].uri:", "LoadCredential"}},
		{"loss of a worker", token("uri: pkcs11:token=a?pin-source=/p&module-path=" + module + "\n    on_worker_loss: panic"), []string{":18: tokens[0].on_worker_loss:", "move or fail"}},
		{"Transit in the clear", good + "\ntransit:\n  - address: http://vault.example:8200\n    keys: [{name: a}]\n    auth: {method: token-file}\n",
			[]string{":17: transit[0].address:", "https", ":19: transit[0].auth.token_file:"}},
		{"Transit without keys", good + "\ntransit:\n  - address: https://vault.example:8200\n", []string{":17: transit[0].keys:", "transit[0].auth.method:"}},
		{"hedging by percent", good + "\nhomes: {hedge_percentile: 95}\n", []string{":16: homes.hedge_percentile:", "0.999"}},
		{"audit without a directory", good + "\naudit: {mode: required}\n", []string{":16: audit.dir:", ":16: audit.key_file:", "audit keygen"}},
		{"audit of no kind", good + "\naudit: {mode: always}\n", []string{":16: audit.mode:", "best-effort"}},
		{"audit with two keys", good + "\naudit: {dir: /x, key: a, key_file: /y}\n", []string{":16: audit.key:", "keep one"}},
		{"audit key not there", good + "\naudit: {dir: /x, key_file: /no/such}\n", []string{":16: audit.key_file:", "/no/such", "correct the path"}},
		{"size without a unit", good + "\naudit: {rotate_size: 64MB}\n", []string{":16: audit.rotate_size:", "64MiB"}},
		{"syslog", good + "\naudit: {syslog: here}\n", []string{":16: audit.syslog:", "udp:host:port"}},
		{"probes too often", good + "\nprobe: {interval: 1ms}\n", []string{":16: probe.interval:"}},
		{"collector", good + "\ntracing: {otlp_endpoint: 'localhost:4317'}\n", []string{":16: tracing.otlp_endpoint:", "http://127.0.0.1:4318"}},
		{"control socket", good + "\ncontrol: ks.sock\n", []string{":16: control:", "absolute"}},
		{"state directory not there", good + "\nstate_dir: /no/such\n", []string{":16: state_dir:", "create it"}},
		{"rate", good + "\n    rate: fast\n", []string{":16: clients[0].rate:", "100/s"}},
		{"window", good + "\n    windows: [always]\n", []string{":16: clients[0].windows[0]:"}},
		{"no URI at all", token("uri: http://x"), []string{":17: tokens[0].uri:", "pkcs11"}},
		{"several faults", swap("ops: {listen: 127.0.0.1:0}", "ops: {listen: x}\nsurprise: 1"), []string{":3: surprise"}},
		{"several faults of meaning", strings.Replace(swap("ops: {listen: 127.0.0.1:0}", "ops: {listen: x}"), "listen: 127.0.0.1:0", "listen: y", 1), []string{":1: listen", ":2: ops.listen"}},
	}
	for _, tt := range tests {
		cfg := s.write("c.yaml", 0o600, tt.text)
		code, out := s.try("check", "--config", cfg)
		if tt.want == nil {
			if code != 0 || !strings.Contains(out, "good: 0 tokens, 0 Transit mounts, 1 file keys, 1 client rules, audit off, identity spiffe://keys.example/keyserver/hsm") {
				t.Errorf("%s: got %d, %s", tt.name, code, out)
			}
			continue
		}
		if code != 3 {
			t.Errorf("%s: got exit code %d, want 3: %s", tt.name, code, out)
		}
		for _, w := range tt.want {
			if strings.HasPrefix(w, ":") {
				w = cfg + w
			}
			if !strings.Contains(out, w) {
				t.Errorf("%s: the output lacks %q: %s", tt.name, w, out)
			}
		}
		// What check refuses, run refuses.
		if code, _ := s.try("run", "--config", cfg); code != 3 {
			t.Errorf("%s: run ended with %d, want 3", tt.name, code)
		}
	}
	for time.Now().Before(mustEnd) {
		time.Sleep(50 * time.Millisecond)
	}
	cfg := s.write("c.yaml", 0o600, strings.ReplaceAll(good, "/tls/", "/old/"))
	if code, out := s.try("check", "--config", cfg); code != 3 || !strings.Contains(out, "expired") {
		t.Errorf("expired certificate: got %d, %s", code, out)
	}
}

func TestExitCodes(t *testing.T) {
	s := newSite(t)
	busy := s.start(s.write("ks.yaml", 0o600, s.config("clients:"+rule("one", "sign"))))
	for _, tt := range []struct {
		code int
		want string
		args []string
	}{
		{0, "Usage:", []string{"--help"}},
		{0, "keyhaven-keyserver version", []string{"--version"}},
		{2, "unknown command", []string{"serve"}},
		{2, "unknown flag", []string{"run", "--fast"}},
		{3, "/etc/keyhaven/keyserver.yaml", []string{"run"}},
		{3, "/etc/keyhaven/keyserver.yaml: no such file or directory", []string{"key", "list"}},
		{3, "--uri", []string{"key", "list"}},
		{2, "config", []string{"key", "list", "--uri", "pkcs11:token=a", "--config", "x"}},
		{2, "pin-file", []string{"key", "list", "--config", "x", "--pin-file", "/y"}},
		{2, "pin-value", []string{"key", "list", "--uri", "pkcs11:token=a?pin-value=canary-wrong"}},
		{3, "pin-value", []string{"key", "list", "--config", s.write("pin.yaml", 0o600, "tokens:\n  - uri: pkcs11:token=a?pin-value=canary-wrong\n")}},
		{2, "accepts 1 arg", []string{"client", "add", "two", "extra", "--ca-dir", "x", "--out", "y"}},
		{2, "Edge", []string{"client", "add", "Edge", "--ca-dir", s.path("ca"), "--out", s.path("x")}},
		{3, "no such file", []string{"run", "--config", s.path("none.yaml")}},
		{1, "address already in use: another program", []string{"run", "--config", s.path("ks.yaml"), "--listen", busy.addr()}},
		{3, "ops", []string{"check", "--config", s.path("ks.yaml"), "--ops", "10.0.0.1:1"}},
		{1, "ca init", []string{"ca", "issue", "x", "--ca-dir", s.path("nowhere"), "--out", s.path("x")}},
		{1, "exists", []string{"ca", "init", "--ca-dir", s.path("ca"), "--trust-domain", "keys.example"}},
		{1, "--replace", []string{"client", "add", "one", "--ca-dir", s.path("ca"), "--out", s.path("one")}},
		{1, "--replace", []string{"ca", "issue", "hsm", "--ca-dir", s.path("ca"), "--out", s.path("tls")}},
		{0, "issued", []string{"ca", "issue", "hsm", "--ca-dir", s.path("ca"), "--out", s.path("tls"), "--replace"}},
		{0, "write a rule", []string{"client", "add", "two", "--ca-dir", s.path("ca"), "--out", s.path("two")}},
		{0, "edge/two in " + s.path("two") + "\n", []string{"client", "add", "two", "--ca-dir", s.path("ca"), "--out", s.path("two"), "--replace"}},
	} {
		if code, out := s.try(tt.args...); code != tt.code || !strings.Contains(out, tt.want) {
			t.Errorf("%v: got %d, %s; want %d with %q", tt.args, code, out, tt.code, tt.want)
		}
	}
	busy.stop()
}

// TestEnvironment holds a misspelt variable to be a fault, as a misspelt key is.
func TestEnvironment(t *testing.T) {
	s := newSite(t)
	cfg := s.write("ks.yaml", 0o600, s.config("clients:"+rule("one", "sign")))
	s.env = []string{"KEYHAVEN_KEYSERVER_LISEN=127.0.0.1:1"}
	if code, out := s.try("check", "--config", cfg); code != 3 || !strings.Contains(out, "did you mean KEYHAVEN_KEYSERVER_LISTEN?") {
		t.Errorf("got %d, %s", code, out)
	}
	s.env = []string{"KEYHAVEN_KEYSERVER_LISTEN=127.0.0.1:1"}
	s.must("check", "--config", cfg)
}

// TestClientCSR certifies a client's own key: the authority sees no private key, and hands out none.
func TestClientCSR(t *testing.T) {
	s := newSite(t)
	fingerprint, err := mtls.WriteRequest(s.path("id"), false)
	if err != nil {
		t.Fatal(err)
	}
	csr := s.path("id/request.csr")
	add := []string{"client", "add", "two", "--ca-dir", s.path("ca"), "--csr", csr, "--out", s.path("two")}
	if out := s.must(add...); !strings.Contains(out, "edge/two in") || !strings.Contains(out, "write a rule") || !strings.Contains(out, fingerprint) {
		t.Errorf("got %s", out)
	}
	if files, err := filepath.Glob(s.path("two/*")); err != nil || strings.Join(files, " ") != s.path("two/ca.pem")+" "+s.path("two/cert.pem") {
		t.Errorf("got %v, %v, want the certificate and the root alone", files, err)
	}
	if _, err := mtls.InstallCertificate(s.path("id"), s.path("two/cert.pem"), s.path("two/ca.pem"), mtls.AcceptKinds(mtls.KindEdge)); err != nil {
		t.Fatal(err)
	}
	p := s.start(s.write("ks.yaml", 0o600, s.config("clients:"+rule("two", "sign"))))
	if err := connect(t, p, s.tls("id")); err != nil {
		t.Error(err)
	}
	p.stop()

	if _, err := mtls.WriteRequest(s.path("id"), false); err != nil {
		t.Fatal(err)
	}
	if out := s.must(append(add, "--replace")...); strings.Contains(out, "rule") {
		t.Errorf("got %s", out)
	}
	text, err := os.ReadFile(csr)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	block.Bytes[len(block.Bytes)-1] ^= 1
	s.write("forged.csr", 0o600, string(pem.EncodeToMemory(block)))
	for _, tt := range []struct{ csr, out, want string }{
		{s.path("none.csr"), "three", "none.csr"},
		{s.path("two/cert.pem"), "three", "CERTIFICATE REQUEST"},
		{s.path("forged.csr"), "three", "not signed by its own key"},
		{csr, "two", "--replace"},
		{csr, "one", "private key of an identity"},
	} {
		if code, out := s.try("client", "add", "three", "--ca-dir", s.path("ca"), "--csr", tt.csr, "--out", s.path(tt.out)); code != 1 || !strings.Contains(out, tt.want) {
			t.Errorf("%s: got %d, %s, want %q", tt.csr, code, out, tt.want)
		}
	}
	if out := s.must("client", "list", "--ca-dir", s.path("ca")); strings.Contains(out, "three") {
		t.Errorf("a client that was not added is listed: %s", out)
	}
}

// TestKeyCommands goes the whole way of a key: made, listed, certified, served.
func TestKeyCommands(t *testing.T) {
	s := newSite(t)
	tok := s.token()
	bare := fmt.Sprintf("pkcs11:token=%s?module-path=%s", tok.Label, tok.Module)
	if out := s.must("key", "list", "--uri", tok.URI()); strings.Contains(out, "level=") {
		t.Errorf("the list comes with a log: %s", out)
	}
	if out := s.must("key", "list", "--uri", tok.URI(), "--log-level", "debug"); !strings.Contains(out, "logged in to token") {
		t.Errorf("the log for debugging lacks the login: %s", out)
	}
	for _, typ := range []string{"p256", "p384", "rsa2048", "ed25519"} {
		out := s.must("key", "generate", "--uri", bare, "--pin-file", tok.PINFile, "--label", "key-"+typ, "--type", typ)
		if !regexp.MustCompile(`(?m)^[0-9a-f]{40} .*key-` + typ + ` .* never +yes `).MatchString(out) {
			t.Errorf("%s: got %s", typ, out)
		}
	}
	if code, out := s.try("key", "generate", "--uri", tok.URI(), "--label", "key-p256"); code != 1 || !strings.Contains(out, "exists") {
		t.Errorf("same label again: got %d, %s", code, out)
	}
	if code, out := s.try("key", "generate", "--uri", tok.URI(), "--label", "x", "--type", "dsa"); code != 1 || !strings.Contains(out, "p256") {
		t.Errorf("unknown type: got %d, %s", code, out)
	}
	if code, out := s.try("key", "list", "--uri", tok.URI(), "--pin-file", tok.PINFile); code != 2 {
		t.Errorf("two PINs: got %d, %s", code, out)
	}

	csr := s.must("key", "csr", "--uri", tok.URI(), "--key", "key-p256", "--dns", "www.example.com")
	req := parseCSR(t, csr)
	if req.CheckSignature() != nil || len(req.DNSNames) != 1 {
		t.Fatalf("got request %+v", req)
	}
	cert := s.write("cert.pem", 0o644, certify(t, req))
	if code, out := s.try("key", "import-cert", "--uri", tok.URI(), "--key", "key-p384", cert); code != 1 || !strings.Contains(out, "does not fit") || !strings.Contains(out, "key csr") {
		t.Errorf("certificate of another key: got %d, %s", code, out)
	}
	if code, out := s.try("key", "csr", "--uri", tok.URI(), "--key", "nobody", "--dns", "x.example"); code != 1 || !strings.Contains(out, "nobody") {
		t.Errorf("unknown key: got %d, %s", code, out)
	}
	s.must("key", "import-cert", "--uri", tok.URI(), "--key", "key-p256", cert)

	cfg := s.write("ks.yaml", 0o600, s.config(fmt.Sprintf("tokens:\n  - uri: %q\nclients:", tok.URI())+strings.Replace(rule("one", "sign"), `["*"]`, "[key-p256, nobody]", 1)))
	if out := s.must("key", "list", "--config", cfg); !strings.Contains(out, "www.example.com until") {
		t.Errorf("the certificate is not listed: %s", out)
	}
	if code, out := s.try("check", "--online", "--config", cfg); code != 3 || !strings.Contains(out, `clients[0].keys[1]: no token or file has a key "nobody"`) || !strings.Contains(out, "key-p384") {
		t.Errorf("online check: got %d, %s", code, out)
	}
}

func parseCSR(t *testing.T, text string) *x509.CertificateRequest {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("no PEM: %s", text)
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

func certify(t *testing.T, req *x509.CertificateRequest) string {
	t.Helper()
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour), DNSNames: req.DNSNames}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}}, req.PublicKey, ca)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// TestServerRenewsItself starts with a certificate that is about to run out.
func TestServerRenewsItself(t *testing.T) {
	s := newSite(t)
	s.must("ca", "issue", "hsm", "--ca-dir", s.path("ca"), "--out", s.path("tls"), "--replace", "--lifetime", "4s")
	p := s.start(s.write("ks.yaml", 0o600, s.config("clients:"+rule("one", "sign"))))
	p.wait("certificate renewed")
	if err := connect(t, p, s.tls("one")); err != nil {
		t.Error(err)
	}
	cert, err := readCertificate(s.path("tls/cert.pem"))
	if err != nil || time.Until(cert.NotAfter) < 24*time.Hour {
		t.Errorf("got %v, %v", cert, err)
	}
	p.stop()
}

// TestExamples holds the example configurations to what the program takes, in a site made as they describe it.
func TestExamples(t *testing.T) {
	s := newSite(t)
	files, err := filepath.Glob("../../examples/keyserver/*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("got %v, %v; want the examples", files, err)
	}
	s.write("seal.keys", 0o600, strings.Repeat("5a", 32)+"\n")
	tok := s.token("www:p256", "legacy:rsa2048")
	pin, err := os.ReadFile(tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	s.write("pin", 0o600, string(pin))
	s.must("audit", "keygen", "--out", s.path("audit.key"))
	s.write("vault-role-id", 0o600, "role\n")
	s.write("vault-secret-id", 0o600, "secret\n")
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		local := strings.NewReplacer(
			"/etc/keyhaven/filekey.pem", s.path("filekey.pem"), "/etc/keyhaven", s.dir,
			"/usr/lib/softhsm/libsofthsm2.so", tok.Module, "token=site-hsm", "token="+tok.Label,
			"/run/keyhaven-keyserver", s.dir, "/var/lib/keyhaven-keyserver", s.dir,
		).Replace(string(text))
		cfg := s.write(filepath.Base(path), 0o600, local)
		check := []string{"check", "--config", cfg}
		if !strings.Contains(local, "transit:") { // which takes a server
			check = append(check, "--online")
		}
		if code, out := s.try(check...); code != 0 {
			t.Errorf("%s: got %d, %s", path, code, out)
		}
	}
}

// TestDocumentedDefaults holds the defaults that other packages choose against the rows of docs/configuration.md.
func TestDocumentedDefaults(t *testing.T) {
	page, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]any{
		"tokens[].workers": worker.DefaultWorkers, "tokens[].sessions": worker.DefaultSessions, "tokens[].deadline": worker.DefaultDeadline,
		"tokens[].keep_alive": worker.DefaultKeepAlive, "tokens[].sandbox.mode": worker.SandboxBasic, "tokens[].on_worker_loss": worker.Move,
		"transit[].batch": transit.DefaultBatch, "transit[].in_flight": transit.DefaultInFlight, "transit[].timeout": transit.DefaultTimeout,
		"transit[].mount": transit.DefaultMount,
	} {
		if row := regexp.MustCompile("(?m)^\\| `" + regexp.QuoteMeta(key) + "` \\| \\w+ \\| `([^`]+)` \\|").FindStringSubmatch(string(page)); row == nil || row[1] != fmt.Sprint(want) {
			t.Errorf("%s: the row says %q, the source %v", key, row, want)
		}
	}
	if size, err := parseSize("1GiB"); err != nil || size != worker.DefaultMaxMemory {
		t.Errorf("sandbox.max_memory: the row says %d, %v, the source %d", size, err, worker.DefaultMaxMemory)
	}
	audit := defaults().Audit
	if size, err := parseSize(audit.RotateSize); err != nil || size != auditlog.DefaultRotateSize || audit.Checkpoint != auditlog.DefaultCheckpoint || audit.RotateEvery != auditlog.DefaultRotateEvery {
		t.Errorf("the audit's defaults differ from those of its package: %+v", audit)
	}
}
