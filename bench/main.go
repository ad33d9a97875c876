// Command bench measures Keyhaven against its own parts, in one run on one machine: the PKCS#11 module alone, the key
// server on loopback and through the tunnel, handshakes with the remote key against a local one, and the tunnel against
// plain loopback. It prints a table and lines of JSON. The ratios are what counts: rates depend on the machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

type options struct {
	bin    string
	window time.Duration
	rounds int
	out    string
}

func main() {
	ctx, stop := cli.SignalContext()
	var o options
	root := cli.New("bench", "Measure Keyhaven against its own parts")
	root.RunE = func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), o) }
	root.Flags().StringVar(&o.bin, "bin", "bin", "directory of the built programs")
	root.Flags().DurationVar(&o.window, "window", 2*time.Second, "how long each case is measured in each round")
	root.Flags().IntVar(&o.rounds, "rounds", 3, "rounds; a figure is the median of its rounds")
	root.Flags().StringVar(&o.out, "json", "", "file for the lines of JSON (default: standard output, after the table)")
	code := cli.Execute(ctx, root, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, o options) (err error) {
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
	if err := b.start(ctx); err != nil {
		return err
	}
	for _, part := range []struct {
		name string
		do   func(context.Context) error
	}{{"signatures", b.signatures}, {"handshakes", b.handshakes}, {"tunnel", b.flows}} {
		fmt.Fprintln(os.Stderr, "measuring", part.name)
		if err := part.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	r.print(os.Stdout)
	if o.out == "" {
		fmt.Println()
		return r.jsonLines(os.Stdout)
	}
	f, err := os.Create(o.out)
	if err != nil {
		return err
	}
	return errors.Join(r.jsonLines(f), f.Close())
}

// measured is one case of a group: it is measured once in each round, so that what disturbs the machine for a while
// disturbs all cases alike.
type measured struct {
	key     string
	name    string
	callers int
	op      func(ctx context.Context, caller int) error
	runs    []sample
}

// measure runs the cases for all rounds and reports them under group.
func (b *bench) measure(ctx context.Context, group string, cases []*measured) error {
	for range b.rounds {
		for _, c := range cases {
			s, err := load(ctx, c.callers, b.window, b.pids(), c.op)
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
