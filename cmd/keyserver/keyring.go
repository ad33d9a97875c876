package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// Pauses between attempts to open a token that is away.
const (
	minTokenPause = time.Second
	maxTokenPause = 30 * time.Second
	openTimeout   = 30 * time.Second
)

// A slot is the place of one configured token, which may be away.
type slot struct {
	conf  TokenConfig
	open  pkcs11.Config
	name  string // the URI, without any secret
	token *pkcs11.Token
	keys  []signer.Home
	err   error // why token is nil
	probe *probe
}

// A probe asks a token whether it answers, once at a time, because a call into a module cannot be cancelled.
type probe struct {
	mu      sync.Mutex    // guards both below
	running chan struct{} // closed at the end of the call in progress; nil if there is none
	err     error         // of the last call
}

// ask returns the answer of a call that is in progress, or of a new one.
func (p *probe) ask(ctx context.Context, call func(context.Context) error) error {
	p.mu.Lock()
	if p.running == nil {
		done := make(chan struct{})
		p.running = done
		go func() {
			// Close of the token waits for the call, and so for this goroutine.
			limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), openTimeout)
			defer cancel()
			err := call(limited)
			p.mu.Lock()
			p.err, p.running = err, nil
			p.mu.Unlock()
			close(done)
		}()
	}
	running := p.running
	p.mu.Unlock()
	select {
	case <-running:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("does not answer: %w", ctx.Err())
	}
}

// A keyring holds the tokens and file keys of the present configuration and keeps the registry in step.
type keyring struct {
	registry *signer.Registry
	logger   *slog.Logger

	change sync.Mutex // held while tokens are opened and closed; only its holder writes what mu guards
	mu     sync.Mutex // guards slots and files
	slots  []*slot
	files  []signer.Home

	closing sync.WaitGroup // tokens that a new configuration does not have

	retry chan struct{} // holds a value when slots have changed
	up    *prometheus.Desc
}

func newKeyring(logger *slog.Logger) *keyring {
	return &keyring{
		registry: signer.NewRegistry(), logger: logger, retry: make(chan struct{}, 1),
		up: prometheus.NewDesc("keyhaven_keyserver_token_up", "Whether the token is open (1) or not (0).", []string{"token"}, nil),
	}
}

// openSlot opens a token and finds its keys. The slot is usable as a place for later attempts whatever the error.
func openSlot(ctx context.Context, conf TokenConfig, open pkcs11.Config) *slot {
	s := &slot{conf: conf, open: open, name: open.URI.String(), probe: new(probe)}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	logger, quiet := tokenLogger(open.Logger, slog.LevelInfo)
	open.Logger = logger // in this copy alone, which the slot does not keep
	quiet.Store(true)
	defer quiet.Store(false)
	token, err := pkcs11.Open(ctx, open)
	if err != nil {
		s.err = plain(err)
		return s
	}
	if s.keys, s.err = homesOf(ctx, token, conf); s.err != nil {
		s.err = plain(errors.Join(s.err, token.Close()))
		return s
	}
	s.token = token
	return s
}

// homesOf lists the token's keys with what the configuration allows.
func homesOf(ctx context.Context, token *pkcs11.Token, conf TokenConfig) ([]signer.Home, error) {
	keys, err := token.Keys(ctx)
	if err != nil {
		return nil, err
	}
	homes := make([]signer.Home, len(keys))
	for i, k := range keys {
		homes[i] = signer.Home{Key: k, Decrypt: namesKey(conf.Decrypt, k.Info())}
	}
	return homes, nil
}

func namesKey(names []string, info signer.KeyInfo) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		ski, err := keyless.ParseSKI(name)
		return err == nil && ski == info.SKI || name != "" && name == info.Label
	})
}

// final reports whether trying again by itself would do no good, or harm: a token locks after a few wrong PINs.
func final(err error) bool {
	return refusesPIN(err) || isAny(err, pkcs11.ErrAmbiguous, pkcs11.ErrExtractable, pkcs11.ErrModuleNotAllowed, pkcs11.ErrUnsupported)
}

