package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/internal/takeover"
	"github.com/keyhaven/keyhaven/signer"
)

// statusOf asks the running server.
func (s *site) statusOf(socket string) status {
	s.t.Helper()
	var st status
	if err := json.Unmarshal([]byte(s.must("status", "--control", socket, "--output", "json")), &st); err != nil {
		s.t.Fatal(err)
	}
	return st
}

// ask sends a request to the control socket as a program of another make would.
func ask(t *testing.T, socket, method, path, body string, header http.Header) (int, string) {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+controlHost+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	if h := header.Get("Host"); h != "" {
		req.Host = h
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// TestControl asks a running server over its socket, by commands and without them.
func TestControl(t *testing.T) {
	s := newSite(t)
	socket := s.path("ks.sock")
	text := s.config("control: " + socket + "\nclients:" + rule("one", "sign"))
	cfg := s.write("ks.yaml", 0o600, text)
	if code, out := s.try("status", "--config", cfg); code != 1 || !strings.Contains(out, "no server answers on "+socket) {
		t.Errorf("without a server: got %d, %s", code, out)
	}
	p := s.start(cfg)
	info, err := os.Stat(socket)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("got %v, %v, want a socket of mode 0600", info, err)
	}
	st := s.statusOf(socket)
	if !st.Ready || len(st.Keys) != 1 || len(st.Homes) != 1 || st.Homes[0].State != "open" || st.Homes[0].Lane == nil || st.Policy != (policyStatus{1, 1}) {
		t.Errorf("got %+v", st)
	}
	if h := st.Keys[0].Homes; len(h) != 1 || !h[0].OK || h[0].At.IsZero() {
		t.Errorf("the key was not probed: %+v", h)
	}
	for _, args := range [][]string{{"status"}, {"token", "list"}} {
		if out := s.must(append(args, "--config", cfg)...); !strings.Contains(out, "files") {
			t.Errorf("%v: got %s", args, out)
		}
	}
	if code, out := s.try("token", "retry", "nobody", "--config", cfg); code != 1 || !strings.Contains(out, "token list") {
		t.Errorf("got %d, %s", code, out)
	}

	if out := s.must("reload", "--config", cfg); !strings.Contains(out, "configuration taken") {
		t.Errorf("got %s", out)
	}
	s.write("ks.yaml", 0o600, text+"\nsurprise: 1\n")
	if code, out := s.try("reload", "--control", socket); code != 3 || !strings.Contains(out, "surprise: unknown key") {
		t.Errorf("a faulty configuration: got %d, %s", code, out)
	}
	s.write("ks.yaml", 0o600, text)
	if st := s.statusOf(socket); st.Reload == nil || st.Reload.Taken {
		t.Errorf("the refused reload is not told: %+v", st.Reload)
	}
	_, metrics := p.get("/metrics")
	for _, want := range []string{`keyhaven_keyserver_reloads_total{result="refused"} 1`, `keyhaven_keyserver_reloads_total{result="taken"} 1`, "keyhaven_keyserver_build_info{",
		`keyhaven_keyserver_certificate_not_after_seconds{kind="server"`, `kind="authority"`, `kind="client"`, "keyhaven_keyserver_probe_success{"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}

	for _, tt := range []struct {
		name, method, path, body string
		header                   http.Header
		code                     int
	}{
		{"from a web page", "GET", "/v1/status", "", http.Header{"Origin": {"https://evil.example"}}, 403},
		{"of another host", "GET", "/v1/status", "", http.Header{"Host": {"evil.example"}}, 403},
		{"unknown path", "GET", "/v2/status", "", nil, 404},
		{"wrong method", "GET", "/v1/reload", "", nil, 405},
		{"no JSON", "POST", "/v1/tokens/retry", "name", nil, 400},
		{"unknown field", "POST", "/v1/tokens/retry", `{"nam":"x"}`, nil, 400},
		{"two objects", "POST", "/v1/tokens/retry", `{"name":"x"}{}`, nil, 400},
		{"too long", "POST", "/v1/tokens/retry", `{"name":"` + strings.Repeat("x", controlBody) + `"}`, nil, 400},
		{"unknown token", "POST", "/v1/tokens/retry", `{"name":"files"}`, nil, 404},
		{"empty question", "POST", "/v1/policy/test", `{}`, nil, 400},
	} {
		if code, body := ask(t, socket, tt.method, tt.path, tt.body, tt.header); code != tt.code {
			t.Errorf("%s: got %d %s, want %d", tt.name, code, body, tt.code)
		}
	}
	p.stop()
	if _, err := os.Stat(socket); err == nil {
		t.Error("the socket is left behind")
	}
}

// TestControlRefusesOthers has callers whom the kernel knows for somebody else.
func TestControlRefusesOthers(t *testing.T) {
	s := &server{logger: slog.New(slog.DiscardHandler), keys: newKeyring(slog.New(slog.DiscardHandler)), self: &takeover.Process{}}
	socket := t.TempDir() + "/ks.sock"
	c, err := s.listenControl(socket)
	if err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]bool{0: true, uint32(os.Geteuid()): true, uint32(os.Geteuid()) + 4711: false, ^uint32(0): false} {
		if c.allowed(uid) != want {
			t.Errorf("user %d: got %v", uid, !want)
		}
	}
	c.allowed = func(uint32) bool { return false }
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.serve(ctx) }()
	if code, body := ask(t, socket, "GET", "/v1/status", "", nil); code != 403 || !strings.Contains(body, "may not control") {
		t.Errorf("got %d %s", code, body)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// FuzzControl reads what a local process sends to the control socket.
func FuzzControl(f *testing.F) {
	f.Add([]byte(`{"client":"spiffe://keys.example/edge/one","op":"sign","key":"www","scheme":"ed25519","at":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"name":"x"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var q policyQuery
		if decode(bytes.NewReader(b), &q) != nil {
			return
		}
		in, known, err := q.query(signer.NewRegistry())
		if err == nil && (known || in.Client == "") {
			t.Errorf("%q: got %+v", b, in)
		}
	})
}

// TestPolicyTest asks what the rules allow, of the file and of the running server.
func TestPolicyTest(t *testing.T) {
	s := newSite(t)
	socket := s.path("ks.sock")
	const rules = `
  - id: spiffe://keys.example/edge/one
    keys: [filekey]
    operations: [tls-sign]
    schemes: [ecdsa_secp256r1_sha256]
    snis: ["*.example.com"]
    windows: ["Mon-Fri 06:00-22:00 Europe/Zurich"]
  - id: spiffe://keys.example/edge/one
    keys: [old]
    operations: [decrypt]
    snis: ["*"]
`
	cfg := s.write("ks.yaml", 0o600, s.config("control: "+socket+"\nclients:"+rules))
	test := func(args ...string) []string {
		return append([]string{"policy", "test", "--config", cfg, "--client", "spiffe://keys.example/edge/one"}, args...)
	}
	sign := []string{"--op", "tls-sign", "--key", "filekey", "--scheme", "ecdsa_secp256r1_sha256", "--sni", "www.example.com", "--at", "2026-01-05T12:00:00Z"}
	with := func(flag, value string) []string { return append(test(sign...), flag, value) } // the last of two counts
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"allowed", test(sign...), 0, "allowed  " + cfg + ":12: clients[0]"},
		{"another server name", with("--sni", "www.example.org"), 1, "refused  " + cfg + ":16: clients[0].snis"},
		{"another key", with("--key", "other"), 1, ":13: clients[0].keys"},
		{"another scheme", with("--scheme", "ed25519"), 1, ":15: clients[0].schemes"},
		{"at night", with("--at", "2026-01-05T22:00:00Z"), 1, ":17: clients[0].windows"},
		{"another operation", with("--op", "sign"), 1, "operations"},
		{"switched off", test("--op", "decrypt", "--key", "old", "--sni", "x.example"), 1, "legacy.decrypt"},
		{"a ping, which any rule allows", test("--op", "ping"), 0, "allowed  " + cfg + ":12: clients[0]"},
		{"another client", with("--client", "spiffe://keys.example/edge/two"), 1, ":11: clients"},
		{"unknown operation", with("--op", "sing"), 2, "sing"},
		{"unknown scheme", with("--scheme", "md4"), 2, "md4"},
		{"no key", test("--op", "sign", "--scheme", "ed25519"), 2, "name the key"},
		{"no scheme", test("--op", "sign", "--key", "filekey"), 2, "scheme"},
		{"no time", with("--at", "noon"), 2, "--at"},
		{"no client", []string{"policy", "test", "--config", cfg, "--op", "ping"}, 2, "client"},
		{"no configuration", append(test(sign...), "--config", s.path("none.yaml")), 3, "none.yaml"},
		{"no server", append(test(sign...), "--online"), 1, "no server answers"},
	} {
		if code, out := s.try(tt.args...); code != tt.code || !strings.Contains(out, tt.want) {
			t.Errorf("%s: got %d, %s; want %d with %q", tt.name, code, out, tt.code, tt.want)
		}
	}
	p := s.start(cfg)
	ski := s.statusOf(socket).Keys[0].SKI
	if code, out := s.try(append(with("--key", ski), "--online")...); code != 0 || !strings.Contains(out, "allowed") {
		t.Errorf("the running server does not know that the key has the rule's label: got %d, %s", code, out)
	}
	if code, out := s.try(with("--key", ski)...); code != 1 || !strings.Contains(out, "taken as it is written") {
		t.Errorf("without the server: got %d, %s", code, out)
	}
	p.stop()
	s.must("client", "revoke", "one", "--ca-dir", s.path("ca"))
	if code, out := s.try(test(sign...)...); code != 1 || !strings.Contains(out, "revoked.json") {
		t.Errorf("a revoked client: got %d, %s", code, out)
	}
}
