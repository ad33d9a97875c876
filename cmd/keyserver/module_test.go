package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/keyless"
)

// misbehaving puts a module between the site's programs and SoftHSM2 that misbehaves on command and counts. It returns the
// configuration of the token behind it, and the command.
func (s *site) misbehaving(tok *softhsm.Token) (tokens string, faults *faultmodule.Control) {
	s.t.Helper()
	module, err := faultmodule.Build(s.path("faulty"))
	if err != nil {
		s.t.Fatal(err)
	}
	faults, err = faultmodule.New(s.path("faulty"), tok.Module)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := faults.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return fmt.Sprintf("tokens:\n  - uri: \"pkcs11:token=%s?pin-source=%s\"\n    module: %s\n    workers: 2\n    deadline: 1s\n", tok.Label, tok.PINFile, module), faults
}

// set replaces the faults.
func set(t *testing.T, c *faultmodule.Control, f faultmodule.Faults) {
	t.Helper()
	if err := c.Set(f); err != nil {
		t.Fatal(err)
	}
}

// hanging has no signature come back.
var hanging = faultmodule.Faults{Rules: []faultmodule.Rule{{Function: "C_Sign", Do: faultmodule.Hang}}}

// TestModuleHangs has a signature that never ends. A new configuration takes effect all the same, and so does SIGTERM.
func TestModuleHangs(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	s.must("client", "add", "two", "--ca-dir", s.path("ca"), "--out", s.path("two"))
	tokens, faults := s.misbehaving(tok)
	limits := "timeouts: {drain: 100ms, operation: 200ms}\n"
	p := s.start(s.write("ks.yaml", 0o600, s.config(tokens+limits+"clients:"+rule("one", "sign")+rule("two", "sign"))))
	if _, err := do(t, p.client("one"), signOp(ec)); err != nil {
		t.Fatal(err)
	}
	set(t, faults, hanging)
	asked := make(chan struct{})
	c := p.client("one")
	go func() {
		defer close(asked)
		_, _ = c.Do(t.Context(), signOp(ec)) // ends with the server
	}()
	eventually(t, "an operation is in the module", func() bool { return faults.Counters().Hanging > 0 })
	s.write("ks.yaml", 0o600, s.config(limits+"clients:"+rule("two", "sign")))
	p.reload(reloaded)
	if err := connect(t, p, s.tls("one")); err == nil {
		t.Error("a client whose rule is gone was let in")
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d, want 0: the module ends with its worker", code)
	}
	<-asked
}

// TestModuleHangsAtStart ends a server whose token never answers.
func TestModuleHangsAtStart(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	tokens, faults := s.misbehaving(tok)
	set(t, faults, hanging)
	cmd := s.command(t.Context(), "run", "--config", s.write("ks.yaml", 0o600, s.config(tokens+"clients:"+rule("one", "sign"))))
	cmd.Stdout, cmd.Stderr = s, s
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	eventually(t, "the test signature hangs", func() bool { return faults.Counters().Hanging > 0 })
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(patience):
		cmd.Process.Kill()
		<-ended
		t.Error("the server did not end after SIGTERM")
	}
}

// TestRevocationDoesNotWait takes a client away in a configuration with a token that hangs, and stops the server while the reload goes on.
func TestRevocationDoesNotWait(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	s.must("client", "add", "two", "--ca-dir", s.path("ca"), "--out", s.path("two"))
	file := mustSKI(t, s.writeKey("filekey.pem"))
	tokens, faults := s.misbehaving(tok)
	socket := s.path("ks.sock")
	control := "control: " + socket + "\n"
	cfg := s.write("ks.yaml", 0o600, s.config(control+"clients:"+rule("one", "sign")+rule("two", "sign")))
	set(t, faults, hanging)
	p := s.start(cfg)
	one, two := p.client("one"), p.client("two")
	for _, c := range []*keyless.Client{one, two} {
		if _, err := do(t, c, signOp(file)); err != nil {
			t.Fatal(err)
		}
	}
	s.write("ks.yaml", 0o600, s.config(control+tokens+"clients:"+rule("one", "sign")))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.try("reload", "--control", socket) // ends with the server
	}()
	eventually(t, "the client that is taken away has no connection", func() bool { return !two.Healthy() })
	if err := connect(t, p, s.tls("two")); err == nil {
		t.Error("the client that is taken away was let in")
	}
	if _, err := do(t, one, signOp(file)); err != nil {
		t.Errorf("while the token hangs: %v", err)
	}
	if n := p.count(reloaded); n != 0 {
		t.Fatal("the reload did not wait for the token; this test shows nothing")
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
	<-ended
}

