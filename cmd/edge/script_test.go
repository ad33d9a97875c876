package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){"keyhaven-edge": main, "test-connector": testConnector})
}

// leakChecked looks for goroutines that are left over after the tests.
type leakChecked struct{ m *testing.M }

func (l leakChecked) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// patience is how long a script waits for something that must happen.
const patience = 30 * time.Second

// The scripts run the program as its users do. Each has, in $WORK, the authorities, identities and certificate that
// the example configurations name, and an edge.yaml with free ports, which are in $TUNNEL, $VISITORS and $OPS.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup:               setUp,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      exits,
			"eventually": eventually,
			"mode":       mode,
		},
	})
}

func setUp(env *testscript.Env) error {
	for _, name := range []string{"TUNNEL", "VISITORS", "OPS", "ADMIN", "TUNNEL2", "VISITORS2", "OPS2", "ETCD", "ETCDPEER"} {
		addr, err := freeport.Addr("127.0.0.1")
		if err != nil {
			return err
		}
		env.Setenv(name, addr)
	}
	env.Setenv("KEYHAVEN_EDGE_SOCKET", filepath.Join(env.WorkDir, "s"))
	env.Setenv("GORACE", "atexit_sleep_ms=0") // programs with the race detector sleep for a second at their end
	config := os.Expand(scriptConfig, env.Getenv)
	return errors.Join(plant(env.WorkDir), os.WriteFile(filepath.Join(env.WorkDir, "edge.yaml"), []byte(config), 0o600))
}

// scriptConfig is edge.yaml of the scripts.
const scriptConfig = `
state: {file: $WORK/state.db}
admin: {socket: $WORK/s}
identity: {ca_dir: $WORK/edge-ca, dir: $WORK/edge-identity}
key_identity: {dir: $WORK/key-identity}
tunnel:
  listen: "$TUNNEL"
  advertise: ["$TUNNEL"]
  connector_lifetime: 1h
  drain_timeout: 1s
ops: {listen: "$OPS"}
visitors:
  listen:
    tls: ["$VISITORS"]
  limits: {drain_timeout: 1s}
  key_servers:
    - name: hsm
      servers: ["10.20.0.5:2407"]
      expect: ["spiffe://keys.example.com/keyserver/hsm1"]
  zones:
    - name: www
      hosts: ["www.example.com"]
      certificate: $WORK/zones/www.pem
      key_server: hsm
      origins:
        - url: http://10.20.1.10:8080
          vnet: default
`

// exits runs a program that must end with the exit code of its first argument.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARG…]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		e, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			ts.Fatalf("%v", err)
		}
		got = e.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// eventually runs a program until it succeeds and, if the first argument is "-out=TEXT", its output holds the text.
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	text := ""
	if len(args) > 0 && strings.HasPrefix(args[0], "-out=") {
		text, args = strings.TrimPrefix(args[0], "-out="), args[1:]
	}
	if neg || len(args) == 0 {
		ts.Fatalf("usage: eventually [-out=TEXT] PROGRAM [ARG…]")
	}
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := ts.Exec(args[0], args[1:]...)
		if err == nil && strings.Contains(ts.ReadFile("stdout"), text) {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("%v: still not so after %v: %v", args, patience, err)
		}
	}
}

// mode checks the permissions of a file.
func mode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mode PERM FILE")
	}
	info, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", info.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s has mode %s, want %s", args[1], got, args[0])
	}
}

// testConnector is a small connector: test-connector TOKENFILE ADDR NAME DIR. It enrols unless DIR has an identity, holds
// one session, refuses every flow, says that it runs on a device of version 1.0.0, and how it all went.
func testConnector() {
	if err := connect(os.Args[1], os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func connect(tokenFile, addr, name, dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := os.Stat(dir); err != nil {
		text, err := os.ReadFile(tokenFile)
		if err != nil {
			return err
		}
		tok, err := mtls.ParseJoinToken(strings.TrimSpace(string(text)))
		if err != nil {
			return err
		}
		key, csr, err := mtls.NewKeyCSR()
		if err != nil {
			return err
		}
		reply, err := tunnel.Join(ctx, addr, tok, csr, name)
		if err != nil {
			return err
		}
		if err := mtls.WriteIdentity(dir, key, reply.Chain, reply.Roots); err != nil {
			return err
		}
		fmt.Println("joined as", reply.Identity)
	}
	src, err := mtls.OpenDir(dir, nil)
	if err != nil {
		return err
	}
	c, err := tunnel.Dial(ctx, tunnel.DialConfig{Addr: addr, Identity: src,
		Registration: tunnel.Registration{Instance: "i1", Version: "test", Hostname: "site"},
		OnDevice: func([]byte) []byte {
			return []byte(`{"product":"test","board":"a board","version":"1.0.0","state":"idle"}`)
		},
		Handle: func(_ context.Context, in *tunnel.Incoming) { in.Reject(tunnel.ResultDenied) }}) //nolint:errcheck // the edge sees it
	if err != nil {
		return err
	}
	err = c.Run(ctx)
	fmt.Println("ended:", err)
	return nil
}
