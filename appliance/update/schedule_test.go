package update

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/appliance/slot"
)

func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		night := func(c *Config) { c.Schedule = "23:00-01:30" }
		e := m.engine(t, p, night) // in 2000: the clock is wrong
		if err := runFor(t, e, 48*time.Hour); errors.Is(err, ErrRestart) || p.times("") > 0 {
			t.Fatalf("with a clock that is wrong: %v, %d requests", err, p.times(""))
		}
		if text := e.Text(); !strings.Contains(text, "clock") {
			t.Errorf("got %q", text)
		}
		inThe2030s()
		time.Sleep(2 * time.Hour)
		e = m.engine(t, p, night)
		if err := runFor(t, e, 20*time.Hour); errors.Is(err, ErrRestart) || p.times("") > 0 {
			t.Fatalf("at day: %v, %d requests", err, p.times(""))
		}
		if text := e.Text(); !strings.Contains(text, "23:00-01:30") {
			t.Errorf("got %q", text)
		}
		if err := runFor(t, m.engine(t, p, night), 24*time.Hour); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		if now := time.Now(); now.Hour() != 23 && now.Hour() != 0 {
			t.Errorf("installed at %v", now)
		}
	})
}

func TestWindow(t *testing.T) {
	at := func(h, m int) time.Time { return time.Date(2026, 6, 1, h, m, 0, 0, time.UTC) }
	for _, c := range []struct {
		hours string
		t     time.Time
		want  time.Duration
	}{
		{"", at(12, 0), 24 * time.Hour},
		{"03:00-05:00", at(2, 59), 0},
		{"03:00-05:00", at(3, 0), 2 * time.Hour},
		{"03:00-05:00", at(4, 59), time.Minute},
		{"03:00-05:00", at(5, 0), 0},
		{"23:00-01:00", at(22, 59), 0},
		{"23:00-01:00", at(23, 30), 90 * time.Minute},
		{"23:00-01:00", at(0, 30), 30 * time.Minute},
		{"23:00-01:00", at(1, 0), 0},
		{"04:00-04:00", at(12, 0), 24 * time.Hour},
	} {
		w, err := parseWindow(c.hours)
		if got := w.left(c.t); err != nil || got != c.want {
			t.Errorf("%q at %v: got %v, %v, want %v", c.hours, c.t, got, err, c.want)
		}
	}
	for _, bad := range []string{"3-5", "24:00-01:00", "03:00", "03:00-05:60", "03:00 - 05:00"} {
		if _, err := parseWindow(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	// Local time: 03:30 in Berlin is 01:30 in summer and 02:30 in winter, by UTC.
	berlin := time.FixedZone("CEST", 2*3600)
	w, _ := parseWindow("03:00-05:00")
	if got := w.left(at(1, 30).In(berlin)); got != 90*time.Minute {
		t.Errorf("in local time: got %v", got)
	}
}

func TestDirectives(t *testing.T) {
	for name, c := range map[string]struct {
		directive fleet.Directive
		automatic bool
		percent   int
		want      string // version that is installed
		text      string
	}{
		"nothing said":            {fleet.Directive{}, true, 100, "1.2.0", ""},
		"free":                    {fleet.Directive{Policy: fleet.Free}, true, 100, "1.2.0", ""},
		"free, by hand":           {fleet.Directive{Policy: fleet.Free}, false, 100, "", "by hand"},
		"free, for nobody":        {fleet.Directive{Policy: fleet.Free}, true, 0, "", "0 % of the devices"},
		"hold":                    {fleet.Directive{Policy: fleet.Hold, Rollout: "spring"}, true, 100, "", "holds this device back, rollout spring"},
		"update":                  {fleet.Directive{Policy: fleet.Update, Version: "1.1.0"}, true, 100, "1.1.0", ""},
		"update, by hand, 0 %":    {fleet.Directive{Policy: fleet.Update, Version: "1.1.0"}, false, 0, "1.1.0", ""},
		"update to what runs":     {fleet.Directive{Policy: fleet.Update, Version: "1.0.0"}, true, 100, "", ""},
		"update to an older one":  {fleet.Directive{Policy: fleet.Update, Version: "0.9.0"}, true, 100, "", "1.0.0 runs"},
		"update to what is not":   {fleet.Directive{Policy: fleet.Update, Version: "2.0.0", Rollout: "r"}, true, 100, "", "does not have 2.0.0"},
		"update in other channel": {fleet.Directive{Policy: fleet.Update, Version: "1.1.0", Channel: "beta"}, true, 100, "", "404"},
		"channel of a path":       {fleet.Directive{Policy: fleet.Update, Version: "1.1.0", Channel: ".."}, true, 100, "", "not like stable"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, p := newMachine("1.0.0"), newPublisher(t)
				for _, v := range []string{"0.9.0", "1.1.0", "1.2.0"} {
					p.publish(t, v, c.percent)
				}
				e := m.engine(t, p, func(k *Config) {
					k.Automatic, k.Directive = c.automatic, func() fleet.Directive { return c.directive }
				})
				err := runFor(t, e, 5*time.Hour)
				if got := errors.Is(err, ErrRestart); got != (c.want != "") {
					t.Fatalf("got %v; %s", err, e.Text())
				}
				if got := m.slots[slot.PartB].Version; got != c.want {
					t.Errorf("installed %q, want %q", got, c.want)
				}
				if text := e.Text(); !strings.Contains(text, c.text) {
					t.Errorf("got %q, want %q in it", text, c.text)
				}
			})
		})
	}
}

// A directive that changes is acted upon at once, not at the next look at the source.
func TestDirectiveChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		began := time.Now()
		e := m.engine(t, p, func(c *Config) {
			c.Directive = func() fleet.Directive {
				if time.Since(began) < time.Hour {
					return fleet.Directive{Policy: fleet.Hold}
				}
				return fleet.Directive{Policy: fleet.Update, Version: "1.1.0"}
			}
		})
		if err := runFor(t, e, 3*time.Hour); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		if d := time.Since(began); d > time.Hour+2*time.Minute {
			t.Errorf("installed after %v", d)
		}
	})
}

// The first directive after a start, which comes once the tunnel is up, has what failed before not tried again at once; one for
// another version has that tried.
func TestFirstDirective(t *testing.T) {
	for name, c := range map[string]struct {
		directive fleet.Directive
		waits     bool
	}{
		"free":                       {fleet.Directive{Policy: fleet.Free}, true},
		"update to what failed":      {fleet.Directive{Policy: fleet.Update, Version: "1.1.0"}, true},
		"update to something better": {fleet.Directive{Policy: fleet.Update, Version: "1.1.1"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, p := newMachine("1.0.0"), newPublisher(t)
				p.publish(t, "1.1.0", 100)
				trial(t, m, p, func(time.Duration) bool { return false })
				p.publish(t, "1.1.1", 100)
				began := time.Now()
				e := m.engine(t, p, func(k *Config) {
					k.Directive = func() fleet.Directive {
						if time.Since(began) < 20*time.Second {
							return fleet.Directive{}
						}
						return c.directive
					}
				})
				if err := runFor(t, e, time.Hour); !errors.Is(err, ErrRestart) {
					t.Fatal(err)
				}
				if d := time.Since(began); d < 5*time.Minute != !c.waits || d > 10*time.Minute {
					t.Errorf("tried again after %v", d)
				}
			})
		})
	}
}
