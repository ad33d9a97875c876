package transit

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// role is an AppRole at a fake, whose logins last a second and may be refused.
type role struct {
	logins  atomic.Int64
	refuses atomic.Bool
}

func newRole(t *testing.T) (r *role, f *fake, cfg Config) {
	t.Helper()
	r, f = new(role), newFake(t)
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /v1/auth/approle/login", func(w http.ResponseWriter, _ *http.Request) {
		r.logins.Add(1)
		if r.refuses.Load() {
			w.WriteHeader(http.StatusBadRequest)
			tell(w, map[string]any{"errors": []string{"invalid role or secret ID"}})
			return
		}
		tell(w, map[string]any{"auth": map[string]any{"client_token": "hvs.role", "lease_duration": 1, "renewable": false}})
	})
	mux.Handle("/", f.http.Config.Handler)
	f.http.Config.Handler = mux
	cfg = f.config()
	cfg.Refusals = new(Refusals)
	cfg.Auth = AuthConfig{Method: AuthAppRole, RoleIDFile: write(t, f.dir, "role_id", "role", 0o600), SecretIDFile: write(t, f.dir, "secret_id", "old", 0o600)}
	return r, f, cfg
}

// TestRefusedRole: five wrong logins lock a role for all who use it, so one that was refused is not repeated with the same ids.
func TestRefusedRole(t *testing.T) {
	r, f, cfg := newRole(t)
	r.refuses.Store(true)
	refused := func(what string, want int64) {
		t.Helper()
		for range 5 {
			b, err := Open(t.Context(), cfg)
			if err == nil {
				b.Close()
			}
			if !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), "invalid role or secret ID") || !strings.Contains(err.Error(), "lock the role") {
				t.Fatalf("%s: got %v, want ErrLogin with what the server said and what to do", what, err)
			}
		}
		if got := r.logins.Load(); got != want {
			t.Errorf("%s: got %d logins, want %d", what, got, want)
		}
	}
	refused("refused", 1)
	write(t, f.dir, "secret_id", "new", 0o600)
	refused("with another secret id", 2)
	cfg.Refusals.Forget()
	refused("after an operator's word", 3)
	r.refuses.Store(false)
	cfg.Refusals.Forget()
	f.open(cfg)
}

// TestRefusedRoleWhileOpen has the server refuse the role when the login of an open backend ends, while operations go on asking.
func TestRefusedRoleWhileOpen(t *testing.T) {
	r, _, cfg := newRole(t)
	b, err := open(t.Context(), cfg, pauses{min: time.Millisecond, max: 2 * time.Millisecond, again: time.Millisecond, look: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	keys, err := b.Keys(t.Context())
	if err != nil || len(keys) != 1 {
		t.Fatalf("got %v, %v", keys, err)
	}
	r.refuses.Store(true)
	for deadline := time.Now().Add(20 * time.Second); !b.Stopped(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the refusal is not noticed")
		}
	}
	before := r.logins.Load()
	for i := 0; i < 100 || b.session.healthy(); i++ {
		_ = signVerified(t.Context(), keys[0])
		time.Sleep(time.Millisecond)
	}
	if got := r.logins.Load(); got != before {
		t.Errorf("%d logins more with ids that were refused", got-before)
	}
	if err := b.Retry(t.Context()); !errors.Is(err, ErrLogin) || r.logins.Load() != before+1 {
		t.Errorf("a retry that is refused: got %v and %d logins, want 1", err, r.logins.Load()-before)
	}
	r.refuses.Store(false)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := b.Retry(ctx); err != nil || b.Stopped() {
		t.Fatalf("a retry that is not refused: got %v", err)
	}
	if err := signVerified(ctx, keys[0]); err != nil {
		t.Error(err)
	}
}
