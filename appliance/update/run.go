package update

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/appliance/slot"
)

// Run finds out how the last start ended, watches a version on trial, and then looks for updates. It ends with ctx's error, or
// with [ErrRestart]. It is called once, before the connector is asked how it is, since a trial's time begins here.
func (e *Engine) Run(ctx context.Context) error {
	st := e.recover()
	if e.returnedHalfway(st) {
		return e.restart(ctx, e.c.Slots.Reboot)
	}
	if st.Trial {
		if err := e.watch(ctx); err != nil {
			return err
		}
	}
	return e.loop(ctx)
}

// recover makes the record fit what runs, and says in it what happened.
func (e *Engine) recover() slot.State {
	e.repair()
	st := e.look()
	e.set(func(r *record) {
		if st.Default == st.Current {
			r.Proven = with(r.Proven, e.running.Version)
		}
		switch {
		case r.Returning:
			e.returned(r, st)
		case st.Trial:
			if r.State != fleet.Trial || r.Slot != st.Current {
				r.Trials, r.Gates = 1, 0
			}
			r.State, r.Target, r.Slot, r.Error = fleet.Trial, e.running.Version, st.Current, ""
			r.Gates++
		case r.State == fleet.Trial && r.Slot == st.Current:
			r.confirm() // it was committed, and the power went before that was written
		case r.State == fleet.Trial:
			r.fellBack()
		case r.State == fleet.Downloading || r.State == fleet.Writing:
			r.State = fleet.Idle
			r.Error = fmt.Sprintf("the update to %s was cut off by a restart or a loss of power; nothing was lost, and it is tried again", r.Target)
		}
	})
	if r := e.Report(); r.Error != "" {
		e.c.Log.Warn("update", "state", r.State, "target", r.Target, "err", r.Error)
	}
	return st
}

// repair writes a damaged autoboot.txt anew. What runs becomes the default, unless it is known to be on trial.
func (e *Engine) repair() {
	st, err := e.c.Slots.State()
	if err != nil || st.Default != 0 {
		return
	}
	part := st.Current
	e.mu.Lock()
	if e.rec.State == fleet.Trial && e.rec.Slot == part {
		part = slot.Other(part)
	}
	e.mu.Unlock()
	if _, err := e.c.Slots.Repair(part); err != nil {
		e.c.Log.Error("cannot repair autoboot.txt", "err", err)
	}
}

// returned ends a return to the other slot that somebody asked for.
func (e *Engine) returned(r *record, st slot.State) {
	if r.Slot == st.Current {
		r.Returning = false
		r.Target, r.Previous = r.Previous, ""
		r.State, r.Error = fleet.RolledBack, fmt.Sprintf("somebody asked for the return from %s to %s", r.Target, e.running.Version)
		return
	}
	if st.Default == st.Current { // the power went before anything was changed
		r.Returning = false
		r.unblock(e.running.Version)
		r.State, r.Error = fleet.Idle, fmt.Sprintf("the return to %s was cut off; ask for it again", r.Target)
	}
}

// returnedHalfway reports whether only the restart of a return is missing. It is asked for once.
func (e *Engine) returnedHalfway(st slot.State) bool {
	e.mu.Lock()
	half := e.rec.Returning && st.Trial
	e.mu.Unlock()
	if half {
		e.set(func(r *record) { r.Returning = false })
	}
	return half
}

// confirm notes that Target was kept.
func (r *record) confirm() {
	r.State, r.Error, r.Trials, r.Gates, r.Failures = fleet.Confirmed, "", 0, 0, 0
	r.unblock(r.Target)
	r.Proven = with(r.Proven, r.Target)
}

// fellBack notes that the machine restarted during a trial, or before it. That may have been the power: a version has more
// than one chance.
func (r *record) fellBack() {
	r.State = fleet.RolledBack
	what := "restarted before its trial was over"
	if r.Gates == 0 {
		what = "did not come up far enough to begin its trial"
	}
	r.Gates = 0
	r.Failures++
	if r.Trials >= maxTrials {
		r.block(r.Target)
		r.Error = fmt.Sprintf("%s %s, %d times; it is not tried again until there is a newer one", r.Target, what, r.Trials)
		r.Trials = 0
		return
	}
	r.Error = fmt.Sprintf("%s %s, by a loss of power or a crash; it is tried once more", r.Target, what)
}

