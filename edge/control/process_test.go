package control

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fakeSibling answers when it is asked, if its process lives.
type fakeSibling struct {
	suspect bool
	lives   bool
	heard   atomic.Int64 // Unix nanoseconds
	asked   int
}

func (f *fakeSibling) Suspect() bool        { return f.suspect }
func (f *fakeSibling) LastHeard() time.Time { return time.Unix(0, f.heard.Load()) }
func (f *fakeSibling) RTT() time.Duration   { return 20 * time.Millisecond }
func (f *fakeSibling) prove() {
	if f.asked++; f.lives {
		go func() {
			time.Sleep(10 * time.Millisecond)
			f.heard.Store(time.Now().UnixNano())
		}()
	}
}

// All sessions of a process count as dead when one of them does, until another proves that it lives.
func TestProcessSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p process
		a, b := &fakeSibling{}, &fakeSibling{}
		p.add(a)
		p.add(b)
		check := func(what string, want bool) {
			t.Helper()
			synctest.Wait()
			if got := p.silent(); got != want {
				t.Errorf("%s: silent is %v, want %v", what, got, want)
			}
		}
		check("all is well", false)
		time.Sleep(time.Second)
		a.suspect = true
		check("one is suspect", true)
		if a.asked != 1 || b.asked != 1 {
			t.Errorf("%d and %d questions, want one each", a.asked, b.asked)
		}
		time.Sleep(time.Second)
		check("and nobody answered", true)
		if b.asked != 1 {
			t.Errorf("%d questions for one suspicion", b.asked)
		}
		p.remove(a) // it has ended
		check("the suspect has gone", false)

		c := &fakeSibling{lives: true}
		p.add(c)
		b.suspect = true
		check("one is suspect again", true)
		time.Sleep(20 * time.Millisecond)
		check("another one answered", false)
		time.Sleep(time.Hour)
		check("much later", false)
		b.suspect = false
		check("healed", false)
		b.suspect, c.lives = true, false
		check("a new suspicion, in which what came before is worth nothing", true)
	})
}

// When one process falls silent the others of its tunnel must show that they live, within a fraction of a second.
func TestProcessChallenged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead, cut, well process
		first, second, third := &fakeSibling{}, &fakeSibling{}, &fakeSibling{lives: true}
		dead.add(first)
		cut.add(second)
		well.add(third)
		alarms := 0
		dead.alarm = func() {
			alarms++
			cut.challenge()
			well.challenge()
		}
		first.suspect = true
		for range 3 {
			if !dead.silent() {
				t.Error("the suspect is not silent")
			}
		}
		if alarms != 1 {
			t.Errorf("%d alarms for one suspicion", alarms)
		}
		if cut.silent() || well.silent() {
			t.Error("silent before there was time to answer")
		}
		time.Sleep(challengeWait + time.Millisecond)
		synctest.Wait()
		if !cut.silent() || well.silent() {
			t.Errorf("after the challenge: silent are %v and %v, want only the first", cut.silent(), well.silent())
		}
		second.heard.Store(time.Now().UnixNano())
		if cut.silent() {
			t.Error("silent though it was heard")
		}
		time.Sleep(time.Hour)
		if cut.silent() || well.silent() {
			t.Error("silent long after the challenge was met")
		}
	})
}
