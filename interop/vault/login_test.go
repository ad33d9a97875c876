package vault

import (
	"context"
	"errors"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/interop/vault/server"
	"github.com/keyhaven/keyhaven/signer"
	"github.com/keyhaven/keyhaven/transit"
)

const (
	canarySecret = "canary-secret-id-6f1d"
	canaryJWT    = "canary.jwt.41c9"
)

// appRole changes a configuration to a login by AppRole.
func (l *lab) appRole(cfg *transit.Config, life server.Lifetime) {
	l.AddAppRole("machines/approle", "role-1", canarySecret, life)
	cfg.Auth = transit.AuthConfig{
		Method: transit.AuthAppRole, Mount: "machines/approle",
		RoleIDFile: l.write("role_id", "role-1"), SecretIDFile: l.write("secret_id", canarySecret),
	}
}

func TestLoginMethods(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*lab, *transit.Config){
		"token-file": func(*lab, *transit.Config) {},
		"approle":    func(l *lab, cfg *transit.Config) { l.appRole(cfg, lifetime(time.Hour, 0)) },
		"approle, wrapped": func(l *lab, cfg *transit.Config) {
			l.appRole(cfg, lifetime(time.Hour, 0))
			cfg.Auth.SecretIDWrapped = true
			l.write("secret_id", l.Wrap(canarySecret))
		},
		"kubernetes": func(l *lab, cfg *transit.Config) {
			l.AddKubernetes("kubernetes", "keyserver", canaryJWT, lifetime(time.Hour, 0))
			cfg.Auth = transit.AuthConfig{Method: transit.AuthKubernetes, Role: "keyserver", JWTFile: l.write("jwt", canaryJWT)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.make("web", "ecdsa-p256")
			cfg := l.config("web")
			set(l, &cfg)
			b := l.open(cfg)
			k := keys(t, b, 1)["web"]
			sign(t, k, p256)
			if got, want := b.Expires().IsZero(), name == "token-file"; got != want {
				t.Errorf("Expires is zero: got %v, want %v", got, want)
			}
			// A revoked login is made anew within the operation; a token from a file cannot be.
			l.RevokeAll()
			if name == "token-file" {
				l.write("token", l.NewToken(lifetime(0, 0)))
			}
			sign(t, k, p256)
			had := l.Tokens()
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			if got, want := l.Tokens(), had-1; name != "token-file" && got != want {
				t.Errorf("after Close the server has %d logins, want %d", got, want)
			}
			if _, err := k.Sign(context.Background(), p256, make([]byte, 32)); !errors.Is(err, signer.ErrUnavailable) {
				t.Errorf("after Close: got %v, want ErrUnavailable", err)
			}
		})
	}
}

// The lifetime ends many times while signatures are asked for without pause: none fails, and renewals come before new logins.
func TestRenewalAndNewLogin(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	cfg := l.config("web")
	l.appRole(&cfg, lifetime(5*time.Second, 10*time.Second))
	k := keys(t, l.open(cfg), 1)["web"]
	eventually(t, "two logins by themselves and two renewals", func() bool {
		sign(t, k, p256)
		c := l.Counters()
		return c.Logins >= 3 && c.Renewals >= 2
	})
}

// All logins are revoked under load: those who were refused share one new login, and no operation fails.
func TestRevokedUnderLoad(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	l.make("rsa", "rsa-2048")
	cfg := l.config("web", "rsa")
	l.appRole(&cfg, lifetime(time.Hour, 0))
	ks := keys(t, l.open(cfg), 2)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 16 {
		k, alg := ks["web"], p256
		if i%4 == 0 {
			k, alg = ks["rsa"], signer.Algorithm{Kind: signer.PSS, Hash: p256.Hash}
		}
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					input := inputFor(t, alg)
					sig, err := k.Sign(context.Background(), alg, input)
					if err != nil {
						t.Error(err)
						return
					}
					verify(t, k.Public(), alg, input, sig)
				}
			}
		})
	}
	before := l.Counters()
	l.RevokeAll()
	eventually(t, "a new login and signatures after it", func() bool {
		c := l.Counters()
		return c.Logins > before.Logins && c.SignItems > before.SignItems+100
	})
	close(stop)
	wg.Wait()
	if got := l.Counters().Logins - before.Logins; got != 1 {
		t.Errorf("got %d new logins, want 1 for all", got)
	}
}

