package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/notify"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/internal/takeover"
)

const (
	// settleTime is how long a process that takes over waits for its last sessions once it has the first, and for the first where
	// its predecessor has none.
	settleTime = 5 * time.Second
	// lookEvery is how often it looks, and how often the service manager is told what has changed.
	lookEvery = 50 * time.Millisecond
	tellEvery = 2 * time.Second
)

// running is a connector with what operators, the service manager and another process of it want of it.
type running struct {
	process   *takeover.Process
	notify    notify.Notifier
	settings  *settings
	log       *slog.Logger
	connector *connector.Connector
	ops       *ops.Server
	control   *control
	reload    func(old *settings) *settings
	check     func(ctx context.Context)
}

// run runs the connector, what is asked of it, and reloads, until ctx ends or another process has taken over, and waits for
// all of them.
func (r *running) run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	drained := make(chan struct{})
	hangups := cli.Hangups(ctx)
	var wg sync.WaitGroup
	var err error
	wg.Go(func() { err = r.attend(ctx, stop, drained, hangups) })
	wg.Go(func() { r.check(ctx) })
	runErr := r.connector.Run(ctx)
	close(drained)
	wg.Wait()
	return errors.Join(runErr, err)
}

// attend waits for the predecessor, if there is one, then answers operators and signals until the connector has drained or
// another process does that. It calls stop when the connector is to drain.
func (r *running) attend(ctx context.Context, stop func(), drained <-chan struct{}, hangups <-chan os.Signal) error {
	defer stop()
	if r.process.Succeeds() {
		r.settle(ctx)
	}
	if err := r.process.Ready(ctx); err != nil {
		return err
	}
	side, endSide := context.WithCancel(context.WithoutCancel(ctx)) // it answers while the connector drains
	var wg sync.WaitGroup
	var errs [3]error
	for i, f := range []func(context.Context) error{
		func(ctx context.Context) error { return cli.ListenError(r.ops.Run(ctx)) },
		r.control.run,
		func(ctx context.Context) error { return r.notify.Watchdog(ctx, r.connector.Alive) },
	} {
		wg.Go(func() {
			if errs[i] = f(side); errs[i] != nil {
				stop()
			}
		})
	}
	// It is there to try: a site that is cut off must not have it killed for want of an edge.
	status := r.connector.Summary()
	r.notify.Ready(status)
	next := r.events(ctx, hangups, status)
	if next == nil {
		r.notify.Stopping("finishing open flows")
		stop()
		<-drained
	}
	endSide()
	wg.Wait()
	if next != nil {
		errs[0] = errors.Join(errs[0], next.Release(r.notify))
	}
	return errors.Join(errs[:]...)
}

// settle waits until this process has the sessions that it wants, or for those that may be out of reach for a while only.
func (r *running) settle(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var enough <-chan time.Time
	for {
		ready := r.connector.Ready(ctx) == nil
		if ready && len(r.connector.Degraded()) == 0 {
			return
		}
		if enough == nil && (ready || r.process.Idle()) {
			enough = time.After(settleTime)
		}
		select {
		case <-tick.C:
		case <-enough:
			return
		case <-ctx.Done():
			return
		}
	}
}

// events answers signals, and tells the service manager how the sessions are, until ctx ends or another process is ready to
// take over, which it then returns.
func (r *running) events(ctx context.Context, hangups <-chan os.Signal, status string) *takeover.Successor {
	tell := time.NewTicker(tellEvery)
	defer tell.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tell.C:
			r.process.Discard() // what this process serves is bound by now
			if now := r.connector.Summary(); now != status {
				status = now
				r.notify.Status(status)
			}
		case <-hangups:
			r.notify.Reloading()
			r.settings = r.reload(r.settings)
			status = r.connector.Summary()
			r.notify.Ready(status)
		case <-r.process.Requests():
			if next := r.replace(ctx); next != nil {
				return next
			}
		}
	}
}

// replace starts another process and returns it when it has sessions. If this one has none, the other needs none.
func (r *running) replace(ctx context.Context) *takeover.Successor {
	r.log.Info("starting another process to take over")
	r.connector.Suspend()
	next, err := r.process.Start(ctx, r.connector.Ready(ctx) != nil)
	if err != nil {
		r.connector.Resume()
		r.log.Error("no other process takes over, this one goes on", "err", err)
		return nil
	}
	r.log.Info("another process takes over, this one finishes its flows", "pid", next.PID())
	return next
}
