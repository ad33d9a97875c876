package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/keyless"
)

// A traffic asks for signatures without a pause.
type traffic struct {
	t    *testing.T
	stop context.CancelFunc
	wg   sync.WaitGroup
	done atomic.Int64
	errs atomic.Int64
}

// startTraffic has goroutines ask for the operations in turn until end is called.
func startTraffic(t *testing.T, c *keyless.Client, goroutines int, ops ...*keyless.Operation) *traffic {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &traffic{t: t, stop: cancel}
	for g := range goroutines {
		l.wg.Go(func() {
			for i := g; ctx.Err() == nil; i++ {
				_, err := do(t, c, ops[i%len(ops)])
				l.done.Add(1)
				if err != nil && t.Context().Err() == nil {
					l.errs.Add(1)
					t.Errorf("an operation failed: %v", err)
					return
				}
			}
		})
	}
	t.Cleanup(cancel)
	return l
}

// more waits until as many operations more are done.
func (l *traffic) more(n int64) {
	l.t.Helper()
	want := l.done.Load() + n
	eventually(l.t, "the load goes on", func() bool { return l.done.Load() >= want || l.errs.Load() > 0 })
}

func (l *traffic) end() {
	l.stop()
	l.wg.Wait()
}

// workersOf returns the processes of the token's workers that are ready.
func (s *site) workersOf(socket, token string) (pids []int) {
	s.t.Helper()
	for _, h := range s.statusOf(socket).Homes {
		for _, w := range h.Workers {
			if h.Name == token && w.State == "ready" {
				pids = append(pids, w.PID)
			}
		}
	}
	return pids
}

// tokenConfigOf is the configuration of a token with two workers, which all tests here use.
func tokenConfigOf(tok *softhsm.Token, more string) string {
	return fmt.Sprintf("tokens:\n  - uri: %q\n    workers: 2\n%s", tok.URI(), more)
}

// TestModuleStaysOut looks into the running processes: workers have the module, the server has not, and the PIN is nowhere to be read.
func TestModuleStaysOut(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	socket := s.path("ks.sock")
	p := s.start(s.write("ks.yaml", 0o600, s.config("control: "+socket+"\n"+tokenConfigOf(tok, "    sandbox: {mode: off}\n")+"clients:"+rule("one", "sign"))))
	if _, err := do(t, p.client("one"), signOp(ec)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "two workers are ready", func() bool { return len(s.workersOf(socket, tok.Label)) == 2 })
	read := func(pid int, name string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			t.Fatal(err)
		}
		return string(b)
	}
	const module = "libsofthsm2"
	maps := read(p.cmd.Process.Pid, "maps")
	if maps == "" && os.Geteuid() != 0 {
		maps = filepath.Base(os.Args[0]) // the server shows its memory to root alone
	}
	if !strings.Contains(maps, filepath.Base(os.Args[0])) || strings.Contains(maps, module) {
		t.Errorf("the server's memory holds the module, or was not read: %s", maps)
	}
	for _, pid := range s.workersOf(socket, tok.Label) {
		if maps := read(pid, "maps"); !strings.Contains(maps, module) {
			t.Errorf("worker %d does not hold the module", pid)
		}
		if got := strings.Split(strings.TrimSuffix(read(pid, "cmdline"), "\x00"), "\x00"); len(got) != 2 || got[1] != workerCommand {
			t.Errorf("worker %d runs as %q", pid, got)
		}
		for _, name := range []string{"cmdline", "environ"} {
			for _, of := range []int{pid, p.cmd.Process.Pid} {
				if strings.Contains(read(of, name), tok.PIN) {
					t.Errorf("process %d: the PIN is in %s", of, name)
				}
			}
		}
	}
	for _, out := range []string{s.must("status", "--control", socket, "--output", "json"), s.must("token", "list", "--control", socket), s.output()} {
		if strings.Contains(out, tok.PIN) {
			t.Error("the PIN is in an output")
		}
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
}

