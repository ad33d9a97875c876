package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// faulty makes a token with a P-256 key behind the module that misbehaves on command.
func faulty(t *testing.T) (*softhsm.Token, *faultmodule.Control, func(*Config)) {
	t.Helper()
	st := makeToken(t, "p256")
	dir := t.TempDir()
	module, err := faultmodule.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctl, err := faultmodule.New(dir, st.Module)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ctl.Close(); err != nil {
			t.Error(err)
		}
	})
	return st, ctl, func(c *Config) {
		c.Token.URI.ModulePath, c.Token.Module = "", module
		c.Workers, c.Token.Sessions = 2, 2
	}
}

func set(t *testing.T, ctl *faultmodule.Control, rules ...faultmodule.Rule) {
	t.Helper()
	if err := ctl.Set(faultmodule.Faults{Rules: rules, Count: true}); err != nil {
		t.Fatal(err)
	}
}

// load signs from several goroutines until stop is called, which returns the errors.
func load(t *testing.T, k signer.Key) (stop func() []error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	var all []error
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := signOnce(context.Background(), k); err != nil {
					mu.Lock()
					all = append(all, err)
					mu.Unlock()
				}
			}
		})
	}
	return func() []error {
		cancel()
		wg.Wait()
		return all
	}
}

// full waits until all workers are ready.
func full(t *testing.T, p *Pool) {
	t.Helper()
	eventually(t, "all workers", func() bool { return p.Workers() == p.cfg.Workers })
}

