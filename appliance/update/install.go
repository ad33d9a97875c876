package update

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/appliance/slot"
)

// ErrNothing says that there is nothing to install.
var ErrNothing = errors.New("there is no newer version for this device")

// A Request says what Update is to look for. The zero value is what a device does of its own accord: the newest version, if it
// is this device's turn.
type Request struct {
	Directive fleet.Directive // with fleet.Update: its version and channel, whatever the percentage
	Asked     bool            // somebody asked: the percentage does not matter
	Force     bool            // versions that are older, the same, or were given up are taken too
}

// Update asks the source and installs what it has. It ends with [ErrRestart] when the new version is about to be started on
// trial, with [ErrNothing], or with another error, which Report tells as well.
func (e *Engine) Update(ctx context.Context, q Request) error {
	if e.source == nil {
		return errors.New("update: no update source is set; write update.source in keyhaven.yaml, or give a bundle")
	}
	return e.exclusive(func() error {
		if err := e.noTrial(); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, e.c.Timing.Total)
		defer cancel()
		x, err := e.ask(ctx, q)
		if err != nil {
			return err
		}
		rel, err := e.choose(x, q)
		if err != nil {
			return err
		}
		e.set(func(r *record) { r.begin(fleet.Downloading, rel.Version, e.running.Version) })
		d, err := e.source.download(ctx, x.Channel, rel)
		if err != nil {
			return e.failed(ctx, err)
		}
		defer d.Close()
		d.progress = e.tell
		return e.install(ctx, d, rel.Version, x.Channel, q.Force)
	})
}

// Install installs a bundle that somebody gives. It ends as Update does.
func (e *Engine) Install(ctx context.Context, r io.Reader, force bool) error {
	return e.exclusive(func() error {
		if err := e.noTrial(); err != nil {
			return err
		}
		return e.install(ctx, r, "", "", force)
	})
}

// noTrial is an error while a version is on trial, before anything is noted: what is noted is about the trial.
func (e *Engine) noTrial() error {
	st, err := e.c.Slots.State()
	if err == nil && st.Trial {
		err = slot.ErrTrial
	}
	return err
}

// exclusive calls do while no other program works on the slots, with the record as it is on the disk.
func (e *Engine) exclusive(do func() error) error {
	unlock, err := lock(e.c.Dir)
	switch {
	case errors.Is(err, ErrBusy):
		return err
	case err != nil: // the data partition fails: no reason to leave the system as it is
		e.c.Log.Error("cannot lock the directory of updates", "err", err)
	default:
		defer unlock()
	}
	r, err := readRecord(e.dir)
	e.mu.Lock()
	if err == nil && !e.unsaved {
		e.rec = r
	}
	e.mu.Unlock()
	return do()
}

// ask gets the source's index for q.
func (e *Engine) ask(ctx context.Context, q Request) (bundle.Index, error) {
	channel := e.c.Channel
	if q.Directive.Policy == fleet.Update && q.Directive.Channel != "" {
		channel = q.Directive.Channel
	}
	e.setChecking(true)
	x, err := e.source.index(ctx, channel, e.running.Arch, e.rec.Published[channel])
	e.mu.Lock()
	e.checkErr = ""
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) {
		e.checkErr = "the update source gave no answer that can be used: " + err.Error()
	}
	e.mu.Unlock()
	e.setChecking(false)
	e.set(func(r *record) {
		if err != nil {
			r.Failures++
			return
		}
		r.Checked = time.Now().UTC().Truncate(time.Second)
		r.saw(channel, x.Published)
	})
	if err != nil {
		e.c.Log.Warn("the update source gave no answer that can be used", "err", err)
	}
	return x, err
}

// setChecking makes Report say that the source is asked, which the record need not.
func (e *Engine) setChecking(yes bool) {
	e.mu.Lock()
	e.checking = yes
	e.mu.Unlock()
	e.changed()
}

// choose picks the release for this device.
func (e *Engine) choose(x bundle.Index, q Request) (bundle.Release, error) {
	version := ""
	if q.Directive.Policy == fleet.Update {
		version = q.Directive.Version
	}
	rel, ok := x.Release(version)
	e.mu.Lock()
	blocked := ok && e.rec.blocks(rel.Version)
	e.mu.Unlock()
	nothing := func(note string) (bundle.Release, error) {
		e.say(note)
		e.set(func(r *record) { r.Failures = 0 })
		return bundle.Release{}, fmt.Errorf("%w: %s", ErrNothing, note)
	}
	switch {
	case !ok && version != "":
		return nothing(fmt.Sprintf("the update source does not have %s, which the edge wants%s", version, byRollout(q.Directive)))
	case !ok:
		return nothing("the update source has no version for this device")
	case q.Force:
		return rel, nil
	case bundle.Compare(rel.Version, e.running.Version) <= 0:
		return nothing(fmt.Sprintf("%s runs, the update source has %s", e.running.Version, rel.Version))
	case blocked:
		return nothing(fmt.Sprintf("%s was given up once and is not tried again until there is a newer one", rel.Version))
	case version == "" && !q.Asked && !Staged(rel.Salt, e.c.Device, rel.Percent):
		return nothing(fmt.Sprintf("%s is there for %d %% of the devices, and not yet for this one", rel.Version, rel.Percent))
	}
	return rel, nil
}

