package reliability

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// trial returns a trial whose samples end at so many milliseconds, those below 0 with an error.
func trial(row Row, calm, recovered int, ends ...int) *Trial {
	base := time.Now()
	t := &Trial{Row: row, calm: calm, recovered: recovered, Load: &Load{}, healed: base.Add(30 * time.Millisecond)}
	for _, ms := range ends {
		s := sample{end: base.Add(time.Duration(max(ms, -ms)) * time.Millisecond)}
		if ms < 0 {
			s.err = errors.New("lost")
		}
		t.Load.samples = append(t.Load.samples, s)
	}
	return t
}

func TestCount(t *testing.T) {
	r := &Result{}
	trial(Row{}, 1, 5, 10, -20, 35, -40, 70, 80).count(r)
	if r.Sent != 6 || r.Lost != 2 || r.Early != 0 || r.Late != 0 || r.Window != 4 {
		t.Errorf("got sent %d, lost %d, early %d, late %d, window %d; want 6, 2, 0, 0, 4", r.Sent, r.Lost, r.Early, r.Late, r.Window)
	}
	if r.Gap != 35*time.Millisecond || r.Recovery != 40*time.Millisecond {
		t.Errorf("got gap %v and recovery %v, want 35ms and 40ms", r.Gap, r.Recovery)
	}
}

func TestCountLeavesPausesOut(t *testing.T) {
	tr := trial(Row{}, 1, 2, 10, 20, 500)
	tr.Load.resumed = []time.Time{tr.Load.samples[2].end.Add(-5 * time.Millisecond)}
	r := &Result{}
	tr.count(r)
	if r.Gap != 10*time.Millisecond {
		t.Errorf("got gap %v, want 10ms", r.Gap)
	}
}

func TestCheck(t *testing.T) {
	lost := map[string]int{"internal error": 1}
	for name, c := range map[string]struct {
		r    Result
		want string // "" for nothing wrong
	}{
		"well":          {Result{}, ""},
		"restart":       {Result{ServerRestarts: 1}, "process"},
		"wrong":         {Result{Wrong: 1}, "wrong answers"},
		"early":         {Result{Early: 1}, "before the failure"},
		"late":          {Result{Late: 1}, "after the recovery"},
		"none":          {Result{Lost: 1, Errors: lost}, "internal error"},
		"in flight":     {Result{Row: Row{Loss: InFlight}, Lost: callers}, ""},
		"more than in":  {Result{Row: Row{Loss: InFlight}, Lost: callers + 1}, "requests lost"},
		"outage":        {Result{Row: Row{Loss: Outage}, Lost: 50, Window: 50}, ""},
		"long outage":   {Result{Row: Row{Loss: Outage}, Lost: 50, Window: 20}, "requests lost"},
		"broken rule":   {Result{faults: []error{errors.New("two logins")}}, "two logins"},
		"what was seen": {Result{Wrong: 1, Errors: lost}, "the client saw internal error"},
	} {
		err := c.r.Check()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

func TestReplace(t *testing.T) {
	got, err := Replace("a\n"+begin+"\nold\n"+end+"\nb\n", "new\n")
	if want := "a\n" + begin + "\n\nnew\n\n" + end + "\nb\n"; err != nil || got != want {
		t.Errorf("got %q and %v, want %q", got, err, want)
	}
	for _, text := range []string{"", begin, end} {
		if _, err := Replace(text, ""); err == nil {
			t.Errorf("%q: accepted", text)
		}
	}
}