// TestWorkersKilled kills workers from outside under load: nobody may see an error.
func TestWorkersKilled(t *testing.T) {
	p := openPool(t, makeToken(t, "p256"), func(c *Config) { c.Workers, c.Token.Sessions = 2, 2 })
	k := keysOf(t, p)["test-p256"]
	full(t, p)
	stop := load(t, k)
	for i := range 6 {
		full(t, p)
		if err := syscall.Kill(p.Stats().Workers[i%2].PID, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		before := int64(i)
		eventually(t, "a restart", func() bool { return p.Stats().Restarts > before })
	}
	full(t, p)
	for _, err := range stop() {
		t.Errorf("sign while workers are killed: %v", err)
	}
	st := p.Stats()
	if st.Restarts != 6 || st.Kills["crash"] != 6 || st.Workers[0].LastError == "" {
		t.Errorf("stats %+v, want 6 restarts after crashes", st)
	}
}

// TestLoneWorkerKilled: operations wait for the replacement when there is no other worker.
func TestLoneWorkerKilled(t *testing.T) {
	p := openPool(t, makeToken(t, "p256"), func(c *Config) { c.Workers = 1 })
	k := keysOf(t, p)["test-p256"]
	stop := load(t, k)
	if err := syscall.Kill(p.Stats().Workers[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a restart", func() bool { return p.Stats().Restarts == 1 && p.Workers() == 1 })
	for _, err := range stop() {
		t.Errorf("sign while the worker is killed: %v", err)
	}
}

// TestRecovery has the module fail in each way under load, and looks at what clients see and what became of the workers.
func TestRecovery(t *testing.T) {
	rule := func(function string, do faultmodule.Action, code uint, count int) func(*faultmodule.Control) error {
		return func(c *faultmodule.Control) error {
			return c.Set(faultmodule.Faults{Rules: []faultmodule.Rule{{Function: function, Do: do, Code: code, Count: count}}})
		}
	}
	// broken is what one operation may return; the others must not fail.
	for _, tc := range []struct {
		name   string
		fault  func(*faultmodule.Control) error
		reason string // of a kill; "" if no worker may go
		lost   int    // operations that may fail
	}{
		{"crash in C_Sign", rule("C_Sign", faultmodule.Crash, 0, 1), "crash", 0},
		{"crash in C_SignInit", rule("C_SignInit", faultmodule.Crash, 0, 1), "crash", 0},
		{"hang in C_Sign", rule("C_Sign", faultmodule.Hang, 0, 1), "deadline", 1},
		{"device error", rule("C_Sign", faultmodule.Return, ck.CKR_DEVICE_ERROR, 1), "device", 0},
		{"device removed", rule("C_SignInit", faultmodule.Return, ck.CKR_DEVICE_REMOVED, 1), "device", 0},
		{"not initialised", rule("C_SignInit", faultmodule.Return, ck.CKR_CRYPTOKI_NOT_INITIALIZED, 1), "device", 0},
		{"sessions dropped", func(c *faultmodule.Control) error { c.DropSessions(); return nil }, "", 0},
		{"login forgotten", func(c *faultmodule.Control) error { c.ForgetLogin(); return nil }, "", 0},
		{"operation left active", func(c *faultmodule.Control) error {
			return c.Set(faultmodule.Faults{Rules: []faultmodule.Rule{{Function: "C_Sign", Do: faultmodule.Return, Code: ck.CKR_SESSION_HANDLE_INVALID, Count: 1, Leave: true}}})
		}, "", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			st, ctl, via := faulty(t)
			p := openPool(t, st, func(c *Config) { via(c); c.Deadline = 300 * time.Millisecond })
			k := keysOf(t, p)["test-p256"]
			full(t, p)
			stop := load(t, k)
			if err := tc.fault(ctl); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the fault", func() bool { return ctl.Counters().Faults > 0 || tc.reason == "" })
			eventually(t, "the kill", func() bool { return tc.reason == "" || p.Stats().Kills[tc.reason] == 1 })
			ctl.Clear()
			full(t, p)
			errs := stop()
			for _, err := range errs {
				if len(errs) > tc.lost || !errors.Is(err, signer.ErrUnavailable) {
					t.Errorf("sign: %v", err)
				}
			}
			mustSign(t, k)
			if st := p.Stats(); tc.reason == "" && st.Restarts != 0 || tc.reason != "" && st.Restarts != 1 {
				t.Errorf("stats %+v, want kills because of %q only", st, tc.reason)
			}
			if c := ctl.Counters(); c.Overlaps != 0 || c.FinalizedBusy != 0 || c.Forked != 0 {
				t.Errorf("the module was misused: %+v", c)
			}
		})
	}
}

// TestDeviceGone breaks the module in all its processes at once: only new processes help.
func TestDeviceGone(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, via)
	k := keysOf(t, p)["test-p256"]
	full(t, p)
	if err := ctl.Set(faultmodule.Faults{Down: true}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an unhealthy key", func() bool {
		err := signOnce(t.Context(), k)
		if !errors.Is(err, signer.ErrUnavailable) {
			t.Errorf("sign with the device gone: %v, want ErrUnavailable", err)
		}
		return !k.(signer.Healther).Healthy()
	})
	if p.Capacity() != 0 {
		t.Errorf("capacity %d with the device gone", p.Capacity())
	}
	if err := p.Check(t.Context()); err == nil {
		t.Error("check finds nothing wrong")
	}
	ctl.Clear()
	full(t, p)
	mustSign(t, k)
	if p.Capacity() != 4 {
		t.Errorf("capacity %d, want 4", p.Capacity())
	}
}

// TestFailOnLoss: by policy, what a lost worker held is not done again.
func TestFailOnLoss(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, func(c *Config) { via(c); c.OnLoss = Fail })
	k := keysOf(t, p)["test-p256"]
	set(t, ctl, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Crash, Count: 1})
	if err := signOnce(t.Context(), k); !errors.Is(err, ErrLost) || errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("sign with a worker that crashes: %v, want ErrLost alone", err)
	}
	mustSign(t, k)
}

// TestPoison: an operation that makes the module crash each time takes few workers along.
func TestPoison(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, via)
	k := keysOf(t, p)["test-p256"]
	full(t, p)
	set(t, ctl, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Crash})
	if err := signOnce(t.Context(), k); !errors.Is(err, ErrLost) || !errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("sign with a module that crashes: %v, want ErrLost", err)
	}
	if n := ctl.Counters().Crashes; n > maxMoves+1 {
		t.Errorf("one operation made %d workers crash", n)
	}
}