// refusesPIN reports whether the token refused the PIN, or would not be asked.
func refusesPIN(err error) bool {
	return isAny(err, pkcs11.ErrPINIncorrect, pkcs11.ErrPINLocked, pkcs11.ErrPINFinalTry)
}

func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
}

// start opens all tokens of a plan. A token that does not open is left to run, or to the operator.
func (r *keyring) start(ctx context.Context, p *plan) error {
	r.change.Lock()
	defer r.change.Unlock()
	var slots []*slot
	for i, open := range p.tokens {
		s := openSlot(ctx, p.cfg.Tokens[i], open)
		slots = append(slots, s)
		r.logSlot(s)
	}
	r.set(slots, p.homes)
	return r.registry.Replace(homesIn(p.homes, slots))
}

func (r *keyring) set(slots []*slot, files []signer.Home) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.slots, r.files = slots, files
}

func (r *keyring) present() []*slot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.slots
}

func (r *keyring) logSlot(s *slot) {
	switch {
	case s.token != nil:
		r.logger.Info("token is open", "token", s.name, "keys", len(s.keys))
	case final(s.err):
		r.logger.Error("token cannot be used; correct the cause, then send SIGHUP", "token", s.name, "err", s.err)
	default:
		r.logger.Warn("token is away; it is tried again", "token", s.name, "err", s.err)
	}
}

func homesIn(files []signer.Home, slots []*slot) []signer.Home {
	homes := slices.Clone(files)
	for _, s := range slots {
		homes = append(homes, s.keys...)
	}
	return homes
}

// run tries tokens that are away again until ctx ends.
func (r *keyring) run(ctx context.Context) error {
	pause := minTokenPause
	for {
		var due <-chan time.Time
		if slices.ContainsFunc(r.present(), (*slot).away) {
			due = time.After(pause/2 + rand.N(pause/2+1))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.retry:
			pause = minTokenPause
			continue
		case <-due:
		}
		if r.tryAgain(ctx) {
			pause = minTokenPause
		} else {
			pause = min(2*pause, maxTokenPause)
		}
	}
}

// away reports whether the token is worth another try.
func (s *slot) away() bool { return s.token == nil && !final(s.err) }

// tryAgain opens what is away and reports whether any came back.
func (r *keyring) tryAgain(ctx context.Context) (came bool) {
	r.change.Lock()
	defer r.change.Unlock()
	slots := slices.Clone(r.slots)
	for i, s := range slots {
		if !s.away() || ctx.Err() != nil {
			continue
		}
		slots[i] = openSlot(ctx, s.conf, s.open)
		if slots[i].away() {
			r.logger.Debug("token is still away", "token", s.name, "err", slots[i].err)
		} else {
			r.logSlot(slots[i])
		}
		came = came || slots[i].token != nil
	}
	r.set(slots, r.files)
	if came {
		if err := r.registry.Replace(homesIn(r.files, slots)); err != nil {
			r.logger.Error("keys of a token cannot be taken in", "err", err)
		}
	}
	return came
}

