package pkcs11

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/signer"
)

// shimDir holds the compiled shim until the tests end: a loaded module must stay where it is.
var shimDir string

// shim is the module between us and SoftHSM2 that misbehaves on request, see testdata/shim.c.
type shim struct {
	t   *testing.T
	log string
}

// ask asks for a fault, until the end of the test.
func (s *shim) ask(name, value string) { s.t.Setenv("KH_SHIM_"+name, value) }

// fired reports whether a fault has happened.
func (s *shim) fired() bool {
	_, err := os.Stat(s.log)
	return err == nil
}

// faults opens a token through the shim, after asking for some faults. By the end of the test at least one must have happened.
func faults(t *testing.T, change func(*Config), before map[string]string) (*Token, *shim) {
	t.Helper()
	st := softhsm.New(t)
	if shimDir == "" {
		dir, err := os.MkdirTemp("", "keyhaven-pkcs11-shim-")
		if err != nil {
			t.Fatal(err)
		}
		shimDir = dir
		cc := exec.Command("cc", "-shared", "-fPIC", "-O1", "-o", filepath.Join(dir, "libshim.so"), "testdata/shim.c", "-ldl", "-lpthread")
		if out, err := cc.CombinedOutput(); err != nil {
			t.Fatalf("compile the shim: %v: %s", err, out)
		}
	}
	os.Setenv("KH_SHIM_MODULE", st.Module)
	sh := &shim{t: t, log: filepath.Join(t.TempDir(), "faults")}
	sh.ask("LOG", sh.log)
	for name, value := range before {
		sh.ask(name, value)
	}
	t.Cleanup(func() {
		if !sh.fired() {
			t.Error("no fault happened: the test shows nothing")
		}
	})
	tok := openToken(t, st, func(c *Config) {
		c.URI.ModulePath, c.Module = "", filepath.Join(shimDir, "libshim.so")
		if change != nil {
			change(c)
		}
	})
	return tok, sh
}

// TestUnsettledToken opens tokens that another process seems to start on: what they say at first is not final.
func TestUnsettledToken(t *testing.T) {
	for name, fault := range map[string]map[string]string{
		"not readable":         {"INFO": "0x5:3"},
		"no PIN at login":      {"LOGIN": "0x102:2"},
		"session dies":         {"LOGIN": "0xb3:3"},
		"not there until anew": {"HIDE": "1"},
	} {
		t.Run(name, func(t *testing.T) {
			tok, sh := faults(t, nil, fault)
			for name := range fault {
				sh.ask(name, "")
			}
			mustSign(t, generate(t, tok, "p256"))
		})
	}
}

// TestFinalTryIsNotUsed: a PIN that may be wrong must not lock the token.
func TestFinalTryIsNotUsed(t *testing.T) {
	tok, sh := faults(t, func(c *Config) { c.AllowFinalTry = true }, map[string]string{"FLAGS": "20000"})
	mustSign(t, generate(t, tok, "p256")) // as it is allowed
	logins := func() bool { return tok.Check(t.Context()) == nil }
	logout(t, tok)
	tok.cfg.AllowFinalTry = false
	sh.ask("LOGIN", "0xa0:1000") // would be a PIN refused
	for range 3 {
		if err := tok.Check(t.Context()); !errors.Is(err, ErrPINFinalTry) || !errors.Is(err, signer.ErrUnavailable) {
			t.Errorf("log in with the last try: %v, want ErrPINFinalTry", err)
		}
	}
	sh.ask("LOGIN", "")
	sh.ask("FLAGS", "")
	if logins() {
		t.Error("the token was asked again")
	}
}

func TestTokenWithoutPSS(t *testing.T) {
	tok, sh := faults(t, nil, map[string]string{"REFUSE": "0xd,"})
	k := generate(t, tok, "rsa2048")
	for _, h := range pssHashes {
		alg := signer.Algorithm{Kind: signer.PSS, Hash: h}
		if m := inner(k).methods[alg]; !m.software || !k.Supports(alg) {
			t.Errorf("PSS with %v: %+v, want it done in software", h, m)
		}
		sig, err := k.Sign(t.Context(), alg, input(alg))
		if err != nil || !verify(k.Public(), alg, input(alg), sig) {
			t.Errorf("PSS with %v: %v, or it does not verify", h, err)
		}
	}
	sh.ask("REFUSE", "0xd,0x3,")
	k, err := tok.Generate(t.Context(), GenerateOptions{Label: "neither", Type: "rsa2048", Decrypt: true})
	if err != nil {
		t.Fatal(err)
	}
	if k.Supports(signer.Algorithm{Kind: signer.PSS, Hash: 5}) {
		t.Error("PSS is said to work on a token that has neither PSS nor raw RSA")
	}
	if _, ok := k.(signer.Decrypter); ok {
		t.Error("raw decryption is said to work on a token without raw RSA")
	}
	mustSign(t, k)
}

func TestTokenWithoutECDSA(t *testing.T) {
	tok, _ := faults(t, nil, map[string]string{"REFUSE": "0x1041,"})
	if _, err := tok.Generate(t.Context(), GenerateOptions{Label: "useless", Type: "p256"}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("generate a key that cannot sign: %v, want ErrUnsupported", err)
	}
	if n := countObjects(t, tok, ck.CKO_PRIVATE_KEY); n != 0 {
		t.Errorf("%d private keys are left behind", n)
	}
}

