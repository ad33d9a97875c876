//go:build packages

package container

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/internal/softhsm"
)

// uid is the user of the images.
const uid = 65532

// A box is a container made of one of the images that "make containers" has left.
type box struct {
	name   string
	store  []string
	mounts []string
}

// unpack makes a container of a program's image. What it mounts are pairs of a directory here and one inside.
func unpack(t *testing.T, program string, mounts ...string) *box {
	t.Helper()
	archives, err := filepath.Glob("../../dist/containers/keyhaven-" + program + "-*-" + runtime.GOARCH + ".oci.tar")
	if err != nil || len(archives) != 1 {
		t.Fatalf("got images %v, %v, want one: run make containers", archives, err)
	}
	dir := t.TempDir()
	b := &box{store: []string{"--storage-driver", "vfs", "--root", filepath.Join(dir, "storage"), "--runroot", filepath.Join(dir, "run")}}
	for i := 0; i < len(mounts); i += 2 {
		b.mounts = append(b.mounts, "--volume", mounts[i]+":"+mounts[i+1])
	}
	b.name = strings.TrimSpace(b.buildah(t, "from", "--quiet", "oci-archive:"+archives[0]))
	t.Cleanup(func() { b.buildah(t, "rm", b.name) })
	return b
}

func (b *box) buildah(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("buildah", append(slices.Clone(b.store), args...)...).Output()
	if err != nil {
		t.Fatalf("buildah %s: %v", args[0], err)
	}
	return string(out)
}

func (b *box) command(ctx context.Context, stdin string, args ...string) *exec.Cmd {
	all := slices.Concat(b.store, []string{"run", "--isolation", "chroot"}, b.mounts, []string{b.name, "--"}, args)
	cmd := exec.CommandContext(ctx, "buildah", all...)
	cmd.Stdin = strings.NewReader(stdin)
	return cmd
}

// run runs a command to its end.
func (b *box) run(t *testing.T, args ...string) string {
	t.Helper()
	return b.feed(t, "", args...)
}

func (b *box) feed(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	var errs bytes.Buffer
	cmd := b.command(t.Context(), stdin, args...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, errs.String())
	}
	return string(out)
}

// start runs a program until the test ends, and waits until its health command says that it does its work.
func (b *box) start(t *testing.T, program string) {
	t.Helper()
	var log bytes.Buffer
	ctx, stop := context.WithCancel(context.Background())
	cmd := b.command(ctx, "", program, "run")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		cmd.Wait() //nolint:errcheck // buildah passes the signal on and says how the program ended
		if t.Failed() {
			t.Logf("%s:\n%s", program, log.String())
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		out, err := b.command(t.Context(), "", program, "health").CombinedOutput()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s is not healthy: %v: %s", program, err, out)
		}
	}
}

// folder is a directory that the user of the images owns.
func folder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	for d := filepath.Dir(dir); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, uid, uid); err != nil {
		t.Fatal(err)
	}
}

