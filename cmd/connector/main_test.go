package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/tunnel"
)

// asProgram makes the test's binary the program, so that tests run it as a process, with its signals and exit codes.
const asProgram = "KEYHAVEN_TEST_AS_CONNECTOR"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

const patience = 30 * time.Second

func program(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	// Under the race detector a program would wait a second before it ends.
	cmd.Env = append(os.Environ(), asProgram+"=1", "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	return cmd
}

// runProgram runs the program to its end and returns what it wrote and its exit code.
func runProgram(t *testing.T, stdin string, args ...string) (out string, code int) {
	t.Helper()
	cmd := program(args...)
	cmd.Stdin = strings.NewReader(stdin)
	b, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	} else if ok {
		return string(b), exit.ExitCode()
	}
	return string(b), 0
}

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 0, "join"},
		{[]string{"--version"}, 0, "go1."},
		{[]string{"walk"}, 2, "walk"},
		{[]string{"run"}, 3, "/etc/keyhaven/connector.yaml"},
		{[]string{"check"}, 3, "/etc/keyhaven/connector.yaml"},
		{[]string{"check", "--config", "x", "extra"}, 2, "extra"},
		{[]string{"run", "--nonsense"}, 2, "nonsense"},
		{[]string{"run", "--config", "/nonexistent.yaml"}, 3, "/nonexistent.yaml"},
		{[]string{"run", "--config", "x", "--log-level", "loud"}, 2, "debug"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			t.Parallel()
			out, code := runProgram(t, "", tt.args...)
			if code != tt.code || !strings.Contains(out, tt.says) {
				t.Errorf("exit code %d, output %q, want %d and %q", code, out, tt.code, tt.says)
			}
		})
	}
}

func TestUnknownEnvironment(t *testing.T) {
	t.Parallel()
	cmd := program("check", "--config", write(t, filepath.Join(t.TempDir(), "c.yaml"), "allow: []\n"))
	cmd.Env = append(cmd.Env, "KEYHAVEN_CONNECTOR_IDENTITY_DIRR=/x")
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != 3 || !strings.Contains(string(out), "did you mean KEYHAVEN_CONNECTOR_IDENTITY_DIR?") {
		t.Errorf("got %v, %s", err, out)
	}
}

// TestRun joins, runs, reloads and drains the program.
func TestRun(t *testing.T) {
	t.Parallel()
	in := install(t)
	dir := in.joined(t)
	a, b := origin(t), origin(t)
	path := filepath.Join(t.TempDir(), "connector.yaml")
	config := func(port uint16, extra string) {
		write(t, path, fmt.Sprintf("identity:\n  dir: %s\nallow:\n  - to: 127.0.0.1\n    ports: [%d]\nops:\n  listen: 127.0.0.1:0\n%s", dir, port, extra))
	}
	config(a, "")
	p := start(t, "run", "--config", path)
	base := "http://" + p.wait(t, `health and metrics" addr=(\S+)`)[1]
	p.wait(t, "session up")
	if code, body := get(t, base+"/readyz"); code != 200 {
		t.Errorf("readyz: got %d %s, want 200", code, body)
	}
	s := in.session(t)
	conn, err := open(t, s, a)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	echo(t, conn)
	if _, err := open(t, s, b); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("a flow outside the list: got %v, want ErrDenied", err)
	}
	if _, body := get(t, base+"/metrics"); !strings.Contains(body, `keyhaven_connector_flow_results_total{result="denied"} 1`) {
		t.Errorf("the metrics do not show the denied flow:\n%s", body)
	}

	// A bad configuration changes nothing.
	write(t, path, "allow: everything\n")
	p.signal(t, syscall.SIGHUP)
	p.wait(t, `configuration not reloaded.*connector.yaml:1: allow: must be a list`)
	echo(t, conn)

	// A good one counts at once, for open flows too.
	config(b, "drain:\n  grace: 1m\n")
	p.signal(t, syscall.SIGHUP)
	p.wait(t, `configuration reloaded.*rules=1 flows_cut=1`)
	p.wait(t, `need a restart`)
	if n, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the flow that is no longer permitted: read %d, %v, want it cut", n, err)
	}
	conn.Close()
	if conn, err = open(t, s, b); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	echo(t, conn)

	// The flow outlives the signal, the program ends with the flow.
	p.signal(t, syscall.SIGTERM)
	p.wait(t, `msg=draining`)
	if code, _ := get(t, base+"/readyz"); code != 503 {
		t.Errorf("readyz while draining: got %d, want 503", code)
	}
	echo(t, conn)
	conn.Close()
	if st := p.exit(t); st.ExitCode() != 0 {
		t.Errorf("exit: %v, want 0", st)
	}
}