// TestStarts: a module that fails while it is loaded or logged in, at first and in a replacement.
func TestStarts(t *testing.T) {
	for _, tc := range []struct {
		function string
		do       faultmodule.Action
		code     uint
		says     string
	}{
		{"C_Initialize", faultmodule.Crash, 0, "ended while it started"},
		{"C_Initialize", faultmodule.Hang, 0, "not logged in after"},
		{"C_Initialize", faultmodule.Return, ck.CKR_GENERAL_ERROR, "CKR_GENERAL_ERROR"},
		{"C_Login", faultmodule.Crash, 0, "ended while it started"},
		{"C_Login", faultmodule.Hang, 0, "not logged in after"},
		{"C_Login", faultmodule.Return, ck.CKR_DEVICE_ERROR, "CKR_DEVICE_ERROR"},
	} {
		t.Run(fmt.Sprint(tc.function, tc.do, tc.code), func(t *testing.T) {
			st, ctl, via := faulty(t)
			cfg := configFor(t, st)
			via(&cfg)
			cfg.StartDeadline = 2 * time.Second
			bad := faultmodule.Rule{Function: tc.function, Do: tc.do, Code: tc.code}
			set(t, ctl, bad)
			if tc.do == faultmodule.Hang {
				cfg.StartDeadline = 300 * time.Millisecond
			}
			if p, err := Open(t.Context(), cfg); err == nil {
				p.Close()
				t.Fatal("opened")
			} else if !strings.Contains(err.Error(), tc.says) || !strings.HasPrefix(err.Error(), "pkcs11: ") {
				t.Errorf("open: %v, want it to say %q", err, tc.says)
			}
			ctl.Clear()
			p := openPool(t, st, func(c *Config) { via(c); c.Workers, c.StartDeadline = 1, cfg.StartDeadline })
			k := keysOf(t, p)["test-p256"]
			set(t, ctl, bad)
			if err := syscall.Kill(p.Stats().Workers[0].PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			eventually(t, "starts that fail", func() bool { return p.Stats().Workers[0].State == StateWaiting })
			if err := signOnce(t.Context(), k); !errors.Is(err, signer.ErrUnavailable) {
				t.Errorf("sign without a worker: %v, want ErrUnavailable", err)
			}
			ctl.Clear()
			full(t, p)
			mustSign(t, k)
		})
	}
}

// TestBusy: what throttling tokens return reaches the caller as such.
func TestBusy(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, via)
	k := keysOf(t, p)["test-p256"]
	full(t, p)
	mustSign(t, k)
	for _, code := range []uint{ck.CKR_FUNCTION_FAILED, ck.CKR_HOST_MEMORY, ck.CKR_DEVICE_MEMORY, ck.CKR_OPERATION_ACTIVE} {
		set(t, ctl, faultmodule.Rule{Function: "C_SignInit", Do: faultmodule.Return, Code: code, Count: 2})
		err := signOnce(t.Context(), k)
		if !errors.Is(err, signer.ErrThrottled) || !errors.Is(err, pkcs11.ErrBusy) || !errors.Is(err, ck.Error(code)) {
			t.Errorf("code %#x: %v, want ErrThrottled", code, err)
		}
		if n := strings.Count(fmt.Sprint(err), "pkcs11: "); n != 1 {
			t.Errorf("%q has the package's name %d times", err, n)
		}
	}
	if n := p.Stats().Restarts; n != 0 {
		t.Errorf("%d workers were replaced", n)
	}
}

