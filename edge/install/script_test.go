package install

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// shells are those that the script meets: dash of Debian, ash of BusyBox, bash.
func shells(t *testing.T) map[string][]string {
	t.Helper()
	m := map[string][]string{"dash": {"dash"}, "ash": {"busybox", "sh"}, "bash": {"bash", "--posix"}}
	for name, argv := range m {
		path, err := exec.LookPath(argv[0])
		if err != nil {
			t.Fatalf("%s is needed: scripts/setup installs it: %v", name, err)
		}
		m[name] = append([]string{path}, argv[1:]...)
	}
	return m
}

// tools is a directory of programs that stand before those of the system.
type tools struct{ dir string }

func newTools(t *testing.T) tools { return tools{t.TempDir()} }

// add makes a program of a shell script.
func (d tools) add(t *testing.T, name, text string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(d.dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755))
}

// few returns a directory with few of the system's programs: no package manager, and of what downloads only what is named.
func few(t *testing.T, more ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range append([]string{"sh", "cat", "sed", "tr", "dd", "grep", "mktemp", "rm", "sha256sum", "id", "mkdir", "env"}, more...) {
		path, err := exec.LookPath(name)
		must(t, err)
		must(t, os.Symlink(path, filepath.Join(dir, name)))
	}
	return dir
}

// machine makes uname and /proc be those of another machine. elf is the byte order of its programs, 1 for little.
func (d tools) machine(t *testing.T, name, cpuinfo string, elf byte) (proc string) {
	t.Helper()
	d.add(t, "uname", "case $1 in -m) echo "+name+" ;; -s) echo Linux ;; esac")
	proc = filepath.Join(d.dir, "proc")
	must(t, os.MkdirAll(filepath.Join(proc, "self"), 0o755))
	must(t, os.WriteFile(filepath.Join(proc, "cpuinfo"), []byte(cpuinfo), 0o644))
	must(t, os.WriteFile(filepath.Join(proc, "self", "exe"), append([]byte("\x7fELF\x01"), elf), 0o644))
	return proc
}

// sh runs the script in a shell with arguments.
func (b *bed) sh(shell []string, script string, env []string, args ...string) (string, error) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 3*patience)
	defer cancel()
	file := filepath.Join(b.t.TempDir(), "install.sh")
	if filepath.Base(shell[0]) == "busybox" { // it takes its own programs before those of PATH
		script = "uname() { \"${PATH%%:*}/uname\" \"$@\"; }\n" + script
	}
	must(b.t, os.WriteFile(file, []byte(script), 0o644))
	cmd := exec.CommandContext(ctx, shell[0], append(slices.Clone(shell[1:]), append([]string{file}, args...)...)...)
	ca := filepath.Join(b.t.TempDir(), "ca.pem")
	must(b.t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b.Certificate().Raw}), 0o644))
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "CURL_CA_BUNDLE=" + ca, "SSL_CERT_FILE=" + ca, "TMPDIR=" + b.t.TempDir()}, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (b *bed) script() string {
	b.t.Helper()
	status, _, body := b.ask("GET", "/install.sh")
	if status != 200 {
		b.t.Fatalf("the script: status %d: %s", status, body)
	}
	return body
}

// What the processor of a Pi Zero says of itself is of version 7; it is of version 6.
const (
	piZero = "processor\t: 0\nmodel name\t: ARMv6-compatible processor rev 7 (v6l)\nFeatures\t: half thumb fastmult vfp edsp java tls\nCPU architecture: 7\n"
	pi2    = "model name\t: ARMv7 Processor rev 5 (v7l)\nFeatures\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm\n"
	noVFP3 = "model name\t: ARMv7 Processor rev 1 (v7l)\nFeatures\t: half thumb fastmult vfp edsp\n"
	pi4    = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU architecture: 8\n"
)

