package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// tellEvery is how often the service manager is told what has changed.
const tellEvery = 5 * time.Second

// attend answers signals and tells the service manager how the edge is, until ctx ends or another process is to take over,
// which it reports.
func (p *process) attend(ctx context.Context, hangups <-chan os.Signal) (replaced bool) {
	tell := time.NewTicker(tellEvery)
	defer tell.Stop()
	status := ""
	for {
		select {
		case <-ctx.Done():
			p.notify.Stopping("finishing what is open")
			return false
		case <-tell.C:
			p.self.Discard() // what this process serves is bound by now
			if now := p.summary(); now != status {
				status = now
				p.notify.Status(status)
			}
		case <-hangups:
			p.notify.Reloading()
			if err := p.tryReload(); err != nil {
				p.log.Error("configuration not reloaded, the old one stays", "err", err)
			} else {
				p.log.Info("configuration reloaded")
			}
			p.notify.Ready(p.summary())
		case <-p.self.Requests():
			p.log.Info("starting another process to take over")
			next, err := p.self.Start(ctx, false)
			if err != nil {
				p.log.Error("no other process takes over, this one goes on", "err", err)
				continue
			}
			p.log.Info("another process takes over when this one has finished what is open", "pid", next.PID())
			p.next = next
			return true
		}
	}
}

// summary is a line about the edge for people.
func (p *process) summary() string {
	s := p.control.Status()
	line := fmt.Sprintf("%d sessions, %d flows", s.Sessions, s.Flows)
	if n := len(p.visitors.Faults()); n > 0 {
		line += fmt.Sprintf(", %d faults", n)
	}
	return line
}

// alive returns an error if a lock of the edge is not given back before ctx ends.
func (p *process) alive(ctx context.Context) error {
	answered := make(chan struct{})
	go func() { // left behind if a lock is not given back; the process is to be ended then
		defer close(answered)
		p.control.Status()
		p.visitors.Faults()
		p.visitors.Pools()
	}()
	select {
	case <-answered:
		return nil
	case <-ctx.Done():
		return errors.New("a lock is not given back")
	}
}
