package main

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
)

type obj = map[string]any

// A keyServer is one running key server, ours or the existing one, with a client of its own.
type keyServer struct {
	name   string
	addr   string
	proc   *lab.Process
	client *keyless.Client
}

// pids are its process and those that it has started.
func (k *keyServer) pids() []int { return append(descendants(k.proc.PID()), os.Getpid()) }

func (k *keyServer) stop() error { return errors.Join(k.client.Close(), k.proc.Stop()) }

// A token is what a key server is to serve, and how its module behaves.
type token struct {
	module string
	env    []string // for the processes that load the module
}

// buildPeer compiles the existing key server out of the nested module.
func (b *bench) buildPeer(ctx context.Context) error {
	if b.peer != "" {
		return nil
	}
	dir, err := filepath.Abs(b.interop)
	if err != nil {
		return err
	}
	out := filepath.Join(b.dir, "peerserver")
	if msg, err := goTool(ctx, dir, "mod", "download", "github.com/cloudflare/gokeyless"); err != nil {
		if strings.Contains(msg, "checksum mismatch") {
			return fmt.Errorf("the existing key server: %s", msg)
		}
		return notRun{fmt.Sprintf("the module of the existing key server cannot be obtained: %s", lastLine(msg))}
	}
	if msg, err := goTool(ctx, dir, "build", "-tags", "pkcs11", "-o", out, "./cmd/peerserver"); err != nil {
		return fmt.Errorf("build the existing key server: %w: %s", err, msg)
	}
	b.peer = out
	ca := b.lab.Path("key-ca")
	if _, err := b.lab.Tool(ctx, "keyhaven-keyserver", "ca", "issue", "peer", "--ca-dir", ca, "--out", b.lab.Path("peer"), "--dns", "localhost"); err != nil {
		return err
	}
	return nil
}

func goTool(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func lastLine(s string) string { return s[strings.LastIndexByte(s, '\n')+1:] }

// startPeer runs the existing key server with its default configuration; sessions is its max-sessions, 0 to leave it out.
func (b *bench) startPeer(ctx context.Context, t token, sessions int) (*keyServer, error) {
	name := "existing, default"
	options := ""
	if sessions > 0 {
		name, options = fmt.Sprintf("existing, %d sessions", sessions), fmt.Sprintf("&max-sessions=%d", sessions)
	}
	var text strings.Builder
	for _, key := range keyTypes { // it wants one URI for each key
		fmt.Fprintf(&text, "pkcs11:token=%s;object=%s?module-path=%s&pin-value=%s%s\n", b.lab.Token.Label, hosts[key], t.module, b.lab.Token.PIN, options)
	}
	ports, err := freePorts(1)
	if err != nil {
		return nil, err
	}
	uris := b.lab.Path("peer-uris")
	if err := os.WriteFile(uris, []byte(text.String()), 0o600); err != nil {
		return nil, err
	}
	dir := b.lab.Path("peer")
	proc := b.lab.Process("peer", nil, b.peer, "--listen", ports[0], "--uris", uris,
		"--cert", filepath.Join(dir, "cert.pem"), "--key", filepath.Join(dir, "key.pem"), "--ca", filepath.Join(dir, "ca.pem"))
	return b.serve(ctx, name, "peer", ports[0], proc, t)
}

// startOurs runs our key server, which logs no single operation, as the existing one does not, with these settings of the token beside its name, and changes to the rest of the configuration.
func (b *bench) startOurs(ctx context.Context, name string, t token, settings, extra obj) (*keyServer, error) {
	ports, err := freePorts(1)
	if err != nil {
		return nil, err
	}
	tok := obj{"uri": fmt.Sprintf("pkcs11:token=%s?pin-source=%s", b.lab.Token.Label, b.lab.Token.PINFile), "module": t.module}
	for k, v := range settings {
		tok[k] = v
	}
	var clients []obj
	for _, c := range append([]string{"edge1"}, crowd...) {
		clients = append(clients, obj{"id": "spiffe://" + lab.KeyDomain + "/edge/" + c, "keys": []string{"*"}, "operations": []string{"tls-sign", "sign"},
			"schemes": []string{"*"}, "snis": []string{"*"}})
	}
	cfg := obj{
		"listen": ports[0], "tls": obj{"cert": b.lab.Path("keyserver", "cert.pem"), "key": b.lab.Path("keyserver", "key.pem"), "ca": b.lab.Path("keyserver", "ca.pem")},
		"modules": []string{t.module}, "tokens": []obj{tok}, "clients": clients,
	}
	for k, v := range extra {
		cfg[k] = v
	}
	b.runs++
	file := fmt.Sprintf("keyserver-%d.yaml", b.runs)
	if err := b.lab.WriteYAML(file, cfg); err != nil {
		return nil, err
	}
	proc := b.lab.Process(fmt.Sprintf("keyserver-%d", b.runs), nil, "keyhaven-keyserver", "run", "--config", b.lab.Path(file), "--log-level", "warn")
	return b.serve(ctx, name, "ks1", ports[0], proc, t)
}

// serve starts a key server and waits until it signs with each key.
func (b *bench) serve(ctx context.Context, name, identity, addr string, proc *lab.Process, t token) (*keyServer, error) {
	if err := startWith(proc, t.env); err != nil {
		return nil, err
	}
	client, err := b.plainClient(addr, identity, "edge-client", 2)
	if err != nil {
		return nil, errors.Join(err, proc.Stop())
	}
	k := &keyServer{name: name, addr: addr, proc: proc, client: client}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, key := range keyTypes {
		op, err := b.digestOp(client, key, hosts[key])
		if err != nil {
			return nil, errors.Join(err, k.stop())
		}
		err = lab.Eventually(ctx, func(ctx context.Context) error {
			if !proc.Running() {
				cancel()
			}
			return op(ctx, 0)
		})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%s does not sign: %w; it said:\n%s", name, err, b.said(proc)), k.stop())
		}
	}
	return k, nil
}

