package main

import (
	"context"
	"log/slog"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A manager is a service manager's notification socket.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
	path string
}

func newManager(t *testing.T) *manager {
	t.Helper()
	path := t.TempDir() + "/notify"
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &manager{t, conn, path}
}

// next returns the next message that fits, and fails if another one comes that does not fit skip.
func (m *manager) next(want string, skip ...string) string {
	m.t.Helper()
	if err := m.conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		m.t.Fatal(err)
	}
	buf := make([]byte, 4096)
	for {
		n, err := m.conn.Read(buf)
		if err != nil {
			m.t.Fatalf("waiting for %s: %v", want, err)
		}
		text := string(buf[:n])
		if regexp.MustCompile(want).MatchString(text) {
			return text
		}
		skipped := false
		for _, s := range skip {
			skipped = skipped || strings.Contains(text, s)
		}
		if !skipped {
			m.t.Fatalf("got %q, want %s", text, want)
		}
	}
}

// TestNotify follows a server's life on the service manager's socket.
func TestNotify(t *testing.T) {
	s := newSite(t)
	m := newManager(t)
	s.env = append(s.env, "NOTIFY_SOCKET="+m.path, "WATCHDOG_USEC=200000")
	text := s.config("clients:" + rule("one", "sign"))
	p := s.start(s.write("ks.yaml", 0o600, text))
	ready := m.next("^READY=1\nSTATUS=serving 1 keys from 1 of 1 homes$")
	if err := connect(t, p, s.tls("one")); err != nil {
		t.Errorf("after %q: %v", ready, err)
	}
	const alive = "WATCHDOG=1"
	m.next(alive)
	p.reload(reloaded)
	m.next(`^RELOADING=1\nMONOTONIC_USEC=[0-9]+\nSTATUS=`, alive)
	m.next("^READY=1\n", alive)
	m.next(alive)
	s.write("ks.yaml", 0o600, "listen: [")
	p.reload(refused)
	m.next("^RELOADING=1\n", alive)
	m.next("^READY=1\n", alive)
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	m.next("^STOPPING=1\n", alive)
	<-p.done
}

// TestTakeover replaces a server: to the service manager the unit does not stop, and another process is its main one before
// that serves.
func TestTakeover(t *testing.T) {
	s := newSite(t)
	m := newManager(t)
	s.env = append(s.env, "NOTIFY_SOCKET="+m.path, "WATCHDOG_USEC=200000")
	state := s.path("state")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg := s.write("ks.yaml", 0o600, s.config("state_dir: "+state+"\ncontrol: "+s.path("ks.sock")+"\nclients:"+rule("one", "sign")))
	p := s.start(cfg)
	const alive = "WATCHDOG=1"
	m.next("^READY=1\n")
	if err := p.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimPrefix(m.next("^MAINPID=[0-9]+$", alive), "MAINPID="))
	if err != nil {
		t.Fatal(err)
	}
	next, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	m.next("^READY=1\nSTATUS=serving 1 keys from 1 of 1 homes$", alive)
	m.next(alive)
	s.must("status", "--config", cfg)
	if err := next.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	m.next("^STOPPING=1\n", alive)
	<-p.done
}

// TestAlive finds a lock that is not given back, and loops that stand still.
func TestAlive(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	s := &server{logger: logger, keys: newKeyring(logger)}
	s.probes = newProber(s.keys.registry, time.Minute, logger)
	s.service = newTestService(s.keys.registry)
	alive := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		return s.alive(ctx)
	}
	if err := alive(); err == nil || !strings.Contains(err.Error(), "stands still") {
		t.Errorf("loops that never ran: %v", err)
	}
	s.keys.beat.Store(time.Now().UnixNano())
	s.probes.beat.Store(time.Now().UnixNano())
	if err := s.alive(t.Context()); err != nil {
		t.Error(err)
	}
	s.keys.mu.Lock()
	if err := alive(); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("a lock that is held: %v", err)
	}
	s.keys.mu.Unlock()
}