func TestDetect(t *testing.T) {
	t.Parallel()
	b := newBed(t, release())
	script := b.script()
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, tt := range []struct {
				machine, cpuinfo string
				elf              byte
				want             string // the program, or what it says
			}{
				{"x86_64", "", 1, "linux-amd64"},
				{"i686", "", 1, "linux-386"},
				{"aarch64", pi4, 1, "linux-arm64"},
				{"armv8l", pi4, 1, "linux-armv7"},
				{"armv7l", pi2, 1, "linux-armv7"},
				{"armv7l", "", 1, "linux-armv7"},
				{"armv7l", noVFP3, 1, "linux-armv6"},
				{"armv7l", piZero, 1, "linux-armv6"},
				{"armv6l", piZero, 1, "linux-armv6"},
				{"armv5tel", "", 1, "linux-armv5"},
				{"riscv64", "", 1, "linux-riscv64"},
				{"mips", "", 1, "linux-mipsle"},
				{"mips64", "", 1, "linux-mipsle"},
				{"mips", "", 2, "big-endian"},
				{"s390x", "", 2, "no program for this machine (s390x)"},
			} {
				bin := newTools(t)
				proc := bin.machine(t, tt.machine, tt.cpuinfo, tt.elf)
				out, err := b.sh(shell, script, []string{"PATH=" + bin.dir + ":" + os.Getenv("PATH"), "KEYHAVEN_PROC=" + proc}, "--dry-run", "--method", "static")
				program := strings.HasPrefix(tt.want, "linux-")
				if (err == nil) != program || !strings.Contains(out, tt.want+" -> ") && program || !strings.Contains(out, tt.want) {
					t.Errorf("%s %q: got %v, %s; want %s", tt.machine, tt.cpuinfo, err, out, tt.want)
				}
			}
			bin := newTools(t)
			bin.add(t, "uname", "echo Darwin")
			if out, err := b.sh(shell, script, []string{"PATH=" + bin.dir + ":" + os.Getenv("PATH")}, "--dry-run"); err == nil || !strings.Contains(out, "this is Darwin") {
				t.Errorf("Darwin: got %v, %s", err, out)
			}
		})
	}
}

// A package is preferred where the system has a package manager and the repository its architecture.
func TestChoose(t *testing.T) {
	t.Parallel()
	b := newBed(t, release())
	script := b.script()
	dash := shells(t)["dash"]
	for _, tt := range []struct {
		name     string
		machine  string
		programs map[string]string
		args     []string
		want     []string
	}{
		{"Debian", "x86_64", map[string]string{"apt-get": "", "dpkg": "echo amd64"}, nil, []string{"with apt (stable, amd64)", "would run: env DEBIAN_FRONTEND=noninteractive apt-get install -q -y keyhaven-connector", "apt-get purge"}},
		{"32-bit user land on a 64-bit kernel", "aarch64", map[string]string{"apt-get": "", "dpkg": "echo armhf"}, nil, []string{"with apt (stable, armhf)"}},
		{"Raspberry Pi OS on a Zero", "armv6l", map[string]string{"apt-get": "", "dpkg": "echo armhf"}, nil, []string{"with apt (rpi, armhf)"}},
		{"an architecture without packages", "riscv64", map[string]string{"apt-get": "", "dpkg": "echo riscv64"}, nil, []string{"static program for riscv64"}},
		{"as asked for", "x86_64", map[string]string{"apt-get": "", "dpkg": "echo amd64"}, []string{"--method", "static"}, []string{"static program for amd64"}},
		{"for an image", "x86_64", map[string]string{"apt-get": "", "dpkg": "echo amd64"}, []string{"--root", "/nonexistent"}, []string{"static program for amd64", "/nonexistent/usr/local/bin"}},
		{"Fedora", "x86_64", map[string]string{"rpm": "echo x86_64", "dnf": ""}, nil, []string{"with dnf", "would run: rpm --import", "would run: dnf install -y keyhaven-connector"}},
		{"openSUSE", "x86_64", map[string]string{"rpm": "echo x86_64", "zypper": ""}, nil, []string{"with zypper", "/etc/zypp/repos.d", "zypper --non-interactive install"}},
		{"rpm without a tool", "x86_64", map[string]string{"rpm": "echo x86_64"}, nil, []string{"static program for amd64"}},
		{"no package", "s390x", map[string]string{}, nil, []string{"no program for this machine"}},
		{"only a package", "riscv64", map[string]string{}, []string{"--method", "package"}, []string{"there is no package for this system"}},
	} {
		bin := newTools(t)
		proc := bin.machine(t, tt.machine, "", 1)
		for name, text := range tt.programs {
			bin.add(t, name, text)
		}
		out, err := b.sh(dash, script, []string{"PATH=" + bin.dir + ":" + few(t, "curl"), "KEYHAVEN_PROC=" + proc}, append([]string{"--dry-run"}, tt.args...)...)
		for _, want := range tt.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: got %v\n%s\nwant %q", tt.name, err, out, want)
			}
		}
	}
}

