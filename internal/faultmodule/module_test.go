package faultmodule

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/softhsm"
)

// A process of its own, with the module loaded, signs as often as this variable says and ends.
const asProcess = "KEYHAVEN_TEST_FAULTMODULE"

func TestMain(m *testing.M) {
	if n, err := strconv.Atoi(os.Getenv(asProcess)); err == nil {
		os.Exit(process(n))
	}
	os.Exit(m.Run())
}

// process returns the CKR code of the first failure, or 0.
func process(n int) int {
	tok := &token{module: os.Getenv("MODULE"), label: os.Getenv("LABEL"), pin: os.Getenv("PIN")}
	err := tok.open()
	for ; err == nil && n > 0; n-- {
		_, err = tok.sign(tok.session)
	}
	var code ck.Error
	if errors.As(err, &code) {
		return int(code)
	}
	return 0
}

// A token is a token behind the module, used as a program would.
type token struct {
	module, label, pin string
	*ck.Ctx
	slot    uint
	session ck.SessionHandle
	key     ck.ObjectHandle
	point   []byte
}

func (k *token) open() error {
	k.Ctx = ck.New(k.module)
	if k.Ctx == nil {
		return errors.New("no module")
	}
	if err := k.Initialize(); err != nil {
		return err
	}
	slots, err := k.GetSlotList(true)
	if err != nil {
		return err
	}
	for _, s := range slots {
		if info, err := k.GetTokenInfo(s); err == nil && info.Label == k.label {
			k.slot = s
		}
	}
	if k.session, err = k.OpenSession(k.slot, ck.CKF_SERIAL_SESSION|ck.CKF_RW_SESSION); err != nil {
		return err
	}
	if err := k.Login(k.session, ck.CKU_USER, k.pin); err != nil {
		return err
	}
	return k.find()
}

func (k *token) find() error {
	if err := k.FindObjectsInit(k.session, []*ck.Attribute{ck.NewAttribute(ck.CKA_CLASS, ck.CKO_PRIVATE_KEY)}); err != nil {
		return err
	}
	found, _, err := k.FindObjects(k.session, 1)
	if err := errors.Join(err, k.FindObjectsFinal(k.session)); err != nil {
		return err
	}
	if len(found) == 0 {
		return errNoKey
	}
	k.key = found[0]
	return nil
}

var errNoKey = errors.New("no private key")

var digest = make([]byte, 32)

func (k *token) sign(s ck.SessionHandle) ([]byte, error) {
	if err := k.SignInit(s, []*ck.Mechanism{ck.NewMechanism(ck.CKM_ECDSA, nil)}, k.key); err != nil {
		return nil, err
	}
	return k.Sign(s, digest)
}

func (k *token) generate() error {
	pub, key, err := k.GenerateKeyPair(k.session, []*ck.Mechanism{ck.NewMechanism(ck.CKM_EC_KEY_PAIR_GEN, nil)},
		[]*ck.Attribute{ck.NewAttribute(ck.CKA_EC_PARAMS, []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}), ck.NewAttribute(ck.CKA_TOKEN, true)},
		[]*ck.Attribute{ck.NewAttribute(ck.CKA_TOKEN, true), ck.NewAttribute(ck.CKA_SIGN, true), ck.NewAttribute(ck.CKA_PRIVATE, true)})
	if err != nil {
		return err
	}
	k.key = key
	at, err := k.GetAttributeValue(k.session, pub, []*ck.Attribute{ck.NewAttribute(ck.CKA_EC_POINT, nil)})
	if err != nil {
		return err
	}
	_, err = asn1.Unmarshal(at[0].Value, &k.point)
	return err
}

// newToken makes a token with a key behind the module, and opens it in this process.
func newToken(t *testing.T) (*token, *Control) {
	t.Helper()
	soft, err := softhsm.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	module, err := Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	c, err := New(dir, soft.Module, soft.Env())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	tok := &token{module: module, label: soft.Label, pin: soft.PIN}
	if err := tok.open(); err != nil && !errors.Is(err, errNoKey) {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Clear()
		_ = tok.Finalize()
	})
	if err := tok.generate(); err != nil {
		t.Fatal(err)
	}
	return tok, c
}

func set(t *testing.T, c *Control, f Faults) {
	t.Helper()
	if err := c.Set(f); err != nil {
		t.Fatal(err)
	}
}

