package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// serviceManager returns the path of a notification socket, and what waits for a message on it and returns what follows.
func serviceManager(t *testing.T) (path string, next func(want string) string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "kh") // short, as the path of a socket must be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return path, func(want string) string {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		for buf := make([]byte, 4096); ; {
			n, err := conn.Read(buf)
			if err != nil {
				t.Fatalf("waiting for %s: %v", want, err)
			}
			if rest, ok := strings.CutPrefix(string(buf[:n]), want); ok {
				return rest
			}
		}
	}
}

// refused returns the configuration of a connector that no edge takes.
func refused(t *testing.T) string {
	t.Helper()
	in := install(t)
	config := write(t, filepath.Join(t.TempDir(), "connector.yaml"), fmt.Sprintf("identity:\n  dir: %s\nallow: []\n", in.joined(t)))
	in.mu.Lock()
	in.refuse = tunnel.ErrRevoked
	in.mu.Unlock()
	return config
}

// TestNotify follows a connector that no edge takes on the service manager's socket: it is there to try, and it lives.
func TestNotify(t *testing.T) {
	path, next := serviceManager(t)
	cmd := program("run", "--config", refused(t))
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=200000")
	p := startCommand(t, cmd)
	next("READY=1\nSTATUS=0 of ")
	next("WATCHDOG=1")
	next("STATUS=no session: ")
	p.signal(t, syscall.SIGHUP)
	next("RELOADING=1\nMONOTONIC_USEC=")
	next("READY=1\nSTATUS=")
	next("WATCHDOG=1")
	p.signal(t, syscall.SIGTERM)
	next("STOPPING=1\nSTATUS=")
	if state := p.exit(t); !state.Success() {
		t.Errorf("ended with %v", state)
	}
}
