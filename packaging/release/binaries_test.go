//go:build packages

package main

import (
	"bytes"
	"debug/elf"
	"debug/macho"
	"debug/pe"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// dist is where make binaries puts programs.
const dist = "../../dist/bin"

// machines are what programs for Linux are, and how QEMU runs them: on the oldest processor that each is for. Those for 386 run
// without it, since threads of Go crash under its emulation of that.
var machines = map[string]struct {
	machine elf.Machine
	class   elf.Class
	qemu    []string
}{
	"amd64":   {elf.EM_X86_64, elf.ELFCLASS64, []string{"qemu-x86_64-static"}},
	"386":     {elf.EM_386, elf.ELFCLASS32, nil},
	"arm64":   {elf.EM_AARCH64, elf.ELFCLASS64, []string{"qemu-aarch64-static", "-cpu", "cortex-a53"}},
	"armv5":   {elf.EM_ARM, elf.ELFCLASS32, []string{"qemu-arm-static", "-cpu", "arm926"}},
	"armv6":   {elf.EM_ARM, elf.ELFCLASS32, []string{"qemu-arm-static", "-cpu", "arm1176"}},
	"armv7":   {elf.EM_ARM, elf.ELFCLASS32, []string{"qemu-arm-static", "-cpu", "cortex-a7"}},
	"riscv64": {elf.EM_RISCV, elf.ELFCLASS64, []string{"qemu-riscv64-static"}},
	"mipsle":  {elf.EM_MIPS, elf.ELFCLASS32, []string{"qemu-mipsel-static", "-cpu", "24Kc"}},
}

// TestBinaries looks at each program, and has those for Linux say their version.
func TestBinaries(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(dist, "keyhaven-*"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, path := range paths {
		name := strings.TrimSuffix(filepath.Base(path), ".exe")
		parts := strings.Split(name, "-")
		if strings.HasSuffix(name, ".json") || len(parts) != 4 {
			continue
		}
		found[name] = true
		t.Run(name, func(t *testing.T) {
			switch parts[2] {
			case "linux":
				linux(t, path, parts[3])
			case "darwin":
				f, err := macho.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				f.Close()
			case "windows":
				f, err := pe.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				f.Close()
			}
		})
	}
	for arch := range machines {
		if name := "keyhaven-connector-linux-" + arch; !found[name] {
			t.Errorf("%s is missing: run make binaries", name)
		}
	}
}

func linux(t *testing.T, path, arch string) {
	t.Helper()
	m, ok := machines[arch]
	if !ok {
		t.Fatalf("architecture %s is not known", arch)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Machine != m.machine || f.Class != m.class {
		t.Errorf("is %v, %v, want %v, %v", f.Machine, f.Class, m.machine, m.class)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("is not static: it has a segment %v", p.Type)
		}
	}
	if strings.HasPrefix(arch, "armv") {
		arch = "arm"
	}
	args := append(m.qemu, path, "--version")
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "linux/"+arch+")") {
		t.Errorf("%v: %v: %s", args, err, out)
	}
}

// TestSameBytes builds the connector from two copies of the tree.
func TestSameBytes(t *testing.T) {
	list, err := exec.Command("git", "-C", "../..", "ls-files", "-z").Output()
	if err != nil {
		t.Fatal(err)
	}
	var programs [2][]byte
	for i := range programs {
		dir := filepath.Join(t.TempDir(), strings.Repeat("x", 5+i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		copies := exec.Command("sh", "-c", `tar --null -T - -cf - | tar -xf - -C "$0"`, dir)
		copies.Dir, copies.Stdin = "../..", bytes.NewReader(list)
		if out, err := copies.CombinedOutput(); err != nil {
			t.Fatalf("tar: %v: %s", err, out)
		}
		build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X github.com/keyhaven/keyhaven/internal/cli.release=1.2.3", "-o", "program", "./cmd/connector")
		build.Dir, build.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v: %s", err, out)
		}
		if programs[i], err = os.ReadFile(filepath.Join(dir, "program")); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(programs[0], programs[1]) {
		t.Error("the same source gave two programs")
	}
	if runtime.GOOS == "linux" && len(programs[0]) > 16<<20 {
		t.Errorf("the connector has %d bytes, want 16 MiB at most", len(programs[0]))
	}
}
