package reliability

import (
	"fmt"
	"os"
	"time"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
)

// CKR_… codes and CKM_… mechanisms (PKCS #11 v2.40, sections 5.1 and 6.1).
const (
	generalError         = 0x5
	functionFailed       = 0x6
	keyHandleInvalid     = 0x60
	objectHandleInvalid  = 0x82
	operationActive      = 0x90
	pinIncorrect         = 0xa0
	sessionClosed        = 0xb0
	sessionHandleInvalid = 0xb3
	userNotLoggedIn      = 0x101

	mechanismX509 = 0x3
	mechanismPSS  = 0xd

	flagFinalTry = 0x20000
)

// wrongPIN is what a PIN file holds when the token is to refuse it. It is a canary like the right one.
const wrongPIN = "canary-wrong-pin"

// spell is how long a failure lasts that the row ends. Only the results depend on it.
const spell = 700 * time.Millisecond

// lasting has the faults for a spell.
func lasting(f faultmodule.Faults) func(*Trial) error { return during(spell, f) }

// learned has the faults for longer than a client waits, after there were enough requests to know how long they take.
func learned(f faultmodule.Faults) func(*Trial) error {
	return func(t *Trial) error {
		if err := t.Answered(300); err != nil {
			return err
		}
		return during(timeout+spell, f)(t)
	}
}

func during(d time.Duration, f faultmodule.Faults) func(*Trial) error {
	return func(t *Trial) error {
		if err := t.Set(f); err != nil {
			return err
		}
		if err := t.wait(d); err != nil {
			return err
		}
		if err := t.Answered(10); err != nil {
			return err
		}
		return t.Heal()
	}
}

// standing leaves as it is what began before the server, for so many requests.
func standing(requests int) func(*Trial) error {
	return func(t *Trial) error { return t.Answered(requests) }
}

// once has the rules, each of which ends by itself after so many calls in all.
func once(calls int, rules ...faultmodule.Rule) func(*Trial) error {
	return func(t *Trial) error {
		before := t.Counters().Faults
		if err := t.Set(faultmodule.Faults{Rules: rules}); err != nil {
			return err
		}
		if err := t.Until("the faults have happened", func() bool { return t.Counters().Faults >= before+uint64(calls) }); err != nil {
			return err
		}
		t.healed = time.Now()
		return nil
	}
}

// hung has one operation hang until its worker is replaced.
func hung(t *Trial) error {
	before := t.Counters().Processes
	if err := once(1, faultmodule.Rule{Function: "C_Sign", Do: faultmodule.Hang, Count: 1})(t); err != nil {
		return err
	}
	if err := t.Until("another worker", func() bool { return t.Counters().Processes > before }); err != nil {
		return err
	}
	return t.Heal()
}

// codes fails one call with each of the codes in turn.
func codes(function string, list ...uint) func(*Trial) error {
	return func(t *Trial) error {
		for _, code := range list {
			if err := once(1, faultmodule.Rule{Function: function, Do: faultmodule.Return, Code: code, Count: 1})(t); err != nil {
				return fmt.Errorf("code %#x: %w", code, err)
			}
			if err := t.Answered(2 * callers); err != nil {
				return err
			}
		}
		return nil
	}
}

// event does something to the processes at one time.
func event(do func(*Home)) func(*Trial) error {
	return func(t *Trial) error {
		do(t.Homes[0])
		return nil
	}
}

// killed sends SIGKILL to one worker, which is to start again under the rules.
func killed(rules ...faultmodule.Rule) func(*Trial) error {
	return func(t *Trial) error {
		before := t.Counters()
		if err := t.Set(faultmodule.Faults{Rules: rules}); err != nil {
			return err
		}
		if err := t.Kill(); err != nil {
			return err
		}
		calls := uint64(0)
		for _, r := range rules {
			calls += uint64(r.Count)
		}
		return t.Until("another worker, and the faults", func() bool {
			c := t.Counters()
			return c.Processes > before.Processes && c.Faults >= before.Faults+calls
		})
	}
}

// wait lets time pass.
func (t *Trial) wait(d time.Duration) error {
	select {
	case <-t.ctx.Done():
		return t.ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// before returns a function that sets faults before the server starts.
func before(f faultmodule.Faults) func(*Trial) error {
	return func(t *Trial) error { return t.Set(f) }
}

// idle leaves the token alone for longer than its login lives, several times.
func idle(t *Trial) error {
	for range 3 {
		if err := t.Load.Pause(t.ctx); err != nil {
			return err
		}
		if err := t.wait(spell); err != nil {
			return err
		}
		t.Load.Resume()
		if err := t.Answered(5 * callers); err != nil {
			return err
		}
	}
	return nil
}

// filesAway takes SoftHSM's tokens away for a spell.
func filesAway(t *Trial) error {
	h := t.Homes[0]
	if err := os.Rename(h.Files, h.Files+".away"); err != nil {
		return err
	}
	if err := t.wait(spell); err != nil {
		return err
	}
	if err := os.Rename(h.Files+".away", h.Files); err != nil {
		return err
	}
	t.healed = time.Now()
	return nil
}

// noPIN leaves a wrong PIN in the first token's file, and lets it lock after three tries.
func noPIN(t *Trial) error {
	if err := os.WriteFile(t.Homes[0].PINFile, []byte(wrongPIN+"\n"), 0o600); err != nil {
		return err
	}
	return t.Set(faultmodule.Faults{PINTries: 3})
}

// rightPIN checks that the wrong PIN was tried once, then mends the file and has the PIN tried again.
func rightPIN(t *Trial) error {
	if err := t.Answered(100); err != nil {
		return err
	}
	if c := t.Counters(); c.Logins != 1 || c.PINFailures != 1 {
		return fmt.Errorf("%d logins and %d wrong PINs, want 1 and 1", c.Logins, c.PINFailures)
	}
	if err := os.WriteFile(t.Homes[0].PINFile, []byte(t.Homes[0].Token.PIN+"\n"), 0o600); err != nil {
		return err
	}
	return t.retry()
}

// refusedLater has the token refuse the PIN when a worker is replaced, until an operator acts.
func refusedLater(t *Trial) error {
	before := t.Counters()
	if err := t.Set(faultmodule.Faults{PINTries: 3, Rules: []faultmodule.Rule{{Function: "C_Login", Do: faultmodule.Return, Code: pinIncorrect}}}); err != nil {
		return err
	}
	if err := t.Kill(); err != nil {
		return err
	}
	if err := t.Until("a wrong PIN", func() bool { return t.Counters().PINFailures > 0 }); err != nil {
		return err
	}
	if err := t.wait(spell); err != nil {
		return err
	}
	if c := t.Counters(); c.Logins != before.Logins+1 {
		return fmt.Errorf("%d logins after the PIN was refused, want 1", c.Logins-before.Logins)
	}
	if err := t.Heal(); err != nil {
		return err
	}
	return t.retry()
}