// want checks that a signature ends with a CKR code, 0 for success.
func (k *token) want(t *testing.T, code uint) {
	t.Helper()
	_, err := k.sign(k.session)
	if got := asCode(err); got != code {
		t.Errorf("signing gives %v, want code %#x", err, code)
	}
}

func asCode(err error) uint {
	var code ck.Error
	if errors.As(err, &code) {
		return uint(code)
	}
	if err != nil {
		return 1
	}
	return 0
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

func TestFaults(t *testing.T) {
	tok, c := newToken(t)
	tok.want(t, 0)
	if got := c.Counters(); got.Calls != 0 || got.Logins != 1 || got.LoginsPeak != 1 || got.SessionsPeak != 1 {
		t.Errorf("without faults got %d calls, %d logins, %d at one time and %d sessions, want 0, 1, 1 and 1", got.Calls, got.Logins, got.LoginsPeak, got.SessionsPeak)
	}
	t.Run("codes", func(t *testing.T) {
		set(t, c, Faults{Rules: []Rule{{Function: "C_Sign", Do: Return, Code: ck.CKR_FUNCTION_FAILED, After: 1, Count: 2}}})
		for _, code := range []uint{0, ck.CKR_FUNCTION_FAILED, ck.CKR_FUNCTION_FAILED, 0} {
			// A signature of miekg's asks for the length first, which no rule sees.
			tok.want(t, code)
		}
	})
	t.Run("another process", func(t *testing.T) {
		set(t, c, Faults{Rules: []Rule{{Do: Return, Code: ck.CKR_DEVICE_ERROR, PID: 1}}})
		tok.want(t, 0)
	})
	t.Run("operation left active", func(t *testing.T) {
		set(t, c, Faults{Rules: []Rule{{Function: "C_Sign", Do: Return, Code: ck.CKR_FUNCTION_FAILED, Count: 1, Leave: true}}})
		tok.want(t, ck.CKR_FUNCTION_FAILED)
		tok.want(t, ck.CKR_OPERATION_ACTIVE)
		c.Clear()
		if _, err := tok.Sign(tok.session, digest); err != nil {
			t.Errorf("ending the operation: %v", err)
		}
	})
	t.Run("mechanism", func(t *testing.T) {
		set(t, c, Faults{Refuse: []uint{ck.CKM_ECDSA}})
		tok.want(t, ck.CKR_MECHANISM_INVALID)
		list, err := tok.GetMechanismList(tok.slot)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range list {
			if m.Mechanism == ck.CKM_ECDSA {
				t.Error("the list has the mechanism")
			}
		}
	})
	t.Run("hidden", func(t *testing.T) {
		set(t, c, Faults{Hidden: true})
		tok.want(t, ck.CKR_DEVICE_REMOVED)
		if slots, err := tok.GetSlotList(true); err != nil || len(slots) != 0 {
			t.Errorf("got slots %v and %v, want none", slots, err)
		}
		c.Clear()
		tok.want(t, 0)
	})
	t.Run("sessions", func(t *testing.T) {
		set(t, c, Faults{MaxSessions: 2})
		s, err := tok.OpenSession(tok.slot, ck.CKF_SERIAL_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tok.OpenSession(tok.slot, ck.CKF_SERIAL_SESSION); asCode(err) != ck.CKR_SESSION_COUNT {
			t.Errorf("third session: got %v", err)
		}
		if err := tok.CloseSession(s); err != nil {
			t.Error(err)
		}
		if got := c.Counters(); got.Sessions != 1 || got.SessionsPeak < 2 {
			t.Errorf("got %d sessions, peak %d, want 1 and 2", got.Sessions, got.SessionsPeak)
		}
	})
	t.Run("flags", func(t *testing.T) {
		set(t, c, Faults{TokenFlags: ck.CKF_USER_PIN_FINAL_TRY})
		info, err := tok.GetTokenInfo(tok.slot)
		if err != nil || info.Flags&ck.CKF_USER_PIN_FINAL_TRY == 0 {
			t.Errorf("got %#x and %v", info.Flags, err)
		}
	})
	t.Run("ECDSA forms", func(t *testing.T) {
		pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), tok.point)
		if err != nil {
			t.Fatal(err)
		}
		set(t, c, Faults{ECDSA: ECDSAShort})
		sig, err := tok.sign(tok.session)
		if err != nil || len(sig) != 64 || sig[0] != 0 && sig[32] != 0 {
			t.Errorf("got %x and %v, want a short r or s", sig, err)
		} else if !ecdsa.Verify(pub, digest, new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])) {
			t.Error("the short signature does not verify")
		}
		// miekg's Sign asks for the length first and has no room for more.
		set(t, c, Faults{ECDSA: ECDSADER})
		tok.want(t, ck.CKR_GENERAL_ERROR)
	})
	t.Run("hang", func(t *testing.T) {
		set(t, c, Faults{Rules: []Rule{{Function: "C_Sign", Do: Hang}}})
		back := make(chan error)
		go func() {
			_, err := tok.sign(tok.session)
			back <- err
		}()
		eventually(t, "a call hangs", func() bool { return c.Counters().Hanging == 1 })
		if _, err := tok.GetSessionInfo(tok.session); err != nil {
			t.Error(err)
		}
		if got := c.Counters().Overlaps; got != 1 {
			t.Errorf("two calls on one session are counted %d times, want once", got)
		}
		c.Clear()
		if err := <-back; err != nil {
			t.Error(err)
		}
		if got := c.Counters(); got.Hanging != 0 || got.InFlight != 0 {
			t.Errorf("afterwards %d calls hang and %d operations run, want none", got.Hanging, got.InFlight)
		}
	})
}

