package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// TestRefusedLogin has a Transit server refuse an AppRole: it is asked once, and again when an operator says so, as a token is with a PIN.
func TestRefusedLogin(t *testing.T) {
	s := newSite(t)
	var logins atomic.Int64
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/auth/approle/login" {
			logins.Add(1)
		}
		w.WriteHeader(http.StatusBadRequest)
		if err := json.NewEncoder(w).Encode(map[string]any{"errors": []string{"invalid role or secret ID"}}); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(srv.Close)
	cfg := s.write("ks.yaml", 0o600, s.config(fmt.Sprintf("control: %s\ntransit:\n  - address: %s\n    keys: [{name: remote}]\n    auth: {method: approle, role_id_file: %s, secret_id_file: %s}\nclients:",
		s.path("ks.sock"), srv.URL, s.write("role", 0o600, "role\n"), s.write("secret", 0o600, "canary-wrong\n"))+rule("one", "sign")))
	p := s.start(cfg, "--log-level", "debug")
	name := strings.TrimPrefix(srv.URL, "http://") + "/transit"
	asked := func(what string, want int64) {
		t.Helper()
		if got := logins.Load(); got != want {
			t.Errorf("%s: the server was asked for %d logins, want %d", what, got, want)
		}
	}
	asked("at the start", 1)
	if l := p.wait("home is away; it is tried again"); l["home"] != name || !strings.Contains(fmt.Sprint(l["err"]), "lock the role") {
		t.Errorf("got %v", l)
	}
	p.wait("home is still away") // after the server tried it by itself
	asked("left alone", 1)
	if code, out := s.try("token", "retry", name, "--config", cfg); code != 1 || !strings.Contains(out, "invalid role") {
		t.Errorf("retry: got %d, %s", code, out)
	}
	asked("after a retry", 2)
	if code, out := s.try("reload", "--config", cfg); code != 1 || !strings.Contains(out, "transit[0]") {
		t.Errorf("reload: got %d, %s", code, out)
	}
	asked("after a reload", 3)
	p.stop()
}
