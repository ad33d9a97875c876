//go:build unix

package takeover

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/keyhaven/keyhaven/internal/notify"
)

// role has this test's own program do what a successor does.
const role = "TAKEOVER_TEST_ROLE"

func TestMain(m *testing.M) {
	if as := os.Getenv(role); as != "" {
		if err := succeed(as); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// succeed takes over and answers each connection with a line, until it is told to end.
func succeed(as string) error {
	if as == "dies" {
		return errors.New("this one cannot start")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	p, err := Begin()
	if err != nil {
		return err
	}
	if !p.Succeeds() || os.Getenv(variable) != "" {
		return errors.New("no predecessor, or its variable is left for others to see")
	}
	fds := []int{3, 4}
	for _, s := range p.left {
		fds = append(fds, s.FD)
	}
	for _, fd := range fds {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			return fmt.Errorf("descriptor %d would be inherited by every program that this one starts: %v", fd, err)
		}
	}
	if as == "hangs" {
		<-ctx.Done()
		return nil
	}
	if path, ok := strings.CutPrefix(as, "gives up "); ok {
		ln, err := p.Listen("unix", path)
		if err != nil {
			return err
		}
		return errors.Join(ln.Close(), errors.New("this one cannot do its work"))
	}
	if !p.Idle() {
		return errors.New("nobody says that the predecessor is idle")
	}
	if err := p.Ready(ctx); err != nil {
		return err
	}
	words := strings.Fields(as)
	lns := make([]net.Listener, 2)
	for i, network := range []string{"tcp", "unix"} {
		if lns[i], err = p.Listen(network, words[i]); err != nil {
			return err
		}
	}
	p.Discard()
	go serve(lns[1], "second")
	<-p.Requests() // handed on
	go serve(lns[0], "second")
	<-ctx.Done()
	return errors.Join(lns[0].Close(), lns[1].Close())
}

func serve(ln net.Listener, line string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		fmt.Fprintln(c, line)
		c.Close()
	}
}

func says(network, addr string) (string, error) {
	c, err := net.Dial(network, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}

// begin is Begin for a process that is not to keep the signal.
func begin(t *testing.T) *Process {
	t.Helper()
	p, err := Begin()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { signal.Stop(p.request) })
	return p
}

func TestTakeover(t *testing.T) {
	p := begin(t)
	if p.Succeeds() {
		t.Fatal("a predecessor, where there is none")
	}
	if err := p.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	tcp, err := p.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	unix, err := p.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	spare, err := p.Listen("tcp", "127.0.0.1:0") // the successor does not want it
	if err != nil {
		t.Fatal(err)
	}
	closed, err := p.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()

	t.Setenv(role, "dies")
	if _, err := p.Start(t.Context(), true); err == nil || !strings.Contains(err.Error(), "ended before it was ready: exit status 1") {
		t.Errorf("a process that ends: %v", err)
	}
	t.Setenv(role, "hangs")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	if _, err := p.Start(ctx, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a process that hangs: %v", err)
	}
	cancel()
	t.Setenv(role, "gives up "+path)
	if _, err := p.Start(t.Context(), true); err == nil || !strings.Contains(err.Error(), "ended before it was ready") {
		t.Errorf("a process that gives up: %v", err)
	}

	// After all of them, this process goes on.
	go serve(tcp, "first")
	go serve(unix, "first")
	for network, a := range map[string]string{"tcp": tcp.Addr().String(), "unix": path} {
		if got, err := says(network, a); err != nil || got != "first" {
			t.Errorf("%s: got %q, %v", network, got, err)
		}
	}
	t.Setenv(role, "127.0.0.1:0 "+path)
	s, err := p.Start(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	process, err := os.FindProcess(s.PID())
	if err != nil {
		t.Fatal(err)
	}
	addr, unwanted := tcp.Addr().String(), spare.Addr().String()
	for _, ln := range []net.Listener{tcp, unix, spare} {
		ln.Close()
	}
	// Who comes now waits until the other process accepts.
	waiting, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	// So does who wants the program replaced once more.
	if err := syscall.Kill(os.Getpid(), syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); len(p.request) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the signal is not reported")
		}
	}
	if err := s.Release(notify.Notifier{}); err != nil {
		t.Fatal(err)
	}
	waiting.SetDeadline(time.Now().Add(30 * time.Second)) //nolint:errcheck // Read would fail too
	if b, err := io.ReadAll(waiting); err != nil || string(b) != "second\n" {
		t.Errorf("who waited got %q, %v", b, err)
	}
	for network, a := range map[string]string{"tcp": addr, "unix": path} {
		if got, err := says(network, a); err != nil || got != "second" {
			t.Errorf("%s: got %q, %v", network, got, err)
		}
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", unwanted)
		if err != nil {
			break
		}
		c.Close()
		if time.Now().After(end) {
			t.Fatal("a socket that nobody wants still takes connections")
		}
	}
	if err := process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if state, err := process.Wait(); err != nil || !state.Success() {
		t.Errorf("the process that took over: %v, %v", state, err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its socket is left behind: %v", err)
	}
}

// A predecessor that ends without handing over leaves a process that ends, too.
func TestPredecessorGone(t *testing.T) {
	p := begin(t)
	t.Setenv(role, "127.0.0.1:0 "+filepath.Join(t.TempDir(), "s"))
	s, err := p.Start(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	process, err := os.FindProcess(s.PID())
	if err != nil {
		t.Fatal(err)
	}
	s.in.Close()
	s.out.Close()
	if state, err := process.Wait(); err != nil || state.ExitCode() != 1 {
		t.Errorf("got %v, %v, want exit code 1", state, err)
	}
}

// A socket that is inherited under another name is not in the way, and those that were closed are forgotten.
func TestListen(t *testing.T) {
	old, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fd, err := duplicate(old.(fileListener))
	if err != nil {
		t.Fatal(err)
	}
	addr := old.Addr().(*net.TCPAddr)
	old.Close()
	p := &Process{left: []socket{{Network: "tcp", Addr: fmt.Sprintf("localhost:%d", addr.Port), FD: fd}}}
	for range 3 {
		ln, err := p.Listen("tcp", addr.String())
		if err != nil {
			t.Fatal(err)
		}
		if len(p.opened) != 1 {
			t.Errorf("%d sockets are to be handed on, want one", len(p.opened))
		}
		ln.Close()
	}
}

func TestRequest(t *testing.T) {
	p := begin(t)
	if err := syscall.Kill(os.Getpid(), syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Requests():
	case <-time.After(30 * time.Second):
		t.Error("the signal is not reported")
	}
}

// FuzzBequest reads what stands in the environment, which anybody may set who starts the program.
func FuzzBequest(f *testing.F) {
	f.Add(`{"in":3,"out":4,"sockets":[{"network":"tcp","addr":"127.0.0.1:1","fd":5}]}`)
	f.Add(`{"in":0,"out":1}`)
	f.Add(`{"in":3,"out":3}`)
	f.Fuzz(func(t *testing.T, text string) {
		b, err := parse(text)
		if err != nil {
			return
		}
		seen := map[int]bool{}
		for _, fd := range b.fds() {
			if fd < 3 || seen[fd] {
				t.Errorf("descriptor %d of %s", fd, text)
			}
			seen[fd] = true
		}
	})
}
