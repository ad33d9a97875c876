package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// openTerminal makes a pseudo-terminal.
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if e := raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}); e != nil || err != nil {
		t.Fatal(e, err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// TestPrompt types a PIN, and Ctrl-C, at a terminal: neither PIN nor a terminal without echo is left behind.
func TestPrompt(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	uri := fmt.Sprintf("pkcs11:token=%s?module-path=%s", tok.Label, tok.Module)
	for _, tt := range []struct {
		name, typed, want string
		code              int
	}{
		{"PIN", tok.PIN + "\n", " ec ", 0},
		{"empty", "\n", "no PIN was given", 1},
		{"Ctrl-C", "\x03", "no PIN was given", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			master, slave := openTerminal(t)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			cmd := s.command(ctx, "key", "list", "--uri", uri)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var shown bytes.Buffer
			typed := false
			buf := make([]byte, 4096)
			ended := make(chan error, 1)
			read := make(chan struct{})
			go func() {
				defer close(read)
				for {
					n, err := master.Read(buf)
					shown.Write(buf[:n])
					if !typed && strings.Contains(shown.String(), "PIN: ") {
						typed = true
						io.WriteString(master, tt.typed)
					}
					if err != nil {
						return
					}
				}
			}()
			go func() { ended <- cmd.Wait() }()
			err := <-ended
			state, tErr := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
			slave.Close()
			<-read // the last end of the terminal is closed
			s.Write(shown.Bytes())
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if got := cmd.ProcessState.ExitCode(); got != tt.code || !strings.Contains(shown.String(), tt.want) {
				t.Errorf("got %d, %s", got, shown.String())
			}
			if tErr != nil || state.Lflag&unix.ECHO == 0 {
				t.Errorf("the terminal has no echo any more (%v)", tErr)
			}
		})
	}
}
