package update

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/appliance/slot"
)

// runFor runs an engine for a time of a bubble and returns what Run returned.
func runFor(t *testing.T, e *Engine, d time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, errors.New("the time is over"))
	defer cancel()
	return e.Run(ctx)
}

// inThe2030s makes the clock of a bubble, which begins in 2000, one that can be right. It is midnight then.
func inThe2030s() {
	time.Sleep(time.Until(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)))
}

func wantReport(t *testing.T, e *Engine, version, state, target, text string) {
	t.Helper()
	r := e.Report()
	if r.Version != version || r.State != state || r.Target != target || !strings.Contains(r.Error, text) || text == "" && r.Error != "" {
		t.Errorf("got %s, %s of %q, %q; want %s, %s of %q, %q", r.Version, r.State, r.Target, r.Error, version, state, target, text)
	}
	if _, err := r.Encode(); err != nil {
		t.Errorf("the report does not fit the wire: %v", err)
	}
}

func TestUpdateIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		stopped := 0
		e := m.engine(t, p, func(c *Config) { c.Stop = func(context.Context) { stopped++ } })
		if err := runFor(t, e, time.Hour); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		wantReport(t, e, "1.0.0", fleet.Trial, "1.1.0", "")
		if stopped != 1 || strings.Join(m.restarts, " ") != "trial" {
			t.Errorf("stopped %d times, restarts %q", stopped, m.restarts)
		}

		if v := m.start(); v != "1.1.0" || m.def != slot.PartA {
			t.Fatalf("%s runs, default %d", v, m.def)
		}
		e = m.engine(t, p, nil)
		if r := e.Report(); !r.Trial {
			t.Errorf("the trial is not reported: %+v", r)
		}
		began := time.Now()
		if err := runFor(t, e, 59*time.Second); errors.Is(err, ErrRestart) || m.def != slot.PartA {
			t.Fatalf("after 59 s: %v, default %d", err, m.def)
		}
		e = m.engine(t, p, nil)
		if err := runFor(t, e, 2*time.Minute); errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		wantReport(t, e, "1.1.0", fleet.Confirmed, "1.1.0", "")
		if r := e.Report(); r.Trial || r.Previous != "1.0.0" || m.def != slot.PartB {
			t.Errorf("got %+v, default %d, after %v", r, m.def, time.Since(began))
		}
		if v := m.start(); v != "1.1.0" {
			t.Errorf("after a power cut %s runs", v)
		}
	})
}

// A version without a tunnel is given up, and tried once more when there was one again: that may have been the network.
func TestUnhealthyUpdateIsGivenUp(t *testing.T) {
	for name, healthy := range map[string]func(time.Duration) bool{
		"never":            func(time.Duration) bool { return false },
		"with gaps":        func(d time.Duration) bool { return int(d.Seconds())%60 != 30 },
		"from too late on": func(d time.Duration) bool { return d > 9*time.Minute+30*time.Second },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, p := newMachine("1.0.0"), newPublisher(t)
				p.publish(t, "1.1.0", 100)
				for i := range maxTrials {
					trial(t, m, p, healthy)
					e := m.engine(t, p, nil)
					if i+1 < maxTrials {
						wantReport(t, e, "1.0.0", fleet.RolledBack, "1.1.0", "tried once more")
						continue
					}
					if err := runFor(t, e, 24*time.Hour); errors.Is(err, ErrRestart) {
						t.Fatal("it was tried again")
					}
					wantReport(t, e, "1.0.0", fleet.RolledBack, "1.1.0", "not tried again until there is a newer one")
				}
				// A newer one is.
				p.publish(t, "1.1.1", 100)
				if err := runFor(t, m.engine(t, p, nil), 24*time.Hour); !errors.Is(err, ErrRestart) {
					t.Fatal(err)
				}
				if v := m.start(); v != "1.1.1" {
					t.Errorf("%s runs", v)
				}
			})
		})
	}
}

