package transit

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/keyhaven/keyhaven/signer"
)

// Backend is an open Transit engine, a [signer.Backend]. All methods may be called from several goroutines at once.
type Backend struct {
	cfg       Config
	name      string
	connector *connector
	session   *session
	slots     chan struct{} // one for each signing request under way
	single    atomic.Bool   // the server does not know batches
	spare     atomic.Int64  // Unix nanoseconds until which the server asked to be left alone

	ctx  context.Context // ends with Close
	stop context.CancelCauseFunc
	wg   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	faults []error
}

var errClosed = unavailable("the backend is closed")

// Open logs in. The caller must call Close. A server that is away is signer.ErrUnavailable, and Open may be tried again; a refused login is
// ErrLogin; faults of the configuration are *FieldErrors. Keys are not asked for before [Backend.Keys].
func Open(ctx context.Context, cfg Config) (*Backend, error) {
	return open(ctx, cfg, defaultPauses)
}

func open(ctx context.Context, cfg Config, p pauses) (*Backend, error) {
	if all := cfg.Check(); len(all) > 0 {
		return nil, errors.Join(all...)
	}
	b := &Backend{cfg: cfg.complete()}
	b.cfg.Keys = slices.Clone(b.cfg.Keys)
	b.name = b.cfg.Name()
	b.slots = make(chan struct{}, b.cfg.InFlight)
	b.ctx, b.stop = context.WithCancelCause(context.Background())
	var err error
	if b.connector, err = newConnector(b.ctx, &b.cfg); err != nil {
		b.stop(err)
		return nil, err
	}
	b.session = newSession(b.connector.method(), b.name, b.cfg.Logger, p)
	l, err := b.session.logIn(ctx)
	if err != nil {
		b.stop(err)
		b.connector.close()
		_, why := b.session.current()
		return nil, loginError(ctx, why, b.session)
	}
	b.wg.Go(func() { b.session.run(b.ctx, l) })
	return b, nil
}

// loginError returns why the first login failed.
func loginError(ctx context.Context, why error, s *session) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return why
}

// Name returns host, namespace and mount: vault.example.net:8200/team/transit.
func (b *Backend) Name() string { return b.name }

// Capacity returns how many operations the engine can be given at once: all that fit into the requests under way.
func (b *Backend) Capacity() int { return b.cfg.InFlight * b.cfg.Batch }

// Faults returns what was wrong with keys when [Backend.Keys] last asked, one error for each key that is not served.
func (b *Backend) Faults() []error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.faults)
}

// Check reports whether the engine answers now, by reading the first key. What is wrong with the key itself is no fault of the engine.
func (b *Backend) Check(ctx context.Context) error {
	_, err := b.read(ctx, b.cfg.Keys[0].Name)
	if errors.Is(err, signer.ErrNotFound) {
		return nil
	}
	return err
}

// Retry logs in anew, even with what was refused before: an operator says that it may work now. A login that is good goes on if the new one fails.
func (b *Backend) Retry(ctx context.Context) error {
	b.cfg.Refusals.Forget()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(b.ctx, func() { cancel(errClosed) })()
	return b.session.retry(ctx)
}

// Stopped reports whether the server refused the login and it is not tried again before its files change, or [Backend.Retry].
func (b *Backend) Stopped() bool { return b.cfg.Refusals.any() }

// Expires returns when the login ends unless it is renewed. Zero: it does not end, or there is none.
func (b *Backend) Expires() time.Time { return b.session.ends() }

// Ending returns from when to when the login lasts, if it ends unless someone puts another token into its file: the server does not renew it, and
// none can be made here. Otherwise ok is false. A zero from is not known.
func (b *Backend) Ending() (from, to time.Time, ok bool) {
	l := b.session.cur.Load()
	if l == nil || !l.final {
		return time.Time{}, time.Time{}, false
	}
	return l.began, l.expires, true
}

// Close waits for the requests under way, ends the login, and gives it back to the server if it was made for this backend alone.
func (b *Backend) Close() error {
	b.mu.Lock()
	first := !b.closed
	b.closed = true
	b.mu.Unlock()
	if first {
		// Whoever waits for a slot gets one or gives up; when all slots are taken here, no request is under way.
		for range cap(b.slots) {
			b.slots <- struct{}{}
		}
		ctx, cancel := context.WithTimeout(b.ctx, min(b.cfg.Timeout, time.Second))
		b.session.revoke(ctx)
		cancel()
		b.stop(errClosed)
	}
	b.wg.Wait()
	b.connector.close()
	return nil
}

// start runs f and lets Close wait for it. It returns false if the backend is closed.
func (b *Backend) start(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.wg.Go(f)
	return true
}

// enter takes a slot for a signing request.
func (b *Backend) enter(ctx context.Context) error {
	if err := b.leaveAlone(ctx); err != nil {
		return err
	}
	select {
	case b.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-b.ctx.Done():
		return errClosed
	}
}

func (b *Backend) leave() { <-b.slots }

// leaveAlone waits as long as the server asked to be left alone.
func (b *Backend) leaveAlone(ctx context.Context) error {
	d := time.Until(time.Unix(0, b.spare.Load()))
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-b.ctx.Done():
		return errClosed
	}
}

// ask sends a request and returns the answer's body. doing and hint are for the error. If the server does not accept the login, it
// asks once more with a new one.
func (b *Backend) ask(ctx context.Context, doing, hint string, send func(context.Context, *api.Logical) (*api.Response, error)) (*answer, error) {
	l, err := b.session.current()
	if err != nil {
		return nil, err
	}
	own, cancel := context.WithTimeout(ctx, b.cfg.Timeout)
	defer cancel()
	for range 2 {
		a, err := collect(send(own, l.client.Logical()))
		if err != nil {
			if ctx.Err() == nil && own.Err() != nil {
				return nil, unavailable("%s: no answer within %s", b.name, b.cfg.Timeout)
			}
			return nil, connection(ctx, b.name, err)
		}
		if a.status == 200 {
			return a, nil
		}
		err = b.refusal(a, doing, hint)
		if !errors.Is(err, ErrPermission) {
			var f *fault
			if errors.As(err, &f) && f.retry > 0 {
				b.spare.Store(time.Now().Add(f.retry).UnixNano())
			}
			return a, err
		}
		next, again := b.session.refresh(own, l)
		if next == nil {
			switch {
			case again == nil || ctx.Err() != nil:
			case own.Err() != nil:
				err = unavailable("%s: no new login within %s", b.name, b.cfg.Timeout)
			default:
				err = again
			}
			return a, err
		}
		l = next
	}
	return nil, b.denied(doing, hint)
}