// fakeProgram stands for the connector: it notes how it was called, and what of the token others can see meanwhile.
const fakeProgram = `#!/bin/sh
case $1 in
--version) echo connector 1; exit ;;
join) ;;
*) exit 9 ;;
esac
echo "$*" >>"$OUT/calls"
for p in /proc/[0-9]*; do
	{ tr '\0' ' ' <$p/cmdline; tr '\0' ' ' <$p/environ; } 2>/dev/null
done >"$OUT/seen"
dir=
while [ $# -gt 0 ]; do [ "$1" != --dir ] || dir=$2; shift; done
read -r token
printf '%s' "$token" >"$OUT/token"
: >"$dir/cert.pem"
`

func TestInstall(t *testing.T) {
	t.Parallel()
	const canary = "khj1_canary-of-this-test"
	files := release()
	files[programPrefix+"amd64"] = fakeProgram
	b := newBed(t, files)
	script := b.script()
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			out, root := t.TempDir(), filepath.Join(t.TempDir(), "root")
			token := filepath.Join(t.TempDir(), "token")
			must(t, os.WriteFile(token, []byte(canary+"\n"), 0o600))
			bin := newTools(t)
			proc := bin.machine(t, "x86_64", "", 1)
			env := []string{"PATH=" + bin.dir + ":" + os.Getenv("PATH"), "KEYHAVEN_PROC=" + proc, "OUT=" + out}
			if text, err := b.sh(shell, script, env, "--root", root, "--dry-run", "--token-file", token); err != nil || strings.Contains(text, canary) {
				t.Fatalf("dry run: %v\n%s", err, text)
			}
			if _, err := os.Stat(root); err == nil {
				t.Fatal("a dry run left something")
			}
			text, err := b.sh(shell, script, append(env, "KEYHAVEN_TOKEN_FILE="+token), "--root", root+"/")
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			for path, want := range map[string]struct {
				text string
				mode fs.FileMode
			}{
				"usr/local/bin/keyhaven-connector":              {fakeProgram, 0o755},
				"etc/keyhaven/connector.yaml":                   {configText, 0o644},
				"etc/systemd/system/keyhaven-connector.service": {strings.Replace(unitText, "/usr/bin/", "/usr/local/bin/", 1), 0o644},
				"var/lib/keyhaven-connector/cert.pem":           {"", 0o644},
			} {
				got, err := os.ReadFile(filepath.Join(root, path))
				must(t, err)
				info, err := os.Stat(filepath.Join(root, path))
				must(t, err)
				if string(got) != want.text || info.Mode().Perm() != want.mode {
					t.Errorf("%s: got mode %v, %q", path, info.Mode(), got)
				}
			}
			if info, err := os.Stat(filepath.Join(root, "var/lib/keyhaven-connector")); err != nil || info.Mode().Perm() != 0o700 {
				t.Errorf("the identity's directory: %v, %v", info.Mode(), err)
			}
			calls, err := os.ReadFile(filepath.Join(out, "calls"))
			must(t, err)
			if want := "join --token-file - --dir " + root + "/var/lib/keyhaven-connector\n"; string(calls) != want {
				t.Errorf("called with %q, want %q", calls, want)
			}
			if got, err := os.ReadFile(filepath.Join(out, "token")); err != nil || string(got) != canary {
				t.Errorf("the program got %q, %v", got, err)
			}
			seen, err := os.ReadFile(filepath.Join(out, "seen"))
			must(t, err)
			if !bytes.Contains(seen, []byte("--token-file")) {
				t.Error("nothing was seen of the processes: the test is broken")
			}
			if bytes.Contains(seen, []byte("khj1_")) || strings.Contains(text, "khj1_") {
				t.Error("the token was in an argument, a variable or on the screen")
			}

			// Once more: nothing is changed, nobody joins. The owner's configuration stays.
			must(t, os.WriteFile(filepath.Join(root, "etc/keyhaven/connector.yaml"), []byte("mine"), 0o644))
			text, err = b.sh(shell, script, env, "--root", root, "--token-file", token)
			if err != nil || !strings.Contains(text, "is there already") || !strings.Contains(text, "has joined already") {
				t.Errorf("again: %v\n%s", err, text)
			}
			if again, _ := os.ReadFile(filepath.Join(out, "calls")); !bytes.Equal(again, calls) {
				t.Errorf("called again: %s", again)
			}
			if got, _ := os.ReadFile(filepath.Join(root, "etc/keyhaven/connector.yaml")); string(got) != "mine" {
				t.Errorf("the configuration became %q", got)
			}
		})
	}
}

