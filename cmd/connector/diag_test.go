package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/connector/check"
)

// untar returns the files of a bundle by their base names.
func untar(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode != 0o600 {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		files[path.Base(h.Name)] = string(b)
	}
}

// TestDiag runs the program with secrets in every place and collects a bundle: everything is in it but they.
func TestDiag(t *testing.T) {
	t.Parallel()
	in := install(t)
	tmp := t.TempDir()
	dir := in.joined(t)
	const password = "canary-proxy-password"
	token := in.token(t, time.Now().Add(time.Hour))
	socket := filepath.Join(tmp, "control.sock")
	config := write(t, filepath.Join(tmp, "connector.yaml"), fmt.Sprintf(`
identity:
  dir: %s
transport:
  proxy:
    url: http://127.0.0.1:9
    user: u
    password_file: %s
allow:
  - to: 10.9.8.7
    ports: [443]
limits:
  per_vnet:
    default: 77
ingress:
  - hostname: %q
    service: http://localhost:9
  - service: http_status:404
control: %s
`, dir, write(t, filepath.Join(tmp, "password"), password+"\n"), "a.example", socket))
	p := start(t, "run", "--config", config)
	p.wait(t, "session up")
	// What somebody wrote in the wrong place must not get out either: an error quotes it, and the log has it.
	write(t, config+".bad", "allow: "+token+"\n")
	b, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	write(t, config, "allow: ["+token+"]\n")
	p.signal(t, syscall.SIGHUP)
	p.wait(t, "configuration not reloaded")
	write(t, config, string(b))

	out := filepath.Join(tmp, "diag.tar.gz")
	if text, code := runProgram(t, "", "diag", "--config", config, "--out", out); code != 0 {
		t.Fatalf("diag: exit code %d: %s", code, text)
	}
	files := untar(t, out)
	for name, says := range map[string][]string{
		"system.txt":     {"go1.", "interface lo"},
		"config.json":    {"10.9.8.7", "30s", `"default": 77`, "a.example"},
		"check.json":     {`"identity"`, `"udp ` + in.addr + `"`, `"level"`},
		"status.json":    {"spiffe://test.example/connector/site-1", `"connected"`},
		"metrics.txt":    {"keyhaven_connector_sessions", "go_goroutines"},
		"goroutines.txt": {"goroutine profile", "(*Connector).Run"},
		"log.txt":        {"session up", "msg=starting"},
	} {
		for _, want := range says {
			if !strings.Contains(files[name], want) {
				t.Errorf("%s does not say %q: %.300s", name, want, files[name])
			}
		}
	}
	key, err := os.ReadFile(filepath.Join(dir, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	secrets := []string{password, token, strings.TrimPrefix(token, "khj1_")[:12]}
	for line := range strings.Lines(string(key)) {
		if line = strings.TrimSpace(line); !strings.HasPrefix(line, "-----") && len(line) > 3 {
			secrets = append(secrets, line)
		}
	}
	for name, text := range files {
		for _, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("%s holds the secret %.6s…", name, s)
			}
		}
	}
	// An existing file is left alone.
	if text, code := runProgram(t, "", "diag", "--config", config, "--out", out); code != 1 || !strings.Contains(text, "exists") {
		t.Errorf("a second time: exit code %d: %s, want a refusal", code, text)
	}
	// Without a running connector, and with a configuration that is wrong, the rest is still there.
	p.signal(t, syscall.SIGTERM)
	p.exit(t)
	out = filepath.Join(tmp, "second.tar.gz")
	if text, code := runProgram(t, "", "diag", "--config", config+".bad", "--control", socket, "--out", out); code != 0 {
		t.Fatalf("diag: exit code %d: %s", code, text)
	}
	files = untar(t, out)
	if len(files) != 6 || !strings.Contains(files["status.json"], "no connector answers") || !strings.Contains(files["config.json"], "allow") || strings.Contains(files["config.json"], token) {
		t.Errorf("without a connector: %+v", files)
	}
}

