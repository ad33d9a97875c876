package worker

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// idle returns the pool's side of a worker that is ready and whose process is gone. What it is sent stays in out.
func idle(tb testing.TB) *proc {
	tb.Helper()
	cfg, err := Config{}.withDefaults()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command("/bin/true")
	if err := cmd.Run(); err != nil {
		tb.Fatal(err)
	}
	p := &Pool{cfg: cfg, log: cfg.Logger, changed: make(chan struct{}), keys: map[keyless.SKI]*key{}}
	p.ready.Store(new([]*proc))
	a, z := net.Pipe()
	tb.Cleanup(func() { a.Close(); z.Close() })
	return &proc{pool: p, cmd: cmd, conn: a, out: newFrameWriter(), text: newTail(pkcs11.PIN{}), started: make(chan error, 1),
		sick: make(chan struct{}), gone: make(chan struct{}), pending: map[uint32]*op{}, given: map[uint32]struct{}{}}
}

// TestListWhileGivenUp: keys that come for an operation that is being taken back must not reach the one that uses its memory next.
func TestListWhileGivenUp(t *testing.T) {
	w := idle(t)
	for range 500 {
		o := &op{done: make(chan struct{}, 1)}
		w.send(o, &request{typ: frameList})
		id := o.id
		var wg sync.WaitGroup
		wg.Go(func() {
			for range 20 {
				if err := w.handle(frame{frameListed, id, []byte("key")}); err != nil {
					t.Error(err)
				}
			}
		})
		if w.forget(o) {
			o.reset()
			if len(o.listed) > 0 {
				t.Fatal("keys came after the operation was taken back")
			}
		}
		wg.Wait()
		w.out.take()
	}
}

// TestSickWorkerIsLeft: when an operation learns that the device failed, no other is given to that worker.
func TestSickWorkerIsLeft(t *testing.T) {
	w := idle(t)
	w.pool.offer(w)
	o := &op{done: make(chan struct{}, 1)}
	w.send(o, &request{typ: frameCheck})
	if err := w.handle(frame{frameError, o.id, encodeError(pkcs11.ErrDevice)}); err != nil {
		t.Fatal(err)
	}
	<-o.done
	if n := w.pool.Workers(); n != 0 {
		t.Errorf("%d workers are picked, want none", n)
	}
	w.pool.offer(w)
	if n := w.pool.Workers(); n != 0 {
		t.Error("a sick worker is offered")
	}
}

// TestLoneWorkerReplaced: operations wait while the only worker is replaced because its device failed.
func TestLoneWorkerReplaced(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, func(c *Config) { via(c); c.Workers = 1 })
	k := keysOf(t, p)["test-p256"]
	stop := load(t, k)
	set(t, ctl, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Return, Code: ck.CKR_DEVICE_ERROR, Count: 1})
	eventually(t, "a restart", func() bool { return p.Stats().Restarts == 1 && p.Workers() == 1 })
	for _, err := range stop() {
		t.Errorf("sign while the worker is replaced: %v", err)
	}
}

// TestManyGivenUp: more operations are given up than a worker holds, while the module hangs.
func TestManyGivenUp(t *testing.T) {
	st, ctl, via := faulty(t)
	p := openPool(t, st, func(c *Config) { via(c); c.Workers, c.Token.Sessions, c.Deadline = 1, 1, time.Minute })
	k := keysOf(t, p)["test-p256"]
	mustSign(t, k)
	set(t, ctl, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Hang})
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var refused atomic.Int32
		const n = maxInFlight/2 + 100
		for range n {
			wg.Go(func() {
				switch err := signOnce(ctx, k); {
				case errors.Is(err, signer.ErrOverloaded):
					refused.Add(1)
				case !errors.Is(err, context.Canceled):
					t.Errorf("sign: %v, want context.Canceled or ErrOverloaded", err)
				}
			})
		}
		eventually(t, "operations in the worker", func() bool { return p.Stats().Workers[0].InFlight+int(refused.Load()) == n || p.Stats().Restarts > 0 })
		cancel()
		wg.Wait()
	}
	ctl.Clear()
	eventually(t, "signatures again", func() bool { return signOnce(t.Context(), k) == nil })
	if st := p.Stats(); st.Restarts != 0 {
		t.Errorf("stats %+v, want the worker to live on", st)
	}
}

