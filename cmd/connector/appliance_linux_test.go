package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// device makes a directory that stands for an appliance with a keyhaven.yaml, and has an agent set it up.
func device(t *testing.T, config string) (root string) {
	t.Helper()
	root = t.TempDir()
	for _, d := range []string{"boot/keyhaven", "run/keyhaven", "data", "etc", "proc/sys/kernel"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(root, "boot/keyhaven/keyhaven.yaml"), config)
	write(t, filepath.Join(root, "etc/passwd"), fmt.Sprintf("kh-connector:x:%d:%d::/:/bin/false\n", os.Getuid(), os.Getgid()))
	agent := &appliance.Agent{Version: "test", Host: appliance.Host{Root: root, Addresses: func() []string { return []string{"192.0.2.1"} },
		Command: func(context.Context, string, ...string) ([]byte, error) { return nil, nil }}}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx) }()
	for until := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(root, appliance.StatusPath)); err == nil {
			break
		} else if time.Now().After(until) {
			t.Error("the agent tells nothing")
			break
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	return root
}

// What an agent makes of each example is a configuration that the connector takes, and the status can be shown.
func TestApplianceExamples(t *testing.T) {
	t.Parallel()
	examples, err := filepath.Glob("../../examples/appliance/*.yaml")
	if err != nil || len(examples) < 4 {
		t.Fatalf("%d examples, %v", len(examples), err)
	}
	for _, path := range examples {
		t.Run(filepath.Base(path), func(t *testing.T) {
			t.Parallel()
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			root := device(t, string(b))
			cmd := &cobra.Command{}
			cmd.Flags().String("config", filepath.Join(root, "run/keyhaven/connector.yaml"), "")
			s, err := load(cmd)
			if err != nil {
				t.Fatal(err)
			}
			if s.Identity.Dir != "/data/identity" || s.Control != "/run/keyhaven-connector/control.sock" || !s.RemoteConfig {
				t.Errorf("%+v", s.config)
			}
			said, code := runProgram(t, "", "appliance", "status", "--root", root)
			if code != 1 || !strings.Contains(said, "WAITING FOR A JOIN TOKEN") {
				t.Errorf("code %d: %s", code, said)
			}
		})
	}
	if said, code := runProgram(t, "", "appliance", "status", "--root", t.TempDir()); code != 1 || !strings.Contains(said, "no running appliance") {
		t.Errorf("elsewhere: code %d: %s", code, said)
	}
}

// Joining again with the key that was kept is not joining with another.
func TestJoinKept(t *testing.T) {
	t.Parallel()
	in := install(t)
	token, err := mtls.ParseJoinToken(in.token(t, time.Now().Add(time.Hour)))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	key, id := filepath.Join(dir, "key.pem"), filepath.Join(dir, "id")
	if err := joinKept(t.Context(), token, key, id, "", nil); err != nil {
		t.Fatal(err)
	}
	kept, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(id, "key.pem")); err != nil || string(got) != string(kept) {
		t.Errorf("the identity has another key than the one that was kept: %v", err)
	}
	if _, _, err := mtls.KeptKeyCSR(key); err != nil {
		t.Error(err)
	}
	if again, err := os.ReadFile(key); err != nil || string(again) != string(kept) {
		t.Errorf("the key changed: %v", err)
	}
	write(t, key, "no key")
	if err := joinKept(t.Context(), token, key, id, "", nil); err == nil || !strings.Contains(err.Error(), "holds no key; remove it") {
		t.Errorf("a damaged key: %v", err)
	}
}

// A device whose way out is a proxy alone joins through it.
func TestJoinKeptThroughProxy(t *testing.T) {
	t.Parallel()
	in := install(t)
	const edge = "edge.test:7844"
	proxy, asked := authProxy(t, "site", "s3cret", edge, in.addr)
	token, err := mtls.ParseJoinToken(in.token(t, time.Now().Add(time.Hour), edge))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	via := &tunnel.ProxyConfig{URL: proxy.URL, User: "site", PasswordFile: write(t, filepath.Join(dir, "password"), "s3cret\n")}
	if err := joinKept(t.Context(), token, filepath.Join(dir, "key.pem"), filepath.Join(dir, "id"), "", via); err != nil {
		t.Fatal(err)
	}
	if asked.Load() == 0 {
		t.Error("it joined without the proxy")
	}
}

func TestApplianceConfigure(t *testing.T) {
	t.Parallel()
	root := device(t, "hostname: a\n")
	write(t, filepath.Join(root, "boot/keyhaven/keyhaven.yaml.txt"), "hostname: b\n")
	if said, code := runProgram(t, "hostname: c\n", "appliance", "configure", "--root", root, "-"); code != 0 {
		t.Fatalf("code %d: %s", code, said)
	}
	said, code := runProgram(t, "wifi: {country: UK}\n", "appliance", "configure", "--root", root, "-")
	if code != 3 || !strings.Contains(said, "did you mean GB?") {
		t.Errorf("code %d: %s", code, said)
	}
	if b, err := os.ReadFile(filepath.Join(root, "boot/keyhaven/keyhaven.yaml")); err != nil || string(b) != "hostname: c\n" {
		t.Errorf("the card holds %q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(root, "boot/keyhaven/keyhaven.yaml.txt")); err == nil {
		t.Error("the old file under another name is still there")
	}
}
