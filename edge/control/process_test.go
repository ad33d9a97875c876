package control

import (
	"testing"
	"time"

	"testing/synctest"
)

// fakeSibling answers when it is asked, if its process lives.
type fakeSibling struct {
	suspect bool
	lives   bool
	heard   time.Time
	asked   int
}

func (f *fakeSibling) Suspect() bool        { return f.suspect }
func (f *fakeSibling) LastHeard() time.Time { return f.heard }
func (f *fakeSibling) prove() {
	if f.asked++; f.lives {
		go func() {
			time.Sleep(10 * time.Millisecond)
			f.heard = time.Now()
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
