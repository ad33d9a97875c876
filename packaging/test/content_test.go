//go:build packages

package packages

import (
	"archive/tar"
	"debug/buildinfo"
	"debug/elf"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A target is an architecture as packages name it, and how a program of it can be run here.
type target struct {
	file, deb, rpm string
	settings       map[string]string
	emulate        []string // nil: this machine does, without an emulator
	libc           string   // where the C library of the key server is; empty: where it belongs
	libcCPU        string   // a processor that runs that library, if it is another
}

var targets = map[string]target{
	"amd64": {"amd64", "amd64", "x86_64", map[string]string{"GOARCH": "amd64"}, nil, "", ""},
	"386":   {"i386", "i386", "i686", map[string]string{"GOARCH": "386"}, nil, "/usr/i686-linux-gnu", ""},
	"arm64": {"arm64", "arm64", "aarch64", map[string]string{"GOARCH": "arm64"}, []string{"qemu-aarch64-static", "-cpu", "cortex-a53"}, "/usr/aarch64-linux-gnu", ""},
	"armhf": {"armhf", "armhf", "armv7hl", map[string]string{"GOARCH": "arm", "GOARM": "7"}, []string{"qemu-arm-static", "-cpu", "cortex-a7"}, "/usr/arm-linux-gnueabihf", ""},
	"armel": {"armel", "armel", "armv5tel", map[string]string{"GOARCH": "arm", "GOARM": "5"}, []string{"qemu-arm-static", "-cpu", "arm926"}, "/usr/arm-linux-gnueabi", ""},
	// Debian has no C library for ARMv6 with hard float, only Raspberry Pi OS has.
	"armv6": {"armv6", "armhf", "armv6hl", map[string]string{"GOARCH": "arm", "GOARM": "6"}, []string{"qemu-arm-static", "-cpu", "arm1176"}, "/usr/arm-linux-gnueabihf", "cortex-a7"},
}

func (x target) debFile(name string) string {
	return filepath.Join(work, "new", name+"_"+newVersion+"_"+x.file+".deb")
}

func (x target) rpmFile(name string) string {
	return filepath.Join(work, "new", name+"-"+newVersion+"-1."+x.rpm+".rpm")
}

func each(t *testing.T, f func(t *testing.T, x target, name string)) {
	for _, arch := range archs {
		x, ok := targets[arch]
		if !ok {
			t.Fatalf("unknown architecture %s", arch)
		}
		for _, name := range programs {
			t.Run(arch+"/"+name, func(t *testing.T) { f(t, x, name) })
		}
	}
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return string(out)
}

// unpack takes the program out of a .deb.
func unpack(t *testing.T, deb, name string) string {
	t.Helper()
	dir := t.TempDir()
	output(t, "dpkg-deb", "-x", deb, dir)
	return filepath.Join(dir, "usr/bin", name)
}

func TestFilesOfDebs(t *testing.T) {
	each(t, func(t *testing.T, x target, name string) {
		if got := output(t, "dpkg-deb", "-f", x.debFile(name), "Architecture"); got != x.deb+"\n" {
			t.Errorf("architecture: got %s, want %s", got, x.deb)
		}
		var names []string
		r := tar.NewReader(strings.NewReader(output(t, "dpkg-deb", "--fsys-tarfile", x.debFile(name))))
		for {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			want := int64(0o644)
			if h.Typeflag == tar.TypeDir || strings.HasPrefix(h.Name, "./usr/bin/") {
				want = 0o755
			}
			if h.Mode&0o7777 != want || h.Uid != 0 || h.Gid != 0 || h.Uname != "root" || h.Gname != "root" || h.Typeflag != tar.TypeDir && h.Typeflag != tar.TypeReg {
				t.Errorf("%s: mode %o owner %s:%s type %c, want mode %o of root", h.Name, h.Mode, h.Uname, h.Gname, h.Typeflag, want)
			}
			names = append(names, strings.TrimPrefix(h.Name, "."))
		}
		hasFiles(t, name, names, "/usr/share/zsh/vendor-completions/_"+name)
		if got, want := output(t, "dpkg-deb", "-I", x.debFile(name), "conffiles"), "/etc/keyhaven/"+strings.TrimPrefix(name, "keyhaven-")+".yaml"; strings.TrimSpace(got) != want {
			t.Errorf("configuration files: got %s, want %s", got, want)
		}
	})
}

func hasFiles(t *testing.T, name string, names []string, more ...string) {
	t.Helper()
	doc := "/usr/share/doc/" + name + "/"
	for _, want := range append(more, "/usr/bin/"+name, "/etc/keyhaven/"+strings.TrimPrefix(name, "keyhaven-")+".yaml", "/usr/lib/systemd/system/"+name+".service",
		"/usr/share/bash-completion/completions/"+name, "/usr/share/fish/vendor_completions.d/"+name+".fish", "/usr/share/man/man8/"+name+".8.gz",
		doc+"copyright", doc+"changelog.gz", doc+"third-party-licenses.gz", doc+"examples/"+strings.TrimPrefix(name, "keyhaven-")+".yaml") {
		if !slices.Contains(names, want) {
			t.Errorf("no %s", want)
		}
	}
}

func TestFilesOfRPMs(t *testing.T) {
	each(t, func(t *testing.T, x target, name string) {
		if got := output(t, "rpm", "-qp", "--qf", "%{ARCH} %{VERSION} %{RELEASE} %{BUILDHOST}", x.rpmFile(name)); got != x.rpm+" "+newVersion+" 1 (none)" && !strings.HasPrefix(got, x.rpm+" "+newVersion+" 1 ") {
			t.Errorf("got %s", got)
		}
		var names []string
		for line := range strings.Lines(output(t, "rpm", "-qp", "--qf", "[%{FILENAMES} %{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILEFLAGS:fflags}\n]", x.rpmFile(name))) {
			f := strings.Fields(line + " -")
			want := "-rw-r--r--"
			if strings.HasPrefix(f[0], "/usr/bin/") {
				want = "-rwxr-xr-x"
			}
			if f[1] != want || f[2] != "root:root" {
				t.Errorf("%s: got %s %s, want %s of root", f[0], f[1], f[2], want)
			}
			if config := strings.HasPrefix(f[0], "/etc/"); config != (f[3] == "cn") {
				t.Errorf("%s: flags %s; configuration, and nothing else, is that and not replaced", f[0], f[3])
			}
			names = append(names, f[0])
		}
		hasFiles(t, name, names, "/usr/share/zsh/site-functions/_"+name)
	})
}

// The newest that Debian's oldest supported release has; what is built on a newer one must not need more.
const newestLibc = "2.36"

func TestPrograms(t *testing.T) {
	each(t, func(t *testing.T, x target, name string) {
		program := unpack(t, x.debFile(name), name)
		info, err := buildinfo.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		settings := map[string]string{}
		for _, s := range info.Settings {
			settings[s.Key] = s.Value
		}
		for key, want := range x.settings {
			if settings[key] != want {
				t.Errorf("%s: got %q, want %q", key, settings[key], want)
			}
		}
		cgo := "0"
		if name == "keyhaven-keyserver" {
			cgo = "1"
		}
		if settings["CGO_ENABLED"] != cgo || settings["-trimpath"] != "true" {
			t.Errorf("built with %v", settings)
		}
		text := []byte(read(t, program))
		for _, path := range strings.Split(os.Getenv("KEYHAVEN_PATHS"), ":") {
			if regexp.MustCompile(`(^|[^0-9A-Za-z_.-])` + regexp.QuoteMeta(path) + "/").Match(text) {
				t.Errorf("has the path %s of the machine that built it", path)
			}
		}
		f, err := elf.Open(program)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		libraries, err := f.ImportedLibraries()
		if err != nil {
			t.Fatal(err)
		}
		depends := output(t, "dpkg-deb", "-f", x.debFile(name), "Depends")
		if cgo == "0" {
			if len(libraries) > 0 || strings.Contains(depends, "libc") {
				t.Errorf("needs %v, depends on %s", libraries, depends)
			}
		} else {
			for _, l := range libraries {
				if !regexp.MustCompile(`^(libc|libpthread|libdl|libresolv)\.so\.\d$|^ld-linux`).MatchString(l) {
					t.Errorf("needs %s, which the package does not depend on", l)
				}
			}
			contains(t, "dependency", depends, "libc6 (>= 2.")
			if v := regexp.MustCompile(`libc6 \(>= ([0-9.]+)\)`).FindStringSubmatch(depends); v == nil || exec.Command("dpkg", "--compare-versions", v[1], "le", newestLibc).Run() != nil {
				t.Errorf("depends on %s; want a C library that Debian 12 has", depends)
			}
		}
		run := append(slices.Clone(x.emulate), program, "--version")
		switch {
		case cgo == "0" || x.libc == "":
		case x.emulate == nil:
			run = append([]string{x.libc + "/lib/ld-linux.so.2", "--library-path", x.libc + "/lib"}, run...)
		default:
			if x.libcCPU != "" {
				run[2] = x.libcCPU
			}
			run = slices.Insert(run, 1, "-L", x.libc)
		}
		contains(t, strings.Join(run, " "), output(t, run[0], run[1:]...), newVersion)
	})
}

// later are instructions that a processor of ARMv6 does not have, and that compilers for ARMv7 like: movw is in nearly every
// function of theirs.
var later = regexp.MustCompile(`(?m)^.*\t(movw|movt|ubfx|sbfx|bfi|bfc|mls|sdiv|udiv|rbit|pli|dmb|dsb|isb)[a-z]*\t.*$`)

// What a program of ARMv6 has of machine code: the attributes that the linker gathers from C and assembly, and the code
// itself. Go's runtime has a few later instructions, which it executes where the processor knows them, and constants
// between functions look like others. What C adds must not add to them.
func TestARMv6Code(t *testing.T) {
	if !slices.Contains(archs, "armv6") {
		t.Log("not among the architectures of this run")
		return
	}
	of := func(name string) map[string]int {
		code := output(t, "arm-linux-gnueabihf-objdump", "-d", "--section=.text", unpack(t, targets["armv6"].debFile(name), name))
		if n := strings.Count(code, "\n"); n < 1_000_000 {
			t.Fatalf("%s: %d lines of machine code", name, n)
		}
		found := map[string]int{}
		for _, m := range later.FindAllStringSubmatch(code, -1) {
			found[m[1]]++
		}
		t.Logf("%s: instructions that came later: %v", name, found)
		return found
	}
	pure, linked := of("keyhaven-connector"), of("keyhaven-keyserver")
	for instruction, n := range linked {
		if n > pure[instruction]+30 {
			t.Errorf("the key server has %s %d times, the connector, which is Go's alone, %d times", instruction, n, pure[instruction])
		}
	}
	program := unpack(t, targets["armv6"].debFile("keyhaven-keyserver"), "keyhaven-keyserver")
	attributes := output(t, "readelf", "-A", program)
	contains(t, "attributes of the key server", attributes, "Tag_CPU_arch: v6\n", "Tag_FP_arch: VFPv2\n", "Tag_ABI_VFP_args: VFP registers\n", "Tag_THUMB_ISA_use: Thumb-1\n")
	control := unpack(t, targets["armhf"].debFile("keyhaven-keyserver"), "keyhaven-keyserver")
	contains(t, "attributes of the key server of ARMv7", output(t, "readelf", "-A", control), "Tag_CPU_arch: v7\n")
}

func TestSameBytesTwice(t *testing.T) {
	for _, path := range glob(t, filepath.Join(work, "again", "*")) {
		other := filepath.Join(work, "new", filepath.Base(path))
		if strings.HasPrefix(filepath.Base(path), "SHA256SUMS") { // of other architectures as well
			continue
		}
		if read(t, path) != read(t, other) {
			t.Errorf("%s differs from what another copy of the tree gave", filepath.Base(path))
		}
	}
	keys := filepath.Join(work, "keys")
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a, b} {
		repository(t, "again", dir, keys, "REPO_DATE=1800000000")
	}
	if out, err := exec.Command("diff", "-r", a, b).CombinedOutput(); err != nil {
		t.Errorf("two repositories of the same packages: %v\n%s", err, out)
	}
}

// Every file of a release is under the signed checksums.
func TestChecksums(t *testing.T) {
	dir := filepath.Join(work, "new")
	cmd := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	sums := read(t, filepath.Join(dir, "SHA256SUMS"))
	for _, path := range glob(t, filepath.Join(dir, "*")) {
		if name := filepath.Base(path); !strings.HasPrefix(name, "SHA256SUMS") && !strings.Contains(sums, "  "+name+"\n") {
			t.Errorf("%s is not in SHA256SUMS", name)
		}
	}
	each(t, func(t *testing.T, x target, name string) {
		bill := read(t, filepath.Join(dir, name+"_"+newVersion+"_"+x.file+".spdx.json"))
		contains(t, "bill of materials", bill, `"SPDX-2.3"`, strings.Fields(output(t, "sha256sum", unpack(t, x.debFile(name), name)))[0])
	})
}