// TestManySessions: the default limit of memory leaves room for the threads of all sessions.
func TestManySessions(t *testing.T) {
	st, ctl, via := faulty(t)
	const sessions = 160
	p := openPool(t, st, func(c *Config) { via(c); c.Workers, c.Token.Sessions = 1, sessions })
	k := keysOf(t, p)["test-p256"]
	set(t, ctl, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Hang, Count: sessions})
	var wg sync.WaitGroup
	for range sessions {
		wg.Go(func() {
			if err := signOnce(t.Context(), k); err != nil {
				t.Errorf("sign: %v", err)
			}
		})
	}
	eventually(t, "all sessions in use", func() bool { return ctl.Counters().Hanging == sessions || p.Stats().Restarts > 0 })
	ctl.Clear()
	wg.Wait()
	if st := p.Stats(); st.Restarts != 0 {
		t.Errorf("stats %+v, want the worker to live on", st)
	}
}

// TestResultsHaveTheirForm: what cannot be a signature of the key ends the worker, and the operation counts as lost.
func TestResultsHaveTheirForm(t *testing.T) {
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(k *ecdsa.PrivateKey) []byte {
		sig, err := ecdsa.SignASN1(rand.Reader, k, make([]byte, 32))
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	ed, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537}
	good := sign(p256)
	for _, tc := range []struct {
		name   string
		typ    frameType
		pub    crypto.PublicKey
		result []byte
		want   bool
	}{
		{"ECDSA", frameSign, p256.Public(), good, true},
		{"short integers", frameSign, p256.Public(), []byte{0x30, 6, 2, 1, 1, 2, 1, 1}, true},
		{"ECDSA P-521", frameSign, p521.Public(), sign(p521), true},
		{"another curve's", frameSign, p256.Public(), sign(p521), false},
		{"a byte behind", frameSign, p256.Public(), append(bytes.Clone(good), 0), false},
		{"a byte missing", frameSign, p256.Public(), good[:len(good)-1], false},
		{"negative", frameSign, p256.Public(), []byte{0x30, 6, 2, 1, 0xff, 2, 1, 1}, false},
		{"no integer", frameSign, p256.Public(), []byte{0x30, 6, 4, 1, 1, 2, 1, 1}, false},
		{"one integer", frameSign, p256.Public(), []byte{0x30, 3, 2, 1, 1}, false},
		{"nothing", frameSign, p256.Public(), nil, false},
		{"a decryption with ECDSA", frameDecrypt, p256.Public(), good, false},
		{"RSA", frameSign, rsaKey, make([]byte, 256), true},
		{"RSA, long", frameSign, rsaKey, make([]byte, 257), false},
		{"decrypted", frameDecrypt, rsaKey, make([]byte, 256), true},
		{"decrypted, short", frameDecrypt, rsaKey, make([]byte, 48), false},
		{"Ed25519", frameSign, ed, make([]byte, 64), true},
		{"Ed25519, short", frameSign, ed, make([]byte, 63), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := idle(t)
			o := &op{done: make(chan struct{}, 1)}
			w.send(o, &request{typ: tc.typ, of: &key{pub: tc.pub}})
			err := w.handle(frame{frameDone, o.id, tc.result})
			if (err == nil) != tc.want {
				t.Fatalf("the pool says %v", err)
			}
			if err != nil {
				w.end("", err)
			}
			if <-o.done; o.lost == tc.want || w.reason != map[bool]string{false: "protocol"}[tc.want] {
				t.Errorf("lost %v because of %q", o.lost, w.reason)
			}
		})
	}
}