// port is one that is free on loopback for TCP and UDP.
func port(t *testing.T) int {
	t.Helper()
	addr, err := freeport.Addr("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return int(netip.MustParseAddrPort(addr).Port())
}

// TestImages looks at what each image is: its user, its entry point, and that it holds no shell.
func TestImages(t *testing.T) {
	for _, program := range []string{"connector", "edge", "keyserver"} {
		t.Run(program, func(t *testing.T) {
			b := unpack(t, program)
			var info struct {
				OCIv1 struct {
					Created string
					Config  struct {
						User       string
						Entrypoint []string
						Labels     map[string]string
					}
				}
			}
			if err := json.Unmarshal([]byte(b.buildah(t, "inspect", b.name)), &info); err != nil {
				t.Fatal(err)
			}
			c := info.OCIv1.Config
			if c.User != fmt.Sprintf("%d:%[1]d", uid) || len(c.Entrypoint) != 1 || c.Entrypoint[0] != "/usr/bin/keyhaven-"+program {
				t.Errorf("runs %v as %q", c.Entrypoint, c.User)
			}
			version := c.Labels["org.opencontainers.image.version"]
			if out := b.run(t, "/usr/bin/keyhaven-"+program, "--version"); version == "" || !strings.Contains(out, "version "+version+" ") {
				t.Errorf("--version says %q, the label %q", out, version)
			}
			if out, err := b.command(t.Context(), "", "/bin/sh", "-c", "true").CombinedOutput(); err == nil {
				t.Errorf("there is a shell: %s", out)
			}
			if err := b.command(t.Context(), "", "/usr/bin/keyhaven-"+program, "health").Run(); err == nil {
				t.Error("healthy without a program that runs")
			}
		})
	}
}

// TestJoin has a connector join an edge and keep its sessions, both in containers.
func TestJoin(t *testing.T) {
	etc, run, state := folder(t), folder(t), folder(t)
	tunnelPort, visitors, edgeOps := port(t), port(t), port(t)
	write(t, filepath.Join(etc, "edge.yaml"), fmt.Sprintf(`identity: {ca_dir: /etc/keyhaven/ca, dir: /etc/keyhaven/identity}
tunnel: {listen: "127.0.0.1:%d", advertise: ["127.0.0.1:%[1]d"]}
ops: {listen: "127.0.0.1:%d"}
visitors: {listen: {tls: ["127.0.0.1:%d"]}}
`, tunnelPort, edgeOps, visitors))
	edge := unpack(t, "edge", etc, "/etc/keyhaven", run, "/run/keyhaven", state, "/var/lib/keyhaven")
	const program = "/usr/bin/keyhaven-edge"
	edge.run(t, program, "ca", "init", "--ca-dir", "/etc/keyhaven/ca", "--trust-domain", "edge.test")
	edge.run(t, program, "ca", "issue", "edge", "edge1", "--ca-dir", "/etc/keyhaven/ca", "--out", "/etc/keyhaven/identity")
	edge.start(t, program)
	edge.run(t, program, "tunnel", "create", "site1")
	token := edge.run(t, program, "tunnel", "token", "create", "site1")

	site, sock, kept := folder(t), folder(t), folder(t)
	write(t, filepath.Join(site, "connector.yaml"), fmt.Sprintf(`identity: {dir: /var/lib/keyhaven-connector/identity}
ops: {listen: "127.0.0.1:%d"}
control: /run/keyhaven-connector/control.sock
allow: [{to: 127.0.0.1, ports: [80]}]
`, port(t)))
	connector := unpack(t, "connector", site, "/etc/keyhaven", sock, "/run/keyhaven-connector", kept, "/var/lib/keyhaven-connector")
	connector.feed(t, token, "/usr/bin/keyhaven-connector", "join", "--dir", "/var/lib/keyhaven-connector/identity", "--token-file", "-")
	connector.start(t, "/usr/bin/keyhaven-connector")
	if out := edge.run(t, program, "tunnel", "list"); !strings.Contains(out, "healthy") {
		t.Errorf("the edge says of the tunnel: %s", out)
	}
}

// TestModule has the key server's image load the module of SoftHSM2, mounted together with what only that is linked with, and
// sign with a key in its token.
func TestModule(t *testing.T) {
	module, err := softhsm.Module()
	if err != nil {
		t.Fatal(err)
	}
	ldd, err := exec.Command("ldd", module).Output()
	if err != nil {
		t.Fatal(err)
	}
	libraries := []string{module}
	for line := range strings.Lines(string(ldd)) {
		if f := strings.Fields(line); len(f) > 2 && (strings.HasPrefix(f[0], "libcrypto") || strings.HasPrefix(f[0], "libbotan")) {
			libraries = append(libraries, f[2])
		}
	}
	const place = "/usr/lib/keyhaven-hsm"
	hsm, etc, run, tokens := folder(t), folder(t), folder(t), folder(t)
	for _, l := range libraries {
		b, err := os.ReadFile(l)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(hsm, filepath.Base(l)), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	token, err := softhsm.Create(tokens)
	if err != nil {
		t.Fatal(err)
	}
	if err := filepath.WalkDir(tokens, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, uid)
	}); err != nil {
		t.Fatal(err)
	}
	token.Module = filepath.Join(place, filepath.Base(module))
	b := unpack(t, "keyserver", hsm, place, etc, "/etc/keyhaven", run, "/run/keyhaven-keyserver", tokens, tokens)
	b.mounts = append(b.mounts, "--env", token.Env(), "--env", "LD_LIBRARY_PATH="+place)
	const program = "/usr/bin/keyhaven-keyserver"
	b.run(t, program, "key", "generate", "--uri", token.URI(), "--label", "www", "--type", "p256")
	b.run(t, program, "ca", "init", "--ca-dir", "/etc/keyhaven/ca", "--trust-domain", "keys.test")
	b.run(t, program, "ca", "issue", "hsm1", "--ca-dir", "/etc/keyhaven/ca", "--out", "/etc/keyhaven/tls")
	write(t, filepath.Join(etc, "keyserver.yaml"), fmt.Sprintf(`listen: 127.0.0.1:%d
control: /run/keyhaven-keyserver/control.sock
tls: {cert: /etc/keyhaven/tls/cert.pem, key: /etc/keyhaven/tls/key.pem, ca: /etc/keyhaven/tls/ca.pem}
tokens: [{uri: %q}]
clients: [{id: "spiffe://keys.test/edge/edge1", keys: [www], operations: [tls-sign], schemes: ["*"], snis: [www.test]}]
`, port(t), token.URI()))
	b.start(t, program)
	if out := b.run(t, program, "status"); !strings.Contains(out, "www") {
		t.Errorf("status: %s", out)
	}
}

// TestSameImage builds an image twice.
func TestSameImage(t *testing.T) {
	var images [2][]byte
	for i := range images {
		dir := t.TempDir()
		cmd := exec.Command("./build", dir, "connector")
		cmd.Env = append(os.Environ(), "VERSION=1.2.3", "SOURCE_DATE_EPOCH=1700000000", "CONTAINER_ARCHS="+runtime.GOARCH)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		images[i] = read(t, filepath.Join(dir, "keyhaven-connector-1.2.3-"+runtime.GOARCH+".oci.tar"))
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("the same source gave two images")
	}
}