// A denied permission costs one new login, not one for each operation.
func TestDeniedPermissionDoesNotHammer(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	cfg := l.config("web")
	l.AddAppRole("approle", "role-1", canarySecret, lifetime(time.Hour, 0), "sign/web")
	cfg.Auth = transit.AuthConfig{Method: transit.AuthAppRole, RoleIDFile: l.write("role_id", "role-1"), SecretIDFile: l.write("secret_id", canarySecret)}
	k := keys(t, l.open(cfg), 1)["web"]
	for range 50 {
		_, err := k.Sign(context.Background(), p256, make([]byte, 32))
		if !errors.Is(err, transit.ErrPermission) || !errors.Is(err, signer.ErrUnavailable) || !matches(err.Error(), `path "transit/sign/web".*update`) {
			t.Fatalf("got %v, want ErrPermission with the policy's lines", err)
		}
	}
	if k.(signer.Healther).Healthy() {
		t.Error("a denied key is healthy")
	}
	if got := l.Counters().Logins; got > 3 {
		t.Errorf("got %d logins", got)
	}
}

// Whoever replaces the token's file need not tell us.
func TestTokenFileIsReadAgain(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	b := l.open(l.config("web"))
	k := keys(t, b, 1)["web"]
	sign(t, k, p256)
	before := l.Counters().Lookups
	l.write("token", l.NewToken(lifetime(time.Hour, 0)))
	eventually(t, "the new token's lookup", func() bool { return l.Counters().Lookups > before && !b.Expires().IsZero() })
	sign(t, k, p256)
}

// A token that ends is renewed by us if nobody else does; when it has ended, the log says what to do, and a new one heals.
func TestTokenFileEnds(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	cfg := l.config("web")
	l.write("token", l.NewToken(lifetime(2*time.Second, 3*time.Second)))
	k := keys(t, l.open(cfg), 1)["web"]
	eventually(t, "a renewal", func() bool { return l.Counters().Renewals > 0 })
	eventually(t, "the end of the token", func() bool { return !k.(signer.Healther).Healthy() })
	_, err := k.Sign(context.Background(), p256, make([]byte, 32))
	if !errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	eventually(t, "a line in the log", func() bool { return l.log.has("put a valid token") })
	l.write("token", l.NewToken(lifetime(time.Hour, 0)))
	eventually(t, "a signature with the new token", func() bool {
		_, err := k.Sign(context.Background(), p256, make([]byte, 32))
		return err == nil
	})
}

// The server does not answer when the login is due; the present one serves until its end, and a new one is made when the server is back.
func TestLoginOutage(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	cfg := l.config("web")
	l.appRole(&cfg, lifetime(2*time.Second, 2*time.Second))
	b := l.open(cfg)
	k := keys(t, b, 1)["web"]
	l.Inject(server.Fault{Path: "auth/", Status: http.StatusServiceUnavailable})
	sign(t, k, p256)
	eventually(t, "the end of the login", func() bool { return !k.(signer.Healther).Healthy() })
	if _, err := k.Sign(context.Background(), p256, make([]byte, 32)); !errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	if err := b.Check(context.Background()); !errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("Check: got %v, want ErrUnavailable", err)
	}
	l.Clear()
	eventually(t, "a new login", func() bool { return k.(signer.Healther).Healthy() })
	sign(t, k, p256)
}

