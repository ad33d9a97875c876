package main

import (
	"os"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
)

// TestSecondServer starts a server where one runs already. It ends before it tries a PIN, and the first goes on.
func TestSecondServer(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	tokens, faults := s.misbehaving(tok)
	set(t, faults, faultmodule.Faults{Count: true})
	for _, dir := range []string{"state", "state2"} {
		if err := os.Mkdir(s.path(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(tok.PINFile, []byte("canary-wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := s.path("ks.sock")
	text := s.config("state_dir: " + s.path("state") + "\ncontrol: " + socket + "\n" + tokens + "clients:" + rule("one", "sign"))
	p := s.start(s.write("ks.yaml", 0o600, text))
	if _, metrics := p.get("/metrics"); !strings.Contains(metrics, `keyhaven_keyserver_workers{state="refused",token="`+tok.Label+`"} 1`) {
		t.Error("the metrics do not say that the PIN was refused")
	}
	for _, tt := range []struct{ name, text, want string }{
		{"the same state", strings.Replace(text, socket, s.path("other.sock"), 1), "second.yaml:10: state_dir: "},
		{"the same socket", strings.Replace(text, s.path("state"), s.path("state2"), 1), "another process answers on " + socket},
	} {
		if code, out := s.try("run", "--config", s.write("second.yaml", 0o600, tt.text)); code != 1 || !strings.Contains(out, tt.want) {
			t.Errorf("%s: got %d, %s", tt.name, code, out)
		}
	}
	if n := faults.Counters().LoginsFailed; n != 1 {
		t.Errorf("the wrong PIN was tried %d times, want once, by the first server", n)
	}
	if code, out := s.try("reload", "--config", s.path("ks.yaml")); code != 1 || !strings.Contains(out, "PIN refused") {
		t.Errorf("the first server does not go on: got %d, %s", code, out)
	}
	p.stop()
	s.start(s.path("ks.yaml")).stop()
}

// TestReloadWarns tells of what matches nothing, which is no failure.
func TestReloadWarns(t *testing.T) {
	s, cfg, _ := auditSite(t, "required")
	b, err := os.ReadFile(cfg)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(b), "key_file: "+s.path("audit.key"), "key: nobody", 1)
	text = strings.Replace(text, `keys: ["*"]`, "keys: [filekey, missing]", 1)
	p := s.start(cfg)
	s.write("ks.yaml", 0o600, text)
	out := s.must("reload", "--config", cfg)
	for _, want := range []string{"warning: " + cfg + ":11: audit.key: ", "nobody", "clients[0].keys[1]: ", "missing"} {
		if !strings.Contains(out, want) {
			t.Errorf("the reload does not say %q: %s", want, out)
		}
	}
	eventually(t, "readyz tells of checkpoints that nobody signs", func() bool {
		code, body := p.get("/readyz")
		return code == 200 && strings.Contains(body, "degraded: audit: no checkpoint: ")
	})
	p.stop()
}
