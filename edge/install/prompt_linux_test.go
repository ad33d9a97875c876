package install

import (
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The script comes through a pipe, so that the token is asked for on the terminal; without one, it says how to go on.
func TestPrompt(t *testing.T) {
	files := release()
	files[programPrefix+"amd64"] = fakeProgram
	b := newBed(t, files)
	bin, out := newTools(t), t.TempDir()
	proc := bin.machine(t, "x86_64", "", 1)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	must(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b.Certificate().Raw}), 0o644))
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	must(t, err)
	defer master.Close()
	must(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	must(t, err)
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	must(t, err)
	defer slave.Close()

	install := func(root string, terminal *os.File) string {
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "-s", "--", "--root", root)
		cmd.Stdin = strings.NewReader(b.script())
		cmd.Env = []string{"PATH=" + bin.dir + ":" + os.Getenv("PATH"), "KEYHAVEN_PROC=" + proc, "OUT=" + out, "CURL_CA_BUNDLE=" + ca, "TMPDIR=" + t.TempDir()}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if terminal != nil {
			cmd.ExtraFiles = []*os.File{terminal}
			cmd.SysProcAttr.Setctty, cmd.SysProcAttr.Ctty = true, 3
		}
		text, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, text)
		}
		return string(text)
	}
	root := filepath.Join(t.TempDir(), "root")
	if text := install(root, nil); !strings.Contains(text, "on a terminal, or with --token-file") {
		t.Errorf("without a terminal: %s", text)
	}
	if _, err := os.Stat(filepath.Join(out, "calls")); err == nil {
		t.Error("without a terminal it joined")
	}
	_, err = master.WriteString("khj1_typed\n") // waits in the terminal until it is read
	must(t, err)
	text := install(root, slave)
	if got, err := os.ReadFile(filepath.Join(out, "token")); err != nil || string(got) != "khj1_typed" {
		t.Errorf("the program got %q, %v\n%s", got, err, text)
	}
	calls, err := os.ReadFile(filepath.Join(out, "calls"))
	must(t, err)
	if want := "join --dir " + root + "/var/lib/keyhaven-connector\n"; string(calls) != want {
		t.Errorf("called with %q, want %q", calls, want)
	}
}
