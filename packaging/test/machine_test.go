//go:build packages

package packages

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// What packaging/test/check builds.
var (
	work  = os.Getenv("KEYHAVEN_PACKAGES")
	tree  = os.Getenv("KEYHAVEN_TREE")
	archs = strings.Fields(os.Getenv("PACKAGE_ARCHS"))
)

const (
	oldVersion = "1.0.0~rc.1"
	newVersion = "1.0.0"
)

var programs = []string{"keyhaven-connector", "keyhaven-edge", "keyhaven-keyserver"}

func TestMain(m *testing.M) {
	if work == "" || tree == "" || len(archs) == 0 {
		fmt.Fprintln(os.Stderr, "run these tests by make packages-check")
		os.Exit(2)
	}
	// The repository script is the project's own; it needs no Go here.
	os.Setenv("RELEASE_TOOL", filepath.Join(work, "release"))
	os.Exit(m.Run())
}

// A machine is a Debian of its own: the tree that all share, with what this one changes over it.
type machine struct {
	t    *testing.T
	root string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t, filepath.Join(dir, "root")}
	for _, d := range []string{"upper", "scratch", "root"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/scratch", tree, dir, dir)
	if err := syscall.Mount("overlay", m.root, "overlay", 0, options); err != nil {
		t.Fatalf("overlay: %v", err)
	}
	t.Cleanup(func() { unmount(t, m.root) })
	for _, device := range []string{"null", "zero", "random", "urandom"} {
		target := m.path("/dev/" + device)
		if _, err := os.Lstat(target); err != nil {
			m.write("/dev/"+device, "", 0o644)
		}
		if err := syscall.Mount("/dev/"+device, target, "", syscall.MS_BIND, ""); err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		t.Cleanup(func() { unmount(t, target) })
	}
	if err := syscall.Mount("proc", m.path("/proc"), "proc", 0, ""); err != nil {
		t.Fatalf("proc: %v", err)
	}
	t.Cleanup(func() { unmount(t, m.path("/proc")) })
	return m
}

func unmount(t *testing.T, path string) {
	if err := syscall.Unmount(path, 0); err != nil {
		t.Errorf("unmount %s: %v", path, err)
	}
}

func (m *machine) path(name string) string { return filepath.Join(m.root, name) }

func (m *machine) write(name, text string, mode fs.FileMode) {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(m.path(name)), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(m.path(name), []byte(text), mode); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) read(name string) string {
	m.t.Helper()
	return read(m.t, m.path(name))
}

func (m *machine) has(name string) bool {
	_, err := os.Lstat(m.path(name))
	return err == nil
}

// try runs a command in the machine and returns what it said.
func (m *machine) try(name string, args ...string) (string, error) {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), "chroot", append([]string{m.root, name}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (m *machine) run(name string, args ...string) string {
	m.t.Helper()
	out, err := m.try(name, args...)
	if err != nil {
		m.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// fakeSystemd makes the machine one that systemd runs, whose systemctl writes down what it is told and keeps what follows
// from it: enabled units as links, active ones as files in /active.
func (m *machine) fakeSystemd() {
	m.write("/run/systemd/system/.keep", "", 0o644)
	m.write("/active/.keep", "", 0o644)
	os.Remove(m.path("/usr/bin/systemctl"))
	m.write("/usr/bin/systemctl", `#!/bin/sh
set -eu
echo "$*" >>/systemctl.log
now=
while case ${1-} in --now) now=1 ;; -*) ;; *) false ;; esac; do shift; done
verb=$1
shift
[ "${1-}" != --now ] || { now=1; shift; }
[ "${1-}" != -- ] || shift
[ $# -eq 0 ] || { unit=${1%.service}.service; link=/etc/systemd/system/multi-user.target.wants/$unit; }
case $verb in
daemon-reload) ;;
is-active) if [ -f "/active/$unit" ]; then echo active; else echo inactive; exit 3; fi ;;
is-enabled) if [ -L "$link" ]; then echo enabled; else echo disabled; exit 1; fi ;;
enable) mkdir -p "${link%/*}"; ln -sf "/usr/lib/systemd/system/$unit" "$link"; [ -z "$now" ] || : >"/active/$unit" ;;
disable) rm -f "$link"; [ -z "$now" ] || rm -f "/active/$unit" ;;
start | restart) : >"/active/$unit" ;;
try-restart) ;;
kill) [ "$1" = --signal=SIGUSR2 ] && [ "$2" = --kill-who=main ] && [ -f "/active/$3" ] ;;
stop) rm -f "/active/$unit" ;;
*) echo "systemctl: $verb?" >&2; exit 1 ;;
esac
`, 0o755)
}

// systemctl returns what systemctl was told since the last call.
func (m *machine) systemctl() string {
	b, err := os.ReadFile(m.path("/systemctl.log"))
	if err != nil {
		return ""
	}
	os.Remove(m.path("/systemctl.log"))
	return string(b)
}

// A site is a repository behind a web server on loopback.
type site struct {
	dir string
	url string

	mu   sync.Mutex
	seen map[string]bool
}

func serve(t *testing.T, dir string) *site {
	t.Helper()
	s := &site{dir: dir, seen: map[string]bool{}}
	files := http.FileServer(http.Dir(dir))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.seen[r.URL.Path] = true
		s.mu.Unlock()
		r.Header.Del("If-Modified-Since") // the tests write twice a second
		files.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

// asked says whether a path with this in it was asked for.
func (s *site) asked(part string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for path := range s.seen {
		if strings.Contains(path, part) {
			return true
		}
	}
	return false
}

// keySet makes a directory of keys: those that sign first, then further public ones.
func keySet(t *testing.T, sign, public []string) string {
	t.Helper()
	dir := t.TempDir()
	take := func(from, to string) {
		if err := os.WriteFile(filepath.Join(dir, to), []byte(read(t, from)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i, k := range append(sign, public...) {
		mark := ""
		if i > 0 {
			mark = "-" + k
		}
		from := filepath.Join(work, "key-"+k)
		take(filepath.Join(from, "openpgp-public.asc"), "openpgp-public"+mark+".asc")
		if i < len(sign) {
			take(filepath.Join(from, "openpgp-secret.asc"), "openpgp-secret"+mark+".asc")
		}
		if i == 0 {
			take(filepath.Join(from, "minisign.key"), "minisign.key")
			take(filepath.Join(from, "minisign.pub"), "minisign.pub")
		}
	}
	return dir
}

// script runs one of the project's own with further variables.
func script(t *testing.T, env []string, name string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// repository adds the packages of a directory of work to a repository in dir, signed by the keys of a directory.
func repository(t *testing.T, packages, dir, keys string, env ...string) {
	t.Helper()
	script(t, append([]string{"KEYS=" + keys}, env...), "../repo/build", filepath.Join(work, packages), dir)
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// flip changes one byte in the middle of a file.
func flip(t *testing.T, path string) {
	t.Helper()
	b := []byte(read(t, path))
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// edit replaces a text in a file.
func edit(t *testing.T, path, old, new string) {
	t.Helper()
	b := []byte(read(t, path))
	if !bytes.Contains(b, []byte(old)) {
		t.Fatalf("%s has no %q", path, old)
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(b, []byte(old), []byte(new)), 0o644); err != nil {
		t.Fatal(err)
	}
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	list, err := filepath.Glob(pattern)
	if err != nil || len(list) == 0 {
		t.Fatalf("no %s: %v", pattern, err)
	}
	return list
}

func contains(t *testing.T, what, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%s: no %q in:\n%s", what, w, got)
		}
	}
}
