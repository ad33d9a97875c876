package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/signer"
)

// The test binary is the program itself when this variable is set.
const asProgram = "KEYHAVEN_TEST_AS_KEYSERVER"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		_ = flag.Set("test.parallel", "4") // most tests wait for processes most of the time
	}
	goleak.VerifyTestMain(m)
}

// patience bounds every wait; it is no measurement.
const patience = 20 * time.Second

// A site is a directory with an authority, a server's identity, a client's, and a key in a file.
type site struct {
	t    *testing.T
	dir  string
	env  []string
	mu   sync.Mutex // guards seen
	seen bytes.Buffer
}

const domain = "keys.example"

func newSite(t *testing.T) *site {
	t.Helper()
	t.Parallel()
	s := &site{t: t, dir: t.TempDir()}
	t.Cleanup(func() {
		if strings.Contains(s.output(), "pin-canary-") || strings.Contains(s.output(), "canary-wrong") {
			t.Errorf("a PIN is in the output: %s", s.output())
		}
	})
	s.must("ca", "init", "--ca-dir", s.path("ca"), "--trust-domain", domain)
	s.must("ca", "issue", "hsm", "--ca-dir", s.path("ca"), "--out", s.path("tls"))
	s.must("client", "add", "one", "--ca-dir", s.path("ca"), "--out", s.path("one"))
	s.writeKey("filekey.pem")
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) output() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen.String()
}

// Write keeps all that the programs print.
func (s *site) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen.Write(b)
}

func (s *site) write(name string, mode os.FileMode, text string) string {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(text), mode); err != nil {
		s.t.Fatal(err)
	}
	return s.path(name)
}

// writeKey makes a P-256 key in a file and returns its public half.
func (s *site) writeKey(name string) *ecdsa.PublicKey {
	s.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(name, 0o600, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	return &k.PublicKey
}

// config returns a configuration of the site: common parts, then extra text.
func (s *site) config(extra string) string {
	return fmt.Sprintf(`listen: 127.0.0.1:0
ops: {listen: 127.0.0.1:0}
ca_dir: %[1]s/ca
tls:
  cert: %[1]s/tls/cert.pem
  key: %[1]s/tls/key.pem
  ca: %[1]s/tls/ca.pem
file_keys:
  - path: %[1]s/filekey.pem
%[2]s`, s.dir, extra)
}

// rule is a rule for a client that may do what an edge does.
func rule(name, operations string) string {
	return fmt.Sprintf(`
  - id: spiffe://%s/edge/%s
    keys: ["*"]
    operations: [%s]
    schemes: ["*"]
    snis: ["*"]`, domain, name, operations)
}

func (s *site) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(append(os.Environ(), asProgram+"=1", "GORACE=atexit_sleep_ms=0"), s.env...)
	return cmd
}

// try runs the program to its end.
func (s *site) try(args ...string) (code int, out string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	cmd := s.command(ctx, args...)
	b, err := cmd.CombinedOutput()
	s.Write(b)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatalf("%v: %v", args, err)
	}
	return cmd.ProcessState.ExitCode(), string(b)
}

func (s *site) must(args ...string) string {
	s.t.Helper()
	code, out := s.try(args...)
	if code != 0 {
		s.t.Fatalf("keyhaven-keyserver %v ended with %d: %s", args, code, out)
	}
	return out
}

// token makes a token and a PIN file, both of the site, with the keys named "label:type".
func (s *site) token(keys ...string) *softhsm.Token {
	s.t.Helper()
	t, err := softhsm.Create(s.path("softhsm"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.env = append(s.env, t.Env())
	for _, k := range keys {
		label, typ, _ := strings.Cut(k, ":")
		args := []string{"key", "generate", "--uri", t.URI(), "--label", label, "--type", typ}
		if strings.HasPrefix(typ, "rsa") {
			args = append(args, "--decrypt")
		}
		s.must(args...)
	}
	return t
}

// A program is a running key server.
type program struct {
	s    *site
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended

	mu    sync.Mutex // guards lines
	lines []map[string]any
	news  chan struct{} // holds a value when lines has grown
}

// start runs the server and waits until it serves.
func (s *site) start(config string, flags ...string) *program {
	s.t.Helper()
	p := &program{s: s, cmd: s.command(context.Background(), append([]string{"run", "--config", config, "--log-format", "json"}, flags...)...), done: make(chan struct{}), news: make(chan struct{}, 1)}
	r, w := io.Pipe()
	p.cmd.Stdout, p.cmd.Stderr = w, w
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // which a process that takes over is in as well
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		p.cmd.Wait()
		w.Close()
	}()
	go func() {
		defer close(p.done)
		p.read(r)
	}()
	s.t.Cleanup(func() {
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	})
	p.wait("serving")
	return p
}

func (p *program) read(r io.Reader) {
	dec := json.NewDecoder(io.TeeReader(r, p.s))
	for {
		var line map[string]any
		if err := dec.Decode(&line); err != nil {
			io.Copy(p.s, r)
			return
		}
		p.mu.Lock()
		p.lines = append(p.lines, line)
		p.mu.Unlock()
		select {
		case p.news <- struct{}{}:
		default:
		}
	}
}

// count returns how many lines had the message.
func (p *program) count(msg string) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.lines {
		if l["msg"] == msg {
			n++
		}
	}
	return n
}

