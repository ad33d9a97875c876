package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/keyhaven/keyhaven/reliability"
)

// recovery reports how long the key server takes to serve again after each failure of the fault matrix.
func (b *bench) recovery(ctx context.Context) error {
	dir := filepath.Join(b.dir, "reliability")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	matrix, err := reliability.NewBench(ctx, dir, filepath.Join(b.bin, "keyhaven-keyserver"))
	if err != nil {
		return err
	}
	restarts := 0
	for _, r := range reliability.Rows() {
		res, err := matrix.Run(ctx, r)
		if ctx.Err() != nil {
			return err
		}
		if err != nil {
			b.report.note("recovery, %s: MISSED: %v", r.Name, err)
			b.report.rows = append(b.report.rows, row{Group: "recovery", Key: r.Name, Case: "never", Unit: "ms"})
			continue
		}
		if err := res.Check(); err != nil {
			b.report.note("recovery, %s: MISSED: %v", r.Name, err)
		}
		restarts += res.ServerRestarts
		b.report.rows = append(b.report.rows, row{Group: "recovery", Key: r.Name, Case: fmt.Sprintf("%d of %d lost", res.Lost, res.Sent), Rate: us(res.Recovery) / 1e3, Unit: "ms"})
	}
	b.report.atMost("recovery: restarts of the key server, all rows together", float64(restarts), 1, 0)
	return nil
}