func TestInstallFaults(t *testing.T) {
	t.Parallel()
	files := release()
	files[programPrefix+"amd64"] = fakeProgram
	files[programPrefix+"arm64"] = "#!/bin/sh\nexit 132\n"
	b := newBed(t, files)
	script := b.script()
	dash := shells(t)["dash"]
	bin := newTools(t)
	proc := bin.machine(t, "x86_64", "", 1)
	env := []string{"PATH=" + bin.dir + ":" + os.Getenv("PATH"), "KEYHAVEN_PROC=" + proc, "OUT=" + t.TempDir()}
	root := filepath.Join(t.TempDir(), "root")
	wants := func(what, want string, env []string, script string, args ...string) {
		t.Helper()
		out, err := b.sh(dash, script, env, args...)
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: got %v\n%s\nwant %q", what, err, out, want)
		}
	}
	wants("a token as argument", "should be revoked", env, script, "khj1_secret")
	if out, _ := b.sh(dash, script, env, "khj1_secret"); strings.Contains(out, "secret") {
		t.Errorf("the token is repeated: %s", out)
	}
	wants("an unknown argument", "unknown argument", env, script, "--now")
	wants("no value", "needs a value", env, script, "--root")
	wants("a root with a space", "--root", env, script, "--root", "/a b", "--dry-run")
	wants("a method", "--method is", env, script, "--method", "magic")
	wants("a package below a root", "--method static", env, script, "--method", "package", "--root", root)
	wants("no token file", "cannot be read", env, script, "--root", root, "--token-file", "/nonexistent/token")
	must(t, os.RemoveAll(root))
	shown := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(shown, []byte("khj1_x\n"), 0o600))
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660} {
		must(t, os.Chmod(shown, mode))
		wants("a token file that others may read", "run chmod 600", env, script, "--root", root, "--token-file", shown)
	}
	must(t, os.RemoveAll(root))

	other := newTools(t)
	armProc := other.machine(t, "aarch64", "", 1)
	wants("a program that does not run here", "does not run on this machine", []string{"PATH=" + other.dir + ":" + os.Getenv("PATH"), "KEYHAVEN_PROC=" + armProc}, script, "--root", root, "--method", "static")
	must(t, os.RemoveAll(root))

	user := newTools(t)
	user.add(t, "id", "echo 1000")
	userProc := user.machine(t, "x86_64", "", 1)
	wants("not root", "run as root", []string{"PATH=" + user.dir + ":" + os.Getenv("PATH"), "KEYHAVEN_PROC=" + userProc}, script)

	// The edge would not send other bytes; somebody on the way, or a script of yesterday, meets them here.
	stale := strings.ReplaceAll(script, fmt.Sprintf("%s %samd64", hashOf([]byte(fakeProgram)), programPrefix), fmt.Sprintf("%s %samd64", hashOf([]byte("another")), programPrefix))
	if stale == script {
		t.Fatal("the script has no such line")
	}
	wants("a file that was tampered with", "is not the file that was signed", env, stale, "--root", root, "--method", "static")
	if _, err := os.Stat(filepath.Join(root, "usr/local/bin/keyhaven-connector")); err == nil {
		t.Error("what was tampered with is installed")
	}
	b.write(programPrefix+"amd64", "tampered with at the edge")
	wants("a file that the edge refuses", "cannot download", env, script, "--root", root, "--method", "static")
	if _, err := os.Stat(filepath.Join(root, "usr/local/bin/keyhaven-connector")); err == nil {
		t.Error("what was tampered with is installed")
	}
}

