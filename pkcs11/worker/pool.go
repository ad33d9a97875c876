package worker

import (
	"context"
	"errors"

	"github.com/keyhaven/keyhaven/signer"
)

// ErrLost means that the worker that held the operation was lost. Whether the token did it is not known.
var ErrLost = errors.New("worker lost while it held the operation")

// Pool is a token served by workers, a [signer.Backend]. All methods may be called from several goroutines at once.
type Pool struct{}

// Stats is what is known of a pool's workers.
type Stats struct {
	Workers  []WorkerStats
	Restarts int64            // workers started in place of others
	Kills    map[string]int64 // workers that ended before they were told to, by reason: see Reasons
}

// WorkerStats is what is known of one worker.
type WorkerStats struct {
	PID       int    // 0 if there is no process now
	State     string // StateStarting, StateReady, StateDraining, StateWaiting or StateRefused
	InFlight  int    // operations that it holds
	Restarts  int64
	LastError string // why the process before ended or did not start; "" if none did
}

// States of a worker.
const (
	StateStarting = "starting"
	StateReady    = "ready"
	StateDraining = "draining" // finishes what it holds
	StateWaiting  = "waiting"  // for the next start
	StateRefused  = "refused"  // the token refused the PIN: nothing happens before Retry
)

// Reasons lists the keys of Stats.Kills: "deadline" (the module held an operation too long), "silent" (the worker said nothing),
// "start" (it was not ready in time, or failed to start), "crash" (a signal ended it), "exit" (it left by itself), "device" (the
// device failed) and "protocol" (it sent what makes no sense).
func Reasons() []string {
	return []string{"deadline", "silent", "start", "crash", "exit", "device", "protocol"}
}

// Open starts the first worker and, once it is logged in, the others. A wrong PIN costs one try: pkcs11.ErrPINIncorrect. ctx bounds Open only. The
// caller must call Close.
func Open(ctx context.Context, cfg Config) (*Pool, error) { return nil, errors.ErrUnsupported }

// Name returns the token's label, or its serial if it has none.
func (p *Pool) Name() string { return "" }

// Keys returns the keys that can be used now, as pkcs11.Token.Keys does. They stay valid while workers come and go.
func (p *Pool) Keys(ctx context.Context) ([]signer.Key, error) { return nil, errors.ErrUnsupported }

// Check reports whether a worker is there, the token answers and the login stands.
func (p *Pool) Check(ctx context.Context) error { return errors.ErrUnsupported }

// Close ends the workers after what they hold. Operations that come later return pkcs11.ErrClosed.
func (p *Pool) Close() error { return nil }

// Capacity is how many operations the workers that are ready can hold at once, 0 if none is ready.
func (p *Pool) Capacity() int { return 0 }

// Workers is how many workers are ready.
func (p *Pool) Workers() int { return 0 }

// Stats returns what is known of the workers.
func (p *Pool) Stats() Stats { return Stats{} }

// Retry reads the PIN anew, forgets that one was refused, and replaces the workers one after another, each before the old one
// goes. The PIN is tried once: if it is refused again, the others stay as they are.
func (p *Pool) Retry(ctx context.Context) error { return errors.ErrUnsupported }

var _ signer.Backend = (*Pool)(nil)
