package transit

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/keyhaven/keyhaven/signer"
)

// scripted is a way to log in that does what a test says.
type scripted struct {
	tries atomic.Int64
	fails atomic.Bool
	old   atomic.Bool
}

var errDown = errors.New("dial: no route")

func (m *scripted) name() string   { return "scripted" }
func (m *scripted) stale() bool    { return m.old.Load() }
func (m *scripted) own() bool      { return false }
func (m *scripted) remedy() string { return "remedy" }

func (m *scripted) login(context.Context) (*login, secrets, error) {
	m.tries.Add(1)
	time.Sleep(100 * time.Millisecond)
	if m.fails.Load() {
		return nil, secrets{"canary"}, errDown
	}
	m.old.Store(false)
	l := &login{secret: &api.SecretAuth{ClientToken: "token"}}
	return l, nil, nil
}

// runs starts a session in a bubble and returns what ends it.
func runs(t *testing.T, m *scripted) (s *session, end func()) {
	t.Helper()
	s = newSession(m, "home", slog.New(slog.DiscardHandler), defaultPauses)
	ctx, cancel := context.WithCancel(context.Background())
	l, err := s.logIn(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.run(ctx, l) })
	return s, func() { cancel(); wg.Wait() }
}

func TestOneLoginForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := new(scripted)
		s, end := runs(t, m)
		defer end()
		time.Sleep(time.Minute)
		refused := s.cur.Load()
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				l, err := s.refresh(context.Background(), refused)
				if err != nil || l == nil || l == refused {
					t.Errorf("got %v, %v, want a new login", l, err)
				}
			})
		}
		wg.Wait()
		if got := m.tries.Load(); got != 2 {
			t.Errorf("got %d logins, want the first and one for all", got)
		}
		// The new one is refused as well: it is not the login's fault.
		if l, err := s.refresh(context.Background(), s.cur.Load()); l != nil || err != nil {
			t.Errorf("got %v, %v, want nothing so soon", l, err)
		}
		time.Sleep(defaultPauses.again)
		if l, err := s.refresh(context.Background(), s.cur.Load()); l == nil || err != nil {
			t.Errorf("got %v, %v, want a new login", l, err)
		}
	})
}

func TestLoginBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := new(scripted)
		s, end := runs(t, m)
		defer end()
		m.fails.Store(true)
		m.old.Store(true) // the file changed
		time.Sleep(time.Hour)
		if got := m.tries.Load(); got < 90 || got > 200 {
			t.Errorf("got %d tries in an hour, want about one each 30 s", got)
		}
		// The old login serves on: nobody said that it ended.
		if _, err := s.current(); err != nil {
			t.Error(err)
		}
		m.fails.Store(false)
		time.Sleep(time.Minute)
		before := m.tries.Load()
		time.Sleep(time.Hour)
		if got := m.tries.Load(); got != before {
			t.Errorf("%d logins without need", got-before)
		}
	})
}

// A login that ended before its timers noticed is asked for anew by the first operation, which does not wait for it.
func TestEndedLoginAsksForANewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := new(scripted)
		s, end := runs(t, m)
		defer end()
		time.Sleep(time.Minute)
		s.expires.Store(time.Now().UnixNano())
		began := time.Now()
		if _, err := s.current(); !errors.Is(err, signer.ErrUnavailable) || s.healthy() {
			t.Errorf("got %v, healthy %v, want ErrUnavailable", err, s.healthy())
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("it took %s", d)
		}
		time.Sleep(time.Second)
		if _, err := s.current(); err != nil || !s.healthy() {
			t.Errorf("got %v", err)
		}
	})
}

func TestFailedLoginSaysWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := new(scripted)
		s, end := runs(t, m)
		defer end()
		m.fails.Store(true)
		refused := s.cur.Load()
		s.expires.Store(time.Now().UnixNano())
		_, err := s.refresh(context.Background(), refused)
		if !errors.Is(err, signer.ErrUnavailable) || !strings.Contains(err.Error(), "no route") {
			t.Errorf("got %v, want the reason", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		time.Sleep(time.Hour)
		if _, err := s.refresh(ctx, refused); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
	})
}

