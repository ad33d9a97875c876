package slot

import (
	"bytes"
	"errors"
	"testing"
)

// everyCut calls do on a copy of a card for each operation of the disk that it needs, with the power going in that operation
// in each way, and then check on what is left. It returns how many operations there are.
func everyCut(t *testing.T, c *card, losses []loss, do func(*Slots) error, check func(t *testing.T, after *card, done bool)) int {
	t.Helper()
	at := func(cut int, l loss) *card { return &card{disk: c.clone(cut, l), current: c.current} }
	whole := at(0, loss{})
	if err := do(whole.slots()); err != nil {
		t.Fatal(err)
	}
	points := whole.ops
	for _, l := range losses {
		for cut := 1; cut <= points; cut++ {
			k := at(cut, l)
			if err := do(k.slots()); !errors.Is(err, errPower) {
				t.Fatalf("%s at %d of %d: got %v", l.name, cut, points, err)
			}
			after := &card{disk: k.clone(0, loss{}), current: k.current}
			check(t, after, false)
			if t.Failed() {
				t.Fatalf("%s at %d of %d", l.name, cut, points)
			}
		}
	}
	whole.cache = map[int64][]byte{}
	check(t, whole, true)
	return points
}

func TestPowerCutsOfWriteIdle(t *testing.T) {
	before, old, next := system(t, "0.9.0"), system(t, "1.0.0"), system(t, "2.0.0")
	write := func(s *Slots) error { return s.WriteIdle(t.Context(), bytes.NewReader(next), int64(len(next)), nil) }
	for _, current := range []int{PartA, PartB} {
		a, b := old, before
		if current == PartB {
			a, b = before, old
		}
		c := newCard(t, a, b, current, current)
		n := everyCut(t, c, losses, write, func(t *testing.T, c *card, done bool) {
			if got := c.firmware(t, false); got != current {
				t.Errorf("the firmware starts %d, not %d", got, current)
			}
			if !bytes.Equal(c.slotBytes(current), old) {
				t.Error("the slot that runs was touched")
			}
			idle := c.slotBytes(Other(current))
			_, err := c.slots().Info(Other(current))
			switch {
			case bytes.Equal(idle, next):
			case done:
				t.Error("the new system is not there")
			case err == nil && !bytes.Equal(idle, before):
				t.Error("half a system is taken for a whole one")
			}
		})
		// What was cut off can be done again: once is enough, since WriteIdle begins anew.
		again := &card{disk: c.clone(n/2, losses[4]), current: current}
		if err := write(again.slots()); !errors.Is(err, errPower) {
			t.Fatal(err)
		}
		again.disk = again.clone(0, loss{})
		if err := write(again.slots()); err != nil || !bytes.Equal(again.slotBytes(Other(current)), next) {
			t.Errorf("after a cut: %v", err)
		}
		if n < 50 {
			t.Errorf("%d points, want 50 and more", n)
		}
		t.Logf("%d points, %d ways each", n, len(losses))
	}
}

// tears are losses that tear the sector in which autoboot.txt is at each of its bytes.
func tears() []loss {
	all := losses
	for i := 1; i <= len(autobootText(PartA)); i++ {
		all = append(all, loss{"begin torn at a byte", losses[1].keep, i}, loss{"end torn at a byte", losses[1].keep, i - sector})
	}
	return all
}

func TestPowerCutsOfCommitAndRollback(t *testing.T) {
	a, b := system(t, "1.0.0"), system(t, "2.0.0")
	for name, c := range map[string]struct {
		current, def, want int
		do                 func(*Slots) error
		losses             []loss
	}{
		"commit B":      {PartB, PartA, PartB, (*Slots).Commit, tears()},
		"commit A":      {PartA, PartB, PartA, (*Slots).Commit, losses},
		"rollback to A": {PartB, PartB, PartA, func(s *Slots) error { _, err := s.Rollback(); return err }, tears()},
		"rollback to B": {PartA, PartA, PartB, func(s *Slots) error { _, err := s.Rollback(); return err }, losses},
	} {
		t.Run(name, func(t *testing.T) {
			n := everyCut(t, newCard(t, a, b, c.current, c.def), c.losses, c.do, func(t *testing.T, k *card, done bool) {
				got := k.firmware(t, false)
				if done && got != c.want {
					t.Errorf("the firmware starts %d, want %d", got, c.want)
				}
				if !bytes.Equal(k.slotBytes(PartA), a) || !bytes.Equal(k.slotBytes(PartB), b) {
					t.Error("a slot was touched")
				}
				if b, err := (fatFiles{k.layout(1)}).ReadFile("keyhaven.yaml"); err != nil || !bytes.HasPrefix(b, []byte("# fill")) {
					t.Errorf("keyhaven.yaml is damaged: %q, %v", b, err)
				}
				// The next start finds its way, also from a sector of which a part is new.
				k.current = got
				if _, err := k.slots().Repair(k.current); err != nil {
					t.Error(err)
				}
				if st, err := k.slots().State(); err != nil || st.Default == 0 {
					t.Errorf("after the repair: %+v, %v", st, err)
				}
			})
			t.Logf("%d points, %d ways each", n, len(c.losses))
		})
	}
}

// A file that somebody edited is replaced: at no moment is it neither that one nor ours.
func TestPowerCutsOfRepair(t *testing.T) {
	edited := []byte("[all]\r\ntryboot_a_b=1\r\nboot_partition=2\r\n")
	c := newCard(t, system(t, "1.0.0"), system(t, "2.0.0"), PartA, PartA)
	if err := (fatFiles{c.layout(1)}).Create(autobootFile, edited); err != nil {
		t.Fatal(err)
	}
	n := everyCut(t, c, losses, func(s *Slots) error { _, err := s.Repair(PartA); return err }, func(t *testing.T, k *card, done bool) {
		if got := k.firmware(t, false); got != PartA {
			t.Errorf("the firmware starts %d", got)
		}
		b, err := k.readConfig(autobootFile)
		if err != nil || !bytes.Equal(b, autobootText(PartA)) && (done || !bytes.Equal(b, edited)) {
			t.Errorf("autoboot.txt is %q, %v", b, err)
		}
		if _, err := k.slots().Repair(k.current); err != nil {
			t.Error(err)
		}
	})
	if n*len(losses) < 50 {
		t.Errorf("%d cuts, want 50 and more", n*len(losses))
	}
}
