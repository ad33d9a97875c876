package pkcs11

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestModulesThatDoNotLoad compiles libraries that are no modules, each in its way.
func TestModulesThatDoNotLoad(t *testing.T) {
	dir := t.TempDir()
	compile := func(name, source string, args ...string) string {
		path := filepath.Join(dir, name+".so")
		cmd := exec.Command("cc", append([]string{"-x", "c", "-shared", "-fPIC", "-o", path, "-", "-x", "none"}, args...)...)
		cmd.Stdin = strings.NewReader(source)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("compile: %v: %s", err, out)
		}
		return path
	}
	// patched is a library whose ELF header names another class or machine.
	patched := func(name string, at int, value byte) string {
		b, err := os.ReadFile(compile(name, "int x;"))
		if err != nil {
			t.Fatal(err)
		}
		b[at] = value
		path := filepath.Join(dir, name+".so")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	needs := compile("needed", "int needed(void) { return 1; }")
	text := filepath.Join(dir, "text.so")
	if err := os.WriteFile(text, []byte("INPUT(other.so)\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dependent := compile("dependent", "int needed(void); int x(void) { return needed(); }", needs, "-Wl,--no-as-needed")
	if err := os.Remove(needs); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ path, says, remedy string }{
		"no library":         {text, "no shared library", "ends in .so"},
		"no PKCS#11 library": {compile("plain", "int x;"), "no C_GetFunctionList", "name the token's PKCS#11 module"},
		"undefined symbol": {compile("undefined", "int nowhere(void); int x(void) { return nowhere(); }", "-Wl,-z,now"),
			"undefined symbol", "one version of all"},
		"library missing": {dependent, "needed.so", "install the library"},
		"another machine": {patched("machine", 18, 0xf3), "another architecture", "install the module for"},
		"no list":         {compile("nolist", "unsigned long C_GetFunctionList(void **l) { return 5; }"), "C_GetFunctionList failed", "own configuration"},
		"empty list": {compile("empty", "static struct { unsigned char v[2]; void *f[68]; } l; unsigned long C_GetFunctionList(void **o) { *o = &l; return 0; }"),
			"function list lacks C_", "own PKCS#11 module"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(tc.path)
			if !errors.Is(err, ErrModule) {
				t.Fatalf("got %v, want ErrModule", err)
			}
			for _, want := range []string{tc.path, tc.says, tc.remedy} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		})
	}
}
