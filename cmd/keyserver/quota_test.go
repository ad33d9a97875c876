package main

import (
	"os"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
)

// TestBudgetsOutlive holds a client to its budget of a day over reloads and restarts.
func TestBudgetsOutlive(t *testing.T) {
	s := newSite(t)
	key := mustSKI(t, s.writeKey("filekey.pem"))
	if err := os.Mkdir(s.path("state"), 0o700); err != nil {
		t.Fatal(err)
	}
	cfg := s.write("ks.yaml", 0o600, s.config("state_dir: "+s.path("state")+"\nclients:"+rule("one", "sign")+"\n    daily: 3\n"))
	sign := func(p *program, want bool) {
		t.Helper()
		_, err := do(t, p.client("one"), signOp(key))
		if want && err != nil {
			t.Error(err)
		}
		if !want {
			wantCode(t, err, keyless.CodeKeyNotFound)
		}
	}
	p := s.start(cfg)
	sign(p, true)
	p.reload(reloaded)
	sign(p, true)
	p.stop()
	p = s.start(cfg)
	sign(p, true)
	sign(p, false)
	p.reload(reloaded)
	sign(p, false)
	p.stop()
	p = s.start(cfg)
	sign(p, false)
	p.stop()
	ask := []string{"policy", "test", "--config", cfg, "--client", "spiffe://keys.example/edge/one", "--op", "sign", "--scheme", "ecdsa_secp256r1_sha256", "--key", "filekey"}
	if code, out := s.try(ask...); code != 1 || !strings.Contains(out, "clients[0].daily") {
		t.Errorf("got %d, %s", code, out)
	}
	s.write("state/quotas.json", 0o600, "{")
	if code, out := s.try("run", "--config", cfg); code != 3 || !strings.Contains(out, "ks.yaml:10: state_dir:") {
		t.Errorf("damaged state: got %d, %s", code, out)
	}
}
