package freeport

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
)

const (
	asked = 50 // ports for each who asks
	role  = "FREEPORT_TEST_CHILD"
)

func TestMain(m *testing.M) {
	next = 0 // all begin at the same place
	if os.Getenv(role) != "" {
		child()
	}
	os.Exit(m.Run())
}

// child prints its ports and keeps them until its input ends.
func child() {
	for range asked {
		addr, err := Addr("127.0.0.1")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(addr)
	}
	io.Copy(io.Discard, os.Stdin) //nolint:errcheck // it ends somehow
	os.Exit(0)
}

// TestAddr asks from goroutines of several processes at the same time: no port may come twice.
func TestAddr(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]bool{}
	note := func(addr string) {
		mu.Lock()
		defer mu.Unlock()
		if seen[addr] {
			t.Errorf("%s came twice", addr)
		}
		seen[addr] = true
	}
	want, children := 4*asked, 0
	if runtime.GOOS == "linux" {
		children = 3
		want += children * asked
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range asked {
				addr, err := Addr("127.0.0.1")
				if err != nil {
					t.Error(err)
					return
				}
				note(addr)
			}
		})
	}
	for range children {
		lines := startChild(t)
		wg.Go(func() {
			for range asked {
				addr, err := lines.ReadString('\n')
				if err != nil {
					t.Errorf("child: %v", err)
					return
				}
				note(strings.TrimSpace(addr))
			}
		})
	}
	wg.Wait()
	if len(seen) != want {
		t.Errorf("%d ports, want %d", len(seen), want)
	}
}

func startChild(t *testing.T) *bufio.Reader {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), role+"=1", "GORACE=atexit_sleep_ms=0")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("child: %v", err)
		}
	})
	return bufio.NewReader(out)
}

// TestUsed: a port that is used by TCP or UDP is not given.
func TestUsed(t *testing.T) {
	addr, err := Addr("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if Check(addr) == nil {
		t.Error("a port that TCP uses is called unused")
	}
	tcp.Close()
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	if Check(addr) == nil {
		t.Error("a port that UDP uses is called unused")
	}
	if _, err := Addr("192.0.2.1"); err == nil {
		t.Error("an address that is not this machine's has a port")
	}
}