// TestRedact holds the last line of defence: secrets are taken out of any text.
func TestRedact(t *testing.T) {
	b := bundle{}
	b.know(write(t, filepath.Join(t.TempDir(), "secret"), "first line\nab\n"))
	text := "x first line, ab, khj1_ABC-def_1, http://user:pw@host/ and\n-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n-----BEGIN PRIVATE KEY-----\ncut off"
	want := "x [redacted], ab, [redacted], http://[redacted]@host/ and\n[redacted]\n[redacted]"
	if got := string(b.redact([]byte(text))); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestLogRing(t *testing.T) {
	var r logRing
	line := strings.Repeat("x", 99) + "\n"
	for i := range 3000 {
		fmt.Fprintf(&r, "%06d%s", i, line[6:])
	}
	got := r.bytes()
	if len(got) > logRingSize || len(got) < logRingSize-len(line) {
		t.Errorf("%d bytes are kept, want up to %d", len(got), logRingSize)
	}
	if !bytes.HasPrefix(got[len(got)-100:], []byte("002999")) || len(got)%100 != 0 {
		t.Errorf("not the last whole lines: %.20q … %q", got, got[len(got)-20:])
	}
}

// TestStatus asks a running connector in every form, and one that has no session.
func TestStatus(t *testing.T) {
	t.Parallel()
	in := install(t)
	tmp := t.TempDir()
	socket := filepath.Join(tmp, "control.sock")
	config := write(t, filepath.Join(tmp, "connector.yaml"),
		fmt.Sprintf("identity:\n  dir: %s\nallow: []\nlimits:\n  per_vnet:\n    default: 5\ncontrol: %s\n", in.joined(t), socket))
	p := start(t, "run", "--config", config)
	p.wait(t, "session up")
	text, code := runProgram(t, "", "status", "--config", config)
	for _, want := range []string{"spiffe://test.example/connector/site-1", "up for", "0 of 8192", "0 of 5", in.addr, "connected", "quic"} {
		if code != 0 || !strings.Contains(text, want) {
			t.Errorf("exit code %d, %s, want it to say %q", code, text, want)
		}
	}
	text, _ = runProgram(t, "", "status", "--control", socket, "--output", "json")
	var st connector.Status
	if err := json.Unmarshal([]byte(text), &st); err != nil || len(st.Sessions) != 4 || st.Up.IsZero() {
		t.Errorf("json: %v, %s, want four sessions", err, text)
	}
	if text, _ = runProgram(t, "", "status", "--control", socket, "--output", "yaml"); !strings.Contains(text, "role: main") {
		t.Errorf("yaml: %s", text)
	}

	// A web page cannot ask.
	client := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	for _, change := range []func(*http.Request){
		func(r *http.Request) { r.Host = "evil.example" },
		func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") },
		func(r *http.Request) { r.Method = http.MethodPost },
	} {
		req, err := http.NewRequest(http.MethodGet, "http://"+controlHost+pathStatus, nil)
		if err != nil {
			t.Fatal(err)
		}
		change(req)
		resp, err := client.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden && resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s %s %v: status %d, want a refusal", req.Method, req.Host, req.Header, resp.StatusCode)
		}
	}

	// A second process with this socket does not start.
	if text, code := runProgram(t, "", "run", "--config", config); code != 1 || !strings.Contains(text, "another process answers") {
		t.Errorf("a second process: exit code %d: %s", code, text)
	}
	in.stop()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if text, code = runProgram(t, "", "status", "--config", config); code == 1 {
			break
		}
	}
	if code != 1 || !strings.Contains(text, "down") {
		t.Errorf("without an edge: exit code %d: %s, want 1", code, text)
	}
	p.signal(t, syscall.SIGTERM)
	p.exit(t)
	if text, code = runProgram(t, "", "status", "--config", config); code != 1 || !strings.Contains(text, "no connector answers") {
		t.Errorf("without a connector: exit code %d: %s", code, text)
	}
	bare := write(t, filepath.Join(tmp, "bare.yaml"), "allow: []\n")
	if text, code = runProgram(t, "", "status", "--config", bare); code != 3 || !strings.Contains(text, "names no control socket") {
		t.Errorf("without a socket: exit code %d: %s", code, text)
	}
}

// TestCheckOutput gives the findings to programs.
func TestCheckOutput(t *testing.T) {
	t.Parallel()
	in := install(t)
	config := write(t, filepath.Join(t.TempDir(), "connector.yaml"), fmt.Sprintf("identity:\n  dir: %s\nallow: []\n", in.joined(t)))
	text, code := runProgram(t, "", "check", "--config", config, "--output", "json")
	var findings []check.Finding
	if err := json.Unmarshal([]byte(text), &findings); err != nil || code != 0 || len(findings) < 5 || findings[0].Level != check.Warn {
		t.Errorf("exit code %d, %v: %s, want findings, the first about the empty list", code, err, text)
	}
	in.stop()
	if text, code = runProgram(t, "", "check", "--config", config); code != 1 || !strings.Contains(text, "remedy: let this host") {
		t.Errorf("with the edge away: exit code %d: %s", code, text)
	}
	if text, code = runProgram(t, "", "check", "--offline", "--config", config); code != 0 || strings.Contains(text, in.addr) {
		t.Errorf("offline: exit code %d: %s, want the edge left alone", code, text)
	}
}
