// Package update keeps an appliance's system up to date. It asks an update source what there is, writes a new version to
// the idle slot, has it started on trial, and keeps it only if the tunnel comes up; otherwise the machine restarts into the
// version before. What it does is on the disk before it is done, so that the next start knows how the last one ended.
package update

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"aead.dev/minisign"

	"github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/appliance/slot"
)

// Slots is what the engine needs of [slot.Slots].
type Slots interface {
	State() (slot.State, error)
	Info(part int) (slot.Info, error)
	Size() (int64, error)
	Boards() []string
	Model() string
	WriteIdle(ctx context.Context, r io.Reader, size int64, progress func(int64)) error
	Commit() error
	Rollback() (slot.Info, error)
	Repair(part int) (bool, error)
	RebootTrial() error
	Reboot() error
}

// ErrRestart is what Run, Install, Update and Rollback end with when they have asked for a restart of the machine and it has
// not come yet.
var ErrRestart = errors.New("the machine restarts")

// ErrBusy says that another program works on the slots.
var ErrBusy = errors.New("another update is being written; wait until it is done")

// Config says how updates are to be done. Slots, Keys and Dir are needed; the zero value of the others is usable.
type Config struct {
	Slots Slots
	Keys  []minisign.PublicKey // of the image: what may be installed is decided by them alone
	Dir   string               // for the engine's record; made if it is missing

	Source    string         // base address of the update source; empty: none
	Channel   string         // empty: stable
	Schedule  string         // hours such as 03:00-05:00 in which updates are looked for and done; empty: always
	Location  *time.Location // of Schedule; nil: time.Local
	Automatic bool           // look for updates without being told to
	Device    string         // name that decides whether a stage has this device; empty: a random one, kept in Dir

	Healthy   func() bool            // whether the tunnel is up; nil: never, so no trial is ever kept
	Directive func() fleet.Directive // what an edge wants; nil: nothing
	Stop      func(context.Context)  // called before a restart, for a minute at most; nil: nothing
	Changed   func()                 // called after changes of Report, by a goroutine of the engine; nil: nothing

	Gate       Gate         // zero fields: those of the kernel command line, else 60 s within 10 min
	KernelArgs string       // the kernel command line; empty: that of this machine
	Proxy      *url.URL     // of HTTP, with user and password; nil: that of the environment, if it names one
	HTTP       *http.Client // nil: one with time limits
	Log        *slog.Logger // nil: nothing is logged
	Timing     Timing
}

// Timing are the engine's intervals. The zero value of each is the default.
type Timing struct {
	Tick    time.Duration // between looks at clock, health and directive; 10 s
	Check   time.Duration // between looks at the source; 6 h, and up to a tenth more by chance
	Start   time.Duration // longest time by chance before the first look at the source; 1 min
	Retry   time.Duration // before another attempt after a failure; 5 min, doubling up to 24 h
	Resume  time.Duration // before a download that was cut goes on; 2 s, doubling up to 1 min
	Stalled time.Duration // a download without a byte for so long is begun anew where it stopped; 1 min
	Total   time.Duration // a download may take; 12 h
	Offline time.Duration // the source is not asked until the tunnel is up, or down for so long; 24 h
}

func (t *Timing) setDefaults() {
	for _, f := range []struct {
		v *time.Duration
		d time.Duration
	}{
		{&t.Tick, 10 * time.Second}, {&t.Check, 6 * time.Hour}, {&t.Start, time.Minute}, {&t.Retry, 5 * time.Minute},
		{&t.Resume, 2 * time.Second}, {&t.Stalled, time.Minute}, {&t.Total, 12 * time.Hour}, {&t.Offline, 24 * time.Hour},
	} {
		if *f.v <= 0 {
			*f.v = f.d
		}
	}
}

// An Engine does the updates of one machine. Report and Text may be called by any goroutine at any time; of the others one
// at a time, also among processes.
type Engine struct {
	c      Config
	hours  window
	source *source // nil: none
	dir    directory

	mu       sync.Mutex
	rec      record
	running  slot.Info
	trial    bool
	unsaved  bool   // rec is not on the disk
	checking bool   // the source is being asked
	checkErr string // why it gave no answer
	note     string // why nothing is done
	done     int64  // bytes of the download
	total    int64
	progress time.Time // when Changed was told last
}

// New checks c and reads the record of what was done before. A record that cannot be read is begun anew. The errors are those
// of c itself.
func New(c Config) (*Engine, error) { return newEngine(c, osDir(c.Dir)) }