// TestSecondSignal ends a drain that takes too long.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	in := install(t)
	path := write(t, filepath.Join(t.TempDir(), "connector.yaml"),
		fmt.Sprintf("identity:\n  dir: %s\nallow:\n  - to: 127.0.0.1\n    ports: [\"*\"]\ndrain:\n  grace: 10m\n", in.joined(t)))
	p := start(t, "run", "--config", path)
	conn, err := open(t, in.session(t), origin(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p.signal(t, syscall.SIGINT)
	p.wait(t, `msg=draining`)
	p.signal(t, syscall.SIGINT)
	if ws := p.exit(t).Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != syscall.SIGINT {
		t.Errorf("exit: %v, want death by SIGINT", ws)
	}
}

// TestRunAway starts the program with its edge away, and with the address for health taken.
func TestRunAway(t *testing.T) {
	t.Parallel()
	in := install(t)
	dir := in.joined(t)
	in.stop()
	path := write(t, filepath.Join(t.TempDir(), "connector.yaml"),
		fmt.Sprintf("identity:\n  dir: %s\nedges: [%q, nowhere.invalid]\nallow: []\nops:\n  listen: 127.0.0.1:0\n", dir, silentEdge))
	p := start(t, "run", "--config", path)
	base := "http://" + p.wait(t, `health and metrics" addr=(\S+)`)[1]
	p.wait(t, `no session to the edge.*edge=127\.0\.0\.1:9`)
	p.wait(t, `no session to the edge.*edge=nowhere.invalid`)
	if code, body := get(t, base+"/readyz"); code != 503 || !strings.Contains(body, "not ready") {
		t.Errorf("readyz: got %d %q, want 503 with the reason", code, body)
	}
	// What is in the way is said once, after the start.
	p.wait(t, `start-up check failed" op="udp 127\.0\.0\.1:9" .*remedy=`)
	p.wait(t, `start-up check failed" op="dns nowhere.invalid" .*remedy=`)
	p.signal(t, syscall.SIGTERM)
	if st := p.exit(t); st.ExitCode() != 0 {
		t.Errorf("exit: %v, want 0", st)
	}

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	write(t, path, fmt.Sprintf("identity:\n  dir: %s\nallow: []\nops:\n  listen: %s\n", dir, ln.Addr()))
	if out, code := runProgram(t, "", "run", "--config", path); code != 1 || !strings.Contains(out, "address already in use: another program") {
		t.Errorf("with the ops address taken: exit code %d, %s, want 1", code, out)
	}
}

// TestShipped builds the program as it is shipped: without cgo, stripped, and small enough for a small device.
func TestShipped(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "keyhaven-connector")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build without cgo: %v\n%s", err, text)
	}
	info, err := os.Stat(out)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%.1f MiB", float64(info.Size())/(1<<20))
	if limit := int64(16 << 20); info.Size() >= limit {
		t.Errorf("the program has %d bytes, want less than %d", info.Size(), limit)
	}
	if text, err := exec.Command(out, "--version").CombinedOutput(); err != nil {
		t.Errorf("--version: %v\n%s", err, text)
	}
}
