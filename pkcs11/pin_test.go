package pkcs11

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/softhsm"
)

const canary = "pin-canary-0123456789"

func TestPINDoesNotPrint(t *testing.T) {
	pin := NewPIN(canary)
	holder := struct {
		Shown PIN
		kept  PIN
		uri   URI
	}{pin, pin, URI{pinValue: pin}}
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "pin", pin, "holder", holder)
	js, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	outputs := []string{fmt.Sprint(pin), log.String(), string(js)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		outputs = append(outputs, fmt.Sprintf(verb, pin), fmt.Sprintf(verb, holder), fmt.Sprintf(verb, &holder))
	}
	for _, got := range outputs {
		if strings.Contains(got, canary) || strings.Contains(got, fmt.Sprintf("%x", canary)) {
			t.Errorf("the PIN shows in %q", got)
		}
	}
	if pin.value() != canary || pin.IsZero() || !(PIN{}).IsZero() {
		t.Error("a PIN does not hold its value")
	}
}

func TestReadPINFile(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, tc := range []struct {
		name, path, want, err string
	}{
		{"plain", write("plain", canary, 0o600), canary, ""},
		{"newline", write("newline", canary+"\n", 0o400), canary, ""},
		{"carriage return", write("cr", canary+"\r\n", 0o600), canary, ""},
		{"spaces are the PIN's", write("spaces", " "+canary+" \n", 0o600), " " + canary + " ", ""},
		{"group may read", write("group", canary, 0o640), "", "mode 0640"},
		{"others may write", write("others", canary, 0o602), "", "mode 0602"},
		{"empty", write("empty", "", 0o600), "", "empty"},
		{"only a newline", write("only", "\n", 0o600), "", "empty"},
		{"two lines", write("two", canary+"\nx\n", 0o600), "", "more than one line"},
		{"long", write("long", strings.Repeat(canary, 100), 0o600), "", "longer"},
		{"missing", filepath.Join(dir, "missing"), "", "no such file"},
		{"directory", dir, "", "neither a regular file"},
		{"relative", "pin", "", "absolute"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pin, err := ReadPINFile(tc.path)
			if tc.err == "" {
				if err != nil || pin.value() != tc.want {
					t.Errorf("got %q and %v, want %q", pin.value(), err, tc.want)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got %v, want an error about %q", err, tc.err)
			} else if strings.Contains(err.Error(), canary) {
				t.Errorf("the error holds the PIN: %v", err)
			}
		})
	}
}