func TestEvents(t *testing.T) {
	tok, c := newToken(t)
	again := func() error { return tok.Login(tok.session, ck.CKU_USER, tok.pin) }
	public := func() bool {
		info, err := tok.GetSessionInfo(tok.session)
		return err == nil && info.State == ck.CKS_RW_PUBLIC_SESSION
	}
	c.ForgetLogin()
	tok.want(t, ck.CKR_USER_NOT_LOGGED_IN)
	if !public() || !errors.Is(tok.find(), errNoKey) {
		t.Error("a forgotten login leaves user functions or private keys")
	}
	if err := again(); err != nil || public() {
		t.Errorf("login after a forgotten one: %v", err)
	}
	tok.want(t, ck.CKR_KEY_HANDLE_INVALID)
	if err := tok.find(); err != nil {
		t.Fatal(err)
	}
	tok.want(t, 0)
	if err := again(); asCode(err) != ck.CKR_USER_ALREADY_LOGGED_IN {
		t.Errorf("second login: %v", err)
	}

	c.DropSessions(os.Getpid())
	tok.want(t, ck.CKR_SESSION_HANDLE_INVALID)
	var err error
	if tok.session, err = tok.OpenSession(tok.slot, ck.CKF_SERIAL_SESSION|ck.CKF_RW_SESSION); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again(), tok.find()); err != nil {
		t.Fatal(err)
	}
	tok.want(t, 0)

	set(t, c, Faults{LoginIdle: time.Nanosecond})
	tok.want(t, ck.CKR_USER_NOT_LOGGED_IN)
	c.Clear()
	tok.want(t, ck.CKR_USER_NOT_LOGGED_IN)

	c.Stale()
	tok.want(t, ck.CKR_DEVICE_ERROR)
	if err := errors.Join(tok.Finalize(), tok.open()); err != nil {
		t.Fatal(err)
	}
	tok.want(t, 0)

	set(t, c, Faults{Down: true})
	c.Clear()
	tok.want(t, ck.CKR_DEVICE_ERROR)
	if err := errors.Join(tok.Finalize(), tok.Initialize()); err != nil {
		t.Fatal(err)
	}
	if _, err := tok.OpenSession(tok.slot, ck.CKF_SERIAL_SESSION); asCode(err) != ck.CKR_DEVICE_ERROR {
		t.Errorf("got %v, want a process that stays broken", err)
	}
	if code := tok.run(t, 3); code != 0 {
		t.Errorf("a new process got code %#x", code)
	}
}