// text returns all lines that the server wrote so far.
func (p *program) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var b strings.Builder
	for _, l := range p.lines {
		fmt.Fprintln(&b, l)
	}
	return b.String()
}

// wait returns the first line with the message, when there is one.
func (p *program) wait(msg string) map[string]any {
	p.s.t.Helper()
	return p.waitNth(msg, 1)
}

func (p *program) waitNth(msg string, n int) map[string]any {
	p.s.t.Helper()
	deadline := time.After(patience)
	for {
		p.mu.Lock()
		left := n
		for _, l := range p.lines {
			if l["msg"] == msg {
				if left--; left == 0 {
					p.mu.Unlock()
					return l
				}
			}
		}
		p.mu.Unlock()
		select {
		case <-p.news:
		case <-p.done:
			p.s.t.Fatalf("the server ended before it said %q: %s", msg, p.s.output())
		case <-deadline:
			p.s.t.Fatalf("the server never said %q: %s", msg, p.s.output())
		}
	}
}

func (p *program) addr() string { return p.wait("serving")["addr"].(string) }

// reload sends SIGHUP and waits for the answer: the message of success or refusal.
func (p *program) reload(want string) map[string]any {
	p.s.t.Helper()
	n := p.count(want)
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		p.s.t.Fatal(err)
	}
	return p.waitNth(want, n+1)
}

const (
	reloaded = "configuration reloaded"
	refused  = "new configuration refused; the old one goes on"
)

// stop sends SIGTERM and returns the exit code.
func (p *program) stop() int {
	p.s.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.s.t.Fatal(err)
	}
	select {
	case <-p.done:
	case <-time.After(patience):
		p.s.t.Fatal("the server did not end after SIGTERM")
	}
	return p.cmd.ProcessState.ExitCode()
}

// get asks the operations server.
func (p *program) get(path string) (int, string) {
	p.s.t.Helper()
	addr := p.wait("serving health and metrics")["addr"].(string)
	c := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get("http://" + addr + path)
	if err != nil {
		p.s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		p.s.t.Fatal(err)
	}
	p.s.Write(b)
	return resp.StatusCode, string(b)
}

// tls returns the TLS configuration of a client of the site.
func (s *site) tls(name string) *tls.Config {
	s.t.Helper()
	src, err := mtls.OpenDir(s.path(name), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return src.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptKinds(mtls.KindKeyServer)})
}

// client returns a client of the site that is connected to the server.
func (p *program) client(name string) *keyless.Client {
	p.s.t.Helper()
	cfg := p.s.tls(name)
	c, err := keyless.NewClient(keyless.ClientConfig{Servers: []string{p.addr()}, TLS: func(string) *tls.Config { return cfg }, Timeout: patience, ConnsPerServer: 1})
	if err != nil {
		p.s.t.Fatal(err)
	}
	p.s.t.Cleanup(func() { c.Close() })
	return c
}

// do sends an operation, and again while no connection is there yet.
func do(t *testing.T, c *keyless.Client, op *keyless.Operation) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		b, err := c.Do(ctx, op)
		if !errors.Is(err, keyless.ErrUnavailable) || ctx.Err() != nil {
			return b, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// signOp asks for a plain ECDSA signature over a digest of zeros.
func signOp(ski keyless.SKI) *keyless.Operation {
	return &keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: ski, Payload: make([]byte, 32), SNI: "www.example.com"}
}

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// skiOf parses the SKI of the key with the label out of what key list prints.
func skiOf(t *testing.T, list, label string) keyless.SKI {
	t.Helper()
	for line := range strings.Lines(list) {
		f := strings.Fields(line)
		if len(f) > 3 && strings.Contains(line, " "+label+" ") {
			ski, err := keyless.ParseSKI(f[0])
			if err != nil {
				t.Fatal(err)
			}
			return ski
		}
	}
	t.Fatalf("no key %s in %s", label, list)
	return keyless.SKI{}
}

func mustSKI(t *testing.T, pub any) keyless.SKI {
	t.Helper()
	ski, err := keyless.SKIOf(pub)
	if err != nil {
		t.Fatal(err)
	}
	return ski
}

// newTestService is a service that admits nobody.
func newTestService(r *signer.Registry) *signer.Service {
	return signer.NewService(signer.ServiceConfig{Registry: r})
}
