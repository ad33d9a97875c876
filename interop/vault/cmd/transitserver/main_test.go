package main

import (
	"bufio"
	"context"
	"crypto"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/signer"
	"github.com/keyhaven/keyhaven/transit"
)

// asProgram makes the test binary the program.
const asProgram = "TRANSITSERVER_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// start runs the program and returns its address and how to stop it.
func start(t *testing.T, args ...string) (url string, stop func() error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = func() error { cmd.Process.Signal(os.Interrupt); return cmd.Wait() }
	line, err := bufio.NewReader(out).ReadString('\n')
	url, ok := strings.CutPrefix(strings.TrimSpace(line), "listening ")
	if err != nil || !ok {
		stop()
		t.Fatalf("got %q, %v", line, err)
	}
	return url, stop
}

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	url, stop := start(t, "-dir", dir, "-key", "web=ecdsa-p256")
	cfg := transit.Config{
		Address: url, Keys: []transit.KeyConfig{{Name: "web"}},
		Auth: transit.AuthConfig{Method: transit.AuthAppRole, RoleIDFile: filepath.Join(dir, "role_id"), SecretIDFile: filepath.Join(dir, "secret_id")},
	}
	b, err := transit.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := b.Keys(context.Background())
	if err != nil || len(keys) != 1 {
		t.Fatalf("got %v, %v", keys, err)
	}
	sign := func() error {
		_, err := keys[0].Sign(context.Background(), signer.Algorithm{Kind: signer.ECDSA, Hash: crypto.SHA256}, make([]byte, 32))
		return err
	}
	if err := sign(); err != nil {
		t.Error(err)
	}
	control(t, "POST", url+"/control/faults", `{"path":"transit/sign","status":503}`, 204)
	if err := sign(); err == nil {
		t.Error("the fault did not strike")
	}
	control(t, "DELETE", url+"/control/faults", "", 204)
	control(t, "POST", url+"/control/revoke", "", 204)
	control(t, "POST", url+"/control/engine/keys/web/rotate", "{}", 200)
	control(t, "GET", url+"/control/engine/keys/web", "", 200)
	control(t, "GET", url+"/control/counters", "", 200)
	control(t, "POST", url+"/control/faults", `{"nonsense":1}`, 400)
	if err := sign(); err != nil {
		t.Error(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Errorf("stopped: %v", err)
	}
}

func control(t *testing.T, method, url, body string, want int) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		t.Errorf("%s %s: got %s, want %d", method, url, resp.Status, want)
	}
}

func TestOnlyLoopback(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, listen := range []string{"0.0.0.0:0", ":0", "192.0.2.1:80", "localhost:0"} {
		cmd := exec.Command(self, "-listen", listen)
		cmd.Env = append(os.Environ(), asProgram+"=1")
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), fmt.Sprintf("-listen %q", listen)) {
			t.Errorf("%s: got %v, %s", listen, err, out)
		}
	}
}
