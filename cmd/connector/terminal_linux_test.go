package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal returns both ends of a new pseudo-terminal.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// TestPrompt types a join token at a terminal, which must not show it.
func TestPrompt(t *testing.T) {
	t.Parallel()
	in := install(t)
	token := in.token(t, time.Now().Add(time.Hour))
	master, slave := terminal(t)
	cmd := program("join", "--dir", filepath.Join(t.TempDir(), "id"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	var mu sync.Mutex
	var shown strings.Builder
	text := func() string {
		mu.Lock()
		defer mu.Unlock()
		return shown.String()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for buf := make([]byte, 1024); ; {
			n, err := master.Read(buf)
			mu.Lock()
			shown.Write(buf[:n])
			mu.Unlock()
			if err != nil { // the program has ended
				return
			}
		}
	})
	for end := time.Now().Add(patience); !strings.Contains(text(), "Join token: "); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			cmd.Process.Kill() //nolint:errcheck // the test fails anyway
			t.Fatalf("no prompt: %q", text())
		}
	}
	if _, err := master.WriteString(token + "\n"); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	wg.Wait()
	if err != nil || !strings.Contains(text(), "joined as") {
		t.Errorf("join: %v: %q", err, text())
	}
	if strings.Contains(text(), token[5:20]) {
		t.Errorf("the terminal shows the token: %q", text())
	}
}
