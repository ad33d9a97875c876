// Command bench measures Keyhaven in one run on one machine: our key server against the existing one over one token, its
// fairness, what the worker processes cost; the PKCS#11 module alone, the key server on loopback and through the tunnel,
// handshakes with the remote key against a local one, and the tunnel against plain loopback. It prints a table and lines
// of JSON. The ratios are what counts: rates depend on the machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

type options struct {
	bin     string
	window  time.Duration
	rounds  int
	out     string
	only    []string
	interop string
	peers   string
	// for tunnel-peers and edge-connectors
	congestion string
	connectors int
}

func main() {
	ctx, stop := cli.SignalContext()
	var o options
	root := cli.New("bench", "Measure Keyhaven against the existing key server and its own parts")
	root.RunE = func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), o) }
	root.Flags().StringVar(&o.bin, "bin", "bin", "directory of the built programs")
	root.Flags().DurationVar(&o.window, "window", 2*time.Second, "how long each case is measured in each round")
	root.Flags().IntVar(&o.rounds, "rounds", 3, "rounds; a figure is the median of its rounds")
	root.Flags().StringVar(&o.out, "json", "", "file for the lines of JSON (default: standard output, after the table)")
	root.Flags().StringSliceVar(&o.only, "only", nil, "measure these parts alone: "+strings.Join(partNames(), ", "))
	root.Flags().StringVar(&o.interop, "interop", "interop/gokeyless", "directory of the module that builds the existing key server")
	root.Flags().StringVar(&o.peers, "peers", "bench/peers", "directory of the module that builds the other tunnels")
	root.Flags().StringVar(&o.congestion, "congestion", "", "TCP congestion control of both namespaces (default: the machine's)")
	root.Flags().IntVar(&o.connectors, "connectors", 10_000, "simulated connectors at one edge")
	code := cli.Execute(ctx, root, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, o options) (err error) {
	for _, name := range o.only {
		if !slices.Contains(partNames(), name) {
			return cli.UsageError("--only: there is no part %q; the parts are %s", name, strings.Join(partNames(), ", "))
		}
	}
	if o.rounds < 1 || o.window < 100*time.Millisecond {
		return cli.UsageError("--rounds must be at least 1 and --window at least 100ms")
	}
	r := &report{machine: thisMachine()}
	r.machine.Window, r.machine.Rounds = o.window.String(), o.rounds
	dir, err := os.MkdirTemp("", "keyhaven-bench-")
	if err != nil {
		return err
	}
	b := &bench{options: o, report: r, dir: dir}
	defer func() { err = errors.Join(err, b.close(), os.RemoveAll(dir)) }()
	if b.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	measured := b.parts(ctx)
	r.print(os.Stdout)
	return errors.Join(measured, r.write(o.out))
}

// parts measures what was asked for. What was measured before a part failed stands in the report.
func (b *bench) parts(ctx context.Context) error {
	o, r := b.options, b.report
	for _, p := range parts {
		if len(o.only) > 0 && !slices.Contains(o.only, p.name) {
			continue
		}
		fmt.Fprintln(os.Stderr, "measuring", p.name)
		var missing notRun
		if err := b.part(ctx, p); errors.As(err, &missing) {
			r.note("NOT RUN: %s: %s", p.name, missing.why)
		} else if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// A part can be chosen with --only.
type part struct {
	name  string
	do    func(*bench, context.Context) error
	needs need
}

// need is what a part takes of the bench's own installation.
type need int

const (
	nothing   need = iota
	files          // of the lab: token, keys, certificates
	installed      // besides, the running key server and the tunnel
)

var parts = []part{
	{"bare", (*bench).bare, files},
	{"network-hsm", (*bench).slow, files},
	{"boundary", (*bench).boundary, files},
	{"fairness", (*bench).fairness, files},
	{"recovery", (*bench).recovery, files},
	{"signatures", (*bench).signatures, installed},
	{"handshakes", (*bench).handshakes, installed},
	{"tunnel", (*bench).flows, installed},
	{"tunnel-peers", (*bench).tunnelPeers, nothing},
	{"routes", (*bench).routes, nothing},
	{"edge-connectors", (*bench).edgeConnectors, nothing},
}

func partNames() (names []string) {
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

func (b *bench) part(ctx context.Context, p part) error {
	if p.needs >= files {
		if err := b.start(ctx); err != nil {
			return err
		}
	}
	if p.needs == installed {
		if err := b.install(ctx); err != nil {
			return err
		}
	}
	return p.do(b, ctx)
}

// notRun says why a part cannot be measured on this machine; the others go on.
type notRun struct{ why string }

func (n notRun) Error() string { return n.why }

// measured is one case of a group: it is measured once in each round, so that what disturbs the machine for a while
// disturbs all cases alike.
type measured struct {
	key     string
	name    string
	callers int
	op      func(ctx context.Context, caller int) error
	pids    func() []int // whose processor time counts; nil: the installation's
	runs    []sample
}

// measure runs the cases for all rounds and reports them under group.
func (b *bench) measure(ctx context.Context, group string, cases []*measured) error {
	for range b.rounds {
		for _, c := range cases {
			pids := b.pids
			if c.pids != nil {
				pids = c.pids
			}
			s, err := load(ctx, c.callers, b.window, pids(), c.op)
			if err != nil {
				return fmt.Errorf("%s, %s, %d at a time: %w", c.name, c.key, c.callers, err)
			}
			c.runs = append(c.runs, s)
		}
	}
	for _, c := range cases {
		b.report.add(group, c.key, c.name, c.callers, median(c.runs))
	}
	return nil
}
