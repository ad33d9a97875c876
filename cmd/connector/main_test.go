package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// asProgram makes the test's binary the program, so that tests run it as a process, with its signals and exit codes.
const asProgram = "KEYHAVEN_CONNECTOR_TEST_AS_PROGRAM"

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
	cmd.Env = append(os.Environ(), asProgram+"=1")
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

func TestJoin(t *testing.T) {
	t.Parallel()
	in := install(t)
	hour := time.Now().Add(time.Hour)
	used := in.token(t, hour)
	if out, code := runProgram(t, used, "join", "--token-file", "-", "--dir", filepath.Join(t.TempDir(), "id")); code != 0 {
		t.Fatalf("join: exit code %d: %s", code, out)
	}
	unknown := in.token(t, hour)
	if tok, err := mtls.ParseJoinToken(unknown); err != nil {
		t.Fatal(err)
	} else {
		delete(in.tokens, tok.ID)
	}
	other, err := mtls.NewJoinToken([32]byte{1}, []string{in.addr})
	if err != nil {
		t.Fatal(err)
	}
	open := write(t, filepath.Join(t.TempDir(), "token"), in.token(t, hour))
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	taken := in.joined(t)
	for _, tt := range []struct {
		name  string
		token string // on standard input
		args  []string
		code  int
		says  []string
	}{
		{"good", in.token(t, hour), nil, 0, []string{"spiffe://test.example/connector/site-1", "tunnel-1", in.addr}},
		{"used", used, nil, 1, []string{"used before", "ask for a new one", "keyhaven-edge tunnel token"}},
		{"named", in.token(t, hour), []string{"--name", "site-2"}, 0, []string{"connector/site-2"}},
		{"expired", in.token(t, time.Now().Add(-time.Minute)), nil, 1, []string{"expired", "ask for a new one"}},
		{"unknown", unknown, nil, 1, []string{"does not know the join token"}},
		{"second edge answers", in.token(t, hour, silentEdge, in.addr), nil, 0, []string{"site-1"}},
		{"unreachable edge", in.token(t, hour, silentEdge), nil, 1, []string{silentEdge, "not used up"}},
		{"edge of another authority", other.Reveal(), nil, 1, []string{in.addr}},
		{"malformed", "khj1_nonsense", nil, 3, []string{"join token", "khj1_"}},
		{"empty", "", nil, 3, []string{"join token"}},
		{"too long", strings.Repeat("x", 9000), nil, 3, []string{"8192"}},
		{"missing file", "", []string{"--token-file", "/nonexistent/token"}, 3, []string{"/nonexistent/token"}},
		{"file open to others", "", []string{"--token-file", open}, 3, []string{"chmod 600"}},
		{"taken directory", in.token(t, hour), []string{"--dir", taken}, 3, []string{taken, "another directory"}},
		{"no directory", "", []string{"--dir", ""}, 2, []string{"--dir"}},
		{"no token", "", []string{"--token-file", ""}, 2, []string{"--token-file"}},
		{"token as argument", "", []string{used}, 2, []string{"--token-file"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"join", "--token-file", "-", "--dir", filepath.Join(t.TempDir(), "id")}, tt.args...)
			out, code := runProgram(t, tt.token, args...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d: %s", code, tt.code, out)
			}
			for _, want := range tt.says {
				if !strings.Contains(out, want) {
					t.Errorf("output %q, want it to say %q", out, want)
				}
			}
			for _, secret := range []string{tt.token, used} {
				if len(secret) > 40 && strings.Contains(out, secret[30:]) {
					t.Errorf("the token is in the output: %s", out)
				}
			}
		})
	}
}

// silentEdge is an address where nothing listens.
const silentEdge = "127.0.0.1:9"

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
		{[]string{"run"}, 2, "config"},
		{[]string{"check"}, 2, "config"},
		{[]string{"check", "--config", "x", "extra"}, 2, "extra"},
		{[]string{"run", "--nonsense"}, 2, "nonsense"},
		{[]string{"run", "--config", "/nonexistent.yaml"}, 3, "/nonexistent.yaml"},
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

