// Command matrix runs the fault matrix and writes its results into docs/reliability.md. It is run in the repository's root:
//
//	go run ./reliability/cmd/matrix
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/keyhaven/keyhaven/reliability"
)

const document = "docs/reliability.md"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(1)
	}
}

// run does one row after the other, so that none disturbs another's times.
func run(ctx context.Context) error {
	old, err := os.ReadFile(document)
	if err != nil {
		return fmt.Errorf("%w: run this in the root of the repository", err)
	}
	dir, err := os.MkdirTemp("", "keyhaven-reliability-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "keyhaven-keyserver")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", program, "./cmd/keyserver").CombinedOutput(); err != nil {
		return fmt.Errorf("build the key server: %w: %s", err, out)
	}
	b, err := reliability.NewBench(ctx, dir, program)
	if err != nil {
		return err
	}
	results, wrong := rows(ctx, b)
	rates, err := b.Rates(ctx, 1, 2, 4, 8, 16)
	if err != nil {
		return errors.Join(wrong, err)
	}
	text, err := reliability.Replace(string(old), reliability.Table(results, rates))
	if err == nil {
		err = os.WriteFile(document, []byte(text), 0o644)
	}
	return errors.Join(wrong, err)
}

// rows does all rows and returns, besides their results, what is not as it must be.
func rows(ctx context.Context, b *reliability.Bench) (results []*reliability.Result, wrong error) {
	for _, row := range reliability.Rows() {
		r, err := b.Run(ctx, row)
		if err == nil {
			err = r.Check()
		} else {
			r = reliability.Unmeasured(row)
		}
		results = append(results, r)
		verdict := "as it must be"
		if err != nil {
			wrong = errors.Join(wrong, fmt.Errorf("%s: %w", row.Name, err))
			verdict = "NOT AS IT MUST BE"
		}
		fmt.Printf("%-18s sent %4d, lost %4d: %s\n", row.Name, r.Sent, r.Lost, verdict)
	}
	return results, wrong
}
