//go:build image

package qemu

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

var (
	boardFlag    = flag.String("board", "arm64", "machine that QEMU plays: arm64, armhf, amd64, raspi3b or raspi0")
	kernelFlag   = flag.String("kernel", "stable", "of the image: stable or backports")
	imageFlag    = flag.String("image", "", "image to boot; the newest in build/image for the machine unless given")
	keysFlag     = flag.String("keys", "../../../dist/keys", "directory with the keys that the image trusts for updates")
	figuresFlag  = flag.String("figures", "../../../dist/image/figures.json", "file that gets what was measured, a line of JSON for each")
	programsFlag = flag.String("programs", "", "directory with the programs; they are built unless it is given")
	picturesFlag = flag.String("pictures", "", "directory that gets pictures of the screen, for the documentation")
	slowFlag     = flag.Float64("slow", 3, "factor for all deadlines")
)

const (
	edgeTunnel = "10.0.2.2:7844" // what a guest calls this host's loopback
	visitors   = "127.0.0.1:443"
	camHost    = "cam.example.test"
	camTunnel  = "petcam"
)

// programs builds the programs of this tree once.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "khq-bin-")
	if err != nil {
		return "", err
	}
	tidy = func() { os.RemoveAll(dir) }
	for _, p := range []string{"cmd/keyserver", "cmd/connector", "cmd/edge", "demo"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "keyhaven-"+filepath.Base(p)), "../../../"+p)
		if out, err := cmd.CombinedOutput(); err != nil {
			return dir, fmt.Errorf("build %s: %w\n%s", p, err, out)
		}
	}
	return dir, nil
})

func bin(t *testing.T) string {
	t.Helper()
	if *programsFlag != "" {
		return *programsFlag
	}
	dir, err := programs()
	must(t, err)
	return dir
}

// shortDir is a temporary directory whose name leaves room for that of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "khq")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func board(t *testing.T) Board {
	t.Helper()
	b, err := FindBoard(*boardFlag)
	must(t, err)
	return b
}

// image is the file of the image under test.
func image(t *testing.T) string {
	t.Helper()
	if *imageFlag != "" {
		return *imageFlag
	}
	arch := board(t).Arch
	if *kernelFlag != "stable" {
		arch += "-" + *kernelFlag
	}
	found, err := filepath.Glob("../../../build/image/keyhaven-*-" + arch + ".img")
	must(t, err)
	if len(found) == 0 {
		t.Fatalf("build/image has no image for %s; run make image ARCH=%s KERNEL=%s", arch, board(t).Arch, *kernelFlag)
	}
	slices.SortFunc(found, func(a, b string) int { return modified(t, a).Compare(modified(t, b)) })
	return found[len(found)-1]
}

func modified(t *testing.T, file string) time.Time {
	t.Helper()
	st, err := os.Stat(file)
	must(t, err)
	return st.ModTime()
}

// A host is a network in which 10.0.2.2 is the loopback, as it is for guests, with an edge on it and a key server whose
// keys are in SoftHSM2. Pet cams enrol with the tunnel "petcam".
type host struct {
	*lab.Lab
	net *testnet.Net
	ns  *testnet.Namespace
}

// sweep removes what earlier runs left because they were killed.
var sweep = sync.OnceFunc(func() { testnet.Sweep("khq") })

// newHost makes a host that lives as long as the test.
func newHost(t *testing.T) *host {
	t.Helper()
	sweep()
	n, err := testnet.New("khq")
	must(t, err)
	t.Cleanup(func() { must(t, n.Close()) })
	ns, err := n.Namespace("host")
	must(t, err)
	for _, a := range []string{"10.0.2.2/32", "10.20.0.10/32", "10.20.0.20/32"} {
		must(t, ns.AddAddr("lo", netip.MustParsePrefix(a)))
	}
	dir := bin(t)
	l, err := lab.New(t.Context(), lab.Plan{
		Dir: shortDir(t), Bin: dir, Tools: filepath.Join(dir, "keyhaven-demo"),
		Edge: lab.EdgePlan{NS: ns, Tunnel: edgeTunnel, Listen: "0.0.0.0:7844", Visitors: visitors, Ops: "127.0.0.1:9600"},
		Sites: []lab.SitePlan{{Name: "keys", NS: ns, Origin: "10.20.0.20:8080", KeyServer: "10.20.0.10:2407", Ops: "127.0.0.1:9601",
			KeyServerOps: "127.0.0.1:9602", Routes: []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}}},
		Zones: []lab.ZonePlan{{Host: camHost, KeyType: "p256"}},
		Adapt: func(file string, cfg map[string]any) {
			if t, is := cfg["tunnel"].(map[string]any); is && cfg["visitors"] != nil {
				t["drain_timeout"] = "1s" // machines that lost their power end no flow
			}
			if file == "edge.yaml" {
				zones := cfg["visitors"].(map[string]any)["zones"].([]map[string]any)
				zones[0]["origins"] = []map[string]any{{"tunnel": camTunnel}}
			}
		},
	})
	must(t, err)
	t.Cleanup(func() {
		must(t, l.Stop())
		if t.Failed() {
			t.Log(tail(l.Logs(), 60))
		}
	})
	h := &host{l, n, ns}
	must(t, l.Start(t.Context()))
	_, err = l.Edge(t.Context(), "tunnel", "create", camTunnel)
	must(t, err)
	return h
}

