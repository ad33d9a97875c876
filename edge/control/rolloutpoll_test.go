package control

import (
	"errors"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/tunnel"
)

// When a connector is asked again, by how it has answered so far.
func TestPollTimes(t *testing.T) {
	want := fleet.Directive{Policy: fleet.Hold}
	lost := errors.New("session lost")
	for name, tt := range map[string]struct {
		before polled
		n      int
		every  time.Duration
		err    error
		wait   time.Duration
		told   bool
	}{
		"a device":                   {polled{failures: 3, empty: 2}, 9, deviceEvery, nil, deviceEvery, true},
		"one that is updating":       {polled{}, 9, deviceBusy, nil, deviceBusy, true},
		"no report yet":              {polled{}, 0, deviceEvery, nil, firstReports[0], true},
		"still none":                 {polled{empty: 1}, 0, deviceEvery, nil, firstReports[1], true},
		"none for long":              {polled{empty: len(firstReports)}, 0, deviceEvery, nil, deviceEvery, true},
		"unsupported":                {polled{}, 0, deviceEvery, &tunnel.FlowError{Result: tunnel.ResultUnsupported, Remote: true}, deviceNever, false},
		"a failure":                  {polled{}, 0, deviceEvery, lost, deviceEvery, false},
		"a second one":               {polled{failures: 1}, 0, deviceEvery, lost, 2 * deviceEvery, false},
		"one that never answers now": {polled{failures: 1 << 20}, 0, deviceEvery, lost, 30 * time.Minute, false},
	} {
		p, got := newPoller(), tt.before
		got.waiting = true
		start := time.Now()
		p.answered(&got, want, tt.n, tt.every, tt.err)
		if least, most := start.Add(tt.wait*9/10), time.Now().Add(tt.wait*11/10); got.next.Before(least) || got.next.After(most) {
			t.Errorf("%s: asked again in %v, want about %v", name, got.next.Sub(start), tt.wait)
		}
		if got.waiting || (got.directive == want) != tt.told {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

// Ten thousand connectors that come at once are asked by few, and then one after the other.
func TestPollsDoNotBurst(t *testing.T) {
	const n = 10_000
	c := &Control{model: newModel(), reg: newRegistry(), polls: newPoller()}
	p := c.polls
	for i := range n {
		p.up(processKey{"tun", count(i), "i"})
	}
	c.queuePolls(time.Now())
	workers := 0
	p.start(func(*lane) { workers++ })
	if workers != maxPolls || len(p.lanes[0].queue) != n {
		t.Errorf("%d workers for %d connectors, want %d for %d", workers, len(p.lanes[0].queue), maxPolls, n)
	}
	perSecond := map[int64]int{}
	for _, e := range p.procs {
		p.answered(e, fleet.Directive{Policy: fleet.Free}, 9, deviceEvery, nil)
		perSecond[e.next.Unix()]++
	}
	for s, k := range perSecond {
		if k > n/6 { // evenly they were over twelve seconds, after one more round over more
			t.Errorf("%d are due in second %d", k, s)
		}
	}
	// Nobody is due before his time, unless there is something new to tell him.
	p.lanes[0].queue = nil
	c.queuePolls(time.Now())
	if k := len(p.lanes[0].queue); k != 0 {
		t.Errorf("%d are asked too soon", k)
	}
	op := put(prefixRollout+"r", Rollout{Config: RolloutConfig{Name: "r", Version: "2", Percent: 10, Salt: "s"}})
	must(t, c.model.applyRolloutLocked("r", delta{op.Key, op.Value, 1}))
	p.mark()
	c.queuePolls(time.Now())
	if k := len(p.lanes[0].queue); k != n {
		t.Errorf("%d of %d are told that there is a rollout", k, n)
	}
	// What has no session is forgotten.
	for _, e := range p.procs {
		e.waiting = false
	}
	c.sweepPolls()
	if len(p.procs) != 0 {
		t.Errorf("%d connectors without a session are remembered", len(p.procs))
	}
}