// trial has 1.1.0 installed over 1.0.0, and given up.
func trial(t *testing.T, m *machine, p *publisher, healthy func(time.Duration) bool) {
	t.Helper()
	if err := runFor(t, m.engine(t, p, nil), time.Hour); !errors.Is(err, ErrRestart) {
		t.Fatal(err)
	}
	if v := m.start(); v != "1.1.0" {
		t.Fatalf("%s runs", v)
	}
	began := time.Now()
	e := m.engine(t, p, func(c *Config) { c.Healthy = func() bool { return healthy(time.Since(began)) } })
	if err := runFor(t, e, time.Hour); !errors.Is(err, ErrRestart) {
		t.Fatal(err)
	}
	if d := time.Since(began); d < 10*time.Minute || d > 11*time.Minute {
		t.Errorf("given up after %v", d)
	}
	if v := m.start(); v != "1.0.0" {
		t.Fatalf("%s runs", v)
	}
}

// An edge or a network that is down during a trial, by chance or because somebody wants that, does not keep an update away
// for good: the next trial waits for a tunnel.
func TestNetworkDownDuringTrial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		trial(t, m, p, func(time.Duration) bool { return false })
		down := time.Now()
		e := m.engine(t, p, func(c *Config) { c.Healthy = func() bool { return time.Since(down) > 8*time.Hour } })
		if err := runFor(t, e, 24*time.Hour); !errors.Is(err, ErrRestart) || time.Since(down) < 8*time.Hour {
			t.Fatalf("after %v: %v", time.Since(down), err)
		}
		m.start()
		e = m.engine(t, p, nil)
		if err := runFor(t, e, time.Hour); errors.Is(err, ErrRestart) || m.start() != "1.1.0" {
			t.Fatalf("the second trial: %v", err)
		}
		wantReport(t, e, "1.1.0", fleet.Confirmed, "1.1.0", "")
	})
}

// A version that crashes before it can say anything has two chances, since the power may have been the reason.
func TestCrashesDuringTrial(t *testing.T) {
	for _, begins := range []bool{false, true} {
		t.Run(fmt.Sprintf("trial begins: %v", begins), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, p := newMachine("1.0.0"), newPublisher(t)
				p.publish(t, "1.1.0", 100)
				for i := 1; i <= 2; i++ {
					if err := runFor(t, m.engine(t, p, nil), 24*time.Hour); !errors.Is(err, ErrRestart) {
						t.Fatalf("attempt %d: %v", i, err)
					}
					m.start()
					if begins {
						_ = runFor(t, m.engine(t, p, nil), time.Second)
					}
					if v := m.start(); v != "1.0.0" { // the watchdog
						t.Fatalf("%s runs", v)
					}
				}
				e := m.engine(t, p, nil)
				if err := runFor(t, e, 72*time.Hour); errors.Is(err, ErrRestart) {
					t.Fatal("a third attempt")
				}
				wantReport(t, e, "1.0.0", fleet.RolledBack, "1.1.0", "2 times")
			})
		})
	}
}

// A program that crashes again and again during a trial does not keep the trial going for ever.
func TestProgramCrashesDuringTrial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		if err := runFor(t, m.engine(t, p, nil), time.Hour); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		m.start()
		for i := range maxGates {
			if err := runFor(t, m.engine(t, p, nil), time.Second); errors.Is(err, ErrRestart) {
				t.Fatalf("given up at start %d", i+1)
			}
		}
		e := m.engine(t, p, nil)
		if err := runFor(t, e, time.Second); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		wantReport(t, e, "1.1.0", fleet.RolledBack, "1.1.0", "restarted 5 times")
	})
}

func TestCommitFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		if err := runFor(t, m.engine(t, p, nil), time.Hour); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		m.start()
		m.commitErr = fmt.Errorf("%w: write autoboot.txt", slot.ErrCard)
		e := m.engine(t, p, nil)
		if err := runFor(t, e, time.Hour); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		wantReport(t, e, "1.1.0", fleet.RolledBack, "1.1.0", "the card fails: write autoboot.txt")
	})
}

// Without a tunnel a device waits for a day: a trial could only fail. Then it tries, since the update may be the remedy.
func TestOffline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		e := m.engine(t, p, func(c *Config) { c.Healthy = func() bool { return false } })
		began := time.Now()
		if err := runFor(t, e, 48*time.Hour); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		if d := time.Since(began); d < 24*time.Hour {
			t.Errorf("tried after %v", d)
		}
	})
}

