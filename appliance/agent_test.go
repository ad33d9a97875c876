package appliance

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A machine is a directory that stands for an appliance, and what an agent on it did.
type machine struct {
	root string
	log  *safeBuffer

	mu        sync.Mutex
	commands  []string
	readOnly  error // what writing to the card fails with
	writable  int   // how often the card was made writable
	clock     time.Duration
	addresses []string
}

// A safeBuffer can be written by several goroutines.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// newMachine makes a machine whose card holds the files.
func newMachine(t *testing.T, files map[string]string) *machine {
	t.Helper()
	root, err := os.MkdirTemp("", "kh") // short, for the socket in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	m := &machine{root: root, log: &safeBuffer{}, addresses: []string{"192.0.2.7"}}
	for _, d := range []string{cardDir, runDir, systemDir, identityDir, "/etc", "/dev", "/proc/sys/kernel", "/sys/class/leds/ACT", "/boot/slot", "/sys/class/net/wlan0"} {
		if err := os.MkdirAll(m.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	me := fmt.Sprintf("root:x:0:0::/root:/bin/sh\n%s:x:%d:%d::/:/bin/false\n", connectorUser, os.Getuid(), os.Getgid())
	for name, text := range map[string]string{
		"/etc/passwd": me, "/etc/machine-id": strings.Repeat("0123456789abcdef", 2) + "\n", "/dev/tty1": "", "/dev/urandom": "",
		"/proc/sys/kernel/hostname": "", "/sys/class/leds/ACT/trigger": "mmc0", "/sys/class/leds/ACT/brightness": "0",
		slotFile:              `{"version":"1.2.3","arch":"arm64","boards":["x"],"built":"2026-01-02T03:04:05Z","format":1}`,
		runDir + "/boot.json": `{"disk":"/dev/mmcblk0","part":2,"config":"/dev/mmcblk0p1","data":"/dev/mmcblk0p4"}`,
	} {
		m.write(t, name, text)
	}
	for name, text := range files {
		m.write(t, cardDir+"/"+name, text)
	}
	return m
}

func (m *machine) path(p ...string) string { return filepath.Join(append([]string{m.root}, p...)...) }

func (m *machine) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(m.path(name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(m.path(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func (m *machine) exists(name string) bool {
	_, err := os.Stat(m.path(name))
	return err == nil
}

// host is the machine as an agent sees it.
func (m *machine) host() Host {
	return Host{
		Root: m.root,
		Command: func(_ context.Context, name string, args ...string) ([]byte, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.commands = append(m.commands, strings.Join(append([]string{name}, args...), " "))
			if name == "ssh-keygen" {
				file := args[len(args)-1]
				for f, text := range map[string]string{file: "host key", file + ".pub": "public host key"} {
					if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
						return nil, err
					}
				}
			}
			return nil, nil
		},
		Writable: func(do func(dir string) error) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.readOnly != nil {
				return &fs.PathError{Op: "open", Path: cardDir, Err: m.readOnly}
			}
			m.writable++
			return do(m.path(cardDir))
		},
		Now:       func() time.Time { return time.Now().Add(m.clock) },
		SetClock:  func(t time.Time) error { m.clock = time.Until(t); return nil },
		Addresses: func() []string { m.mu.Lock(); defer m.mu.Unlock(); return m.addresses },
	}
}

// ran reports whether a command that contains text was run.
func (m *machine) ran(text string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.commands {
		if strings.Contains(c, text) {
			return true
		}
	}
	return false
}

func (m *machine) agent(join JoinFunc) *Agent {
	return &Agent{Host: m.host(), Join: join, Version: "test", Log: slog.New(slog.NewTextHandler(m.log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
}

// run runs an agent until done says so.
func (m *machine) run(t *testing.T, a *Agent, done func() bool) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	for until := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(until) {
			stop()
			<-ended
			t.Fatalf("it does not come to it; the log:\n%s", m.log)
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// status is what the agent told last.
func (m *machine) status() string {
	b, _ := os.ReadFile(m.path(runDir, statusFile))
	return string(b)
}

func testToken(t testing.TB) mtls.JoinToken {
	t.Helper()
	token, err := mtls.NewJoinToken([32]byte{1, 2, 3}, []string{"edge.example.com:7844"})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// connect puts a connector on the control socket, with a session to the edge or without.
func (m *machine) connect(t *testing.T, up bool) {
	t.Helper()
	if err := os.MkdirAll(m.path(filepath.Dir(controlPath)), 0o755); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", m.path(controlPath))
	if err != nil {
		t.Fatal(err)
	}
	st := connector.Status{Identity: "spiffe://example.net/connector/petcam", Sessions: []connector.SessionStatus{{Edge: "edge.example.com", State: connector.StateConnected}}}
	if up {
		st.Up = time.Now()
	} else {
		st.Sessions[0] = connector.SessionStatus{Edge: "edge.example.com", State: connector.StateConnecting, Error: "no answer", Remedy: "look at the edge"}
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/device" {
			w.Write([]byte("{}")) //nolint:errcheck // the agent is told
			return
		}
		json.NewEncoder(w).Encode(st) //nolint:errcheck // the agent is told
	})}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) }) //nolint:errcheck // it ends with the test
	t.Cleanup(func() { srv.Close(); wg.Wait() })
}

// joinsAt writes an identity as joining does.
func joinsAt(_ context.Context, _ mtls.JoinToken, _, dir, _ string, _ *tunnel.ProxyConfig) error {
	for _, f := range []string{"key.pem", "cert.pem", "ca.pem", "join.json"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte(f), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func TestFirstBoot(t *testing.T) {
	t.Parallel()
	token := testToken(t).Reveal()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "# mine\ntoken: " + token + "\r\nhostname: petcam\nwifi: {country: de, ssid: Home, password: correct horse}\n" +
		"ssh: {keys: [\"" + goodKey + "\"]}\ncamera: cam.example.com\n"})
	m.connect(t, true)
	m.run(t, m.agent(joinsAt), func() bool { return m.exists(identityDir+"/cert.pem") && m.exists(cardDir+"/keyhaven-status.txt") })
	if !m.ran("restart keyhaven-connector.service") {
		t.Errorf("the connector was not started: %v", m.commands)
	}

	card := m.read(t, cardDir+"/keyhaven.yaml")
	if strings.Contains(card, "khj1_") || !strings.Contains(card, "# mine\ntoken: .removed...") || !strings.Contains(card, "hostname: petcam") {
		t.Errorf("the card holds\n%s", card)
	}
	if m.exists(configDir + "/token") {
		t.Error("the token is kept after it was used up")
	}
	for file, want := range map[string]string{
		"/proc/sys/kernel/hostname":             "petcam",
		runDir + "/wpa_supplicant.conf":         `psk="correct horse"`,
		runDir + "/ssh/authorized_keys":         goodKey,
		runDir + "/connector.yaml":              "hostname: cam.example.com",
		runDir + "/streamer.env":                "STREAMER_ARGS=",
		systemDir + "/machine-id":               "0123456789abcdef",
		configDir + "/keyhaven.yaml":            "hostname: petcam",
		cardDir + "/keyhaven-status.txt":        "Keyhaven\r\n",
		"/dev/tty1":                             "petcam",
		systemDir + "/ssh/ssh_host_ed25519_key": "host key",
	} {
		if got := m.read(t, file); !strings.Contains(got, want) {
			t.Errorf("%s holds\n%s\nwant %q in it", file, got, want)
		}
	}
	for _, secret := range []string{token, "correct horse"} {
		for name, text := range map[string]string{"log": m.log.String(), "status": m.status(), "card": m.read(t, cardDir+"/keyhaven-status.txt"),
			"screen": m.read(t, "/dev/tty1"), "commands": strings.Join(m.commands, "\n"), "connector": m.read(t, runDir+"/connector.yaml")} {
			if strings.Contains(text, secret) {
				t.Errorf("%s tells a secret:\n%s", name, text)
			}
		}
	}
}

const goodKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGqR2mV8cQ1sB0d5x0y8JtYkQ3m9n2a7v6c5b4n3m2l1 me@home"
