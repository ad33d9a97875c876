package unixsock

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPeerUID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := Listen(path, 1)
	must(t, err)
	defer ln.Close()
	go func() {
		if c, err := net.Dial("unix", path); err == nil {
			defer c.Close()
			io.Copy(io.Discard, c)
		}
	}()
	c, err := ln.Accept()
	must(t, err)
	defer c.Close()
	if uid, err := PeerUID(c); err != nil || uid != uint32(os.Geteuid()) {
		t.Errorf("PeerUID = %d, %v, want %d", uid, err, os.Geteuid())
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if uid, err := PeerUID(a); err == nil || uid == 0 {
		t.Errorf("PeerUID of a pipe = %d, %v, want an error and not root", uid, err)
	}
}

// The listener takes no more connections than it may, and goes on when one is closed.
func TestBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := Listen(path, 1)
	must(t, err)
	defer ln.Close()
	for range 2 {
		c, err := net.Dial("unix", path)
		must(t, err)
		defer c.Close()
	}
	first, err := ln.Accept()
	must(t, err)
	second := make(chan net.Conn)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			t.Error(err)
		}
		second <- c
	}()
	select {
	case <-second:
		t.Error("a second connection was taken beside the first")
	default:
	}
	must(t, first.Close())
	(<-second).Close()
	must(t, ln.Close())
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
