package update

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/appliance/slot"
)

var quiet = slog.New(slog.DiscardHandler)

func TestDamagedRecord(t *testing.T) {
	good := newRecord()
	m := newMachine("1.0.0")
	if err := good.save(m); err != nil {
		t.Fatal(err)
	}
	whole := string(m.files[recordFile])
	for name, text := range map[string]string{
		"empty":             "",
		"half":              whole[:len(whole)/2],
		"zeros":             strings.Repeat("\x00", len(whole)),
		"another format":    strings.Replace(whole, `"format": 1`, `"format": 9`, 1),
		"state of a future": strings.Replace(whole, `"idle"`, `"polishing"`, 1),
		"no device":         strings.Replace(whole, good.Device, "", 1),
		"more than one":     whole + whole,
		"large":             whole + strings.Repeat(" ", maxRecord),
		"negative":          strings.Replace(whole, `"device"`, `"trials":-1,"device"`, 1),
	} {
		t.Run(name, func(t *testing.T) {
			m, p := newMachine("1.0.0"), newPublisher(t)
			m.files[recordFile] = []byte(text)
			e := m.engine(t, p, nil)
			e.recover()
			wantReport(t, e, "1.0.0", fleet.Idle, "", "damaged")
			if e := m.engine(t, p, nil); e.Report().State != fleet.Idle { // and now it is whole
				t.Error("the record was not written anew")
			}
		})
	}
}

// A data partition that fails keeps no update from being watched and given up.
func TestRecordCannotBeWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		m.slots[slot.PartB] = system("1.1.0")
		m.current = slot.PartB
		e, err := newEngine(m.engine(t, p, func(c *Config) { c.Healthy = nil }).c, badDir{})
		if err != nil {
			t.Fatal(err)
		}
		if err := runFor(t, e, time.Hour); !errors.Is(err, ErrRestart) || strings.Join(m.restarts, " ") != "default" {
			t.Errorf("got %v, restarts %q", err, m.restarts)
		}
	})
}

type badDir struct{}

var errBad = errors.New("input/output error")

func (badDir) Read(string, int64) ([]byte, error) { return nil, errBad }
func (badDir) Create(string, []byte) error        { return errBad }
func (badDir) Rename(string, string) error        { return errBad }
func (badDir) Sync() error                        { return errBad }

// The power goes in every single step of an update from its start to the moment that it is kept, before and after the step was
// done. Each time the machine comes up with a whole system, knows what happened, and gets the update done after all.
func TestPowerCutsOfUpdate(t *testing.T) {
	powerCuts(t, "1.1.0", func(t *testing.T, m *machine, p *publisher) {
		if err := runFor(t, m.engine(t, p, nil), time.Hour); !errors.Is(err, ErrRestart) || m.dead {
			return
		}
		m.begin()
		_ = runFor(t, m.engine(t, p, nil), 2*time.Minute)
	})
}

// The same for a return to the version before.
func TestPowerCutsOfRollback(t *testing.T) {
	powerCuts(t, "", func(t *testing.T, m *machine, p *publisher) {
		if m.slots[slot.PartB].Version == "" {
			m.slots[slot.PartB] = system("0.9.0")
		}
		if err := m.engine(t, p, func(c *Config) { c.Automatic = false }).Rollback(t.Context(), true); !errors.Is(err, ErrRestart) || m.dead {
			return
		}
		m.begin()
		_ = runFor(t, m.engine(t, p, func(c *Config) { c.Automatic = false }), 2*time.Minute)
	})
}

// begin starts the machine without giving it power again.
func (m *machine) begin() {
	cut := m.cut
	m.start()
	m.cut = cut
}

// powerCuts does do with the power going in each of its steps. In the end, after more starts, the version that runs is final; empty:
// any.
func powerCuts(t *testing.T, final string, do func(*testing.T, *machine, *publisher)) {
	t.Helper()
	p := newPublisher(t)
	p.publish(t, "1.1.0", 100)
	points := 0
	synctest.Test(t, func(t *testing.T) {
		m := newMachine("1.0.0")
		do(t, m, p)
		points = m.steps
	})
	for cut := 1; cut <= points; cut++ {
		for _, late := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				m := newMachine("1.0.0")
				m.cut, m.late = cut, late
				do(t, m, p)
				if !m.dead {
					t.Fatalf("cut %d of %d was not made", cut, points)
				}
				m.tryboot = m.tryboot && late // a restart that was asked for and then the power: the firmware forgets
				afterCut(t, m, p, final)
				if t.Failed() {
					t.Fatalf("cut %d of %d, late %v", cut, points, late)
				}
			})
		}
	}
	if final != "" && points*2 < 50 {
		t.Errorf("%d cuts, want 50 and more", points*2)
	}
	t.Logf("%d points, 2 ways each", points)
}