func TestCheck(t *testing.T) {
	t.Parallel()
	in := install(t)
	dir := in.joined(t)
	edgeDir := t.TempDir()
	key, csr, _ := mtls.NewKeyCSR()
	chain, err := in.authority.IssueCSR(csr, mtls.Identity{TrustDomain: "test.example", Kind: mtls.KindEdge, Name: "e"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := mtls.WriteIdentity(edgeDir, key, chain, in.authority.RootPEM()); err != nil {
		t.Fatal(err)
	}
	head := "identity:\n  dir: " + dir + "\n"
	for _, tt := range []struct {
		name string
		yaml string
		code int
		says []string
	}{
		{"good", head + "allow:\n  - to: 10.0.0.0/8\n    ports: [443, 8000-8010, \"*\"]\n", 0, []string{"ok", "1 rules", in.addr}},
		{"nothing permitted", head + "allow: []\n", 0, []string{"warning", "every flow will be denied"}},
		{"own edges", head + "edges: [edge.example]\nallow: []\n", 0, []string{"[edge.example]"}},
		{"no allow", head, 3, []string{"allow: is missing", "allow: []"}},
		{"no identity", "allow: []\n", 3, []string{"identity.dir", "join"}},
		{"identity missing", "identity:\n  dir: /nonexistent\nallow: []\n", 3, []string{"/nonexistent", "keyhaven-connector join"}},
		{"identity of an edge", "identity:\n  dir: " + edgeDir + "\nallow: []\n", 3, []string{"not for a connector"}},
		{"no edges anywhere", "identity:\n  dir: " + edgeDir + "\nallow: []\n", 3, []string{"connector"}},
		{"unknown key", head + "alow: []\n", 3, []string{":3: ", "alow", "did you mean allow?"}},
		{"unknown key in a rule", head + "allow:\n  - to: 10.0.0.1\n    port: [443]\n", 3, []string{":5: ", "allow[0].port", "ports"}},
		{"wrong type", head + "allow: []\nlimits:\n  max_flows: many\n", 3, []string{":5: ", "limits.max_flows", "whole number"}},
		{"ports no list", head + "allow:\n  - to: 10.0.0.1\n    ports: 443\n", 3, []string{":5: ", "allow[0].ports", "list"}},
		{"bad port", head + "allow:\n  - to: 10.0.0.1\n    ports: [443, 70000]\n", 3, []string{":5: ", "allow[0].ports[1]", "65535"}},
		{"no ports", head + "allow:\n  - to: 10.0.0.1\n", 3, []string{":4: ", "allow[0].ports", `"*"`}},
		{"no destination", head + "allow:\n  - ports: [1]\n", 3, []string{":4: ", "allow[0].to", "missing"}},
		{"bits beyond the length", head + "allow:\n  - to: 10.0.0.1/8\n    ports: [1]\n", 3, []string{":4: ", "allow[0].to", "write 10.0.0.0/8"}},
		{"bad edge", head + "edges: [\"https://edge\"]\nallow: []\n", 3, []string{":3: ", "edges[0]", "port must be a number"}},
		{"edge twice", head + "edges: [edge, \"edge:7844\"]\nallow: []\n", 3, []string{":3: ", "edges[1]", "remove one"}},
		{"bad duration", head + "allow: []\ndrain:\n  grace: 30\n", 3, []string{":5: ", "drain.grace", "such as 5s"}},
		{"zero grace", head + "allow: []\ndrain:\n  grace: 0s\n", 3, []string{"drain.grace", "positive"}},
		{"ops for all", head + "allow: []\nops:\n  addr: 0.0.0.0:9464\n", 3, []string{":5: ", "ops.addr", "127.0.0.1", "ops.allow_non_loopback"}},
		{"log level", head + "allow: []\nlog:\n  level: loud\n", 3, []string{":5: ", "log.level", "debug"}},
		{"two faults", head + "allow: []\nlog:\n  level: loud\nlimits:\n  max_flows: 0\n", 3, []string{"log.level", "limits.max_flows"}},
		{"not YAML", head + "allow: [\n", 3, []string{"not valid YAML"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := write(t, filepath.Join(t.TempDir(), "connector.yaml"), tt.yaml)
			out, code := runProgram(t, "", "check", "--config", path)
			if code != tt.code {
				t.Errorf("exit code %d, want %d: %s", code, tt.code, out)
			}
			for _, want := range tt.says {
				if !strings.Contains(out, want) {
					t.Errorf("output %q, want it to say %q", out, want)
				}
			}
		})
	}
}

func TestExamples(t *testing.T) {
	t.Parallel()
	in := install(t)
	dir := in.joined(t)
	files, err := filepath.Glob("../../examples/connector/*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			text := string(b)
			const placeholder = "/var/lib/keyhaven-connector\n\n"
			if !strings.Contains(text, "  dir: "+placeholder) {
				t.Fatalf("the example's identity.dir is not %q", placeholder)
			}
			text = strings.Replace(text, "  dir: "+placeholder, "  dir: "+dir+"\n\n", 1)
			path := write(t, filepath.Join(t.TempDir(), "connector.yaml"), text)
			if out, code := runProgram(t, "", "check", "--config", path); code != 0 {
				t.Errorf("exit code %d: %s", code, out)
			}
		})
	}
}

