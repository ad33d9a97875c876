package reliability

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// A Result is what became of the requests of a row.
type Result struct {
	Row            Row
	Sent, Lost     int
	Early, Late    int            // lost before the failure, and after the recovery
	Window         int            // sent between the failure and the recovery
	Wrong          int            // signatures that did not verify
	Gap            time.Duration  // longest time without a good answer
	Recovery       time.Duration  // from the end of the failure to the first answer after which none was lost
	WorkerRestarts int            // workers that took the place of others
	ServerRestarts int            // 0, or 1 if the process is not the one that was started
	Errors         map[string]int // what the client saw

	Log string // of the key server, without the operations that went well

	faults []error // what must never be so
}

// result ends the row and sums up.
func (t *Trial) result() (*Result, error) {
	r := &Result{Row: t.Row, Errors: t.errors()}
	if err := t.tree(); err != nil {
		r.faults = append(r.faults, err)
	}
	for i, h := range t.Homes {
		c := h.Counters()
		r.WorkerRestarts += int(c.Processes) - t.Row.Workers
		for what, n := range map[string]uint64{
			"calls on a session while another ran on it": c.Overlaps, "calls of C_Finalize beside others": c.FinalizedBusy,
			"calls in a process that was forked with the module in it": c.Forked,
		} {
			if n != 0 {
				r.faults = append(r.faults, fmt.Errorf("home %d: %d %s", i, n, what))
			}
		}
		if c.LoginsPeak > 1 {
			r.faults = append(r.faults, fmt.Errorf("home %d: %d logins at one time", i, c.LoginsPeak))
		}
	}
	r.WorkerRestarts = max(0, r.WorkerRestarts)
	if !t.server.same() {
		r.ServerRestarts = 1
	}
	t.Load.stop()
	code, err := t.server.stop(t.ctx)
	if err != nil || code != 0 {
		r.faults = append(r.faults, fmt.Errorf("after SIGTERM the key server ended with %d: %w", code, err))
	}
	if log := t.server.text(); strings.Contains(log, "pin-canary-") || strings.Contains(log, wrongPIN) {
		r.faults = append(r.faults, errors.New("a PIN is in the log"))
	}
	r.Log = t.server.story()
	t.count(r)
	return r, nil
}

// count sums up the samples.
func (t *Trial) count(r *Result) {
	s := t.Load.samples
	r.Sent, r.Wrong, r.Window = len(s), t.Load.wrong, t.recovered-t.calm
	var lastBad time.Time
	for i, x := range s {
		if x.err == nil {
			continue
		}
		r.Lost++
		lastBad = x.end
		if i < t.calm {
			r.Early++
		}
		if i >= t.recovered {
			r.Late++
		}
	}
	var last time.Time
	for _, x := range s {
		if x.err != nil {
			continue
		}
		for _, again := range t.Load.resumed {
			if !last.IsZero() && again.After(last) && again.Before(x.end) {
				last = again // nobody asked before
			}
		}
		if !last.IsZero() {
			r.Gap = max(r.Gap, x.end.Sub(last))
		}
		last = x.end
		if x.end.After(lastBad) && r.Recovery == 0 && r.Lost > 0 {
			r.Recovery = max(x.end.Sub(t.healed), time.Nanosecond)
		}
	}
}

// Check returns what is wrong with the result.
func (r *Result) Check() error {
	errs := slices.Clone(r.faults)
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if r.ServerRestarts != 0 {
		fail("the key server's process is not the one that was started")
	}
	if r.Wrong != 0 {
		fail("%d wrong answers", r.Wrong)
	}
	if r.Early != 0 || r.Late != 0 {
		fail("%d requests lost before the failure and %d after the recovery", r.Early, r.Late)
	}
	if most := r.allowed(); r.Lost > most {
		fail("%d requests lost, at most %d may be", r.Lost, most)
	}
	if len(errs) > 0 && len(r.Errors) > 0 {
		fail("the client saw %s", r.Seen())
	}
	return errors.Join(errs...)
}

// allowed is how many requests the row may lose.
func (r *Result) allowed() int {
	switch r.Row.Loss {
	case None:
		return 0
	case InFlight:
		return callers
	}
	return r.Window + callers
}

// Seen lists what the client saw, for people.
func (r *Result) Seen() string {
	if len(r.Errors) == 0 {
		return "–"
	}
	return strings.Join(slices.Sorted(maps.Keys(r.Errors)), "; ")
}
