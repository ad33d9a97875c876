package mtls

import (
	"context"
	"crypto/x509"
	"math/rand/v2"
	"time"
)

const (
	minRenewRetry = time.Second
	maxRenewRetry = 10 * time.Minute
	maxRenewSleep = 10 * time.Minute
)

// KeepRenewed renews the certificate when two thirds of its lifetime are over, somewhat earlier by chance so that many
// programs do not ask at once. After a failure it tries again, with a pause that grows from one second to ten minutes, or
// to a twentieth of the lifetime where that is less and the certificate still valid. A certificate that Reload brings in
// is minded from then on. It blocks until ctx ends and returns the cause.
func (s *Source) KeepRenewed(ctx context.Context, issue func(ctx context.Context, csrDER []byte) ([][]byte, error)) error {
	own := s.current.Load()
	due := renewAt(own.cert.Leaf)
	for failures := 0; ; {
		replaced, err := waitUntil(ctx, due, own.replaced)
		if err != nil {
			return err
		}
		if replaced {
			own, failures = s.current.Load(), 0
			due = renewAt(own.cert.Leaf)
			continue
		}
		if err := s.Renew(ctx, issue); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			failures++
			s.log.Warn("certificate renewal failed", "err", err, "not_after", own.cert.Leaf.NotAfter, "failures", failures)
			due = time.Now().Add(renewPause(own.cert.Leaf, failures))
			continue
		}
		own, failures = s.current.Load(), 0
		due = renewAt(own.cert.Leaf)
		if soonest := time.Now().Add(minRenewRetry); due.Before(soonest) {
			due = soonest // the authority gives less and less, as at the end of its root
		}
	}
}

// waitUntil waits for a time of day, or until replaced is closed, or ctx ends. It looks at the clock now and then, because
// a timer stands still while the machine sleeps.
func waitUntil(ctx context.Context, due time.Time, replaced <-chan struct{}) (bool, error) {
	for {
		wait := min(time.Until(due), maxRenewSleep)
		if wait <= 0 {
			return false, nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return false, context.Cause(ctx)
		case <-replaced:
			timer.Stop()
			return true, nil
		case <-timer.C:
		}
	}
}

// lifetimeOf returns a certificate's lifetime from its issue on, without the time by which its start was set back.
func lifetimeOf(leaf *x509.Certificate) time.Duration {
	whole := leaf.NotAfter.Sub(leaf.NotBefore)
	if whole > backdate {
		return whole - backdate
	}
	return whole
}

// renewAt returns a moment between 17/30 and 2/3 of the certificate's lifetime.
func renewAt(leaf *x509.Certificate) time.Time {
	life := lifetimeOf(leaf)
	early := rand.N(life/10 + 1)
	return leaf.NotAfter.Add(-life/3 - early)
}

// renewPause returns the pause after a number of failures: doubling from one second, half of it by chance.
func renewPause(leaf *x509.Certificate, failures int) time.Duration {
	limit := maxRenewRetry
	if time.Now().Before(leaf.NotAfter) {
		limit = min(max(lifetimeOf(leaf)/20, minRenewRetry), maxRenewRetry)
	}
	pause := limit
	if shift := failures - 1; shift < 20 {
		pause = min(minRenewRetry<<shift, limit)
	}
	return pause/2 + rand.N(pause/2+1)
}
