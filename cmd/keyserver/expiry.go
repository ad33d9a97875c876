package main

import (
	"context"
	"crypto/x509"
	"path/filepath"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// An expiry is something that ends at a time.
type expiry struct {
	kind     string // one of the kinds below
	name     string
	from, to time.Time // from: zero if it is not known
}

// Kinds of things that end.
const (
	endsServer    = "server"    // the server's own certificate
	endsAuthority = "authority" // a root by which clients are verified
	endsClient    = "client"    // the last certificate that the authority gave a client
	endsKey       = "key"       // a certificate that a home holds beside a key
	endsLogin     = "login"     // a token for Transit that is not renewed by the server; its metric is that of all logins
)

// expiryTick is how often the log is told of what is about to end.
const expiryTick = time.Minute

// warnAt are the times before an end at which the log is told.
var warnAt = []time.Duration{24 * time.Hour, 7 * 24 * time.Hour, 30 * 24 * time.Hour}

// stage returns how near the end is: 0 for not near, then 1 for the first of the warnings up to 3 for the last, and 4 for the end itself. What
// is renewed at two thirds of its life is near its end when that did not happen.
func (e expiry) stage(now time.Time) int {
	left := e.to.Sub(now)
	if left <= 0 {
		return len(warnAt) + 1
	}
	if !e.from.IsZero() && left > e.to.Sub(e.from)/3 {
		return 0
	}
	for i, d := range warnAt {
		if left <= d {
			return len(warnAt) - i
		}
	}
	return 0
}

// expiries lists what ends. Revoked clients are left out, and so are files that do not hold what they should, which other commands say.
func (s *server) expiries() (all []expiry) {
	l := s.current.Load()
	add := func(kind, name string, c *x509.Certificate) {
		all = append(all, expiry{kind, name, c.NotBefore, c.NotAfter})
	}
	add(endsServer, l.source.Identity().String(), l.source.Leaf())
	for _, der := range roots(l.plan) {
		if c, err := x509.ParseCertificate([]byte(der)); err == nil {
			add(endsAuthority, c.Subject.CommonName, c)
		}
	}
	if l.revoked != nil {
		files, _ := filepath.Glob(clientFile(l.cfg.CADir, "*")) // the pattern is good
		for _, path := range files {
			if c, id, err := readClient(path); err == nil && l.revoked.accept(id, c) == nil {
				add(endsClient, id.String(), c)
			}
		}
	}
	seen := map[keyless.SKI]bool{}
	for _, e := range s.keys.registry.Entries() {
		for _, h := range e.Homes {
			if c := h.Key.Info().Certificate; c != nil && !seen[e.SKI] {
				seen[e.SKI] = true
				add(endsKey, e.SKI.String(), c)
			}
		}
	}
	for _, p := range s.keys.present() {
		if b, ok := p.backend.(interface {
			Ending() (from, to time.Time, ok bool)
		}); ok {
			if from, to, ok := b.Ending(); ok {
				all = append(all, expiry{endsLogin, p.name, from, to})
			}
		}
	}
	return all
}

// firstEnds returns by kind and name which certificates end, as of the last look. Of several that have a name, such as two roots while one takes the place of
// the other, it is the first that ends.
func (s *server) firstEnds() map[[2]string]time.Time {
	all := s.endings.Load()
	if all == nil {
		return nil
	}
	ends := make(map[[2]string]time.Time, len(*all))
	for _, e := range *all {
		if e.kind == endsLogin {
			continue
		}
		id := [2]string{e.kind, e.name}
		if to, ok := ends[id]; !ok || e.to.Before(to) {
			ends[id] = e.to
		}
	}
	return ends
}

// watchExpiry tells the log of what is about to end, at each of its stages once.
func (s *server) watchExpiry(ctx context.Context) error {
	type id struct {
		kind, name string
		to         time.Time
	}
	told := map[id]int{}
	tick := time.NewTicker(expiryTick)
	defer tick.Stop()
	for {
		now := time.Now()
		next := map[id]int{}
		all := s.expiries()
		s.endings.Store(&all)
		for _, e := range all {
			key := id{e.kind, e.name, e.to}
			stage := e.stage(now)
			next[key] = stage
			switch {
			case stage <= told[key]:
			case e.kind == endsLogin:
				s.logger.Warn("a token for Transit ends; put another into its file", "home", e.name, "not_after", e.to, "left", e.to.Sub(now).Round(time.Minute))
			case stage > len(warnAt):
				s.logger.Error("a certificate has ended; renew it", "kind", e.kind, "name", e.name, "not_after", e.to)
			default:
				s.logger.Warn("a certificate is about to end; renew it", "kind", e.kind, "name", e.name, "not_after", e.to, "left", e.to.Sub(now).Round(time.Minute))
			}
		}
		told = next
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-s.expiryNews:
		}
	}
}