// TestReloadGivesWay takes a client away while a reload before waits for a token that hangs, be it asked for by command or by signal.
func TestReloadGivesWay(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	s.must("client", "add", "two", "--ca-dir", s.path("ca"), "--out", s.path("two"))
	file := mustSKI(t, s.writeKey("filekey.pem"))
	tokens, faults := s.misbehaving(tok)
	socket := s.path("ks.sock")
	base := s.config("control: " + socket + "\n")
	both, one := "clients:"+rule("one", "sign")+rule("two", "sign"), "clients:"+rule("one", "sign")
	set(t, faults, hanging)
	p := s.start(s.write("ks.yaml", 0o600, base+both))
	for name, start := range map[string]func() (end func()){
		"command": func() func() {
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				if code, out := s.try("reload", "--control", socket); code != 1 || !strings.Contains(out, "newer reload") {
					t.Errorf("the reload that gave way: got %d, %s", code, out)
				}
			}()
			return func() { <-ended }
		},
		"signal": func() func() {
			if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
				t.Fatal(err)
			}
			return func() {}
		},
	} {
		c := p.client("two")
		if _, err := do(t, c, signOp(file)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		hung, done := faults.Counters().Hanging, p.count(reloaded)
		s.write("ks.yaml", 0o600, base+tokens+both)
		end := start()
		eventually(t, "the token hangs", func() bool { return faults.Counters().Hanging > hung })
		s.write("ks.yaml", 0o600, base+one)
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		p.waitNth(reloaded, done+2)
		end()
		if err := connect(t, p, s.tls("two")); err == nil {
			t.Errorf("%s: the client that was taken away was let in", name)
		}
		s.write("ks.yaml", 0o600, base+both)
		p.reload(reloaded)
	}
	if code := p.stop(); code != 0 {
		t.Errorf("got exit code %d", code)
	}
}

// TestPINChanged changes the PIN on the token while the server runs. When the login is lost, the old PIN is tried once; SIGHUP
// has the new one read.
func TestPINChanged(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	tokens, faults := s.misbehaving(tok)
	p := s.start(s.write("ks.yaml", 0o600, s.config(tokens+"timeouts: {operation: 500ms}\nclients:"+rule("one", "sign"))))
	c := p.client("one")
	if _, err := do(t, c, signOp(ec)); err != nil {
		t.Fatal(err)
	}
	const pin = "pin-canary-changed"
	change := exec.Command("pkcs11-tool", "--module", tok.Module, "--token-label", tok.Label, "--login", "--pin", tok.PIN, "--change-pin", "--new-pin", pin)
	change.Env = append(os.Environ(), tok.Env())
	if out, err := change.CombinedOutput(); err != nil {
		t.Fatalf("change the PIN: %v: %s", err, out)
	}
	set(t, faults, faultmodule.Faults{Down: true, Count: true})
	if _, err := do(t, c, signOp(ec)); err == nil {
		t.Error("a broken device signed")
	}
	set(t, faults, faultmodule.Faults{Count: true})
	eventually(t, "a worker tries the old PIN", func() bool { return faults.Counters().LoginsFailed > 0 })
	if _, err := do(t, c, signOp(ec)); err == nil {
		t.Error("signed without a login")
	}
	if err := os.WriteFile(tok.PINFile, []byte(pin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.reload(reloaded)
	if _, err := do(t, c, signOp(ec)); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
	if n := faults.Counters().LoginsFailed; n != 1 {
		t.Errorf("the wrong PIN was tried %d times, want once", n)
	}
}