// TestFewSessions: the token has fewer sessions than the workers want.
func TestFewSessions(t *testing.T) {
	for _, limit := range []int{1, 2, 3} {
		st, ctl, via := faulty(t)
		if err := ctl.Set(faultmodule.Faults{MaxSessions: limit}); err != nil {
			t.Fatal(err)
		}
		p := openPool(t, st, func(c *Config) { via(c); c.Token.Sessions = 4 })
		k := keysOf(t, p)["test-p256"]
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for range 5 {
					if err := signOnce(t.Context(), k); err != nil && !errors.Is(err, signer.ErrThrottled) {
						t.Errorf("limit %d: %v", limit, err)
					}
				}
			})
		}
		wg.Wait()
		if n := ctl.Counters().SessionsPeak; n > uint64(limit) {
			t.Errorf("%d sessions were open, the limit is %d", n, limit)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestKeepAlive: a token that forgets the login of idle processes has it back before anybody signs.
func TestKeepAlive(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, func(c *Config) { via(c); c.KeepAlive = 20 * time.Millisecond })
	k := keysOf(t, p)["test-p256"]
	full(t, p)
	before := ctl.Counters().Logins
	ctl.ForgetLogin()
	eventually(t, "logins without a request", func() bool { return ctl.Counters().Logins >= before+2 })
	mustSign(t, k)
	if n := ctl.Counters().LoginsPeak; n != 1 {
		t.Errorf("%d logins at one time, want one after another", n)
	}
}

// TestSilentWorker stops a worker's process: it holds operations and says nothing.
func TestSilentWorker(t *testing.T) {
	p := openPool(t, makeToken(t, "p256"), func(c *Config) { c.Workers, c.Deadline = 1, 200*time.Millisecond })
	k := keysOf(t, p)["test-p256"]
	pid := p.Stats().Workers[0].PID
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the process is stopped", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && bytes.Contains(stat, []byte(") T "))
	})
	if err := signOnce(t.Context(), k); err != nil && !errors.Is(err, ErrLost) { // on a busy machine the next worker may come late
		t.Fatal(err)
	}
	eventually(t, "a worker that signs", func() bool { return signOnce(t.Context(), k) == nil })
	if st := p.Stats(); st.Kills["silent"] != 1 {
		t.Errorf("stats %+v, want one kill of a silent worker", st)
	}
}

// TestCancelledInQueue: what nobody waits for any more does not reach the token.
func TestCancelledInQueue(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, func(c *Config) { via(c); c.Workers, c.Token.Sessions = 1, 1 })
	k := keysOf(t, p)["test-p256"]
	mustSign(t, k)
	set(t, ctl, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Hang})
	before := ctl.Counters().Operations
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := signOnce(ctx, k); !errors.Is(err, context.Canceled) {
				t.Errorf("sign: %v, want context.Canceled", err)
			}
		})
	}
	eventually(t, "operations in the worker", func() bool { return p.Stats().Workers[0].InFlight == 20 && ctl.Counters().Hanging == 1 })
	cancel()
	wg.Wait()
	ctl.Clear()
	mustSign(t, k)
	if n := ctl.Counters().Operations - before; n > 3 {
		t.Errorf("the token did %d operations, want the first and the last", n)
	}
}

// TestWorkerLeavesWithItsParent: a worker whose socket closes ends by itself, though the module holds a call.
func TestWorkerLeavesWithItsParent(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, func(c *Config) { via(c); c.Workers = 1 })
	k := keysOf(t, p)["test-p256"]
	set(t, ctl, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Hang, Count: 1})
	done := make(chan error, 1)
	go func() { done <- signOnce(t.Context(), k) }()
	eventually(t, "a call that hangs", func() bool { return ctl.Counters().Hanging == 1 })
	w := (*p.ready.Load())[0]
	w.conn.Close()
	<-w.gone
	if !w.cmd.ProcessState.Exited() || w.cmd.ProcessState.ExitCode() != exitTold {
		t.Errorf("the worker ended with %v, want it to leave by itself", w.cmd.ProcessState)
	}
	if err := <-done; err != nil {
		t.Errorf("the operation was not moved: %v", err)
	}
}
