package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// auditSite is a site with an audit of a mode, and its configuration.
func auditSite(t *testing.T, mode string) (s *site, cfg string, key keyless.SKI) {
	s = newSite(t)
	key = mustSKI(t, s.writeKey("filekey.pem"))
	s.must("audit", "keygen", "--out", s.path("audit.key"), "--public", s.path("audit.pub"))
	if info, err := os.Stat(s.path("audit.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got %v, %v, want a key of mode 0600", info, err)
	}
	if code, _ := s.try("audit", "keygen", "--out", s.path("audit.key")); code != 1 {
		t.Errorf("a second key over the first: got %d, want 1", code)
	}
	text := s.config("control: " + s.path("ks.sock") + "\naudit: {mode: " + mode + ", dir: " + s.path("audit") + ", key_file: " + s.path("audit.key") + ", checkpoint: 1s}\nclients:" + rule("one", "sign"))
	return s, s.write("ks.yaml", 0o600, text), key
}

// TestAudit keeps a record of operations, and finds the one that was altered.
func TestAudit(t *testing.T) {
	s, cfg, key := auditSite(t, "required")
	p := s.start(cfg)
	c := p.client("one")
	for range 5 {
		if _, err := do(t, c, signOp(key)); err != nil {
			t.Fatal(err)
		}
	}
	_, err := do(t, c, signOp(keyless.SKI{1}))
	wantCode(t, err, keyless.CodeKeyNotFound)
	if st := s.statusOf(s.path("ks.sock")); st.Audit == nil || st.Audit.Mode != "required" || st.Audit.Records != 6 || st.Audit.Error != "" {
		t.Errorf("got %+v", st.Audit)
	}
	_, metrics := p.get("/metrics")
	for _, want := range []string{"keyhaven_keyserver_audit_up 1", "keyhaven_keyserver_audit_records_total 6", "keyhaven_keyserver_audit_lost_total 0"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}

	verify := []string{"audit", "verify", "--config", cfg, "--public-key", s.path("audit.pub")}
	if out := s.must(verify...); !strings.Contains(out, "every record is as it was written") || !strings.Contains(out, "6 by ") {
		t.Errorf("got %s", out)
	}
	if out := s.must("audit", "verify", "--config", cfg); !strings.Contains(out, "not checked") || strings.Contains(out, "as it was written") {
		t.Errorf("without a key: got %s", out)
	}
	if out := s.must(append(verify, "--all-signed", "--anchor", s.path("audit/audit-head.json"))...); !strings.Contains(out, "fits") {
		t.Errorf("with an anchor: got %s", out)
	}
	if code, _ := s.try("audit", "keygen", "--out", s.path("half.key"), "--public", s.path("audit.pub")); code != 1 {
		t.Errorf("a public key over another: got %d, want 1", code)
	}
	if _, err := os.Stat(s.path("half.key")); err == nil {
		t.Error("half a pair was left behind")
	}
	if out := s.must("audit", "show", "--config", cfg); strings.Count(out, "spiffe://keys.example/edge/one") != 6 || strings.Count(out, "filekey") != 5 {
		t.Errorf("got %s", out)
	}
	if out := s.must("audit", "show", "--dir", s.path("audit"), "--result", "refused", "--format", "json"); strings.Count(out, "\n") != 1 {
		t.Errorf("got %s", out)
	}
	export := s.write("export.jsonl", 0o600, s.must("audit", "export", "--config", cfg))
	s.must("audit", "verify", "--file", export, "--public-key", s.path("audit.pub"))
	if out := s.must("audit", "export", "--config", cfg, "--format", "csv"); strings.Count(out, "edge/one") != 6 {
		t.Errorf("got %s", out)
	}
	for _, tt := range []struct {
		code int
		args []string
	}{
		{2, []string{"audit", "show", "--config", cfg, "--format", "xml"}},
		{2, []string{"audit", "show", "--config", cfg, "--result", "good"}},
		{2, []string{"audit", "verify", "--config", cfg, "--all-signed"}},
		{2, []string{"audit", "show", "--config", cfg, "--since", "noon"}},
		{2, []string{"audit", "show", "--dir", "x", "--file", "y"}},
		{3, []string{"audit", "show", "--config", s.path("none.yaml")}},
		{1, []string{"audit", "verify", "--dir", s.path("nowhere")}},
		{1, []string{"audit", "verify", "--config", cfg, "--public-key", s.path("none.pub")}},
	} {
		if code, out := s.try(tt.args...); code != tt.code {
			t.Errorf("%v: got %d, %s; want %d", tt.args, code, out, tt.code)
		}
	}

	files, err := filepath.Glob(s.path("audit/audit-*.jsonl"))
	if err != nil || len(files) != 1 {
		t.Fatalf("got %v, %v, want one file", files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	altered := strings.Replace(string(text), "www.example.com", "www.example.net", 1)
	if altered == string(text) {
		t.Fatal("nothing was altered")
	}
	if err := os.WriteFile(files[0], []byte(altered), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out := s.try(verify...); code != 1 || !strings.Contains(out, "BAD") || !strings.Contains(out, "altered") || !strings.Contains(out, "line 3") {
		t.Errorf("an altered record: got %d, %s", code, out)
	}
}

// TestAuditOutOfOrder has a log that cannot be written. What that stops depends on the mode; the rest is served, and a reload mends it.
func TestAuditOutOfOrder(t *testing.T) {
	for _, mode := range []string{"required", "best-effort"} {
		t.Run(mode, func(t *testing.T) {
			s, cfg, key := auditSite(t, mode)
			s.write("audit", 0o600, "a file where the directory should be")
			p := s.start(cfg)
			c := p.client("one")
			_, err := do(t, c, signOp(key))
			if refused := err != nil; refused != (mode == "required") {
				t.Errorf("got %v", err)
			}
			if _, err := do(t, c, &keyless.Operation{Opcode: keyless.OpPing}); err != nil {
				t.Errorf("a ping: %v", err)
			}
			code, body := p.get("/readyz")
			if want := map[string]int{"required": 503, "best-effort": 200}[mode]; code != want || !strings.Contains(body, "audit: ") || !strings.Contains(body, s.path("audit")) || !strings.Contains(body, "reload") {
				t.Errorf("readyz: %d %s", code, body)
			}
			if code, out := s.try("reload", "--config", cfg); code != 1 || !strings.Contains(out, "ks.yaml:") || !strings.Contains(out, "audit") {
				t.Errorf("reload: got %d, %s", code, out)
			}
			if err := os.Remove(s.path("audit")); err != nil {
				t.Fatal(err)
			}
			s.must("reload", "--config", cfg)
			if _, err := do(t, c, signOp(key)); err != nil {
				t.Errorf("after the reload: %v", err)
			}
			if code, body := p.get("/readyz"); code != 200 || strings.Contains(body, "degraded") {
				t.Errorf("readyz after the reload: %d %s", code, body)
			}
			p.stop()
		})
	}
}

// TestAuditKeyInToken has a key of a token sign the checkpoints.
func TestAuditKeyInToken(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256", "audit:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	csr := s.must("key", "csr", "--uri", tok.URI(), "--key", "audit", "--dns", "audit.example")
	cert := s.write("audit.pem", 0o644, certify(t, parseCSR(t, csr)))
	cfg := s.write("ks.yaml", 0o600, s.config("audit: {dir: "+s.path("audit")+", key: audit, checkpoint: 1s}\n"+tokenConfigOf(tok, "")+"clients:"+rule("one", "sign")))
	p := s.start(cfg)
	if _, err := do(t, p.client("one"), signOp(ec)); err != nil {
		t.Fatal(err)
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
	if out := s.must("audit", "verify", "--config", cfg, "--public-key", cert); !strings.Contains(out, "1 by ") {
		t.Errorf("got %s", out)
	}
}

// TestExpiryStages says when the log is told of what ends.
func TestExpiryStages(t *testing.T) {
	const day = 24 * time.Hour
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		name      string
		age, left time.Duration // age -1: from is not known
		want      int
	}{
		{"a year's, new", 0, 365 * day, 0},
		{"a year's, 31 days left", 334 * day, 31 * day, 0},
		{"a year's, 30 days left", 335 * day, 30 * day, 1},
		{"a year's, a week left", 358 * day, 7 * day, 2},
		{"a year's, a day left", 364 * day, day, 3},
		{"a year's, over", 366 * day, 0, 4},
		{"a month's, new", 0, 30 * day, 0},
		{"a month's, a third left", 20 * day, 10 * day, 1},
		{"a day's, new", 0, day, 0},
		{"a day's, an hour left", 23 * time.Hour, time.Hour, 3},
		{"of unknown age", -1, 20 * day, 1},
	} {
		e := expiry{to: now.Add(tt.left)}
		if tt.age >= 0 {
			e.from = now.Add(-tt.age)
		}
		if got := e.stage(now); got != tt.want {
			t.Errorf("%s: got stage %d, want %d", tt.name, got, tt.want)
		}
	}
}

// TestExpiryIsTold has the log tell of an end once.
func TestExpiryIsTold(t *testing.T) {
	s := newSite(t)
	s.must("client", "add", "brief", "--ca-dir", s.path("ca"), "--out", s.path("brief"), "--lifetime", "1s")
	ended, err := readCertificate(s.path("brief/cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the certificate has ended", func() bool { return time.Now().After(ended.NotAfter) })
	p := s.start(s.write("ks.yaml", 0o600, s.config("clients:"+rule("one", "sign"))))
	if l := p.wait("a certificate has ended; renew it"); l["kind"] != "client" || l["name"] != "spiffe://keys.example/edge/brief" {
		t.Errorf("got %v", l)
	}
	p.reload(reloaded)
	p.reload(reloaded)
	if n := p.count("a certificate has ended; renew it"); n != 1 {
		t.Errorf("the end is told %d times, want once", n)
	}
	p.stop()
}

// TestCredential reads the PIN from where systemd puts it.
func TestCredential(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	pin, err := os.ReadFile(tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	dir := s.path("credentials")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "pin"), pin, 0o440); err != nil { // as an access control list makes it look
		t.Fatal(err)
	}
	uri := "pkcs11:token=" + tok.Label + "?pin-source=credential:pin&module-path=" + tok.Module
	cfg := s.write("ks.yaml", 0o600, s.config("tokens:\n  - uri: \""+uri+"\"\nclients:"+rule("one", "sign")))
	if code, out := s.try("check", "--config", cfg); code != 3 || !strings.Contains(out, "ks.yaml:11: tokens[0].uri:") || !strings.Contains(out, "LoadCredential=pin:PATH") {
		t.Errorf("without credentials: got %d, %s", code, out)
	}
	s.env = append(s.env, "CREDENTIALS_DIRECTORY="+dir)
	s.must("check", "--online", "--config", cfg)
	p := s.start(cfg)
	if _, err := do(t, p.client("one"), signOp(ec)); err != nil {
		t.Error(err)
	}
	p.stop()
	if err := os.Chmod(dir, 0o705); err != nil {
		t.Fatal(err)
	}
	if code, out := s.try("check", "--config", cfg); code != 3 || !strings.Contains(out, "others must have no access") {
		t.Errorf("a directory for everybody: got %d, %s", code, out)
	}
}

// FuzzCredentialURI reads what an operator may write as a token's URI.
func FuzzCredentialURI(f *testing.F) {
	f.Add("pkcs11:token=a?pin-source=credential:pin&module-path=/m")
	f.Add("pkcs11:token=a?module-path=/m&pin-source=credential:%2fetc%2fshadow")
	f.Add("pkcs11:token=a?pin-source=credential:..")
	f.Fuzz(func(t *testing.T, uri string) {
		rest, name, err := takeCredential(uri)
		if err != nil || name == "" {
			return
		}
		if strings.ContainsAny(name, "/") || strings.HasPrefix(name, ".") {
			t.Errorf("%q: got the name %q", uri, name)
		}
		if len(rest) >= len(uri) {
			t.Errorf("%q: nothing was taken out: %q", uri, rest)
		}
	})
}

// TestTransitAway serves the rest while an engine cannot be reached.
func TestTransitAway(t *testing.T) {
	s := newSite(t)
	file := mustSKI(t, s.writeKey("filekey.pem"))
	token := s.write("vault-token", 0o600, "canary-wrong-token\n")
	text := s.config("transit:\n  - address: http://127.0.0.1:1\n    keys: [{name: www}]\n    auth: {method: token-file, token_file: " + token + "}\nclients:" +
		strings.Replace(rule("one", "sign"), `["*"]`, "[filekey, www]", 1))
	p := s.start(s.write("ks.yaml", 0o600, text))
	if l := p.wait("home is away; it is tried again"); l["home"] != "127.0.0.1:1/transit" || !strings.HasSuffix(l["config"].(string), "ks.yaml:11: transit[0].address") {
		t.Errorf("got %v", l)
	}
	if _, err := do(t, p.client("one"), signOp(file)); err != nil {
		t.Error(err)
	}
	if code, body := p.get("/readyz"); code != 503 || !strings.Contains(body, "transit 127.0.0.1:1/transit is not open") {
		t.Errorf("readyz: %d %s", code, body)
	}
	p.stop()
}

// TestAuditMoves has a reload name another directory while operations come: each leaves a record in one of the logs. One that cannot be used
// leaves the present one in place.
func TestAuditMoves(t *testing.T) {
	s, cfg, key := auditSite(t, "required")
	p := s.start(cfg)
	c := p.client("one")
	text, err := os.ReadFile(cfg)
	if err != nil {
		t.Fatal(err)
	}
	move := func(to string) {
		s.write("ks.yaml", 0o600, strings.Replace(string(text), "dir: "+s.path("audit")+",", "dir: "+s.path(to)+",", 1))
	}
	s.write("occupied", 0o600, "a file where the directory should be")
	move("occupied")
	if code, out := s.try("reload", "--config", cfg); code != 1 || !strings.Contains(out, "records go on into "+s.path("audit")) {
		t.Errorf("reload: got %d, %s", code, out)
	}
	if _, err := do(t, c, signOp(key)); err != nil {
		t.Errorf("with the present log: %v", err)
	}
	if code, body := p.get("/readyz"); code != 200 || !strings.Contains(body, "audit: ") {
		t.Errorf("readyz: %d %s", code, body)
	}
	move("audit") // back
	s.must("reload", "--config", cfg)
	if _, body := p.get("/readyz"); strings.Contains(body, "audit: ") {
		t.Errorf("readyz: %s", body)
	}

	old, err := os.ReadFile(s.path("audit.key"))
	if err != nil {
		t.Fatal(err)
	}
	s.must("audit", "keygen", "--out", s.path("other.key"))
	if err := os.Rename(s.path("other.key"), s.path("audit.key")); err != nil {
		t.Fatal(err)
	}
	if code, out := s.try("reload", "--config", cfg); code != 1 || !strings.Contains(out, "another key") {
		t.Errorf("reload with another key: got %d, %s", code, out)
	}
	s.write("audit.key", 0o600, string(old))
	s.must("reload", "--config", cfg)

	stop, done, count := make(chan struct{}), make(chan error, 1), 0
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if _, err := do(t, c, signOp(key)); err != nil {
				done <- err
				return
			}
			count++
		}
	}()
	for _, to := range []string{"two", "audit", "three"} {
		move(to)
		s.must("reload", "--config", cfg)
	}
	close(stop)
	if err := <-done; err != nil {
		t.Errorf("while the log moved: %v", err)
	}
	p.stop()
	records := 0
	for _, dir := range []string{"audit", "two", "three"} {
		s.must("audit", "verify", "--dir", s.path(dir), "--public-key", s.path("audit.pub"), "--all-signed")
		records += strings.Count(s.must("audit", "show", "--dir", s.path(dir)), "filekey")
	}
	if records != count+1 {
		t.Errorf("got %d records of %d operations", records, count+1)
	}
}
