package pkcs11

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ck "github.com/miekg/pkcs11"
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
			_, _, err := load(tc.path)
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

// TestOneFunctionList loads a module whose C_GetFunctionList yields another instance each time: all calls must go to one.
func TestOneFunctionList(t *testing.T) {
	const source = `
static struct { unsigned char v[2]; void *f[68]; } lists[8];
static unsigned long n;
#define F(i) static unsigned long f##i(void) { return 0x80000000 + i; }
F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
static void *fs[] = {f0, f1, f2, f3, f4, f5, f6, f7};
unsigned long C_GetFunctionList(void **out) {
	if (n == 8) return 5;
	for (int i = 0; i < 68; i++) lists[n].f[i] = fs[n];
	*out = &lists[n++];
	return 0;
}`
	path := filepath.Join(t.TempDir(), "instances.so")
	cmd := exec.Command("cc", "-x", "c", "-shared", "-fPIC", "-o", path, "-")
	cmd.Stdin = strings.NewReader(source)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("compile: %v: %s", err, out)
	}
	ctx, fns, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	want := ctx.Initialize()
	if got := fns.operate(1, 1, &operation{}); got != want || want != ck.Error(0x80000000) {
		t.Errorf("our calls go to instance %v, miekg's to %v; want the first", got, want)
	}
}
