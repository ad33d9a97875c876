//go:build unix

package main

import (
	"os"
	"strconv"
	"syscall"
	"testing"
)

// TestTakeoverWithoutSession replaces a connector that no edge takes by one that no edge takes either, which then lives.
func TestTakeoverWithoutSession(t *testing.T) {
	t.Parallel()
	path, next := serviceManager(t)
	cmd := program("run", "--config", refused(t))
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=200000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p := startCommand(t, cmd)
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }) // both, of which the other has the first one's output
	next("READY=1\nSTATUS=0 of ")
	p.signal(t, syscall.SIGUSR2)
	pid, err := strconv.Atoi(next("MAINPID="))
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	next("READY=1\nSTATUS=")
	next("WATCHDOG=1")
	if err := other.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	next("STOPPING=1\nSTATUS=")
	if state := p.exit(t); !state.Success() {
		t.Errorf("the one that was replaced ended with %v", state)
	}
}
