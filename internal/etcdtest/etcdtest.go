// Package etcdtest starts real etcd clusters on loopback for tests.
package etcdtest

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/freeport"
)

// patience bounds the wait for a member to be healthy.
const patience = 30 * time.Second

// A Member is one etcd process of a cluster.
type Member struct {
	URL string // for clients
	t   testing.TB
	cmd *exec.Cmd
	arg []string
}

// Start starts a cluster of n members, which ends with the test. Further arguments go to each of them.
func Start(t testing.TB, n int, args ...string) []*Member {
	t.Helper()
	path, err := exec.LookPath("etcd")
	if err != nil {
		t.Fatal("etcd is missing; run: make setup")
	}
	addrs := make([]string, 2*n)
	for i := range addrs {
		if addrs[i], err = freeport.Addr("127.0.0.1"); err != nil {
			t.Fatal(err)
		}
	}
	url := func(i int) string { return "http://" + addrs[i] }
	var peers []string
	for i := range n {
		peers = append(peers, fmt.Sprintf("m%d=%s", i, url(n+i)))
	}
	var members []*Member
	for i := range n {
		m := &Member{URL: url(i), t: t}
		m.arg = append([]string{path, "--name", fmt.Sprintf("m%d", i), "--data-dir", filepath.Join(t.TempDir(), "data"),
			"--listen-client-urls", m.URL, "--advertise-client-urls", m.URL, "--listen-peer-urls", url(n + i),
			"--initial-advertise-peer-urls", url(n + i), "--initial-cluster", strings.Join(peers, ","),
			"--unsafe-no-fsync", "--logger", "zap", "--log-level", "error"}, args...)
		m.start()
		t.Cleanup(m.Kill)
		members = append(members, m)
	}
	for _, m := range members {
		m.await()
	}
	return members
}

func (m *Member) start() {
	m.t.Helper()
	m.cmd = exec.Command(m.arg[0], m.arg[1:]...)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
}

func (m *Member) await() {
	m.t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		r, err := http.Get(m.URL + "/health")
		if err != nil {
			continue
		}
		r.Body.Close()
		http.DefaultClient.CloseIdleConnections()
		if r.StatusCode == http.StatusOK {
			return
		}
	}
	m.t.Fatalf("etcd at %s is not healthy after %v", m.URL, patience)
}

// Kill ends the member's process at once; it may have ended already.
func (m *Member) Kill() {
	if m.cmd.ProcessState == nil {
		m.cmd.Process.Kill() //nolint:errcheck // it may have ended
		m.cmd.Wait()         //nolint:errcheck // it was killed
	}
}

// Restart starts a member that was killed again, with its data, and waits until it is healthy.
func (m *Member) Restart() {
	m.t.Helper()
	m.start()
	m.await()
}

// Freeze stops the member's process without ending it, and waits until it stands still.
func (m *Member) Freeze() {
	m.t.Helper()
	m.cmd.Process.Signal(syscall.SIGSTOP) //nolint:errcheck // its own process
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if m.stopped() {
			return
		}
	}
	m.t.Fatalf("etcd at %s does not stop", m.URL)
}

// stopped reports whether every thread of the process is stopped. See proc_pid_stat(5).
func (m *Member) stopped() bool {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", m.cmd.Process.Pid))
	if err != nil || len(stats) == 0 {
		return false
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			return false
		}
		if _, after, ok := strings.Cut(string(b), ") "); !ok || !strings.HasPrefix(after, "T") {
			return false
		}
	}
	return true
}

// Thaw lets it go on.
func (m *Member) Thaw() { m.cmd.Process.Signal(syscall.SIGCONT) } //nolint:errcheck // its own process

// URLs are the members' client URLs.
func URLs(ms []*Member) (list []string) {
	for _, m := range ms {
		list = append(list, m.URL)
	}
	return list
}