// TestEnding: a token that nobody renews ends, which is to be told in time; other logins do not.
func TestEnding(t *testing.T) {
	for name, tt := range map[string]struct {
		data  map[string]any
		ends  bool
		whole time.Duration // 0: not known
	}{
		"not renewable":          {map[string]any{"ttl": 3600, "creation_ttl": 7200, "renewable": false}, true, 2 * time.Hour},
		"of unknown age":         {map[string]any{"ttl": 3600, "renewable": false}, true, 0},
		"of an age that is none": {map[string]any{"ttl": 3600, "creation_ttl": -1, "renewable": false}, true, 0},
		"renewable":              {map[string]any{"ttl": 3600, "creation_ttl": 7200, "renewable": true}, false, 0},
		"without an end":         {map[string]any{"ttl": 0, "expire_time": nil, "renewable": false}, false, 0},
	} {
		f := newFake(t)
		inner := f.http.Config.Handler
		f.http.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/v1/auth/token/lookup-self" {
				inner.ServeHTTP(w, r)
				return
			}
			tell(w, map[string]any{"data": tt.data})
		})
		b, _ := f.open(f.config())
		from, to, ends := b.Ending()
		if ends != tt.ends || ends && (!to.Equal(b.Expires()) || tt.whole == 0 != from.IsZero() || tt.whole != 0 && to.Sub(from) != tt.whole) {
			t.Errorf("%s: got %v to %v, %v; want an end: %v, after %v", name, from, to, ends, tt.ends, tt.whole)
		}
	}
}

func TestScrubKnowsTheCurrentToken(t *testing.T) {
	s := newSession(new(scripted), "home", slog.New(slog.DiscardHandler), defaultPauses)
	s.cur.Store(&login{secret: &api.SecretAuth{ClientToken: "hvs.current"}})
	for _, old := range []string{"hvs.a", "hvs.b", "hvs.c", "hvs.d", "hvs.e", "hvs.f"} {
		s.known = append(secrets{old}, s.known[:min(len(s.known), 4)]...)
	}
	if got := s.scrub("hvs.current hvs.f"); strings.Contains(got, "hvs.") {
		t.Errorf("got %q", got)
	}
}

func TestClassifyLogin(t *testing.T) {
	s := newSession(new(scripted), "home", slog.New(slog.DiscardHandler), defaultPauses)
	s.known = secrets{"canary"}
	for status, want := range map[int]error{
		400: ErrLogin, 403: ErrLogin, 404: ErrLogin, 429: signer.ErrUnavailable, 473: signer.ErrUnavailable, 500: signer.ErrUnavailable, 503: signer.ErrUnavailable,
	} {
		err := s.classify(context.Background(), &api.ResponseError{HTTPMethod: http.MethodPut, StatusCode: status, Errors: []string{"no canary"}})
		if !errors.Is(err, want) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%d: got %v, want %v", status, err, want)
		}
		if other := map[error]error{ErrLogin: signer.ErrUnavailable, signer.ErrUnavailable: ErrLogin}[want]; errors.Is(err, other) {
			t.Errorf("%d: got %v, which is %v", status, err, other)
		}
	}
}

// A login that is asked for while one that failed is pausing is made, though the present one has no end.
func TestAskedForInAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := new(scripted)
		s, end := runs(t, m)
		defer end()
		refused := s.cur.Load()
		m.fails.Store(true)
		// Into every kind of moment between tries.
		for at := range 200 {
			time.Sleep(time.Duration(at) * 100 * time.Millisecond)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			if _, err := s.refresh(ctx, refused); errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("pause %d: nobody logs in", at)
			}
			cancel()
		}
		m.fails.Store(false)
		time.Sleep(defaultPauses.again)
		if l, err := s.refresh(context.Background(), refused); l == nil || l == refused || err != nil {
			t.Errorf("got %v, %v, want a new login", l, err)
		}
	})
}
