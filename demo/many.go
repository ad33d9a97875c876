package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

// whileVisited has visit done over and over while do works, and returns how many visits there were. One that fails ends it.
func (d *demo) whileVisited(ctx context.Context, visit func(context.Context) error, do func(context.Context, *atomic.Int64) error) (int64, error) {
	var pages atomic.Int64
	var visits sync.WaitGroup
	var failed error
	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	looping, stop := context.WithCancel(ctx)
	visits.Go(func() {
		for looping.Err() == nil {
			if failed = visit(ctx); failed != nil {
				cancel(failed) // nobody waits for more visits then
				return
			}
			pages.Add(1)
		}
	})
	err := do(work, &pages)
	stop()
	visits.Wait()
	if err = errors.Join(failed, err); err != nil {
		return pages.Load(), fmt.Errorf("after %d pages: %w", pages.Load(), err)
	}
	return pages.Load(), nil
}

// fetchOK is one visit to the first edge, which must bring the page.
func (d *demo) fetchOK(ctx context.Context) error {
	_, err := d.fetch(ctx, ecHost, "-f")
	return err
}

// fetchAnywhere is one visit to an edge that takes connections. curl asks again when a connection breaks, as browsers do.
func (d *demo) fetchAnywhere(ctx context.Context) error {
	cmd, err := d.lab.Curl(ctx, nil, ecHost, "/", "-f", "-m", "15", "--retry", "2", "--retry-all-errors")
	if err != nil {
		return err
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("curl: %w: %s", err, strings.TrimSpace(errs.String()))
	}
	if !strings.Contains(out.String(), "Hello from the private origin") {
		return fmt.Errorf("the page is %q", out.String())
	}
	return nil
}

// connectorKilled kills each connector in turn while curl loops over one edge, without a second try.
func (d *demo) connectorKilled(ctx context.Context) error {
	connectors := d.lab.Sites[0].Connectors
	pages, err := d.whileVisited(ctx, d.fetchOK, func(ctx context.Context, pages *atomic.Int64) error {
		for _, c := range connectors {
			if err := d.killed(ctx, pages, c.Proc, func() error { return d.lab.Restart(ctx, c, true) }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Printf("        %d visits without an error while each of %d connectors was killed and came back\n", pages, len(connectors))
	return nil
}

// edgeKilled kills each edge in turn while curl loops over both.
func (d *demo) edgeKilled(ctx context.Context) error {
	pages, err := d.whileVisited(ctx, d.fetchAnywhere, func(ctx context.Context, pages *atomic.Int64) error {
		for i, e := range d.lab.Edges {
			if err := d.killed(ctx, pages, e.Proc, func() error { return d.lab.RestartEdge(ctx, i, true) }); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Printf("        %d visits without an error while each of %d edges was killed and came back\n", pages, len(d.lab.Edges))
	return nil
}

// killed ends a process by kill -9 when visitors have come, lets more come while it is away, and brings it back.
func (d *demo) killed(ctx context.Context, pages *atomic.Int64, p *lab.Process, back func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	if err := d.visited(ctx, pages); err != nil {
		return err
	}
	if err := p.Kill(); err != nil {
		return err
	}
	if err := d.visited(ctx, pages); err != nil {
		return fmt.Errorf("with %s killed: %w", p.Name(), err)
	}
	if err := back(); err != nil {
		return err
	}
	return d.visited(ctx, pages)
}
