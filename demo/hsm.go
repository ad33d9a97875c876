package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

// home is what "token list --output json" shows of a token.
type home struct {
	Workers []struct {
		PID   int    `json:"pid"`
		State string `json:"state"`
	} `json:"workers"`
}

// workers returns the process ids of the key server's workers that are ready.
func (d *demo) workers(ctx context.Context) ([]int, error) {
	out, err := d.lab.Tool(ctx, "keyhaven-keyserver", "token", "list", "--output", "json", "--control", d.lab.Path("keyserver.sock"))
	if err != nil {
		return nil, err
	}
	var homes []home
	if err := json.Unmarshal([]byte(out), &homes); err != nil {
		return nil, fmt.Errorf("token list says %q: %w", out, err)
	}
	var pids []int
	for _, h := range homes {
		for _, w := range h.Workers {
			if w.State == "ready" {
				pids = append(pids, w.PID)
			}
		}
	}
	return pids, nil
}

// workersKilled kills each worker in turn while visitors come, of whom each needs a signature.
func (d *demo) workersKilled(ctx context.Context) error {
	server := d.lab.KeyServer.PID()
	before, err := d.workers(ctx)
	if err != nil {
		return err
	}
	if len(before) == 0 {
		return errors.New("the key server has no worker processes")
	}
	pages, err := d.whileVisited(ctx, func(ctx context.Context) error { return d.fetchOK(ctx) }, func(ctx context.Context, pages *atomic.Int64) error {
		return d.killEach(ctx, before, pages)
	})
	if err != nil {
		return err
	}
	if d.lab.KeyServer.PID() != server || !d.lab.KeyServer.Running() {
		return errors.New("the key server itself did not live on")
	}
	fmt.Printf("        %d visits without an error while the workers %v were killed\n", pages, before)
	return nil
}

// killEach kills processes one after the other, each when visitors have come since the one before and as many workers
// are ready as there were.
func (d *demo) killEach(ctx context.Context, pids []int, pages *atomic.Int64) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for _, pid := range pids {
		if err := d.visited(ctx, pages); err != nil {
			return err
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			return fmt.Errorf("kill -9 %d: %w", pid, err)
		}
		if err := d.visited(ctx, pages); err != nil {
			return err
		}
		err := lab.Eventually(ctx, func(ctx context.Context) error {
			now, err := d.workers(ctx)
			if err == nil && len(now) < len(pids) {
				err = fmt.Errorf("%d workers of %d", len(now), len(pids))
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("after kill -9 %d: %w", pid, err)
		}
	}
	return d.visited(ctx, pages)
}

// visited waits until some more visitors have come.
func (d *demo) visited(ctx context.Context, pages *atomic.Int64) error {
	want := pages.Load() + 5
	return lab.Eventually(ctx, func(context.Context) error {
		if n := pages.Load(); n < want {
			return fmt.Errorf("no more visits after %d", n)
		}
		return nil
	})
}

// auditHolds has the audit log verified, and then a copy of it in which one name was changed.
func (d *demo) auditHolds(ctx context.Context) error {
	verify := func(dir string) (string, error) {
		return d.lab.Tool(ctx, "keyhaven-keyserver", "audit", "verify", "--public-key", d.lab.Path("audit.pub"), "--dir", dir)
	}
	if out, err := verify(d.lab.Path("audit")); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	copied := d.lab.Path("audit-copy")
	if err := os.CopyFS(copied, os.DirFS(d.lab.Path("audit"))); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(copied, "audit-*.jsonl"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("the audit log has no files: %w", err)
	}
	log, err := os.ReadFile(files[0])
	if err != nil {
		return err
	}
	altered := bytes.Replace(log, []byte(`"`+ecHost+`"`), []byte(`"`+rsaHost+`"`), 1)
	if bytes.Equal(altered, log) {
		return errors.New("the audit log does not name " + ecHost)
	}
	if err := os.WriteFile(files[0], altered, 0o600); err != nil {
		return err
	}
	if out, err := verify(copied); err == nil || !strings.Contains(out, "altered") {
		return fmt.Errorf("an altered record is not named (%v): %s", err, out)
	}
	return nil
}
