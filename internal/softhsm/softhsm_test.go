package softhsm

import (
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestNewMakesSeparateTokens(t *testing.T) {
	a, b := New(t), New(t)
	if a.Conf != b.Conf {
		t.Errorf("tokens of one process have configurations %q and %q, want one", a.Conf, b.Conf)
	}
	if a.Label == b.Label || a.Serial == b.Serial || a.PIN == b.PIN {
		t.Errorf("tokens share a label, serial or PIN: %s %s, %s %s", a.Label, a.Serial, b.Label, b.Serial)
	}
	if got := os.Getenv("SOFTHSM2_CONF"); got != a.Conf {
		t.Errorf("SOFTHSM2_CONF is %q, want %q", got, a.Conf)
	}
	for _, tok := range []*Token{a, b} {
		fi, err := os.Stat(tok.PINFile)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := fi.Mode(), fs.FileMode(0o600); got != want {
			t.Errorf("PIN file has mode %v, want %v", got, want)
		}
		if strings.Contains(tok.URI(), tok.PIN) {
			t.Error("the URI holds the PIN")
		}
	}
	out, err := exec.Command("softhsm2-util", "--show-slots").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{a.Label, a.Serial, b.Label, b.Serial} {
		if !strings.Contains(string(out), want) {
			t.Errorf("softhsm2-util does not list %q", want)
		}
	}
}

func TestTwinSharesTheLabel(t *testing.T) {
	a := New(t)
	b, err := a.Twin()
	if err != nil {
		t.Fatal(err)
	}
	if a.Label != b.Label || a.Serial == b.Serial {
		t.Errorf("twin has label %q and serial %q, the first %q and %q", b.Label, b.Serial, a.Label, a.Serial)
	}
}

func TestDirectoryGoesWithItsLastUser(t *testing.T) {
	var dir string
	t.Run("user", func(t *testing.T) { dir = New(t).Dir })
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("stat of the token directory after its last user: %v, want it gone", err)
	}
}
