package notify

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// manager stands in for the service manager.
func manager(t *testing.T) *net.UnixConn {
	t.Helper()
	path := t.TempDir() + "/notify"
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return conn
}

func next(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	n, err := conn.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func TestMessages(t *testing.T) {
	conn := manager(t)
	var n Notifier
	for _, tt := range []struct {
		tell func()
		want string
	}{
		{func() { n.Ready("two sessions") }, "READY=1\nSTATUS=two sessions"},
		{func() { n.Status("no session") }, "STATUS=no session"},
		{func() { n.Stopping("draining") }, "STOPPING=1\nSTATUS=draining"},
		{func() { n.Main(4711) }, "MAINPID=4711"},
		{n.Reloading, "RELOADING=1\nMONOTONIC_USEC="},
	} {
		tt.tell()
		if got := next(t, conn); !strings.HasPrefix(got, tt.want) {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

// Without a service manager nothing is told, and nothing asked.
func TestNobodyListens(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "")
	var n Notifier
	n.Ready("")
	if err := n.Watchdog(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

// A program that is not alive is not spoken for.
func TestWatchdogIsHonest(t *testing.T) {
	conn := manager(t)
	t.Setenv("WATCHDOG_USEC", "20000")
	var dead atomic.Bool
	dead.Store(true)
	var asked atomic.Int32
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Notifier{}.Watchdog(ctx, func(context.Context) error {
			asked.Add(1)
			if dead.Load() {
				return errors.New("a lock is not given back")
			}
			return nil
		})
	}()
	for deadline := time.Now().Add(30 * time.Second); asked.Load() < 4; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nobody is asked")
		}
	}
	if err := conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a dead program was spoken for: %d bytes, %v", n, err)
	}
	dead.Store(false)
	if got := next(t, conn); got != "WATCHDOG=1" {
		t.Errorf("got %q", got)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
