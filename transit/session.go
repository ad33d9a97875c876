package transit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"
)

// Pauses of the login. They are variables of a session so that tests need not wait.
type pauses struct {
	min, max time.Duration // between logins that fail; also before a login is made anew
	again    time.Duration // between logins because the server denied permission
	look     time.Duration // between looks at the token's file
}

var defaultPauses = pauses{min: time.Second, max: 30 * time.Second, again: 5 * time.Second, look: 5 * time.Second}

// login is one login. It is immutable.
type login struct {
	client  *api.Client // holds the token
	expires time.Time   // zero: never
	began   time.Time   // of a login that is not made here; zero: not known
	final   bool        // it can neither be renewed nor made anew here
	secret  *api.SecretAuth
}

// session keeps a Backend logged in. One goroutine, run, logs in and renews; everyone else uses what it made.
type session struct {
	method method
	home   string
	log    *slog.Logger
	pauses pauses

	cur     atomic.Pointer[login]
	expires atomic.Int64 // Unix nanoseconds of the current login's end, which renewals move; 0: never, or none
	kick    chan struct{}

	mu      sync.Mutex
	err     error         // why the last login failed
	asked   time.Time     // when a denied permission last asked for a login
	asking  bool          // a login that was asked for is not done yet
	changed chan struct{} // closed when a login is done or has failed
	known   secrets       // of the last logins, made or tried
}

func newSession(m method, home string, log *slog.Logger, p pauses) *session {
	return &session{method: m, home: home, log: log, pauses: p, kick: make(chan struct{}, 1), changed: make(chan struct{})}
}