// Failures are told, and tried again later and later.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		m.writeErr = fmt.Errorf("%w: write at 12 KiB of the idle slot: no space left on device; write another card", slot.ErrCard)
		e := m.engine(t, p, nil)
		if err := runFor(t, e, 24*time.Hour); errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		wantReport(t, e, "1.0.0", fleet.Failed, "1.1.0", "no space left on device; write another card")
		if n := p.times(".update"); n < 4 || n > 10 {
			t.Errorf("tried %d times in a day", n)
		}
		m.writeErr = nil
		if err := runFor(t, m.engine(t, p, nil), 48*time.Hour); !errors.Is(err, ErrRestart) {
			t.Error("not tried again once the card is good")
		}
	})
}

func TestSourceDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		p.down = true
		e := m.engine(t, p, nil)
		if err := runFor(t, e, time.Hour); errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		wantReport(t, e, "1.0.0", fleet.Idle, "", "no route to host")
		p.mu.Lock()
		p.down = false
		p.mu.Unlock()
		if err := runFor(t, e, 24*time.Hour); !errors.Is(err, ErrRestart) {
			t.Fatal(err)
		}
		wantReport(t, e, "1.0.0", fleet.Trial, "1.1.0", "")
	})
}

// An index that was replaced cannot be played again.
func TestOldIndexIsRefused(t *testing.T) {
	m, p := newMachine("1.0.0"), newPublisher(t)
	p.publish(t, "1.0.0", 100)
	old := bytes.Clone(p.files["/stable/arm64.json"])
	p.publish(t, "1.0.0", 0)
	e := m.engine(t, p, nil)
	if err := e.Update(t.Context(), Request{}); !errors.Is(err, ErrNothing) {
		t.Fatal(err)
	}
	p.files["/stable/arm64.json"] = old
	e = m.engine(t, p, nil)
	if err := e.Update(t.Context(), Request{}); !errors.Is(err, bundle.ErrOlder) || !strings.Contains(err.Error(), "publish it again") {
		t.Errorf("got %v", err)
	}
}

func TestInstallAndRollback(t *testing.T) {
	m, p := newMachine("1.0.0"), newPublisher(t)
	e := m.engine(t, p, nil)
	e.recover()
	if err := e.Rollback(t.Context(), false); !errors.Is(err, slot.ErrEmpty) {
		t.Errorf("rollback to an empty slot: got %v", err)
	}
	if err := e.Install(t.Context(), bytes.NewReader(p.bundle(t, "0.9.0")), false); !errors.Is(err, bundle.ErrOlder) {
		t.Errorf("an older one: got %v", err)
	}
	wantReport(t, e, "1.0.0", fleet.Failed, "", "--force")
	if err := e.Install(t.Context(), strings.NewReader("rubbish, and more of it"), true); !errors.Is(err, bundle.ErrFormat) {
		t.Errorf("rubbish: got %v", err)
	}
	if err := e.Install(t.Context(), bytes.NewReader(p.bundle(t, "0.9.0")), true); !errors.Is(err, ErrRestart) {
		t.Fatalf("an older one, forced: got %v", err)
	}
	m.start()
	e = m.engine(t, p, nil)
	if err := e.Install(t.Context(), bytes.NewReader(p.bundle(t, "1.1.0")), false); !errors.Is(err, slot.ErrTrial) {
		t.Errorf("during a trial: got %v", err)
	}
	e.recover()
	wantReport(t, e, "0.9.0", fleet.Trial, "0.9.0", "")
	if err := e.exclusive(e.keep); err != nil {
		t.Fatal(err)
	}

	if err := e.Rollback(t.Context(), false); !errors.Is(err, ErrRestart) {
		t.Fatal(err)
	}
	if v := m.start(); v != "1.0.0" {
		t.Fatalf("%s runs", v)
	}
	e = m.engine(t, p, nil)
	e.recover()
	wantReport(t, e, "1.0.0", fleet.RolledBack, "0.9.0", "somebody asked")
	// Back to what somebody left is refused unless it is forced.
	if err := e.Rollback(t.Context(), false); err == nil || !strings.Contains(err.Error(), "given up") {
		t.Errorf("got %v", err)
	}
	if err := e.Rollback(t.Context(), true); !errors.Is(err, ErrRestart) || m.start() != "0.9.0" {
		t.Errorf("forced: got %v", err)
	}
}

