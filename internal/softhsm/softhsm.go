// Package softhsm makes SoftHSM2 tokens for tests, the demo and benchmarks.
//
// SoftHSM2 finds its tokens through the process-wide variable SOFTHSM2_CONF, read when the module is initialised. Tokens made
// by [New] in one process therefore share one configuration; tokens made by [Create] share one if they share a directory.
// A token must exist before its module is initialised: the module does not look for tokens again while it is in use.
//
// These are not places for real keys: softhsm2-util takes its PINs as arguments, which other users of the host can see.
package softhsm

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// Token is one initialised SoftHSM2 token. Two tokens may carry the same label, see [Twin]; their serials differ.
type Token struct {
	Module  string // absolute path of libsofthsm2.so
	Label   string // unique, unless made by Twin
	Serial  string // as C_GetTokenInfo gives it
	PIN     string // random; a canary that must never show up in a log or an error
	PINFile string // holds the PIN and a newline, mode 0600
	Conf    string // the file SOFTHSM2_CONF must name
	Dir     string // holds everything of this token's configuration, other tokens included
}

// modulePaths are the places where distributions put the module.
var modulePaths = []string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib/*/softhsm/libsofthsm2.so",
	"/usr/lib64/softhsm/libsofthsm2.so",
	"/usr/lib64/pkcs11/libsofthsm2.so",
	"/usr/lib64/libsofthsm2.so",
	"/usr/local/lib/softhsm/libsofthsm2.so",
	"/opt/homebrew/lib/softhsm/libsofthsm2.so",
}

// Module returns the absolute path of the SoftHSM2 module of this host.
func Module() (string, error) {
	for _, pattern := range modulePaths {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return "", fmt.Errorf("softhsm: look for the module: %w", err)
		}
		if len(found) > 0 {
			return found[0], nil
		}
	}
	return "", fmt.Errorf("softhsm: libsofthsm2.so is in none of %s; install softhsm2", strings.Join(modulePaths, ", "))
}

// Create makes a token in dir, which is made if it is missing. Several calls with one dir make several tokens under
// one configuration file, dir/softhsm2.conf. Create does not touch this process's environment: see [Token.Env] and [Token.Use].
func Create(dir string) (*Token, error) {
	return create(dir, "keyhaven-"+random(4))
}

// Twin makes a second token with t's label beside it, to try out what happens with ambiguous names.
func (t *Token) Twin() (*Token, error) {
	return create(t.Dir, t.Label)
}

// URI returns a PKCS#11 URI (RFC 7512) that names module, token and PIN file.
func (t *Token) URI() string {
	return fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=%s", t.Label, t.Module, t.PINFile)
}

// Env returns the environment entry that a process needs to see the token.
func (t *Token) Env() string { return "SOFTHSM2_CONF=" + t.Conf }

// Use sets the environment of this process so that a module initialised from now on sees the token.
func (t *Token) Use() error { return os.Setenv("SOFTHSM2_CONF", t.Conf) }

func create(dir, label string) (*Token, error) {
	module, err := Module()
	if err != nil {
		return nil, err
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("softhsm: %w", err)
	}
	pin := "pin-canary-" + random(8)
	t := &Token{Module: module, Label: label, PIN: pin, Conf: filepath.Join(dir, "softhsm2.conf"), Dir: dir}
	if err := t.writeConf(); err != nil {
		return nil, err
	}
	out, err := t.util("--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", "so-"+random(8))
	if err != nil {
		return nil, err
	}
	if t.Serial, err = t.serialOf(out); err != nil {
		return nil, err
	}
	t.PINFile = filepath.Join(dir, "pin-"+t.Serial)
	if err := os.WriteFile(t.PINFile, []byte(pin+"\n"), 0o600); err != nil {
		return nil, fmt.Errorf("softhsm: write PIN file: %w", err)
	}
	return t, nil
}

func (t *Token) writeConf() error {
	tokens := filepath.Join(t.Dir, "tokens")
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return fmt.Errorf("softhsm: make token directory: %w", err)
	}
	if _, err := os.Stat(t.Conf); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("softhsm: %w", err)
	}
	text := "directories.tokendir = " + tokens + "\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
	if err := os.WriteFile(t.Conf, []byte(text), 0o600); err != nil {
		return fmt.Errorf("softhsm: write configuration: %w", err)
	}
	return nil
}

// util runs softhsm2-util under the token's configuration and returns what it printed.
func (t *Token) util(args ...string) (string, error) {
	cmd := exec.Command("softhsm2-util", args...)
	cmd.Env = append(os.Environ(), t.Env())
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("softhsm: softhsm2-util %s: %w: %s", args[0], err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

var slotLine = regexp.MustCompile(`reassigned to slot (\d+)`)

// serialOf asks for the serial of the token that initialising printed about.
func (t *Token) serialOf(out string) (string, error) {
	m := slotLine.FindStringSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("softhsm: softhsm2-util named no slot: %s", strings.TrimSpace(out))
	}
	slots, err := t.util("--show-slots")
	if err != nil {
		return "", err
	}
	_, block, found := strings.Cut(slots, "Slot "+m[1]+"\n")
	if !found {
		return "", fmt.Errorf("softhsm: slot %s is not listed", m[1])
	}
	serial := regexp.MustCompile(`Serial number:\s+([0-9a-f]+)`).FindStringSubmatch(block)
	if serial == nil {
		return "", fmt.Errorf("softhsm: slot %s has no serial", m[1])
	}
	return serial[1], nil
}

func random(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// shared is the configuration that the tokens of New have in common while at least one test uses it.
var shared struct {
	mu    sync.Mutex // guards what follows
	dir   string
	users int
}

// New makes a token for a test and points this process's SOFTHSM2_CONF at it. The test fails if SoftHSM2 is missing. Tokens
// of one process share a directory, which is removed when the last test that asked for one has ended. Make every token
// that a test needs before opening the first.
func New(tb testing.TB) *Token {
	tb.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.users == 0 {
		dir, err := os.MkdirTemp("", "keyhaven-softhsm-")
		if err != nil {
			tb.Fatal(err)
		}
		shared.dir = dir
	}
	shared.users++
	tb.Cleanup(func() {
		shared.mu.Lock()
		defer shared.mu.Unlock()
		shared.users--
		if shared.users == 0 {
			if err := os.RemoveAll(shared.dir); err != nil {
				tb.Errorf("remove token directory: %v", err)
			}
		}
	})
	t, err := Create(shared.dir)
	if err != nil {
		tb.Fatal(err)
	}
	if err := t.Use(); err != nil {
		tb.Fatal(err)
	}
	return t
}