// startWith starts a process with additions to its environment.
func startWith(p *lab.Process, env []string) error {
	for _, e := range env {
		k, v, _ := strings.Cut(e, "=")
		if err := os.Setenv(k, v); err != nil {
			return err
		}
		defer os.Unsetenv(k)
	}
	return p.Start()
}

// said is the end of what a process printed, without the PIN, which the existing server logs.
func (b *bench) said(p *lab.Process) string {
	lines := strings.Split(strings.TrimRight(p.Log(), "\n"), "\n")
	return strings.ReplaceAll(strings.Join(lines[max(0, len(lines)-5):], "\n"), b.lab.Token.PIN, "PIN")
}

// plainClient makes the load generator, the same for both makes. It takes TLS 1.2 from a server that has nothing newer.
func (b *bench) plainClient(addr, server, identity string, conns int) (*keyless.Client, error) {
	want, err := mtls.ParseIdentity("spiffe://" + lab.KeyDomain + "/keyserver/" + server)
	if err != nil {
		return nil, err
	}
	own, err := mtls.OpenDir(b.lab.Path(identity), nil)
	if err != nil {
		return nil, err
	}
	return keyless.NewClient(keyless.ClientConfig{Servers: []string{addr}, ConnsPerServer: conns, Timeout: 30 * time.Second, TLS: func(string) *tls.Config {
		c := own.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptIdentities(want)})
		c.MinVersion = tls.VersionTLS12
		return c
	}})
}

var digestOps = map[string]keyless.Opcode{"P-256": keyless.OpECDSASignSHA256, "RSA-2048": keyless.OpRSASignSHA256}

// digestOp asks for the signature over a digest, which every key server knows; it does not verify it.
func (b *bench) digestOp(c *keyless.Client, key, sni string) (func(context.Context, int) error, error) {
	leaf, err := b.leaf(key)
	if err != nil {
		return nil, err
	}
	ski, err := keyless.SKIOf(leaf.PublicKey)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, _ int) error {
		op := keyless.Operation{Opcode: digestOps[key], SKI: ski, SNI: sni, Payload: digest}
		_, err := c.Do(ctx, &op)
		return err
	}, nil
}

func (b *bench) leaf(key string) (*x509.Certificate, error) { return readLeaf(b.lab.Chain(hosts[key])) }

// auditRequired is the configuration under which no signature leaves without a durable record.
func (b *bench) auditRequired() (obj, error) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	b.runs++
	dir := b.lab.Path(fmt.Sprintf("audit-%d", b.runs))
	file := dir + ".key"
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return nil, err
	}
	return obj{"audit": obj{"mode": "required", "dir": dir, "key_file": file}}, nil
}