func newEngine(c Config, dir directory) (*Engine, error) {
	if c.Slots == nil || len(c.Keys) == 0 || c.Dir == "" {
		return nil, errors.New("update: slots, keys and a directory are needed")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Channel == "" {
		c.Channel = "stable"
	}
	if c.Location == nil {
		c.Location = time.Local
	}
	c.Timing.setDefaults()
	e := &Engine{c: c, dir: dir}
	var err error
	if e.hours, err = parseWindow(c.Schedule); err != nil {
		return nil, err
	}
	if c.Source != "" {
		if e.source, err = newSource(c); err != nil {
			return nil, err
		}
	}
	if e.c.KernelArgs == "" {
		b, _ := os.ReadFile("/proc/cmdline") // elsewhere than on Linux there is none
		e.c.KernelArgs = string(b)
	}
	e.c.Gate = c.Gate.complete(e.c.KernelArgs, c.Log)
	// From here on nothing is an error: a trial has to be watched on a card whose other partitions fail, too.
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		c.Log.Error("cannot make the directory of updates", "err", err)
	}
	e.rec = e.load()
	if e.c.Device == "" {
		e.c.Device = e.rec.Device
	}
	e.look()
	return e, nil
}

// look finds out what runs.
func (e *Engine) look() slot.State {
	st, err := e.c.Slots.State()
	if err != nil {
		e.c.Log.Error("cannot read which slot is the default", "err", err)
	}
	info, err := e.c.Slots.Info(st.Current)
	if err != nil {
		e.c.Log.Error("cannot read what runs", "err", err)
	}
	e.mu.Lock()
	e.running, e.trial = info, st.Trial
	e.mu.Unlock()
	return st
}

// Report returns how updates stand, for an edge. Camera is left empty.
func (e *Engine) Report() fleet.Report {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := fleet.Report{
		Product: bundle.Product, Arch: e.running.Arch, Board: e.c.Slots.Model(), Version: e.running.Version, Trial: e.trial,
		Previous: e.rec.Previous, State: e.rec.State, Target: e.rec.Target, Error: e.rec.Error, Checked: e.rec.Checked, Since: e.rec.Since,
	}
	if e.checking {
		r.State = fleet.Checking
	}
	if r.Error == "" {
		r.Error = e.checkErr
	}
	if r.Version == "" {
		r.Version = "unknown"
	}
	return r
}

// Text returns how updates stand, for people, in one line.
func (e *Engine) Text() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "version %s", e.running.Version)
	if e.checking {
		b.WriteString(", looks for a newer one")
	}
	switch e.rec.State {
	case fleet.Downloading, fleet.Writing:
		fmt.Fprintf(&b, ", gets %s", e.rec.Target)
		if e.total > 0 {
			fmt.Fprintf(&b, " (%d %%)", e.done*100/e.total)
		}
	case fleet.Trial:
		if e.trial {
			b.WriteString(", on trial: kept once the tunnel is up, else the one before comes back")
		} else {
			fmt.Fprintf(&b, ", restarts into %s on trial", e.rec.Target)
		}
	case fleet.Confirmed:
		fmt.Fprintf(&b, ", updated from %s", e.rec.Previous)
	case fleet.RolledBack:
		fmt.Fprintf(&b, ", %s was given up", e.rec.Target)
	case fleet.Failed:
		fmt.Fprintf(&b, ", the update to %s failed", e.rec.Target)
	}
	for _, s := range []string{e.rec.Error, e.checkErr, e.note} {
		if s != "" {
			b.WriteString("; " + s)
		}
	}
	return b.String()
}

// set changes the record, puts it on the disk, and tells about it. A record that cannot be written is told and kept in memory:
// the card's other partitions may be good still.
func (e *Engine) set(change func(*record)) {
	e.mu.Lock()
	before := e.rec.State
	change(&e.rec)
	if e.rec.State != before {
		e.rec.Since = time.Now().UTC().Truncate(time.Second)
	}
	rec := e.rec
	e.mu.Unlock()
	err := rec.save(e.dir)
	e.mu.Lock()
	e.unsaved = err != nil
	e.mu.Unlock()
	if err != nil {
		e.c.Log.Error("cannot write the record of updates", "err", err)
	}
	e.changed()
}

// say sets why nothing is done.
func (e *Engine) say(note string) {
	e.mu.Lock()
	same := e.note == note
	e.note = note
	e.mu.Unlock()
	if !same {
		e.c.Log.Info("update", "note", note)
		e.changed()
	}
}

func (e *Engine) changed() {
	if e.c.Changed != nil {
		e.c.Changed()
	}
}

// tell counts the bytes of a download.
func (e *Engine) tell(done, total int64) {
	e.mu.Lock()
	e.done, e.total = done, total
	due := time.Since(e.progress) >= 5*time.Second
	if due {
		e.progress = time.Now()
	}
	e.mu.Unlock()
	if due {
		e.changed()
	}
}

// restart has what runs stop and then restarts the machine.
func (e *Engine) restart(ctx context.Context, how func() error) error {
	if e.c.Stop != nil {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		e.c.Stop(ctx)
		cancel()
	}
	if err := how(); err != nil {
		return err
	}
	return ErrRestart
}
