package worker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// TestWrongPINIsTriedOnce: at the start, one try, however many workers there were to be.
func TestWrongPINIsTriedOnce(t *testing.T) {
	st, ctl, via := faulty(t)
	set(t, ctl)
	cfg := configFor(t, st)
	via(&cfg)
	cfg.Workers = 4
	log := &capture{}
	cfg.Logger = log.logger()
	const wrong = "wrong-pin-canary-4711"
	cfg.Token.URI.PINSource = ""
	cfg.Token.PIN = func() (pkcs11.PIN, error) { return pkcs11.NewPIN(wrong), nil }
	before := ctl.Counters().Logins
	p, err := Open(t.Context(), cfg)
	if err == nil {
		p.Close()
		t.Fatal("opened with a wrong PIN")
	}
	if !errors.Is(err, pkcs11.ErrPINIncorrect) || !errors.Is(err, signer.ErrUnavailable) || !errors.Is(err, ck.Error(ck.CKR_PIN_INCORRECT)) {
		t.Errorf("open: %v, want ErrPINIncorrect", err)
	}
	if n := ctl.Counters().Logins - before; n != 1 {
		t.Errorf("C_Login was called %d times, want once", n)
	}
	if strings.Contains(err.Error()+log.String(), wrong) {
		t.Errorf("the PIN shows in %v or %s", err, log)
	}
}

// TestPINChangedOutside: the workers that are logged in go on, a replacement tries the old PIN once, and nobody tries again before
// an operator acts.
func TestPINChangedOutside(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, func(c *Config) { via(c); c.Workers = 3 })
	k := keysOf(t, p)["test-p256"]
	full(t, p)
	before := ctl.Counters().Logins
	set(t, ctl, faultmodule.Rule{Function: "C_Login", Do: faultmodule.Return, Code: ck.CKR_PIN_INCORRECT})
	for _, w := range p.Stats().Workers[:2] {
		if err := syscall.Kill(w.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	refused := func() bool {
		all := p.Stats().Workers
		return all[0].State == StateRefused && all[1].State == StateRefused
	}
	eventually(t, "a refusal", refused)
	mustSign(t, k) // by the third
	ctl.ForgetLogin()
	for range 3 {
		if err := signOnce(t.Context(), k); !errors.Is(err, pkcs11.ErrPINIncorrect) || !errors.Is(err, signer.ErrUnavailable) {
			t.Errorf("sign without a login: %v, want ErrPINIncorrect", err)
		}
	}
	if n := ctl.Counters().Logins - before; n != 1 {
		t.Errorf("C_Login was called %d times, want once", n)
	}
	// The operator acts too early: one more try.
	if err := p.Retry(t.Context()); !errors.Is(err, pkcs11.ErrPINIncorrect) {
		t.Errorf("retry: %v, want ErrPINIncorrect", err)
	}
	if n := ctl.Counters().Logins - before; n != 2 {
		t.Errorf("C_Login was called %d times after a retry, want twice", n)
	}
	ctl.Clear()
	if err := p.Retry(t.Context()); err != nil {
		t.Fatal(err)
	}
	full(t, p)
	mustSign(t, k)
}

// TestRetryUnderLoad replaces all workers: nobody may see an error.
func TestRetryUnderLoad(t *testing.T) {
	p := openPool(t, makeToken(t, "p256"), func(c *Config) { c.Workers, c.Token.Sessions = 2, 2 })
	k := keysOf(t, p)["test-p256"]
	full(t, p)
	before := p.Stats().Workers
	stop := load(t, k)
	if err := p.Retry(t.Context()); err != nil {
		t.Error(err)
	}
	for _, err := range stop() {
		t.Errorf("sign while workers are replaced: %v", err)
	}
	after := p.Stats()
	for i, w := range after.Workers {
		if w.PID == before[i].PID || w.State != StateReady {
			t.Errorf("worker %d: %+v, was %+v; want another", i, w, before[i])
		}
	}
	for reason, n := range after.Kills {
		t.Errorf("%d kills because of %q", n, reason)
	}
}

// TestNothingShowsThePIN searches what others can see of a worker, and looks for what workers leave behind.
func TestNothingShowsThePIN(t *testing.T) {
	st := makeToken(t, "p256")
	descriptors := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	// The runtime's poller is there afterwards.
	first := openPool(t, st, nil)
	mustSign(t, keysOf(t, first)["test-p256"])
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	before, children := descriptors(), len(childrenOf(t))
	for _, mode := range []string{SandboxOff, SandboxBasic} {
		p := openPool(t, st, func(c *Config) { c.Sandbox.Mode = mode })
		full(t, p)
		for _, w := range p.Stats().Workers {
			for _, file := range []string{"cmdline", "environ", "status"} {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", w.PID, file))
				if err != nil && (mode == SandboxOff || !errors.Is(err, os.ErrPermission)) {
					t.Error(err)
				}
				if strings.Contains(string(b), st.PIN) {
					t.Errorf("%s of a worker holds the PIN", file)
				}
				if err == nil && file == "environ" && mode == SandboxOff && !strings.Contains(string(b), "SOFTHSM2_CONF=") {
					t.Errorf("the environment of the worker is %q: the test shows nothing", b)
				}
			}
		}
		if err := syscall.Kill(p.Stats().Workers[0].PID, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		eventually(t, "a restart", func() bool { return p.Stats().Restarts == 1 && p.Workers() == DefaultWorkers })
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	if n := descriptors(); n != before {
		t.Errorf("%d descriptors are open, were %d", n, before)
	}
	if n := len(childrenOf(t)); n != children {
		t.Errorf("%d child processes are left, were %d", n, children)
	}
}

// childrenOf returns the processes of which this one is the parent.
func childrenOf(t testing.TB) (pids []int) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			pids = append(pids, pid)
		}
	}
	return pids
}