// current returns a login that has not ended.
func (s *session) current() (*login, error) {
	l := s.cur.Load()
	if l != nil && !s.ended() {
		return l, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if l != nil {
		// It should have been replaced in time. Timers lag behind when a machine slept, or its clock was set.
		s.askLocked()
	}
	if s.err != nil {
		return nil, unavailable("not logged in to %s: %w", s.home, s.err)
	}
	return nil, unavailable("not logged in to %s", s.home)
}

func (s *session) ended() bool {
	at := s.expires.Load()
	return at != 0 && time.Now().UnixNano() >= at
}

// healthy reports whether there is a login.
func (s *session) healthy() bool { return s.cur.Load() != nil && !s.ended() }

// ends returns when the login ends. Zero: never, or there is none.
func (s *session) ends() time.Time {
	if at := s.expires.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return time.Time{}
}

// scrub makes a text of the server fit for an error.
func (s *session) scrub(text string) string {
	s.mu.Lock()
	known := s.known
	s.mu.Unlock()
	if l := s.cur.Load(); l != nil {
		known = append(secrets{l.secret.ClientToken}, known...)
	}
	return known.scrub(text)
}

// refresh returns a login newer than old, which the server refused. All who ask at the same time wait for the same one. Asked
// too soon after the last time, it returns nil: a new login would be refused like the one before.
func (s *session) refresh(ctx context.Context, old *login) (*login, error) {
	s.mu.Lock()
	if l := s.cur.Load(); l != nil && l != old {
		s.mu.Unlock()
		return l, nil
	}
	due := s.askLocked()
	changed := s.changed
	s.mu.Unlock()
	if !due {
		return nil, nil
	}
	select {
	case <-changed:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if l := s.cur.Load(); l != nil && l != old {
		return l, nil
	}
	_, err := s.current()
	return nil, err
}

// askLocked asks for a login, and reports whether one is on its way. It is not if one was asked for a moment ago.
func (s *session) askLocked() bool {
	if s.asking {
		return true
	}
	if !s.asked.IsZero() && time.Since(s.asked) < s.pauses.again {
		return false
	}
	s.asking, s.asked = true, time.Now()
	select {
	case s.kick <- struct{}{}:
	default:
	}
	return true
}

// retry has a login made now, whatever was asked for a moment ago, and waits for it.
func (s *session) retry(ctx context.Context) error {
	for {
		s.mu.Lock()
		s.asked = time.Time{}
		s.askLocked()
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		s.mu.Lock()
		err := s.err
		s.mu.Unlock()
		if !errors.As(err, new(*heldError)) { // else it was begun before a refusal was forgotten
			return err
		}
	}
}

// logIn makes one login and tells all who wait for it.
func (s *session) logIn(ctx context.Context) (*login, error) {
	select {
	case <-s.kick: // this login is the answer
	default:
	}
	l, used, err := s.method.login(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = append(used, s.known[:min(len(s.known), 4)]...)
	if err != nil {
		err = s.classify(ctx, err)
	} else {
		s.expires.Store(0)
		s.cur.Store(l)
		if !l.expires.IsZero() {
			s.expires.Store(l.expires.UnixNano())
		}
	}
	s.err, s.asking = err, false
	close(s.changed)
	s.changed = make(chan struct{})
	return l, err
}

// classify says what a failed login means. The caller holds mu.
func (s *session) classify(ctx context.Context, err error) error {
	var refused *api.ResponseError
	switch {
	case errors.As(err, &refused):
		said := ""
		for _, e := range refused.Errors {
			said += " " + e
		}
		if refused.StatusCode >= 500 || refused.StatusCode == http.StatusTooManyRequests || refused.StatusCode == 472 || refused.StatusCode == 473 {
			return unavailable("login at %s: HTTP %d: %s", s.home, refused.StatusCode, s.known.scrub(said))
		}
		f := &fault{
			text: fmt.Sprintf("transit: login by %s at %s: HTTP %d: %s: %s",
				s.method.name(), s.home, refused.StatusCode, s.known.scrub(said), s.method.remedy()),
			classes: []error{ErrLogin},
		}
		if h := (*heldError)(nil); errors.As(err, &h) {
			f.classes = append(f.classes, h)
		}
		return f
	case errors.Is(err, errNoAnswer):
		return err
	case errors.As(err, new(*fileError)):
		return &fault{text: fmt.Sprintf("transit: login by %s at %s: %s", s.method.name(), s.home, err), classes: []error{ErrLogin, err}}
	}
	// The text may quote what the server sent.
	return connection(ctx, s.home, errors.New(s.known.scrub(trim(err).Error())))
}

// run keeps logged in until ctx ends. The first login was made by logIn. While no new one can be had, the present one is held on to: it may be
// that it can still be renewed.
func (s *session) run(ctx context.Context, l *login) {
	pause := s.pauses.min
	asked := false // for a login, while there was a pause
	for {
		began := time.Now()
		if !asked && !s.ended() && s.hold(ctx, l) {
			pause = s.pauses.min
		}
		// A login that ends as soon as it is made leaves the server time.
		s.wait(ctx, s.pauses.min-time.Since(began))
		if ctx.Err() != nil {
			return
		}
		next, err := s.logIn(ctx)
		if err == nil {
			s.log.Info("transit login renewed by a new one", "home", s.home, "expires", next.expires)
			l, pause, asked = next, s.pauses.min, false
			continue
		}
		if ctx.Err() != nil {
			return
		}
		level := slog.LevelWarn
		if errors.As(err, new(*heldError)) { // nobody was asked
			level = slog.LevelDebug
		}
		s.log.Log(ctx, level, "transit login failed", "home", s.home, "err", err, "again_in", pause)
		asked = s.wait(ctx, pause)
		// Jitter keeps many key servers from coming back at the same moment.
		pause = min(pause*2, s.pauses.max)
		pause = pause*3/4 + rand.N(pause/4+1)
	}
}

// wait waits, but no longer than until a login is asked for, and reports whether one was.
func (s *session) wait(ctx context.Context, d time.Duration) (asked bool) {
	if d <= 0 {
		return false
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.kick:
		return true
	case <-ctx.Done():
	case <-t.C:
	}
	return false
}

// hold renews a login and returns when a new one is due: the server renews no more or not now, it refused the login, or the file changed. It
// reports whether a renewal succeeded.
func (s *session) hold(ctx context.Context, l *login) (well bool) {
	var done <-chan error
	var renewed <-chan *api.RenewOutput
	if !l.expires.IsZero() {
		w, err := l.client.NewLifetimeWatcher(s.watch(l))
		if err != nil {
			s.log.Error("transit login cannot be renewed", "home", s.home, "err", err)
			return false
		}
		ended := make(chan struct{})
		go func() { defer close(ended); w.Start() }()
		defer func() { w.Stop(); <-ended }()
		done, renewed = w.DoneCh(), w.RenewCh()
	}
	look := time.NewTicker(s.pauses.look)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return well
		case <-s.kick:
			return well
		case <-done:
			return well
		case r := <-renewed:
			if r.Secret != nil && r.Secret.Auth != nil {
				well = true
				s.expires.Store(r.RenewedAt.Add(time.Duration(r.Secret.Auth.LeaseDuration) * time.Second).UnixNano())
			}
		case <-look.C:
			if s.method.stale() {
				return well
			}
		}
	}
}

// watch says how a login is renewed for the rest of its time. A renewal that fails ends the watch: left to itself, the watcher repeats it
// without a pause when little time is left.
func (s *session) watch(l *login) *api.LifetimeWatcherInput {
	auth := *l.secret
	auth.LeaseDuration = max(1, int(time.Until(s.ends())/time.Second))
	behaviour := api.RenewBehaviorErrorOnErrors
	if !auth.Renewable {
		behaviour = api.RenewBehaviorRenewDisabled
	}
	return &api.LifetimeWatcherInput{Secret: &api.Secret{Auth: &auth}, RenewBehavior: behaviour}
}

// revoke gives a login back that was made for this backend alone. It is a courtesy; the login ends by itself.
func (s *session) revoke(ctx context.Context) {
	l := s.cur.Swap(nil)
	if l == nil || !s.method.own() {
		return
	}
	if err := l.client.Auth().Token().RevokeSelfWithContext(ctx, ""); err != nil {
		s.log.Debug("transit login not revoked", "home", s.home, "err", s.scrub(err.Error()))
	}
}