// watch keeps the version on trial once the tunnel was up for long enough, or else restarts into the one before.
func (e *Engine) watch(ctx context.Context) error {
	e.mu.Lock()
	gates := e.rec.Gates
	e.mu.Unlock()
	if gates > maxGates {
		return e.giveUp(ctx, fmt.Sprintf("its appliance program restarted %d times", gates-1), true)
	}
	e.c.Log.Info("a version is on trial", "version", e.running.Version, "up_for", e.c.Gate.For, "within", e.c.Gate.Within)
	began := time.Now()
	var up time.Time
	var commitErr error
	tick := time.NewTicker(min(time.Second, e.c.Timing.Tick))
	defer tick.Stop()
	for {
		healthy := e.c.Healthy != nil && e.c.Healthy()
		switch {
		case !healthy:
			up = time.Time{}
		case up.IsZero():
			up = time.Now()
		}
		if healthy && time.Since(up) >= e.c.Gate.For {
			if commitErr = e.exclusive(e.keep); commitErr == nil {
				return nil
			}
			e.c.Log.Error("cannot keep the new version yet", "err", commitErr)
		}
		if time.Since(began) >= e.c.Gate.Within {
			break
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	if commitErr != nil {
		return e.giveUp(ctx, commitErr.Error(), true)
	}
	return e.giveUp(ctx, fmt.Sprintf("the tunnel was not up for %v within %v", e.c.Gate.For, e.c.Gate.Within), false)
}

// keep makes the version on trial the default.
func (e *Engine) keep() error {
	if err := e.c.Slots.Commit(); err != nil && !errors.Is(err, slot.ErrNoTrial) {
		return err
	}
	e.mu.Lock()
	e.trial = false
	e.mu.Unlock()
	e.set((*record).confirm)
	e.c.Log.Info("the new version is kept", "version", e.running.Version)
	return nil
}

// giveUp restarts into the version before. Unless it is sure that the new one is at fault, which has no tunnel too while the
// network or the edge is down, there is another trial: that begins, as all do, when there is a tunnel.
func (e *Engine) giveUp(ctx context.Context, why string, sure bool) error {
	e.c.Log.Error("the new version is given up", "version", e.running.Version, "err", why)
	e.set(func(r *record) {
		r.State, r.Gates = fleet.RolledBack, 0
		if !sure && r.Trials < maxTrials {
			r.Failures++
			r.Error = fmt.Sprintf("%s was given up: %s; that may have been the network, and it is tried once more", r.Target, why)
			return
		}
		r.block(r.Target)
		r.Trials = 0
		r.Error = fmt.Sprintf("%s was given up: %s; it is not tried again until there is a newer one", r.Target, why)
	})
	return e.restart(ctx, e.c.Slots.Reboot)
}

// looks is what loop remembers.
type looks struct {
	next      time.Time // when the source is asked again
	chosen    bool      // next was chosen for this run of the hours
	up        time.Time // when the tunnel was up last
	directive fleet.Directive
}

// loop looks for updates until ctx ends.
func (e *Engine) loop(ctx context.Context) error {
	t := e.c.Timing
	l := &looks{next: time.Now().Add(chance(t.Start)), up: time.Now()}
	e.mu.Lock()
	if n := e.rec.Failures; n > 0 {
		l.next = l.next.Add(backoff(t.Retry, n, 24*time.Hour))
	}
	e.mu.Unlock()
	tick := time.NewTicker(t.Tick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		if !e.due(l) {
			continue
		}
		err := e.Update(ctx, Request{Directive: l.directive})
		switch {
		case errors.Is(err, ErrRestart):
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, ErrNothing):
			wait := t.Check
			if l.directive.Policy == fleet.Update { // what the edge wants may not be published yet
				wait /= 12
			}
			l.next = time.Now().Add(wait + chance(wait/10))
		default:
			e.mu.Lock()
			n := max(e.rec.Failures, 1)
			e.mu.Unlock()
			wait := backoff(t.Retry, n, 24*time.Hour)
			l.next = time.Now().Add(wait + chance(wait/10))
		}
	}
}

// due reports whether the source is to be asked now.
func (e *Engine) due(l *looks) bool {
	d := fleet.Directive{}
	if e.c.Directive != nil {
		d = e.c.Directive()
	}
	if d != l.directive {
		if e.news(l.directive, d) {
			l.next = time.Now().Add(chance(e.c.Timing.Start))
		}
		l.directive = d
	}
	up := e.c.Healthy == nil || e.c.Healthy()
	if up {
		l.up = time.Now()
	}
	switch {
	case d.Policy == fleet.Hold:
		e.say("the edge holds this device back" + byRollout(d))
		return false
	case e.source == nil:
		e.say("no update source is set")
		return false
	case d.Policy == fleet.Update && bundle.Compare(d.Version, e.running.Version) == 0:
		e.say("")
		return false
	case d.Policy != fleet.Update && !e.c.Automatic:
		e.say("updates are done by hand only")
		return false
	}
	if !e.open(l) || time.Now().Before(l.next) {
		return false
	}
	if !up && time.Since(l.up) < e.c.Timing.Offline {
		e.say("updates wait for the tunnel")
		return false
	}
	e.say("")
	return true
}

// news reports whether a directive is a reason to ask the source soon. The first after a start is none to try again at once
// what failed before it.
func (e *Engine) news(before, d fleet.Directive) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return before != fleet.Directive{} || e.rec.Failures == 0 || d.Policy == fleet.Update && bundle.Compare(d.Version, e.rec.Target) != 0
}

func byRollout(d fleet.Directive) string {
	if d.Rollout == "" {
		return ""
	}
	return ", rollout " + d.Rollout
}

// open reports whether these are the hours for updates. Their first part is spread by chance over the devices.
func (e *Engine) open(l *looks) bool {
	if e.hours.always() {
		return true
	}
	now := time.Now()
	if !plausible(now, e.running.Built) {
		e.say("updates wait for the clock to be set: is a time server reachable?")
		return false
	}
	left := e.hours.left(now.In(e.c.Location))
	if left == 0 {
		l.chosen = false
		e.say("updates wait for the hours " + e.c.Schedule)
		return false
	}
	if !l.chosen {
		l.chosen = true
		if first := now.Add(chance(min(left/2, time.Hour))); l.next.Before(first) {
			l.next = first
		}
	}
	return true
}
