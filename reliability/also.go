package reliability

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os/exec"
	"time"
)

// noRestart checks that no worker was replaced.
func noRestart(t *Trial) error {
	if n := t.Counters().Processes; n != uint64(t.Row.Workers) {
		return fmt.Errorf("%d workers in all, want none but the first %d", n, t.Row.Workers)
	}
	return nil
}

// kept checks that workers kept their logins, but for one that the machine may have held up: without keep-alive each worker
// loses its login with each of three pauses.
func kept(t *Trial) error {
	if n := t.Counters().Logins; n > uint64(t.Row.Workers)+1 {
		return fmt.Errorf("%d logins of %d workers", n, t.Row.Workers)
	}
	return nil
}

// notKept checks that workers lost their logins.
func notKept(t *Trial) error {
	if n := t.Counters().Logins; n < uint64(t.Row.Workers)+3 {
		return fmt.Errorf("%d logins of %d workers, want one more at least for each of three pauses", n, t.Row.Workers)
	}
	return nil
}

// logins checks how often the token was asked to log in.
func logins(want int) func(*Trial) error {
	return func(t *Trial) error {
		if n := t.Counters().Logins; n != uint64(want) {
			return fmt.Errorf("%d logins, want %d", n, want)
		}
		return nil
	}
}

// atMost checks that the sessions were never more, and that they did not become fewer than one for each worker.
func atMost(n int) func(*Trial) error {
	return func(t *Trial) error {
		c := t.Counters()
		if c.SessionsPeak > uint64(n) || c.Sessions < uint64(t.Row.Workers) {
			return fmt.Errorf("%d sessions at most and %d now, want at most %d and at least %d", c.SessionsPeak, c.Sessions, n, t.Row.Workers)
		}
		return nil
	}
}

// aloneDuring checks that the second home did nothing while the first was in trouble.
func aloneDuring(fault func(*Trial) error) func(*Trial) error {
	return func(t *Trial) error {
		was := t.Homes[1].Counters().Operations
		if err := fault(t); err != nil {
			return err
		}
		if n := t.Homes[1].Counters().Operations - was; n != 0 {
			return fmt.Errorf("the second home was asked %d times, want 0", n)
		}
		return nil
	}
}

// withoutPSS asks for what the token cannot do, and for what it still can.
func withoutPSS(t *Trial) error {
	other, err := t.bench.startLoad(t.ctx, t.server.address("serving"), tls.PSSWithSHA256)
	if err != nil {
		return err
	}
	defer other.stop()
	if err := other.Pause(t.ctx); err != nil {
		return err
	}
	if err := other.Ask(t.ctx); err == nil || errors.Is(err, errWrong) {
		return fmt.Errorf("a signature with RSA-PSS gave %w, want a refusal", err)
	}
	other.scheme = tls.PKCS1WithSHA256
	if err := other.Ask(t.ctx); err != nil {
		return fmt.Errorf("a signature with PKCS#1 v1.5: %w", err)
	}
	return t.Answered(50)
}

// retry has the operator's command run that reads the PIN anew and tries it once.
func (t *Trial) retry() error {
	ctx, cancel := context.WithTimeout(t.ctx, patience)
	defer cancel()
	t.healed = time.Now()
	cmd := exec.CommandContext(ctx, t.bench.program, "token", "retry", t.Homes[0].Token.Label, "--control", t.dir+"/control.sock")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("token retry: %w: %s", err, out)
	}
	return nil
}