// afterCut starts the machine until it is at rest.
func afterCut(t *testing.T, m *machine, p *publisher, final string) {
	t.Helper()
	automatic := func(c *Config) { c.Automatic, c.Timing.Tick = final != "", time.Minute }
	for range 4 {
		version := m.start()
		if version == "" {
			t.Fatalf("slot %d is started and holds nothing", m.current)
		}
		e := m.engine(t, p, automatic)
		if st := e.Report().State; st == "" {
			t.Error("no state is reported")
		}
		if err := runFor(t, e, 7*time.Hour); errors.Is(err, ErrRestart) {
			continue
		}
		r := e.Report()
		if r.Trial || r.State == fleet.Writing || r.State == fleet.Downloading || r.State == fleet.Trial {
			t.Errorf("at rest it reports %+v", r)
		}
		if final != "" && version != final {
			t.Errorf("in the end %s runs: %+v", version, r)
		}
		return
	}
	t.Errorf("it restarts for ever: %q", m.restarts)
}

// What the next start finds out and says, from each state in which the power can go.
func TestRecover(t *testing.T) {
	for name, c := range map[string]struct {
		rec          record
		current, def int
		state        string
		target       string
		text         string
	}{
		"downloading":         {record{State: fleet.Downloading, Target: "1.1.0"}, 2, 2, fleet.Idle, "1.1.0", "was cut off"},
		"writing":             {record{State: fleet.Writing, Target: "1.1.0"}, 2, 2, fleet.Idle, "1.1.0", "was cut off"},
		"before the trial":    {record{State: fleet.Trial, Target: "1.1.0", Slot: 3, Trials: 1}, 2, 2, fleet.RolledBack, "1.1.0", "did not come up"},
		"during the trial":    {record{State: fleet.Trial, Target: "1.1.0", Slot: 3, Trials: 1, Gates: 1}, 2, 2, fleet.RolledBack, "1.1.0", "tried once more"},
		"twice":               {record{State: fleet.Trial, Target: "1.1.0", Slot: 3, Trials: 2, Gates: 1}, 2, 2, fleet.RolledBack, "1.1.0", "not tried again"},
		"on trial":            {record{State: fleet.Trial, Target: "1.1.0", Slot: 3, Trials: 1}, 3, 2, fleet.Trial, "1.1.0", ""},
		"on trial, unknown":   {record{State: fleet.Idle}, 3, 2, fleet.Trial, "1.1.0", ""},
		"committed":           {record{State: fleet.Trial, Target: "1.1.0", Slot: 3, Trials: 1, Gates: 1}, 3, 3, fleet.Confirmed, "1.1.0", ""},
		"confirmed":           {record{State: fleet.Confirmed, Target: "1.1.0", Slot: 3}, 3, 3, fleet.Confirmed, "1.1.0", ""},
		"failed":              {record{State: fleet.Failed, Target: "1.1.0", Error: "no space"}, 2, 2, fleet.Failed, "1.1.0", "no space"},
		"return not begun":    {record{State: fleet.RolledBack, Target: "1.1.0", Slot: 3, Returning: true}, 2, 2, fleet.Idle, "1.1.0", "cut off"},
		"return done":         {record{State: fleet.RolledBack, Target: "1.1.0", Previous: "1.0.0", Slot: 3, Returning: true}, 3, 3, fleet.RolledBack, "1.0.0", "somebody asked"},
		"bad during a trial":  {record{State: fleet.Trial, Target: "1.1.0", Slot: 3, Trials: 1, Gates: 1}, 3, 0, fleet.Trial, "1.1.0", ""},
		"autoboot.txt is bad": {record{State: fleet.Idle}, 2, 0, fleet.Idle, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			m, p := newMachine("1.0.0"), newPublisher(t)
			m.slots[slot.PartB] = system("1.1.0")
			m.current, m.def = c.current, c.def
			c.rec.Format, c.rec.Device = recordFormat, "x"
			if err := c.rec.save(m); err != nil {
				t.Fatal(err)
			}
			e := m.engine(t, p, nil)
			e.recover()
			wantReport(t, e, m.slots[c.current].Version, c.state, c.target, c.text)
			if want := 2; c.def == 0 && m.def != want {
				t.Errorf("autoboot.txt was repaired to %d, want %d", m.def, want)
			}
		})
	}
}

// Whoever can write to the data partition is root already; but a card that fails makes anything of a record.
func FuzzRecord(f *testing.F) {
	m := newMachine("1.0.0")
	if err := newRecord().save(m); err != nil {
		f.Fatal(err)
	}
	f.Add(m.files[recordFile])
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err != nil {
			return
		}
		m := newMachine("1.0.0")
		if err := r.save(m); err != nil {
			return // a time that JSON cannot hold
		}
		if _, err := parseRecord(m.files[recordFile]); err != nil && len(m.files[recordFile]) <= maxRecord {
			t.Errorf("%s: %v", m.files[recordFile], err)
		}
	})
}