func tail(s string, lines int) string {
	all := strings.Split(s, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// token makes a join token and returns its file and itself.
func (h *host) token(t *testing.T, args ...string) (file, token string) {
	t.Helper()
	file = filepath.Join(shortDir(t), "token")
	_, err := h.Edge(t.Context(), append([]string{"tunnel", "token", "create", camTunnel, "--out", file}, args...)...)
	must(t, err)
	b, err := os.ReadFile(file)
	must(t, err)
	return file, strings.TrimSpace(string(b))
}

// personalise puts a configuration, and a join token if its file is named, into a copy of the image.
func (h *host) personalise(t *testing.T, config, tokenFile string) *Disk {
	t.Helper()
	dir := shortDir(t)
	in, out := filepath.Join(dir, "keyhaven.yaml"), filepath.Join(dir, "card.img")
	must(t, os.WriteFile(in, []byte(config), 0o600))
	args := []string{"image", "personalise", "--config", in, "--output", out}
	if tokenFile != "" {
		args = append(args, "--token-file", tokenFile)
	}
	_, err := h.Tool(t.Context(), "keyhaven-connector", append(args, image(t))...)
	must(t, err)
	return open(t, out)
}

// open makes a disk of a file for the time of the test.
func open(t *testing.T, file string) *Disk {
	t.Helper()
	d, done, err := OpenDisk(file)
	must(t, err)
	t.Cleanup(func() { must(t, done()) })
	return d
}

// switchOn starts a machine with the disk, which is cut off at the end of the test. Its serial line is searched for the
// secrets then.
func (h *host) switchOn(t *testing.T, m Machine, secrets ...string) *Run {
	t.Helper()
	if m.Board.Name == "" {
		m.Board = board(t)
	}
	m.Dir, m.NS = shortDir(t), h.ns
	// The journal goes over the serial line, for people who look for a fault, and so that secrets are looked for in all of it.
	m.Append += " console=" + m.Board.Console + " systemd.journald.forward_to_console=1"
	r, err := m.Start()
	must(t, err)
	t.Cleanup(func() {
		if err := r.PowerCut(); err != nil {
			t.Error(err)
		}
		said := r.Serial()
		for _, s := range secrets {
			if strings.Contains(said, s) {
				t.Errorf("the serial line shows a secret")
			}
		}
		if t.Failed() {
			t.Logf("boots: %+v\nthe serial line:\n%s", r.History(), tail(said, 80))
			if status, err := r.ReadFile(1, statusFile); err == nil {
				t.Logf("%s:\n%s", statusFile, status)
			}
		}
	})
	return r
}

const statusFile = "keyhaven-status.txt"

// eventually polls while the machine is on, for a time that a slow machine gets more of.
func eventually(t *testing.T, r *Run, patience time.Duration, what string, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := deadline(t, patience)
	defer cancel()
	if err := r.Until(ctx, f); err != nil {
		t.Fatalf("%s, %v after the start: %v", what, patience, err)
	}
}

func deadline(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), time.Duration(float64(d)**slowFlag))
}

// awaitStatus waits until the status file on the card has all the words.
func awaitStatus(t *testing.T, r *Run, patience time.Duration, words ...string) {
	t.Helper()
	eventually(t, r, patience, "the status file", func(context.Context) error {
		b, err := r.ReadFile(1, statusFile)
		if err != nil {
			return err
		}
		text := strings.Join(strings.Fields(string(b)), " ") // lines are wrapped
		for _, w := range words {
			if !strings.Contains(text, w) {
				return fmt.Errorf("it lacks %q:\n%s", w, b)
			}
		}
		return nil
	})
}

// tunnelUp reports whether the edge has a live session of a pet cam.
func (h *host) tunnelUp(ctx context.Context) error { return tunnelUp(ctx, h.Edge) }

func tunnelUp(ctx context.Context, edge func(context.Context, ...string) (string, error)) error {
	out, err := edge(ctx, "tunnel", "info", camTunnel, "--output", "json")
	if err != nil {
		return err
	}
	var v struct {
		Status   string `json:"status"`
		Sessions int    `json:"sessions"`
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		return err
	}
	if v.Sessions == 0 {
		return fmt.Errorf("the tunnel is %s", v.Status)
	}
	return nil
}

// figure keeps what was measured, and prints it.
func figure(t *testing.T, name string, value float64, unit string, more ...any) {
	t.Helper()
	line := map[string]any{"name": name, "value": value, "unit": unit, "board": *boardFlag, "kernel": *kernelFlag}
	for i := 0; i+1 < len(more); i += 2 {
		line[more[i].(string)] = more[i+1]
	}
	b, err := json.Marshal(line)
	must(t, err)
	t.Logf("FIGURE %s", b)
	must(t, os.MkdirAll(filepath.Dir(*figuresFlag), 0o755))
	f, err := os.OpenFile(*figuresFlag, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	must(t, err)
	defer f.Close()
	_, err = f.Write(append(b, '\n'))
	must(t, err)
}
