package main

import (
	"net"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyhaven/keyhaven/internal/unixsock"
)

// TestWorkersDoNotControl: what a worker, or a process that it started, says at the control socket is refused.
func TestWorkersDoNotControl(t *testing.T) {
	ln, err := unixsock.Listen(filepath.Join(t.TempDir(), "sock"), 4)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other := exec.CommandContext(t.Context(), "sleep", "60")
	other.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	for _, tt := range []struct {
		leader int
		want   bool
	}{{syscall.Getpgrp(), true}, {other.Process.Pid, false}} {
		c := &control{workers: func() []int { return []int{tt.leader} }}
		if got := c.byWorker(conn); got != tt.want {
			t.Errorf("with the worker %d: got %v, want %v", tt.leader, got, tt.want)
		}
	}
}

func TestProtect(t *testing.T) {
	dumpable := func() int {
		t.Helper()
		v, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	before := dumpable()
	defer func() {
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(before), 0, 0, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := protect(); err != nil {
		t.Fatal(err)
	}
	if got := dumpable(); got != 0 {
		t.Errorf("got dumpable %d, want 0", got)
	}
}