// TestKillWorker kills workers under load, and nobody notices.
func TestKillWorker(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	socket := s.path("ks.sock")
	p := s.start(s.write("ks.yaml", 0o600, s.config("control: "+socket+"\n"+tokenConfigOf(tok, "")+"clients:"+rule("one", "sign"))))
	ready := func() bool { return len(s.workersOf(socket, tok.Label)) == 2 }
	eventually(t, "two workers are ready", ready)
	l := startTraffic(t, p.client("one"), 8, signOp(ec))
	for range 4 {
		l.more(100)
		if err := syscall.Kill(s.workersOf(socket, tok.Label)[0], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		l.more(100)
		eventually(t, "the worker was replaced", ready)
	}
	l.end()
	_, metrics := p.get("/metrics")
	if !strings.Contains(metrics, fmt.Sprintf("keyhaven_keyserver_worker_ends_total{reason=\"crash\",token=%q} 4", tok.Label)) {
		t.Errorf("four workers were killed, and the metrics say otherwise")
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
}

// TestTokenRetry corrects a wrong PIN while the server runs. Each retry costs one try.
func TestTokenRetry(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	pin, err := os.ReadFile(tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	wrong := func() {
		if err := os.WriteFile(tok.PINFile, []byte("canary-wrong\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	wrong()
	tokens, faults := s.misbehaving(tok)
	set(t, faults, faultmodule.Faults{Count: true})
	socket := s.path("ks.sock")
	cfg := s.write("ks.yaml", 0o600, s.config("control: "+socket+"\n"+tokens+"clients:"+rule("one", "sign")))
	p := s.start(cfg)
	refused := func(want uint64) {
		t.Helper()
		if n := faults.Counters().LoginsFailed; n != want {
			t.Errorf("the token was asked for %d wrong PINs, want %d", n, want)
		}
	}
	refused(1)
	state := func() string {
		var homes []homeStatus
		if err := json.Unmarshal([]byte(s.must("token", "list", "--config", cfg, "--output", "json")), &homes); err != nil {
			t.Fatal(err)
		}
		return homes[0].State + " " + homes[0].Error
	}
	if got := state(); !strings.HasPrefix(got, "stopped ") || !strings.Contains(got, "PIN refused") {
		t.Errorf("got %q", got)
	}
	if code, out := s.try("token", "retry", tok.Label, "--config", cfg); code != 1 || !strings.Contains(out, "PIN refused") {
		t.Errorf("retry with the wrong PIN: got %d, %s", code, out)
	}
	refused(2)
	if err := os.WriteFile(tok.PINFile, pin, 0o600); err != nil {
		t.Fatal(err)
	}
	if out := s.must("token", "retry", tok.Label, "--config", cfg); !strings.Contains(out, tok.Label) {
		t.Errorf("got %s", out)
	}
	if _, err := do(t, p.client("one"), signOp(ec)); err != nil {
		t.Error(err)
	}
	if got := state(); got != "open " {
		t.Errorf("got %q", got)
	}

	// An open token whose PIN is wrong at a retry goes on with the workers that it has.
	wrong()
	if code, out := s.try("token", "retry", tok.Label, "--config", cfg); code != 1 {
		t.Errorf("got %d, %s", code, out)
	}
	refused(3)
	if _, err := do(t, p.client("one"), signOp(ec)); err != nil {
		t.Errorf("after a retry that failed: %v", err)
	}
	if err := os.WriteFile(tok.PINFile, pin, 0o600); err != nil {
		t.Fatal(err)
	}
	s.must("reload", "--config", cfg)
	if got := state(); got != "open " {
		t.Errorf("after the reload: got %q", got)
	}
	refused(3)
	p.stop()
}

// TestBadHomes has homes that cannot be used, at the start and after a reload. Each is named with file and line, and the rest is served.
func TestBadHomes(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	if _, err := tok.Twin(); err != nil {
		t.Fatal(err)
	}
	file := mustSKI(t, s.writeKey("filekey.pem"))
	text := s.write("libtext.so", 0o755, "this is no library\n")
	plain := s.path("libplain.so")
	source := s.write("plain.c", 0o600, "int plain(void) { return 1; }\n")
	if out, err := exec.Command("cc", "-shared", "-fPIC", "-o", plain, source).CombinedOutput(); err != nil {
		t.Fatalf("compile a library: %v: %s", err, out)
	}
	elf, err := os.ReadFile(plain)
	if err != nil {
		t.Fatal(err)
	}
	elf[18] ^= 0xff // e_machine
	foreign := s.write("libforeign.so", 0o755, string(elf))
	uri := func(name, module string) string {
		return fmt.Sprintf("pkcs11:%s?module-path=%s&pin-source=%s", name, module, tok.PINFile)
	}
	for _, tt := range []struct{ name, uri, want string }{
		{"no library at all", uri("token=a", text), "libtext.so"},
		{"a library that is no module", uri("token=a", plain), "libplain.so"},
		{"a library for other machines", uri("token=a", foreign), "libforeign.so"},
		{"two tokens with one label", tok.URI(), "serial"},
		{"no such token", uri("token=nobody", tok.Module), "token not found"},
	} {
		bad := s.config(fmt.Sprintf("control: %s\ntokens:\n  - uri: %q\nclients:", s.path("ks.sock"), tt.uri) + rule("one", "sign"))
		cfg := s.write("ks.yaml", 0o600, bad)
		p := s.start(cfg)
		if _, err := do(t, p.client("one"), signOp(file)); err != nil {
			t.Errorf("%s: the rest is not served: %v", tt.name, err)
		}
		if out := p.text(); !strings.Contains(out, "config:"+cfg+":12: tokens[0].uri") || !strings.Contains(out, tt.want) {
			t.Errorf("%s: the log does not say what and where: %s", tt.name, out)
		}
		if code, body := p.get("/readyz"); code != 503 || !strings.Contains(body, tt.want) {
			t.Errorf("%s: readyz: %d %s", tt.name, code, body)
		}
		// Without a rule that could mean its keys, the server is ready for what is asked of it.
		s.write("ks.yaml", 0o600, strings.Replace(bad, `keys: ["*"]`, "keys: [filekey]", 1))
		code, out := s.try("reload", "--config", cfg)
		if code != 1 || !strings.Contains(out, "ks.yaml:12: tokens[0].uri") || !strings.Contains(out, tt.want) {
			t.Errorf("%s: reload: got %d, %s", tt.name, code, out)
		}
		if code, body := p.get("/readyz"); code != 200 || !strings.Contains(body, "degraded: ") || !strings.Contains(body, tt.want) {
			t.Errorf("%s: readyz with a rule for the file alone: %d %s", tt.name, code, body)
		}
		if _, err := do(t, p.client("one"), signOp(file)); err != nil {
			t.Errorf("%s: after the reload: %v", tt.name, err)
		}
		p.stop()
	}
}

// TestTwoHomes serves a key from a token and a file, and loses the token.
func TestTwoHomes(t *testing.T) {
	s := newSite(t)
	tok := s.token()
	file := mustSKI(t, s.writeKey("filekey.pem"))
	imported := exec.Command("softhsm2-util", "--import", s.path("filekey.pem"), "--token", tok.Label, "--label", "shared", "--id", "01", "--pin", tok.PIN)
	imported.Env = append(os.Environ(), tok.Env())
	if out, err := imported.CombinedOutput(); err != nil {
		t.Fatalf("import the key: %v: %s", err, out)
	}
	socket := s.path("ks.sock")
	text := s.config("control: " + socket + "\nprobe: {interval: 1s}\nhomes: {breaker_failures: 2}\n" + tokenConfigOf(tok, "    allow_extractable: true\n") + "clients:" + rule("one", "sign"))
	cfg := s.write("ks.yaml", 0o600, text)
	p := s.start(cfg)
	keys := s.statusOf(socket).Keys
	if len(keys) != 1 || len(keys[0].Homes) != 2 {
		t.Fatalf("got %+v, want one key in two homes", keys)
	}
	l := startTraffic(t, p.client("one"), 4, signOp(file))
	l.more(100)
	away, home := s.path("away"), filepath.Join(tok.Dir, "tokens")
	if err := os.Rename(home, away); err != nil {
		t.Fatal(err)
	}
	for _, pid := range s.workersOf(socket, tok.Label) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the probe finds the token gone", func() bool {
		_, metrics := p.get("/metrics")
		return strings.Contains(metrics, fmt.Sprintf("keyhaven_keyserver_probe_success{home=%q,key=%q} 0", tok.Label, file))
	})
	l.more(100)
	if code, body := p.get("/readyz"); code != 200 || !strings.Contains(body, "degraded: key "+file.String()) || !strings.Contains(body, " in "+tok.Label) {
		t.Errorf("readyz with one home of two: %d %s", code, body)
	}
	if err := os.Rename(away, home); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the token comes back", func() bool {
		code, body := p.get("/readyz")
		return code == 200 && !strings.Contains(body, "degraded")
	})
	l.more(100)
	l.end()
	p.stop()
}

// TestReloadUnderLoad changes keys, rules, certificates, tokens, homes and audit while clients ask without a pause.
func TestReloadUnderLoad(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	file := mustSKI(t, s.writeKey("filekey.pem"))
	s.writeKey("other.pem")
	s.must("audit", "keygen", "--out", s.path("audit.key"))
	s.must("ca", "issue", "hsm", "--ca-dir", s.path("ca"), "--out", s.path("tls2"))
	base := s.config("control: " + s.path("ks.sock") + "\n" + tokenConfigOf(tok, "") + "clients:" + rule("one", "sign"))
	audit := func(mode string) string {
		return fmt.Sprintf("\naudit: {mode: %s, dir: %s, key_file: %s}\n", mode, s.path("audit"), s.path("audit.key"))
	}
	cfg := s.write("ks.yaml", 0o600, base)
	p := s.start(cfg)
	l := startTraffic(t, p.client("one"), 8, signOp(ec), signOp(file))
	bundle, err := os.ReadFile(s.path("tls/ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	s.must("ca", "init", "--ca-dir", s.path("ca2"), "--trust-domain", domain)
	second, err := os.ReadFile(s.path("ca2/ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	s.write("bundle.pem", 0o644, string(bundle)+string(second))
	for _, tt := range []struct{ name, text string }{
		{"nothing", base},
		{"another key more", strings.Replace(base, "  - path: "+s.path("filekey.pem"), "  - path: "+s.path("filekey.pem")+"\n  - path: "+s.path("other.pem"), 1)},
		{"the key less", base},
		{"a client more", base + rule("two", "sign")},
		{"the client less", base},
		{"another certificate", strings.ReplaceAll(base, "/tls/", "/tls2/")},
		{"more sessions", strings.Replace(base, "workers: 2", "workers: 2\n    sessions: 6", 1)},
		{"another share", strings.Replace(base, "workers: 2", "workers: 2\n    weight: 3\n    priority: 2\n    queue: 100", 1)},
		{"other breakers", base + "\nhomes: {breaker_failures: 2, hedge_percentile: 0}\n"},
		{"an audit", base + audit("required")},
		{"an audit of another kind", base + audit("best-effort")},
		{"the audit again", base + audit("required")},
		{"no audit", base},
		{"an authority more", strings.Replace(base, s.path("tls/ca.pem"), s.path("bundle.pem"), 1)},
		{"the authority less", base},
	} {
		s.write("ks.yaml", 0o600, tt.text)
		l.more(20)
		if code, out := s.try("reload", "--config", cfg); code != 0 {
			t.Errorf("%s: got %d, %s", tt.name, code, out)
		}
		l.more(20)
		if t.Failed() {
			t.Fatalf("%s: failed", tt.name)
		}
	}
	l.end()
	if out := s.must("audit", "verify", "--dir", s.path("audit")); !strings.Contains(out, "good") {
		t.Errorf("the log that was begun three times: %s", out)
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
}

// TestRevocationIsQuick takes a client, and a key, away from open connections.
func TestRevocationIsQuick(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	file := mustSKI(t, s.writeKey("filekey.pem"))
	s.must("client", "add", "two", "--ca-dir", s.path("ca"), "--out", s.path("two"))
	text := s.config("control: " + s.path("ks.sock") + "\n" + tokenConfigOf(tok, "") + "clients:" + rule("one", "sign") + rule("two", "sign"))
	cfg := s.write("ks.yaml", 0o600, text)
	p := s.start(cfg)
	one, two := p.client("one"), p.client("two")
	for _, c := range []*keyless.Client{one, two} {
		if _, err := do(t, c, signOp(ec)); err != nil {
			t.Fatal(err)
		}
	}
	// A key that no rule has any more, and a client that is revoked. What reload returns after is in force.
	s.write("ks.yaml", 0o600, strings.ReplaceAll(text, `keys: ["*"]`, "keys: [filekey]"))
	s.must("client", "revoke", "two", "--ca-dir", s.path("ca"))
	s.must("reload", "--config", cfg)
	_, err := do(t, one, signOp(ec))
	wantCode(t, err, keyless.CodeKeyNotFound)
	if _, err := do(t, one, signOp(file)); err != nil {
		t.Errorf("the key that is left: %v", err)
	}
	eventually(t, "the revoked client has no connection", func() bool { return !two.Healthy() })
	if p.count("operation") > 5 {
		t.Error("more was asked than this test does")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := two.Do(ctx, signOp(file)); err == nil {
		t.Error("a revoked client got a signature")
	}
	p.stop()
}