// begin notes that something new is done about target.
func (r *record) begin(state, target, running string) {
	if r.Target != target {
		r.Trials = 0
	}
	r.State, r.Target, r.Previous, r.Error, r.Slot, r.Gates = state, target, running, "", 0, 0
}

// install writes a bundle to the idle slot and has it started. Version and channel, if not empty, are those of the index.
func (e *Engine) install(ctx context.Context, src io.Reader, version, channel string, force bool) error {
	r, err := bundle.Open(src, e.c.Keys)
	if err != nil {
		return e.failed(ctx, err)
	}
	defer r.Close()
	m := r.Manifest()
	if version != "" && m.Version != version {
		return e.failed(ctx, fmt.Errorf("%w: the index says %s, the bundle is %s; make the index again", bundle.ErrCorrupt, version, m.Version))
	}
	if channel != "" && m.Channel != "" && m.Channel != channel {
		return e.failed(ctx, fmt.Errorf("%w: it is for %s, the index for %s; publish each where it belongs", bundle.ErrChannel, m.Channel, channel))
	}
	if err := e.fits(m, force); err != nil {
		return e.failed(ctx, err)
	}
	st, err := e.c.Slots.State()
	if err != nil {
		return e.failed(ctx, err)
	}
	e.set(func(r *record) {
		r.begin(fleet.Writing, m.Version, e.running.Version)
		r.Proven = without(r.Proven, m.Version)
	})
	e.c.Log.Info("write an update to the idle slot", "version", m.Version, "partition", st.Idle, "size", m.Size)
	progress := func(int64) {}
	if version == "" { // otherwise the download tells
		progress = func(n int64) { e.tell(n, m.Size) }
	}
	if err := e.c.Slots.WriteIdle(ctx, r, m.Size, progress); err != nil {
		return e.failed(ctx, err)
	}
	info, err := e.c.Slots.Info(st.Idle)
	if err == nil && (info.Version != m.Version || info.Arch != m.Arch || !slices.Equal(info.Boards, m.Boards)) {
		err = fmt.Errorf("%w: its slot says %s for %s, its manifest %s for %s; make it again", bundle.ErrCorrupt, info.Version, info.Arch, m.Version, m.Arch)
	}
	if err != nil {
		return e.failed(ctx, err)
	}
	e.set(func(r *record) { r.State, r.Slot, r.Trials = fleet.Trial, st.Idle, r.Trials+1 })
	if err := e.restart(ctx, e.c.Slots.RebootTrial); !errors.Is(err, ErrRestart) {
		return e.failed(ctx, err)
	}
	return ErrRestart
}

func (e *Engine) fits(m bundle.Manifest, force bool) error {
	size, err := e.c.Slots.Size()
	if err != nil {
		return err
	}
	d := bundle.Device{Arch: e.running.Arch, Boards: e.c.Slots.Boards(), Version: e.running.Version, MaxSize: size}
	return m.Fits(d, force)
}

// failed notes err. What ctx ended is no failure.
func (e *Engine) failed(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		e.set(func(r *record) { r.State = fleet.Idle })
		return context.Cause(ctx)
	}
	e.set(func(r *record) {
		r.Failures++
		r.State, r.Error = fleet.Failed, err.Error()
	})
	e.c.Log.Error("the update failed", "err", err)
	return err
}

// Rollback returns to the system in the other slot, which is not tried first: it was kept on this card before. The version that
// runs is blocked. With force any whole system is returned to. It ends with [ErrRestart] or an error. While a trial runs it is
// given up.
func (e *Engine) Rollback(ctx context.Context, force bool) error {
	return e.exclusive(func() error {
		st, err := e.c.Slots.State()
		if err != nil {
			return err
		}
		other := slot.Other(st.Current)
		info, err := e.c.Slots.Info(other)
		if err != nil {
			return err
		}
		if st.Trial {
			return e.giveUp(ctx, "somebody asked for the one before", true)
		}
		e.mu.Lock()
		good := slices.Contains(e.rec.Proven, info.Version) && !e.rec.blocks(info.Version)
		e.mu.Unlock()
		if !good && !force {
			return fmt.Errorf("update: the other slot has %s, which was given up or never kept on this device; to start it all the same, say --force", info.Version)
		}
		e.set(func(r *record) {
			r.block(e.running.Version)
			r.unblock(info.Version)
			r.State, r.Target, r.Previous, r.Slot, r.Returning, r.Error = fleet.RolledBack, info.Version, e.running.Version, other, true, ""
		})
		if _, err := e.c.Slots.Rollback(); err != nil {
			e.set(func(r *record) {
				r.unblock(e.running.Version)
				r.State, r.Returning, r.Error = fleet.Failed, false, err.Error()
			})
			return err
		}
		return e.restart(ctx, e.c.Slots.Reboot)
	})
}