// TestHostileFrames: what only a module that has taken its worker over sends ends the worker before it costs much.
func TestHostileFrames(t *testing.T) {
	w := idle(t)
	list, check := &op{done: make(chan struct{}, 1)}, &op{done: make(chan struct{}, 1)}
	w.send(list, &request{typ: frameList})
	w.send(check, &request{typ: frameCheck})
	repeat := func(f frame) (n int, err error) {
		for ; err == nil && n < 1<<20; n++ {
			err = w.handle(f)
		}
		return n, err
	}
	big := make([]byte, maxFrame-frameHeader)
	list.size = maxList - 2*len(big)
	if n, err := repeat(frame{frameListed, list.id, big}); !errors.Is(err, errFrame) || n != 3 {
		t.Errorf("endless keys: %v after %d", err, n)
	}
	if n, err := repeat(frame{frameListed, check.id, nil}); !errors.Is(err, errFrame) || n != 1 {
		t.Errorf("keys that nobody asked for: %v after %d", err, n)
	}
	w.pool.logins.refused = &remoteError{text: strings.Repeat("x", maxErrorText)}
	w.out.buf = make([]byte, maxBacklog-2*maxErrorText)
	if n, err := repeat(frame{frameAsk, 1, nil}); !errors.Is(err, errFrame) || n != 2 {
		t.Errorf("endless wishes without reading the answers: %v after %d", err, n)
	}
	w.state = frameReady
	for _, r := range []readyReply{{"t", 0}, {"t", DefaultSessions + 1}, {"", 1}, {strings.Repeat("t", maxName+1), 1}} {
		if err := w.handle(frame{frameReady, 0, encodeJSON(r)}); !errors.Is(err, errFrame) {
			t.Errorf("ready with %d sessions and a name of %d bytes: %v", r.Sessions, len(r.Token), err)
		}
	}
}

// TestLossIsExplained: what operators read about a worker whose module crashed says so, and the process has a name.
func TestLossIsExplained(t *testing.T) {
	for _, mode := range []string{SandboxBasic, SandboxStrict} {
		st, ctl, via := faulty(t)
		p := openPool(t, st, func(c *Config) {
			via(c)
			c.Workers, c.Sandbox = 1, Sandbox{Mode: mode, WritePaths: []string{st.Dir, filepath.Dir(c.Token.Module)}}
		})
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.Stats().Workers[0].PID))
		if err != nil || string(comm) != "keyhaven-worker\n" {
			t.Errorf("mode %s: the process is called %q, %v", mode, comm, err)
		}
		k := keysOf(t, p)["test-p256"]
		set(t, ctl, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Crash, Count: 1})
		mustSign(t, k)
		why := p.Stats().Workers[0].LastError
		if !strings.Contains(why, "SIGSEGV") || strings.Contains(why, "goroutine") || strings.Contains(why, "rflags") {
			t.Errorf("mode %s: the worker was lost because %q, want the signal and no stacks", mode, why)
		}
	}
}

// TestUnkillable: a process that the kernel does not let go of keeps its place neither in the pool nor from Close, and only so many are left behind.
func TestUnkillable(t *testing.T) {
	w := idle(t)
	p := w.pool
	p.starts = make(chan struct{}, 1)
	p.ctx = t.Context()
	log := &capture{}
	p.log = log.logger()
	w.kill("deadline", errors.New("it hangs"))
	if err := w.read(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("its socket, which stays open, yields %v, want a deadline", err)
	}
	w.reason, w.cause = "", nil
	end := make(chan struct{})
	w.wait = func() error { <-end; return nil }
	w.conclude(w.reap(time.Millisecond))
	if err := <-w.started; !errors.Is(err, errLeftBehind) || !errors.Is(err, signer.ErrUnavailable) || w.reason != "silent" {
		t.Errorf("the worker ended with %v because of %q", err, w.reason)
	}
	if !strings.Contains(log.String(), "left behind") {
		t.Error("the log does not say that a process was left behind")
	}
	p.behind.Add(int32(p.cfg.Workers))
	if _, err := p.start(t.Context(), &seat{}); err == nil || !strings.Contains(err.Error(), "driver") || !errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("start with %d processes left behind: %v", p.behind.Load(), err)
	}
	close(end)
	eventually(t, "the end of the process to count", func() bool { return int(p.behind.Load()) == p.cfg.Workers })
}