// A system that was never kept is not returned to, however whole it is: nobody knows whether it starts.
func TestRollbackToUnproven(t *testing.T) {
	m, p := newMachine("1.0.0"), newPublisher(t)
	e := m.engine(t, p, nil)
	e.recover()
	if err := e.Install(t.Context(), bytes.NewReader(p.bundle(t, "1.1.0")), false); !errors.Is(err, ErrRestart) {
		t.Fatal(err)
	}
	m.tryboot = false // the power goes before the trial
	m.start()
	e = m.engine(t, p, nil)
	e.recover()
	if err := e.Rollback(t.Context(), false); err == nil || !strings.Contains(err.Error(), "never kept") || m.def != slot.PartA {
		t.Errorf("got %v, default %d", err, m.def)
	}
	if err := e.Rollback(t.Context(), true); !errors.Is(err, ErrRestart) || m.def != slot.PartB {
		t.Errorf("forced: got %v, default %d", err, m.def)
	}
}

func TestRollbackOfTrial(t *testing.T) {
	m, p := newMachine("1.0.0"), newPublisher(t)
	if err := m.engine(t, p, nil).Install(t.Context(), bytes.NewReader(p.bundle(t, "1.1.0")), false); !errors.Is(err, ErrRestart) {
		t.Fatal(err)
	}
	m.start()
	e := m.engine(t, p, nil)
	e.recover()
	if err := e.Rollback(t.Context(), false); !errors.Is(err, ErrRestart) || m.start() != "1.0.0" {
		t.Fatal(err)
	}
	e = m.engine(t, p, nil)
	e.recover()
	wantReport(t, e, "1.0.0", fleet.RolledBack, "1.1.0", "somebody asked")
}

func TestBusy(t *testing.T) {
	m, p := newMachine("1.0.0"), newPublisher(t)
	e := m.engine(t, p, nil)
	unlock, err := lock(e.c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Install(t.Context(), bytes.NewReader(p.bundle(t, "1.1.0")), false); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v", err)
	}
	unlock()
	if err := e.Install(t.Context(), bytes.NewReader(p.bundle(t, "1.1.0")), false); !errors.Is(err, ErrRestart) {
		t.Errorf("got %v", err)
	}
}

func TestGate(t *testing.T) {
	for _, c := range []struct {
		gate Gate
		args string
		want Gate
	}{
		{Gate{}, "quiet splash", Gate{time.Minute, 10 * time.Minute}},
		{Gate{}, "quiet kh.health=5", Gate{5 * time.Second, 10 * time.Minute}},
		{Gate{}, "kh.health=5/40 quiet", Gate{5 * time.Second, 40 * time.Second}},
		{Gate{For: time.Second}, "kh.health=5/40", Gate{time.Second, 40 * time.Second}},
		{Gate{}, "kh.health=", Gate{time.Minute, 10 * time.Minute}},
		{Gate{}, "kh.health=50/40", Gate{time.Minute, 10 * time.Minute}},
		{Gate{}, "kh.health=-1/x", Gate{time.Minute, 10 * time.Minute}},
		{Gate{For: time.Hour}, "", Gate{time.Hour, time.Hour}},
	} {
		if got := c.gate.complete(c.args, quiet); got != c.want {
			t.Errorf("%v with %q: got %v, want %v", c.gate, c.args, got, c.want)
		}
	}
}

// The stages of an update: each percentage has about its part of the devices, and all of those of a smaller one.
func TestStaged(t *testing.T) {
	in := map[int]int{}
	for i := range 2000 {
		device := fmt.Sprintf("device-%d", i)
		before := false
		for _, percent := range []int{0, 1, 10, 50, 99, 100} {
			now := Staged("salt", device, percent)
			if before && !now {
				t.Fatalf("%s is in a smaller stage, and not at %d %%", device, percent)
			}
			if before = now; now {
				in[percent]++
			}
		}
	}
	if in[0] != 0 || in[100] != 2000 || in[10] < 140 || in[10] > 260 || in[50] < 900 || in[50] > 1100 {
		t.Errorf("got %v of 2000 devices", in)
	}
	same := 0
	for i := range 1000 {
		device := fmt.Sprintf("device-%d", i)
		if Staged("salt", device, 10) && Staged("another", device, 10) {
			same++
		}
	}
	if same > 40 {
		t.Errorf("another salt begins with the same devices: %d of 1000", same)
	}
}