// TestDeviceErrorIsReturned: only a new process remedies a failed device, so the operation ends and says so.
func TestDeviceErrorIsReturned(t *testing.T) {
	for _, code := range []string{"0x30", "0x32", "0xe0", "0x190"} {
		t.Run(code, func(t *testing.T) {
			tok, sh := faults(t, nil, nil)
			k := generate(t, tok, "p256")
			sh.ask("SIGN", code+":1")
			err := signOnce(t.Context(), k)
			if !errors.Is(err, ErrDevice) || !errors.Is(err, signer.ErrUnavailable) {
				t.Errorf("sign with a broken device: %v, want ErrDevice", err)
			}
			if n := strings.Count(fmt.Sprint(err), "pkcs11: "); n != 1 || !strings.HasPrefix(fmt.Sprint(err), "pkcs11: ") {
				t.Errorf("%q has the package's name %d times, want once, at its beginning", err, n)
			}
			mustSign(t, k)
		})
	}
}

// TestBusyToken: what a token says when it has too much to do is not a failure of the device.
func TestBusyToken(t *testing.T) {
	tok, sh := faults(t, nil, nil)
	k := generate(t, tok, "p256")
	for code, rv := range map[string]uint{"0x6:1": ck.CKR_FUNCTION_FAILED, "0x2:1": ck.CKR_HOST_MEMORY, "0x31:1": ck.CKR_DEVICE_MEMORY,
		"0xb1:1": ck.CKR_SESSION_COUNT, "0x90:2": ck.CKR_OPERATION_ACTIVE} {
		sh.ask("SIGN", code)
		err := signOnce(t.Context(), k)
		if !errors.Is(err, ErrBusy) || !errors.Is(err, signer.ErrThrottled) || errors.Is(err, signer.ErrUnavailable) || !errors.Is(err, ck.Error(rv)) {
			t.Errorf("code %s: %v, want ErrBusy", code, err)
		}
		mustSign(t, k)
	}
}

// TestGeneralErrorIsNoDeviceError: a client can provoke general errors with some modules, and must not restart them by it.
func TestGeneralErrorIsNoDeviceError(t *testing.T) {
	tok, sh := faults(t, nil, nil)
	k := generate(t, tok, "p256")
	for _, code := range []string{"0x5", "0x7"} {
		sh.ask("SIGN", code+":1")
		if err := signOnce(t.Context(), k); !errors.Is(err, signer.ErrUnavailable) || errors.Is(err, ErrDevice) {
			t.Errorf("code %s: %v, want an error by which another home is asked, and that is not ErrDevice", code, err)
		}
		mustSign(t, k)
	}
}

// TestDataFaultIsFinal: what a token says of the data, whose length a client chooses for Ed25519, must not count against the token; what it says of
// a key must not count against its other keys.
func TestDataFaultIsFinal(t *testing.T) {
	tok, sh := faults(t, nil, nil)
	k := generate(t, tok, "p256")
	for code, final := range map[string]bool{"0x20": true, "0x21": true, "0x63": false, "0x68": false, "0x70": false} {
		sh.ask("SIGN", code+":1")
		err := signOnce(t.Context(), k)
		if err == nil || errors.Is(err, signer.ErrUnavailable) == final || errors.Is(err, signer.ErrNotFound) == final {
			t.Errorf("code %s: %v, want final %v", code, err, final)
		}
		mustSign(t, k)
	}
}

// TestSessionFaultIsRetriedOnce: an operation that never gets a good session ends.
func TestSessionFaultIsRetriedOnce(t *testing.T) {
	tok, sh := faults(t, nil, nil)
	k := generate(t, tok, "p256")
	for code, want := range map[string]uint{"0xb3": ck.CKR_SESSION_HANDLE_INVALID, "0x90": ck.CKR_OPERATION_ACTIVE, "0x101": ck.CKR_USER_NOT_LOGGED_IN, "0x60": ck.CKR_KEY_HANDLE_INVALID} {
		sh.ask("SIGN", code+":1")
		mustSign(t, k)
		sh.ask("SIGN", code+":1000000")
		if err := signOnce(t.Context(), k); !errors.Is(err, ck.Error(want)) {
			t.Errorf("code %s for ever: %v, want it returned", code, err)
		}
		sh.ask("SIGN", "")
		mustSign(t, k)
	}
}

// TestFewSessions: the token has one or two sessions, whatever the configuration says, and nothing leaks.
func TestFewSessions(t *testing.T) {
	for _, limit := range []int{1, 2} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			tok, sh := faults(t, func(c *Config) { c.Sessions = 8 }, map[string]string{"SESSIONS": fmt.Sprint(limit)})
			k := generate(t, tok, "p256")
			var held []*session
			for range limit {
				s, err := tok.pool.take(t.Context(), false)
				if err != nil {
					t.Fatal(err)
				}
				held = append(held, s)
			}
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					for range 3 {
						if err := signOnce(t.Context(), k); err != nil {
							t.Error(err)
						}
					}
				})
			}
			for deadline := time.Now().Add(10 * time.Second); !sh.fired() && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			for _, s := range held {
				tok.pool.give(s, nil)
			}
			wg.Wait()
			logout(t, tok)
			mustSign(t, k)
			if n := len(tok.pool.permits); n != 8 {
				t.Errorf("%d permits came back, want 8", n)
			}
		})
	}
}
