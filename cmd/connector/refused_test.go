package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// TestRefusedOnce has the edge refuse all sessions of a process: its log says so, and what to do, in one line.
func TestRefusedOnce(t *testing.T) {
	t.Parallel()
	in := install(t)
	path := write(t, filepath.Join(t.TempDir(), "connector.yaml"), fmt.Sprintf("identity:\n  dir: %s\nallow: []\n", in.joined(t)))
	in.mu.Lock()
	in.refuse = tunnel.ErrRevoked
	in.mu.Unlock()
	p := start(t, "run", "--config", path, "--log-level", "debug")
	for end := time.Now().Add(patience); strings.Count(p.text(), "no session to the edge") < 4; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the four sessions were not refused")
		}
	}
	p.signal(t, syscall.SIGTERM)
	p.exit(t)
	var errs, debugs int
	for line := range strings.Lines(p.text()) {
		if strings.Contains(line, "this connector was revoked") {
			errs += strings.Count(line, "level=ERROR")
			debugs += strings.Count(line, "level=DEBUG")
		}
	}
	if errs != 1 || debugs < 3 {
		t.Errorf("%d lines at ERROR and %d at DEBUG, want 1 and those of the other sessions", errs, debugs)
	}
}