// replace puts the tokens and file keys of a plan in place of the present ones, or returns an error and changes nothing. Tokens that the plan has as
// they were stay open, and their keys are looked for again; those that had failed are tried once. before is called when only the exchange
// itself is left to do.
func (r *keyring) replace(ctx context.Context, p *plan, before func()) error {
	r.change.Lock()
	defer r.change.Unlock()
	var next, opened []*slot
	var errs []error
	for i, open := range p.tokens {
		s, fresh, err := r.nextSlot(ctx, p.cfg.Tokens[i], open)
		if err != nil {
			errs = append(errs, p.file.Errorf(fmt.Sprintf("tokens[%d].uri", i), "%v", err))
		}
		next = append(next, s)
		if fresh {
			opened = append(opened, s)
		}
	}
	err := errors.Join(errs...)
	if err == nil {
		before()
		err = r.registry.Replace(homesIn(p.homes, next))
	}
	if err != nil {
		for _, s := range opened {
			err = errors.Join(err, s.close())
		}
		return err
	}
	old := r.slots
	r.set(next, p.homes)
	for _, s := range old {
		if kept := slices.ContainsFunc(next, func(n *slot) bool { return n.token == s.token }); kept {
			continue
		}
		// Operations in progress are waited for, perhaps for long: the rest of a new configuration must not be.
		r.closing.Go(func() {
			if err := s.close(); err != nil {
				r.logger.Warn("closing a token failed", "token", s.name, "err", plain(err))
			}
		})
	}
	select {
	case r.retry <- struct{}{}:
	default:
	}
	return nil
}

// nextSlot returns the slot for a token of a new configuration, and whether its token was opened for it. A token that is new must open; one
// that was away may stay away.
func (r *keyring) nextSlot(ctx context.Context, conf TokenConfig, open pkcs11.Config) (s *slot, fresh bool, err error) {
	i := slices.IndexFunc(r.slots, func(s *slot) bool { return sameToken(s.conf, conf) })
	if i < 0 || r.slots[i].token == nil {
		s = openSlot(ctx, conf, open)
		if i < 0 {
			err = s.err
		} else {
			r.logSlot(s)
		}
		return s, s.token != nil, err
	}
	old := r.slots[i]
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	keys, err := homesOf(ctx, old.token, conf)
	if refusesPIN(err) {
		r.logger.Info("the token's PIN is read anew and tried once", "token", old.name)
		if err = old.token.Reopen(ctx); err == nil {
			keys, err = homesOf(ctx, old.token, conf)
		}
	}
	if err != nil {
		// The token is in trouble, which is not the new configuration's fault: the keys known so far recover when it does.
		if !refusesPIN(err) { // which the token has said
			r.logger.Warn("token does not list its keys; those known stay", "token", old.name, "err", plain(err))
		}
		keys = slices.Clone(old.keys)
		for i := range keys {
			keys[i].Decrypt = namesKey(conf.Decrypt, keys[i].Key.Info())
		}
	}
	return &slot{conf: conf, open: open, name: old.name, token: old.token, keys: keys, probe: old.probe}, false, nil
}

// sameToken reports whether a token opened for one configuration serves the other.
func sameToken(a, b TokenConfig) bool {
	return a.URI == b.URI && a.Module == b.Module && a.Sessions == b.Sessions && a.AllowExtractable == b.AllowExtractable && a.AllowFinalTry == b.AllowFinalTry
}

func (s *slot) close() error {
	if s.token == nil {
		return nil
	}
	return s.token.Close()
}

// close closes all tokens, waiting for operations in progress.
func (r *keyring) close() error {
	r.change.Lock()
	defer r.change.Unlock()
	var errs []error
	for _, s := range r.slots {
		errs = append(errs, s.close())
	}
	r.set(nil, nil)
	r.closing.Wait()
	return errors.Join(errs...)
}

// check returns what is wrong with any token, naming it.
func (r *keyring) check(ctx context.Context) error {
	var errs []error
	for _, s := range r.present() {
		err := s.err
		if s.token != nil {
			err = plain(s.probe.ask(ctx, s.token.Check))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("token %s: %w", s.name, err))
		}
	}
	return errors.Join(errs...)
}

// Describe implements prometheus.Collector.
func (r *keyring) Describe(ch chan<- *prometheus.Desc) { ch <- r.up }

// Collect implements prometheus.Collector.
func (r *keyring) Collect(ch chan<- prometheus.Metric) {
	for _, s := range r.present() {
		up := 0.0
		if s.token != nil {
			up = 1
		}
		ch <- prometheus.MustNewConstMetric(r.up, prometheus.GaugeValue, up, s.name)
	}
}