func TestWrongPINsLockTheToken(t *testing.T) {
	tok, c := newToken(t)
	set(t, c, Faults{PINTries: 2})
	if err := tok.Logout(tok.session); err != nil {
		t.Fatal(err)
	}
	for i, want := range []uint{ck.CKR_PIN_INCORRECT, ck.CKR_PIN_INCORRECT, ck.CKR_PIN_LOCKED} {
		info, err := tok.GetTokenInfo(tok.slot)
		if err != nil || (info.Flags&ck.CKF_USER_PIN_FINAL_TRY != 0) != (i == 1) || (info.Flags&ck.CKF_USER_PIN_LOCKED != 0) != (i == 2) {
			t.Errorf("try %d: got flags %#x and %v", i, info.Flags, err)
		}
		if err := tok.Login(tok.session, ck.CKU_USER, "wrong"); asCode(err) != want {
			t.Errorf("try %d: got %v, want code %#x", i, err, want)
		}
	}
	if got := c.Counters(); got.PINFailures != 2 || got.LoginsFailed != 3 {
		t.Errorf("got %d wrong PINs and %d failed logins, want 2 and 3", got.PINFailures, got.LoginsFailed)
	}
}

// run has another process sign n times and returns its exit code.
func (k *token) run(t *testing.T, n int) int {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", asProcess, n), "MODULE="+k.module, "LABEL="+k.label, "PIN="+k.pin)
	_ = cmd.Run()
	return cmd.ProcessState.ExitCode()
}

func TestOtherProcesses(t *testing.T) {
	tok, c := newToken(t)
	set(t, c, Faults{Rules: []Rule{{Function: "C_Sign", Do: Crash, After: 2, Count: 1}}})
	if code := tok.run(t, 10); code != 2 {
		t.Errorf("the process with the crash ended with %d, want 2", code)
	}
	if code := tok.run(t, 10); code != 0 {
		t.Errorf("the next process ended with %d, want 0", code)
	}
	got := c.Counters()
	if got.Crashes != 1 || got.Operations != 13 || len(got.PIDs) != 1 {
		t.Errorf("got %d crashes, %d operations and processes %v, want 1, 13 and this one", got.Crashes, got.Operations, got.PIDs)
	}
	if got.Processes != 3 {
		t.Errorf("got %d processes, want 3", got.Processes)
	}
	if got.Forked != 0 || got.Overlaps != 0 || got.FinalizedBusy != 0 {
		t.Errorf("got %d forked calls, %d overlaps, %d finalised under calls", got.Forked, got.Overlaps, got.FinalizedBusy)
	}
}

// TestServe has a token that works on two operations at a time.
func TestServe(t *testing.T) {
	tok, c := newToken(t)
	set(t, c, Faults{Delay: 20 * time.Millisecond, Serve: 2, Count: true})
	var wg sync.WaitGroup
	start := time.Now()
	for range 8 {
		s, err := tok.OpenSession(tok.slot, ck.CKF_SERIAL_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if _, err := tok.sign(s); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(start); took < 80*time.Millisecond {
		t.Errorf("8 operations of 20 ms, 2 at a time, took %v", took)
	}
	if got := c.Counters(); got.MaxInFlight < 2 {
		t.Errorf("at most %d operations at a time", got.MaxInFlight)
	}
	// Of two that come at once both may find the other there: the second comes when the first runs.
	set(t, c, Faults{Throttle: 1, Delay: time.Second})
	s, err := tok.OpenSession(tok.slot, ck.CKF_SERIAL_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	before := c.Counters().Operations
	first := make(chan error, 1)
	go func() {
		_, err := tok.sign(s)
		first <- err
	}()
	for c.Counters().Operations == before {
		time.Sleep(time.Millisecond)
	}
	_, second := tok.sign(tok.session)
	if a, b := asCode(<-first), asCode(second); a != 0 || b != ck.CKR_FUNCTION_FAILED {
		t.Errorf("two operations of which the second is throttled: got codes %#x and %#x", a, b)
	}
}

func TestWrongFaults(t *testing.T) {
	for name, f := range map[string]Faults{
		"function": {Rules: []Rule{{Function: "C_DigestInit", Do: Hang}}},
		"action":   {Rules: []Rule{{Function: "C_Sign"}}},
		"code":     {Rules: []Rule{{Function: "C_Sign", Do: Return}}},
		"rules":    {Rules: make([]Rule, 9)},
		"serve":    {Serve: 2},
		"refuse":   {Refuse: make([]uint, 9)},
	} {
		if err := f.check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