func TestReadPINFromDescriptor(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString(canary + "\n"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	pin, err := ReadPINFile(fmt.Sprintf("/dev/fd/%d", r.Fd()))
	if err != nil || pin.value() != canary {
		t.Errorf("got %q and %v, want the PIN", pin.value(), err)
	}
}

// TestWrongPINIsTriedOnce counts C_Login calls with pkcs11-spy and looks at the token's own flags.
func TestWrongPINIsTriedOnce(t *testing.T) {
	st := softhsm.New(t)
	spy, calls := spyModule(t, st.Module)
	wrong := "wrong-" + canary
	log := &capture{}
	cfg := configFor(t, st)
	cfg.URI.ModulePath, cfg.Module, cfg.URI.PINSource = "", spy, ""
	cfg.PIN = func() (PIN, error) { return NewPIN(wrong), nil }
	cfg.Logger = log.logger()
	_, err := Open(t.Context(), cfg)
	if !errors.Is(err, ErrPINIncorrect) || !errors.Is(err, ck.Error(ck.CKR_PIN_INCORRECT)) {
		t.Fatalf("Open with a wrong PIN: %v, want ErrPINIncorrect and the module's code", err)
	}
	if got := calls("C_Login"); got != 1 {
		t.Errorf("Open with a wrong PIN called C_Login %d times, want once", got)
	}
	if strings.Contains(err.Error()+log.String(), wrong) {
		t.Error("the PIN shows in the error or in the log")
	}
	if !strings.Contains(log.String(), "token refused the PIN") {
		t.Errorf("the log does not tell of the refusal: %s", log)
	}
}

func TestLostLoginWithWrongPINIsTriedOnce(t *testing.T) {
	st := softhsm.New(t)
	spy, calls := spyModule(t, st.Module)
	tok := openToken(t, st, func(c *Config) { c.URI.ModulePath, c.Module = "", spy })
	k := generate(t, tok, "p256")
	if got := calls("C_Login"); got != 1 {
		t.Errorf("opening the token and making a key called C_Login %d times, want once", got)
	}

	tok.pin = NewPIN("wrong-" + canary) // as if the PIN had been changed on the token
	logout(t, tok)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 3 {
				if err := signOnce(t.Context(), k); !errors.Is(err, ErrPINIncorrect) {
					t.Errorf("sign after the login was lost and the PIN changed: %v, want ErrPINIncorrect", err)
				}
			}
		})
	}
	wg.Wait()
	if err := tok.Check(t.Context()); !errors.Is(err, ErrPINIncorrect) {
		t.Errorf("Check: %v, want ErrPINIncorrect", err)
	}
	if _, err := tok.Keys(t.Context()); !errors.Is(err, ErrPINIncorrect) {
		t.Errorf("Keys: %v, want ErrPINIncorrect", err)
	}
	if got := calls("C_Login"); got != 2 {
		t.Errorf("C_Login was called %d times, want twice: the good one and one refused", got)
	}
	behind(t, tok, func(c *ck.Ctx, slot uint) error {
		info, err := c.GetTokenInfo(slot)
		if err == nil && info.Flags&ck.CKF_USER_PIN_COUNT_LOW == 0 {
			t.Error("the token does not remember a refused PIN: the test shows nothing")
		}
		if info.Flags&ck.CKF_USER_PIN_LOCKED != 0 {
			t.Error("the token is locked")
		}
		return err
	})

	// Opening the token again reads the PIN anew, from its file.
	if err := tok.Close(); err != nil {
		t.Fatal(err)
	}
	again := openToken(t, st, func(c *Config) { c.URI.ModulePath, c.Module = "", spy })
	if k, err := again.Key(t.Context(), Selector{SKI: k.Info().SKI}); err != nil {
		t.Error(err)
	} else {
		mustSign(t, k)
	}
	if got := calls("C_Login"); got != 3 {
		t.Errorf("C_Login was called %d times after another Open, want 3", got)
	}
}

// TestHotPath counts what one signature costs the module.
func TestHotPath(t *testing.T) {
	st := softhsm.New(t)
	spy, calls := spyModule(t, st.Module)
	tok := openToken(t, st, func(c *Config) { c.URI.ModulePath, c.Module = "", spy })
	for _, typ := range []string{"p256", "rsa2048"} {
		k := generate(t, tok, typ)
		mustSign(t, k)
		before := map[string]int{}
		for _, f := range []string{"C_SignInit", "C_Sign", "C_OpenSession", "C_FindObjectsInit", "C_Login"} {
			before[f] = calls(f)
		}
		const n = 10
		for range n {
			mustSign(t, k)
		}
		for f, want := range map[string]int{"C_SignInit": n, "C_Sign": n, "C_OpenSession": 0, "C_FindObjectsInit": 0, "C_Login": 0} {
			if got := calls(f) - before[f]; got != want {
				t.Errorf("%s: %d signatures called %s %d times, want %d", typ, n, f, got, want)
			}
		}
	}
}

func TestReadPINFromNamedPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	go func() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		if _, err := f.WriteString(canary); err != nil {
			t.Error(err)
		}
	}()
	pin, err := ReadPINFile(path)
	if err != nil || pin.value() != canary {
		t.Errorf("got %q and %v, want the PIN", pin.value(), err)
	}
}
