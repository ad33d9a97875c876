package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// resident returns a process's resident memory in KiB.
func resident(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(b)
	if m == nil {
		t.Fatalf("no VmRSS in %s", b)
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestIdleMemory runs the program as it is shipped with four idle sessions: it is small enough for a small device.
func TestIdleMemory(t *testing.T) {
	t.Parallel()
	in := install(t)
	tmp := t.TempDir()
	bin := filepath.Join(tmp, "keyhaven-connector")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, text)
	}
	config := write(t, filepath.Join(tmp, "connector.yaml"), fmt.Sprintf(
		"identity:\n  dir: %s\nallow: []\ncontrol: %s\nops:\n  listen: 127.0.0.1:0\n", in.joined(t), filepath.Join(tmp, "control.sock")))
	p := startCommand(t, exec.Command(bin, "run", "--config", config))
	p.wait(t, `health and metrics`)
	for end := time.Now().Add(patience); strings.Count(p.text(), "session up") < 4; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("four sessions did not come up")
		}
	}
	const limit = 20 << 10
	least := resident(t, p.cmd.Process.Pid)
	for end := time.Now().Add(patience); least >= limit && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		least = min(least, resident(t, p.cmd.Process.Pid))
	}
	t.Logf("%.1f MiB", float64(least)/1024)
	if least >= limit {
		t.Errorf("%d KiB are resident, want less than %d", least, limit)
	}
}
