package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"runtime"
	"slices"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/pkcs11/worker"
	"github.com/keyhaven/keyhaven/signer"
)

// openTimeout bounds the opening of a place.
const openTimeout = 45 * time.Second

// Kinds of places.
const (
	kindToken   = "token"
	kindTransit = "transit"
	kindFiles   = "files"
)

// A spec is what the configuration says of a place that holds keys: a token, a mount of Transit, or all file keys.
type spec struct {
	kind     string
	name     string // as short as it can be among those of the configuration
	longName string
	at       string // file, line and key of the configuration
	module   string // of a token; those of one module are opened one after the other
	config   any    // what, if it stays the same, keeps an open place open; nil: never
	open     func(ctx context.Context, logger *slog.Logger) (signer.Backend, error)
	forget   func() // has open try what was refused; nil: it does anyway

	weight, priority int
	decrypt          func(signer.KeyInfo) bool
	lane             signer.LaneConfig
}

// same reports whether a place that was opened for one spec serves the other.
func (s *spec) same(o *spec) bool {
	return s.kind == o.kind && s.name == o.name && s.config != nil && reflect.DeepEqual(s.config, o.config)
}

// A place is a spec with what became of it. It is not changed once others can see it.
type place struct {
	*spec
	backend signer.Backend // nil: not open
	homes   []signer.Home
	err     error   // why it is not open
	faults  []error // of single keys of an open place
}

// openPlace opens a place and finds its keys.
func openPlace(ctx context.Context, s *spec, lane func(*spec, signer.Backend) *signer.Lane, logger *slog.Logger) *place {
	p := &place{spec: s}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	b, err := s.open(ctx, logger)
	if err != nil {
		p.err = err
		if cause := context.Cause(ctx); errors.Is(cause, errOvertaken) {
			p.err = cause
		}
		return p
	}
	if err := p.find(ctx, b, lane(s, b)); err != nil {
		p.err = errors.Join(err, b.Close())
		return p
	}
	p.backend = b
	return p
}

// find lists the backend's keys as homes, with what the configuration says of them.
func (p *place) find(ctx context.Context, b signer.Backend, lane *signer.Lane) error {
	keys, err := b.Keys(ctx)
	if err != nil {
		return err
	}
	p.homes = make([]signer.Home, len(keys))
	for i, k := range keys {
		p.homes[i] = signer.Home{Key: k, Decrypt: p.decrypt(k.Info()), Weight: p.weight, Priority: p.priority, Lane: lane}
	}
	if f, ok := b.(interface{ Faults() []error }); ok {
		p.faults = f.Faults()
	}
	return nil
}

// again returns the place for a new spec of it, with its keys looked for anew. An open place that does not list its keys keeps those
// that are known: it is in trouble, which is not the new configuration's fault, and they recover when it does.
func (p *place) again(ctx context.Context, s *spec, lane *signer.Lane, logger *slog.Logger) *place {
	next := &place{spec: s, backend: p.backend, faults: p.faults}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	var err error
	if stopped(p.backend) {
		logger.Info("what the home refused, a PIN or a login, is read anew and tried once", "home", p.name)
		err = retry(ctx, p.backend)
	}
	if err == nil {
		err = next.find(ctx, p.backend, lane)
	}
	if err == nil {
		return next
	}
	logger.Warn("a home does not list its keys; those known stay", "home", p.name, "config", s.at, "err", err)
	for _, h := range p.homes {
		next.homes = append(next.homes, signer.Home{Key: h.Key, Decrypt: s.decrypt(h.Key.Info()), Weight: s.weight, Priority: s.priority, Lane: lane})
	}
	return next
}

// stopped reports whether the home refused a PIN or a login that is not tried again by itself: workers that are lost are not replaced before an
// operator acts.
func stopped(b signer.Backend) bool {
	switch b := b.(type) {
	case *worker.Pool:
		return slices.ContainsFunc(b.Stats().Workers, func(w worker.WorkerStats) bool { return w.State == worker.StateRefused })
	case interface{ Stopped() bool }:
		return b.Stopped()
	}
	return false
}

// retry has the PIN, or the login, of an open place read and tried once.
func retry(ctx context.Context, b signer.Backend) error {
	if r, ok := b.(interface{ Retry(context.Context) error }); ok {
		return r.Retry(ctx)
	}
	return b.Check(ctx)
}

// away reports whether the place is worth another try by itself.
func (p *place) away() bool { return p.backend == nil && !final(p.err) }

// state is a word for people.
func (p *place) state() string {
	switch {
	case p.backend != nil && stopped(p.backend):
		return "refused"
	case p.backend != nil:
		return "open"
	case final(p.err):
		return "stopped"
	}
	return "away"
}

// capacity is how many operations the place takes at once now.
func capacity(b signer.Backend) int {
	if c, ok := b.(interface{ Capacity() int }); ok {
		return c.Capacity()
	}
	return 1
}

func (p *place) close() error {
	if p.backend == nil {
		return nil
	}
	if err := p.backend.Close(); err != nil {
		return fmt.Errorf("close %s: %w", p.name, err)
	}
	return nil
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

func namesKey(names []string, info signer.KeyInfo) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		ski, err := keyless.ParseSKI(name)
		return err == nil && ski == info.SKI || name != "" && name == info.Label
	})
}

// fileKeys is the backend of all keys in files.
type fileKeys struct{ keys []signer.Key }

func (f *fileKeys) Name() string                               { return kindFiles }
func (f *fileKeys) Keys(context.Context) ([]signer.Key, error) { return f.keys, nil }
func (f *fileKeys) Check(context.Context) error                { return nil }
func (f *fileKeys) Close() error                               { return nil }

// Capacity is as many operations as the machine can do at once.
func (f *fileKeys) Capacity() int { return runtime.GOMAXPROCS(0) }