// TestNothingWorks: a module that has failed everything for a while is loaded anew, and one that did something in between is not.
func TestNothingWorks(t *testing.T) {
	general := &remoteError{text: "CKR_GENERAL_ERROR", rv: ck.CKR_GENERAL_ERROR + 1}
	for _, tc := range []struct {
		name string
		err  error
		n    int
		ok   bool // one operation works before the last failure
		want bool
	}{
		{"all", general, streakLength, false, true},
		{"too few", general, streakLength - 1, false, false},
		{"all but one", general, streakLength, true, false},
		{"PIN refused", fmt.Errorf("%w: %w", pkcs11.ErrPINIncorrect, ck.Error(ck.CKR_PIN_INCORRECT)), streakLength, false, false},
		{"not the module", pkcs11.ErrInput, streakLength, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := idle(t)
			for i := range tc.n {
				if i == tc.n-1 {
					if w.isSick {
						t.Error("replaced before its time")
					}
					w.failures.since = time.Now().Add(-streakTime)
					if tc.ok {
						o := &op{done: make(chan struct{}, 1)}
						w.send(o, &request{typ: frameSign, of: &key{pub: make(ed25519.PublicKey, ed25519.PublicKeySize)}})
						if err := w.handle(frame{frameDone, o.id, make([]byte, ed25519.SignatureSize)}); err != nil {
							t.Fatal(err)
						}
					}
				}
				o := &op{done: make(chan struct{}, 1)}
				w.send(o, &request{typ: frameCheck})
				if err := w.handle(frame{frameError, o.id, encodeError(tc.err)}); err != nil {
					t.Fatal(err)
				}
			}
			if w.isSick != tc.want {
				t.Errorf("to be replaced: %v, want %v", w.isSick, tc.want)
			}
		})
	}
}

// TestWaitForReplacement: operations wait while a worker is replaced, but not for one that did not start before.
func TestWaitForReplacement(t *testing.T) {
	for _, tc := range []struct {
		seats []*seat
		want  bool
	}{
		{[]*seat{{state: StateStarting}}, true},
		{[]*seat{{state: StateDraining}}, true},
		{[]*seat{{state: StateWaiting}}, false},
		{[]*seat{{state: StateRefused}}, false},
		{[]*seat{{state: StateStarting, failing: true}}, false},
		{[]*seat{{state: StateStarting, failing: true}, {state: StateWaiting}}, false},
		{[]*seat{{state: StateStarting, failing: true}, {state: StateDraining}}, true},
	} {
		p := idle(t).pool
		p.slots = tc.seats
		err := p.await(t.Context(), time.Now().Add(time.Millisecond))
		if waits := err == nil; waits != tc.want {
			t.Errorf("first seat %+v of %d: %v, want to wait %v", *tc.seats[0], len(tc.seats), err, tc.want)
		}
	}
}

// TestLogLimit: a worker that logs without end fills the log neither with records nor with warnings about them.
func TestLogLimit(t *testing.T) {
	w := idle(t)
	log := &capture{}
	w.pool.log, w.pool.cfg.Logger = log.logger(), log.logger()
	record := frame{frameLog, 0, encodeJSON(logRecord{Message: "spam"})}
	for range 10 * maxLogRate {
		for _, f := range []frame{record, {frameError, 0, encodeError(pkcs11.ErrBusy)}} {
			if err := w.handle(f); err != nil {
				t.Fatal(err)
			}
		}
	}
	// The second may turn in between.
	if n := strings.Count(log.String(), "\n"); n > 10*maxLogRate {
		t.Errorf("%d lines were logged, want about %d", n, maxLogRate)
	}
	w.logs.second = time.Time{}
	if err := w.handle(record); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "records were left out") {
		t.Error("the log does not say that records were left out")
	}
}