// process is the program running.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}

	mu  sync.Mutex
	log bytes.Buffer
}

func start(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{cmd: program(args...), done: make(chan struct{})}
	pipe, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		for s := bufio.NewScanner(pipe); s.Scan(); {
			p.mu.Lock()
			p.log.Write(append(s.Bytes(), '\n'))
			p.mu.Unlock()
		}
		p.cmd.Wait() //nolint:errcheck // read from ProcessState
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill() //nolint:errcheck // it may have ended
		<-p.done
		if t.Failed() {
			t.Logf("log:\n%s", p.text())
		}
	})
	return p
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// wait returns the first match in the log.
func (p *process) wait(t *testing.T, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if m := re.FindStringSubmatch(p.text()); m != nil {
			return m
		}
	}
	t.Fatalf("the log does not say %q", pattern)
	return nil
}

func (p *process) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func (p *process) exit(t *testing.T) *os.ProcessState {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Fatal("the program did not end")
	}
	return p.cmd.ProcessState
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// origin is a server that answers each line with itself.
func origin(t *testing.T) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			context.AfterFunc(ctx, func() { c.Close() })
			wg.Go(func() {
				defer c.Close()
				io.Copy(c, c) //nolint:errcheck // the test sees what is missing
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		cancel()
		wg.Wait()
	})
	return ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

func open(t *testing.T, s *tunnel.Session, port uint16) (tunnel.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return s.Open(ctx, tunnel.Flow{Kind: tunnel.KindTCP, VNet: "default", Host: "127.0.0.1", Port: port})
}

func echo(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetDeadline(time.Now().Add(patience)) //nolint:errcheck // Read would fail too
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != "hello\n" {
		t.Fatalf("echo: got %q, %v", line, err)
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
		write(t, path, fmt.Sprintf("identity:\n  dir: %s\nallow:\n  - to: 127.0.0.1\n    ports: [%d]\nops:\n  addr: 127.0.0.1:0\n%s", dir, port, extra))
	}
	config(a, "")
	p := start(t, "run", "--config", path)
	base := "http://" + p.wait(t, `health and metrics" addr=(\S+)`)[1]
	p.wait(t, `session up`)
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
		fmt.Sprintf("identity:\n  dir: %s\nedges: [%q, nowhere.invalid]\nallow: []\nops:\n  addr: 127.0.0.1:0\n", dir, silentEdge))
	p := start(t, "run", "--config", path)
	base := "http://" + p.wait(t, `health and metrics" addr=(\S+)`)[1]
	p.wait(t, `no session to the edge.*edge=127\.0\.0\.1:9`)
	p.wait(t, `no session to the edge.*edge=nowhere.invalid`)
	if code, body := get(t, base+"/readyz"); code != 503 || !strings.Contains(body, "not ready") {
		t.Errorf("readyz: got %d %q, want 503 with the reason", code, body)
	}
	p.signal(t, syscall.SIGTERM)
	if st := p.exit(t); st.ExitCode() != 0 {
		t.Errorf("exit: %v, want 0", st)
	}

	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	write(t, path, fmt.Sprintf("identity:\n  dir: %s\nallow: []\nops:\n  addr: %s\n", dir, ln.Addr()))
	if out, code := runProgram(t, "", "run", "--config", path); code != 1 || !strings.Contains(out, "address already in use") {
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
