package control

import (
	"errors"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// Two processes that live with one identity both hear of it: the later one ends the sessions of the earlier, which comes back
// and does the same.
func TestTwins(t *testing.T) {
	e := newBed(t).edge()
	e.reg.twinLook = 50 * time.Millisecond
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	first := e.link(src, "i1", 0, saying("first"))
	second := e.link(src, "i2", 0, saying("second"))
	want := &tunnel.SessionError{Reason: tunnel.CloseReplaced, Remote: true}
	ends := func(old *link) {
		t.Helper()
		eventually(t, "the session of the earlier process to end", func() bool {
			old.Probe(t.Context()) //nolint:errcheck // it has ended, then
			return old.Err() != nil
		})
		if !errors.Is(old.Err(), want) {
			t.Errorf("it ended with %v, want %v", old.Err(), want)
		}
	}
	ends(first)
	if err := second.Err(); err != nil {
		t.Errorf("the later process's session ended: %v", err)
	}
	e.link(src, "i1", 0, saying("first"))
	ends(second)
}

// A process whose sessions were replaced one by one, each by one with the other of its two indexes, has all of them.
func TestMovedSessions(t *testing.T) {
	e := newBed(t).edge()
	e.site("plant", "")
	src := e.enrol("plant", "p1")
	for i, index := range []int{0, 1, 66, 67} {
		ps := processesOf(e.reg.all())
		if complete := len(ps) > 0 && ps[0].Complete; complete {
			t.Errorf("complete with %d sessions of 4", i)
		}
		e.link(src, "i1", index, saying("p1"))
	}
	if ps := processesOf(e.reg.all()); len(ps) != 1 || !ps[0].Complete || ps[0].Sessions != 4 {
		t.Errorf("got %+v, want one complete process", ps)
	}
}