func TestRefusedLogins(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	for name, test := range map[string]struct {
		set  func(*transit.Config)
		is   error
		text string
	}{
		"wrong secret id": {func(c *transit.Config) {
			l.appRole(c, lifetime(0, 0))
			l.write("secret_id", "canary-wrong-secret")
		}, transit.ErrLogin, "HTTP 400.*invalid role or secret ID.*secret_id"},
		"wrong token":   {func(*transit.Config) { l.write("token", "hvs.canary-wrong-token") }, transit.ErrLogin, "HTTP 403.*put a valid token"},
		"used wrapping": {func(c *transit.Config) { l.appRole(c, lifetime(0, 0)); c.Auth.SecretIDWrapped = true }, transit.ErrLogin, "wrapping token"},
		"sealed": {func(*transit.Config) { l.Inject(server.Fault{Status: 503, Body: `{"errors":["Vault is sealed"]}`}) },
			signer.ErrUnavailable, "503.*Vault is sealed"},
		"down":          {func(c *transit.Config) { c.Address = "http://127.0.0.1:1" }, signer.ErrUnavailable, "connection refused"},
		"no namespace":  {func(c *transit.Config) { c.Namespace = "nowhere" }, transit.ErrLogin, "HTTP 404"},
		"not a vault":   {func(*transit.Config) { l.Inject(server.Fault{Status: 200, Body: "<html>"}) }, signer.ErrUnavailable, ""},
		"echoed token":  {func(*transit.Config) { l.Inject(server.Fault{Status: 403, Echo: true}) }, transit.ErrLogin, "redacted"},
		"echoed secret": {func(c *transit.Config) { l.appRole(c, lifetime(0, 0)); l.Inject(server.Fault{Status: 400, Echo: true}) }, transit.ErrLogin, "redacted"},
	} {
		t.Run(name, func(t *testing.T) {
			defer l.Clear()
			cfg := l.config("web")
			test.set(&cfg)
			token, _ := os.ReadFile(cfg.Auth.TokenFile)
			_, err := transit.Open(context.Background(), cfg)
			if !errors.Is(err, test.is) {
				t.Fatalf("got %v, want %v", err, test.is)
			}
			if !matches(err.Error(), test.text) {
				t.Errorf("got %q, want %s", err, test.text)
			}
			for _, secret := range []string{"canary", strings.TrimSpace(string(token))} {
				if secret != "" && strings.Contains(err.Error(), secret) {
					t.Errorf("the error shows a secret: %v", err)
				}
			}
		})
	}
	if l.log.has("canary") {
		t.Error("the log shows a secret")
	}
}

// Secrets are nowhere to be seen, though the server sends back what it got with every error.
func TestSecretsStayHidden(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	cfg := l.config("web")
	l.appRole(&cfg, lifetime(2*time.Second, 4*time.Second))
	b := l.open(cfg)
	k := keys(t, b, 1)["web"]
	l.Inject(server.Fault{Path: "auth/", Status: 500, Echo: true})
	var text string
	for _, status := range []int{400, 403, 404, 429, 500, 503} {
		l.Inject(server.Fault{Path: "transit/", Count: 1, Status: status, Echo: true})
		_, err := k.Sign(context.Background(), p256, make([]byte, 32))
		if err == nil {
			t.Fatalf("HTTP %d: no error", status)
		}
		text += err.Error() + "\n"
	}
	eventually(t, "a failed login in the log", func() bool { return l.log.has("transit login failed") })
	eventually(t, "the end of the login", func() bool { return time.Now().After(b.Expires()) })
	_, err := k.Sign(context.Background(), p256, make([]byte, 32))
	if err == nil {
		t.Fatal("signed without a login")
	}
	text += err.Error()
	for _, secret := range []string{"canary", "hvs."} {
		if strings.Contains(text, secret) {
			t.Errorf("errors show a secret: %s", text)
		}
		if l.log.has(secret) {
			t.Errorf("the log shows a secret: %s", &l.log.b)
		}
	}
}

// What VAULT_ variables say has no effect.
func TestEnvironmentHasNoEffect(t *testing.T) {
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	for name, v := range map[string]string{
		"VAULT_ADDR": "https://127.0.0.1:1", "VAULT_TOKEN": "canary-token", "VAULT_NAMESPACE": "elsewhere", "VAULT_SKIP_VERIFY": "true",
		"VAULT_MAX_RETRIES": "5", "VAULT_HTTP_PROXY": "http://127.0.0.1:1", "HTTPS_PROXY": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1",
		"VAULT_HEADERS": `{"X-Canary":"1"}`, "VAULT_AGENT_ADDR": "http://127.0.0.1:1", "VAULT_RATE_LIMIT": "1:1",
	} {
		t.Setenv(name, v)
	}
	k := keys(t, l.open(l.config("web")), 1)["web"]
	for range 5 {
		sign(t, k, p256)
	}
}