// A script that was cut short at any byte does nothing, not even find out where it is.
func TestCutShort(t *testing.T) {
	t.Parallel()
	b := newBed(t, release())
	script := b.script()
	bin := newTools(t)
	mark := filepath.Join(t.TempDir(), "ran")
	for _, name := range []string{"uname", "id", "mktemp", "curl", "wget", "mkdir", "rm", "sed", "cat", "sha256sum"} {
		bin.add(t, name, "echo >"+mark)
	}
	var cuts []int
	for i := 0; i < len(script)-200; i += 509 {
		cuts = append(cuts, i)
	}
	for i := len(script) - 60; i < len(script)-1; i++ {
		cuts = append(cuts, i)
	}
	dash := shells(t)["dash"]
	for _, n := range cuts {
		cmd := exec.Command(dash[0], "-s")
		cmd.Stdin = strings.NewReader(script[:n])
		cmd.Env = []string{"PATH=" + bin.dir}
		cmd.Run() //nolint:errcheck // a syntax error, as a rule
		if _, err := os.Stat(mark); err == nil {
			t.Fatalf("cut to %d of %d bytes it did something: …%q", n, len(script), script[max(0, n-40):n])
		}
	}
	cmd := exec.Command(dash[0], "-s")
	cmd.Stdin = strings.NewReader(script)
	cmd.Env = []string{"PATH=" + bin.dir}
	cmd.Run() //nolint:errcheck // its programs do nothing
	if _, err := os.Stat(mark); err != nil {
		t.Error("the whole script did nothing: the test is broken")
	}
}

// As people start it: through a pipe, from a real web server, over TLS.
func TestPipe(t *testing.T) {
	t.Parallel()
	files := release()
	files[programPrefix+"amd64"] = fakeProgram
	b := newBed(t, files)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	must(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b.Certificate().Raw}), 0o644))
	rc := filepath.Join(t.TempDir(), "rc")
	must(t, os.WriteFile(rc, []byte("ca_certificate = "+ca+"\n"), 0o644))
	token := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(token, []byte("khj1_x\n"), 0o600))
	for name, get := range map[string]string{"curl": "curl -fsSL", "wget": "wget -qO-"} {
		bin, root := newTools(t), filepath.Join(t.TempDir(), "root")
		proc := bin.machine(t, "x86_64", "", 1)
		env := []string{"PATH=" + bin.dir + ":" + few(t, name, "cp", "mv", "chmod", "sleep"), "KEYHAVEN_PROC=" + proc, "OUT=" + t.TempDir(), "WGETRC=" + rc}
		out, err := b.sh([]string{"/bin/sh"}, get+" "+b.URL+"/get/install.sh | sh -s -- --root "+root+" --token-file "+token, env)
		if _, serr := os.Stat(filepath.Join(root, "var/lib/keyhaven-connector/cert.pem")); err != nil || serr != nil {
			t.Errorf("%s: %v, %v\n%s", name, err, serr, out)
		}
	}
}
