package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// A reloadReport says what became of a new configuration.
type reloadReport struct {
	At     time.Time     `json:"at"`
	Took   time.Duration `json:"took_ns"`
	Taken  bool          `json:"taken"`            // false: refused as a whole, and the old one goes on
	Errors []string      `json:"errors,omitempty"` // why it was refused
	Faults []string      `json:"faults,omitempty"` // what of it does not work, while the rest does

	Warnings []string `json:"warnings,omitempty"` // what of it matches nothing, or is in doubt
}

// errOvertaken is why a reload opens no more homes: another one waits, which may take something away from a client.
var errOvertaken = errors.New("is left for a newer reload, or for later")

// giveWay is how long a reload waits for homes while another one waits for it. Below it, a hail of signals would have a PIN tried for each.
const giveWay = 500 * time.Millisecond

// A request is a reload that was asked for.
type request struct {
	at     time.Time
	cancel context.CancelCauseFunc
}

// overtake ends the wait for homes of the reload before, once it had its time, and has ctx end the same way.
func (s *server) overtake(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if before := s.newest.Swap(&request{time.Now(), cancel}); before != nil {
		time.AfterFunc(giveWay-time.Since(before.at), func() { before.cancel(errOvertaken) })
	}
	return ctx, cancel
}

// reload puts a new configuration in place, or says why not and changes nothing. Reloads come one after the other; one that waits for homes to
// open gives way to the next.
func (s *server) reload(ctx context.Context) reloadReport {
	ctx, cancel := s.overtake(ctx)
	defer cancel(nil)
	s.reloading.Lock()
	defer s.reloading.Unlock()
	start := time.Now()
	s.notify.Reloading()
	faults, warnings, err := s.exchange(ctx)
	r := reloadReport{At: start, Took: time.Since(start), Taken: err == nil, Errors: lines(err), Faults: lines(errors.Join(faults...)), Warnings: lines(errors.Join(warnings...))}
	if err != nil {
		s.logger.Error("new configuration refused; the old one goes on", "err", err)
	}
	s.last.Store(&r)
	s.metrics.reloaded(r)
	s.notify.Ready(s.summary())
	return r
}

// lines are the single errors of an error.
func lines(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n") // conf.Errors, and what errors.Join returns, have a line for each
}

// exchange loads the configuration and puts it in place. The faults are those of parts that do not work while the rest does, the warnings
// those of what matches nothing.
func (s *server) exchange(ctx context.Context) (faults, warnings []error, err error) {
	next, err := load(s.options, s.logger)
	if err != nil {
		return nil, nil, err
	}
	old := s.current.Load()
	if err := fixed(&old.cfg, next); err != nil {
		return nil, nil, err
	}
	keysBefore := keyNames(s.keys.registry)
	// Until keys have changed too, which may take as long as a token takes to open, only what both policies allow is done; so what is taken
	// away is gone at once.
	s.service.SetPolicy(old.policy.And(next.policy))
	s.closeGone(false)
	faults = s.keys.replace(ctx, next.places)
	if err := s.auditor.use(next); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", next.where("audit"), err))
		s.logger.Error("the audit is out of order", "config", next.where("audit"), "err", err)
	}
	s.service.SetPolicy(next.policy)
	s.service.SetSealer(next.sealer)
	s.use(next)
	s.probes.set(next.cfg.Probe.Interval)
	for _, news := range []chan struct{}{s.renewals, s.expiryNews} {
		select {
		case news <- struct{}{}:
		default:
		}
	}
	s.closeGone(len(missingFrom(roots(next), roots(old.plan))) > 0) // by which one a client was verified is not known any more
	s.logChanges(old.plan, next, keysBefore)
	return faults, s.warn(), nil
}

// closeGone closes the connections of clients that may not connect any more, or all.
func (s *server) closeGone(rootGone bool) {
	s.keyless.CloseIf(func(p keyless.Peer) bool {
		gone := !s.service.Admits(p.ID) // which leaves revoked clients out
		switch {
		case gone:
			s.logger.Warn("closing a connection of a client that may not connect any more", "peer", p.ID, "addr", p.Addr.String())
		case rootGone:
			s.logger.Info("closing a connection, as its client must be verified by the authorities that are left", "peer", p.ID, "addr", p.Addr.String())
		}
		return gone || rootGone
	})
}

// roots are the authorities by which clients are verified.
func roots(p *plan) (all []string) {
	for rest := p.source.RootsPEM(); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return all
		}
		all = append(all, string(block.Bytes))
	}
}

// fixed returns an error for each value that a running server cannot change.
func fixed(old *Config, next *plan) error {
	var errs conf.Errors
	for key, changed := range map[string]bool{
		"listen": old.Listen != next.cfg.Listen, "ops": old.Ops != next.cfg.Ops, "control": old.Control != next.cfg.Control,
		"state_dir": old.StateDir != next.cfg.StateDir, "tracing": old.Tracing != next.cfg.Tracing,
		"limits": old.Limits != next.cfg.Limits, "timeouts": old.Timeouts != next.cfg.Timeouts,
	} {
		if changed {
			errs = append(errs, next.file.Errorf(key, "cannot change while the server runs; restart it, or take the change back"))
		}
	}
	slices.SortFunc(errs, byLine)
	return errs.Err()
}

// logChanges says what a reload changed.
func (s *server) logChanges(old, next *plan, keysBefore []string) {
	keysAfter := keyNames(s.keys.registry)
	s.logger.Info("configuration reloaded",
		"keys_added", missingFrom(keysBefore, keysAfter), "keys_removed", missingFrom(keysAfter, keysBefore),
		"clients_added", missingFrom(clientIDs(old), clientIDs(next)), "clients_removed", missingFrom(clientIDs(next), clientIDs(old)),
		"rules_changed", !reflect.DeepEqual(old.cfg.Clients, next.cfg.Clients), "audit_changed", old.cfg.Audit != next.cfg.Audit,
		"certificate_changed", !old.source.Leaf().Equal(next.source.Leaf()), "not_after", next.source.NotAfter())
}

func keyNames(r *signer.Registry) []string {
	var names []string
	for _, e := range r.Entries() {
		names = append(names, fmt.Sprint(e))
	}
	return names
}

func clientIDs(p *plan) []string {
	var ids []string
	for _, c := range p.cfg.Clients {
		if !slices.Contains(ids, c.ID) {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// missingFrom returns what b has and a has not.
func missingFrom(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(b), func(x string) bool { return slices.Contains(a, x) })
}
