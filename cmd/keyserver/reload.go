package main

import (
	"bytes"
	"context"
	"fmt"
	"reflect"
	"slices"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// reload puts a new configuration in place, or returns an error and changes nothing.
func (s *server) reload(ctx context.Context) error {
	next, err := load(s.options, s.logger)
	if err != nil {
		return err
	}
	old := s.current.Load()
	if err := fixed(&old.cfg, next); err != nil {
		return err
	}
	keysBefore := keyNames(s.keys.registry)
	// Keys and policy change one after the other: in between, only what both policies allow is done.
	narrow := func() { s.service.SetPolicy(old.policy.And(next.policy)) }
	if err := s.keys.replace(ctx, next, narrow); err != nil {
		s.service.SetPolicy(old.policy)
		return err
	}
	s.service.SetPolicy(next.policy)
	s.service.SetSealer(next.sealer)
	s.use(next)
	select {
	case s.renewals <- struct{}{}:
	default:
	}
	newRoots := !bytes.Equal(old.source.RootsPEM(), next.source.RootsPEM()) // who is connected was verified with the old ones
	s.keyless.CloseIf(func(p keyless.Peer) bool {
		gone := !s.service.Admits(p.ID) // which leaves revoked clients out
		switch {
		case gone:
			s.logger.Warn("closing a connection of a client that may not connect any more", "peer", p.ID, "addr", p.Addr.String())
		case newRoots:
			s.logger.Info("closing a connection, as its client must be verified by the new authority", "peer", p.ID, "addr", p.Addr.String())
		}
		return gone || newRoots
	})
	s.logChanges(old.plan, next, keysBefore)
	s.warnAboutPolicy()
	return nil
}

// fixed returns an error for each value that a running server cannot change.
func fixed(old *Config, next *plan) error {
	var errs conf.Errors
	for key, changed := range map[string]bool{
		"listen": old.Listen != next.cfg.Listen, "ops": old.Ops != next.cfg.Ops,
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
		"rules_changed", !reflect.DeepEqual(old.cfg.Clients, next.cfg.Clients),
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
