package pkcs11

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/internal/softhsm"
)

func TestOpenByEachName(t *testing.T) {
	st := softhsm.New(t)
	first := openToken(t, st, nil)
	slot := first.slot
	if first.Name() != st.Label {
		t.Errorf("Name() = %q, want the label %q", first.Name(), st.Label)
	}
	generate(t, first, "p256")
	for name, u := range map[string]URI{
		"serial":    {Serial: st.Serial},
		"slot":      {SlotID: strconv.FormatUint(uint64(slot), 10)},
		"and model": {Token: st.Label, Model: "SoftHSM v2", Manufacturer: "SoftHSM project"},
	} {
		t.Run(name, func(t *testing.T) {
			u.PINSource = st.PINFile
			second := openToken(t, st, func(c *Config) { c.URI = u })
			keys, err := second.Keys(t.Context())
			if err != nil || len(keys) != 1 {
				t.Fatalf("got %d keys and %v, want 1", len(keys), err)
			}
			mustSign(t, keys[0])
		})
	}
	// The others have closed; the login, which they shared, must still stand.
	if err := first.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	st := softhsm.New(t)
	twin, err := st.Twin()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link.so")
	if err := os.Symlink(st.Module, link); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "libother.so")
	if err := os.WriteFile(other, []byte("no library"), 0o600); err != nil {
		t.Fatal(err)
	}
	pin := st.PINFile
	for _, tc := range []struct {
		name string
		cfg  Config
		is   error    // nil: any
		says []string // parts of the text
	}{
		{"no name", Config{URI: URI{PINSource: pin}, Module: st.Module}, nil, []string{"names no token"}},
		{"two names", Config{URI: URI{Token: "a", Serial: "b", PINSource: pin}, Module: st.Module}, nil, []string{"exactly one"}},
		{"not a private key", Config{URI: URI{Token: "a", Type: "cert", PINSource: pin}, Module: st.Module}, nil, []string{"type cert"}},
		{"library attribute", Config{URI: URI{Token: "a", LibraryVersion: "2", PINSource: pin}, Module: st.Module}, nil, []string{"library-version"}},
		{"too many sessions", Config{URI: URI{Token: "a", PINSource: pin}, Module: st.Module, Sessions: 1000}, nil, []string{"1000 sessions"}},
		{"negative sessions", Config{URI: URI{Token: "a", PINSource: pin}, Module: st.Module, Sessions: -1}, nil, []string{"-1 sessions"}},
		{"two sources of the PIN", Config{URI: URI{Token: "a", PINSource: pin}, Module: st.Module, PIN: func() (PIN, error) { return PIN{}, nil }}, nil, []string{"two sources"}},
		{"no PIN", Config{URI: URI{Token: "a"}, Module: st.Module}, nil, []string{"pin-source"}},
		{"PIN file missing", Config{URI: URI{Token: "a", PINSource: "/nonexistent/pin"}, Module: st.Module}, os.ErrNotExist, nil},
		{"no module", Config{URI: URI{Token: "a", PINSource: pin}}, nil, []string{"no module"}},
		{"module missing", Config{URI: URI{Token: "a", PINSource: pin}, Module: "/nonexistent/module.so"}, os.ErrNotExist, []string{"/nonexistent/module.so"}},
		{"module relative", Config{URI: URI{Token: "a", PINSource: pin}, Module: "module.so"}, nil, []string{"absolute"}},
		{"module no library", Config{URI: URI{Token: "a", PINSource: pin}, Module: other}, ErrModule, []string{"no shared library", other}},
		{"module of the URI without a list", Config{URI: URI{Token: "a", PINSource: pin, ModulePath: st.Module}}, ErrModuleNotAllowed, []string{st.Module}},
		{"module of the URI not in the list", Config{URI: URI{Token: "a", PINSource: pin, ModulePath: other}, AllowedModules: []string{st.Module}}, ErrModuleNotAllowed, []string{other}},
		{"module of the URI not the configured one", Config{URI: URI{Token: "a", PINSource: pin, ModulePath: other}, Module: st.Module}, ErrModuleNotAllowed, []string{other}},
		{"configured module not in the list", Config{URI: URI{Token: "a", PINSource: pin}, Module: st.Module, AllowedModules: []string{other}}, ErrModuleNotAllowed, []string{other}},
		{"unknown module name", Config{URI: URI{Token: "a", PINSource: pin, ModuleName: "opensc"}, AllowedModules: []string{st.Module}}, ErrModuleNotAllowed, []string{"opensc"}},
		{"ambiguous module name", Config{URI: URI{Token: "a", PINSource: pin, ModuleName: "other"}, AllowedModules: []string{other, "/x/other.so"}}, ErrAmbiguous, []string{"/x/other.so"}},
		{"absent token", Config{URI: URI{Token: "absent", PINSource: pin}, Module: st.Module}, ErrTokenNotFound, []string{`"absent"`, st.Label, st.Serial}},
		{"absent serial", Config{URI: URI{Serial: "absent", PINSource: pin}, Module: st.Module}, ErrTokenNotFound, []string{`"absent"`}},
		{"absent slot", Config{URI: URI{SlotID: "4711", PINSource: pin}, Module: st.Module}, ErrTokenNotFound, []string{"4711"}},
		{"another model", Config{URI: URI{Serial: st.Serial, Model: "Luna", PINSource: pin}, Module: st.Module}, ErrTokenNotFound, nil},
		{"two tokens of one label", Config{URI: URI{Token: st.Label, PINSource: pin}, Module: link}, ErrAmbiguous, []string{st.Serial, twin.Serial}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tok, err := Open(t.Context(), tc.cfg)
			if err == nil {
				tok.Close()
				t.Fatal("opened, want an error")
			}
			if tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("%v, want it to be %v", err, tc.is)
			}
			for _, s := range tc.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%v, want it to say %q", err, s)
				}
			}
			if strings.Contains(err.Error(), st.PIN) {
				t.Errorf("the error holds the PIN: %v", err)
			}
		})
	}
	// Nothing is left open: the twin opens by its serial, through a module with another name.
	u := URI{Serial: twin.Serial, PINSource: twin.PINFile, ModuleName: "softhsm2"}
	openToken(t, twin, func(c *Config) { c.URI, c.Module, c.AllowedModules = u, "", []string{other, st.Module} })
}

func TestModuleByName(t *testing.T) {
	list := []string{"/a/libsofthsm2.so", "/b/opensc-pkcs11.so", "/c/libCryptoki2_64.so.10"}
	for name, want := range map[string]string{
		"softhsm2": list[0], "libsofthsm2": list[0], "libsofthsm2.so": list[0], "opensc-pkcs11": list[1], "Cryptoki2_64": list[2],
	} {
		if got, err := byName(name, list); err != nil || got != want {
			t.Errorf("byName(%q) = %q, %v, want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"softhsm", "opensc", "so", "lib"} {
		if got, err := byName(name, list); !errors.Is(err, ErrModuleNotAllowed) {
			t.Errorf("byName(%q) = %q, %v, want ErrModuleNotAllowed", name, got, err)
		}
	}
}
