package transit

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/api/auth/approle"
	"github.com/hashicorp/vault/api/auth/kubernetes"
)

// method is a way to log in. Only the session's goroutine uses it.
type method interface {
	name() string
	// login logs in. It returns the secrets that were used or got, whether it succeeds or not.
	login(ctx context.Context) (*login, secrets, error)
	// stale reports whether a login is due because the file behind the last one changed.
	stale() bool
	// own reports whether logins are made for this backend alone, so that it may revoke them.
	own() bool
	// remedy says what to do when the server refuses.
	remedy() string
}

// fileError is a file that cannot be used to log in.
type fileError struct{ err error }

func (e *fileError) Error() string { return e.err.Error() }
func (e *fileError) Unwrap() error { return e.err }

// errNoAnswer marks a login that the server answered with something else.
var errNoAnswer = errors.New("not the answer to a login")

// method returns the way to log in that the configuration names.
func (c *connector) method() method {
	a := c.cfg.Auth
	switch a.Method {
	case AuthAppRole:
		return &appRole{c: c, a: a}
	case AuthKubernetes:
		return &kubernetesRole{c: c, a: a}
	}
	return &tokenFile{c: c, a: a}
}

// loggedIn turns the answer to a login into one.
func loggedIn(client *api.Client, s *api.Secret) (*login, error) {
	if s == nil || s.Auth == nil || s.Auth.ClientToken == "" {
		return nil, &fault{text: "transit: the server answered a login without a token", classes: []error{ErrLogin, errNoAnswer}}
	}
	l := &login{client: client, secret: s.Auth}
	if s.Auth.LeaseDuration > 0 {
		l.expires = time.Now().Add(time.Duration(s.Auth.LeaseDuration) * time.Second)
	}
	return l, nil
}

// tokenFile uses a token that someone else puts into a file.
type tokenFile struct {
	c    *connector
	a    AuthConfig
	seen os.FileInfo
}

func (t *tokenFile) name() string { return AuthTokenFile }
func (t *tokenFile) own() bool    { return false }

func (t *tokenFile) remedy() string {
	return fmt.Sprintf("put a valid token that may read auth/token/lookup-self into %q", t.a.TokenFile)
}

func (t *tokenFile) stale() bool {
	info, err := os.Stat(t.a.TokenFile)
	if err != nil {
		return false // whoever writes it may be at it
	}
	return t.seen == nil || !os.SameFile(info, t.seen) || info.ModTime() != t.seen.ModTime() || info.Size() != t.seen.Size()
}

func (t *tokenFile) login(ctx context.Context) (l *login, used secrets, err error) {
	// Looked at before it is read: a change in between is found at the next look.
	seen, _ := os.Stat(t.a.TokenFile)
	defer func() {
		if t.seen = seen; err != nil {
			t.seen = nil // try again
		}
	}()
	token, err := readFile(t.a.TokenFile, true)
	if err != nil {
		return nil, nil, &fileError{err}
	}
	used = secrets{token}
	client, err := t.c.client()
	if err != nil {
		return nil, used, err
	}
	client.SetToken(token)
	s, err := client.Auth().Token().LookupSelfWithContext(ctx)
	if err != nil {
		return nil, used, err
	}
	if s == nil || s.Data == nil {
		return nil, used, &fault{text: "transit: the server answered a token's lookup without data", classes: []error{ErrLogin, errNoAnswer}}
	}
	auth := &api.SecretAuth{ClientToken: token}
	if ttl, ok := s.Data["ttl"].(json.Number); ok {
		n, err := ttl.Int64()
		if err != nil || n < 0 || n > 1<<31 {
			return nil, used, &fault{text: "transit: the server gave a token's lifetime that is none", classes: []error{ErrLogin, errNoAnswer}}
		}
		if n == 0 && s.Data["expire_time"] != nil {
			return nil, used, &fault{text: "transit: the token has ended: " + t.remedy(), classes: []error{ErrLogin, errNoAnswer}}
		}
		auth.LeaseDuration = int(n)
	}
	auth.Renewable, _ = s.Data["renewable"].(bool)
	if l, err = loggedIn(client, &api.Secret{Auth: auth}); err != nil {
		return nil, used, err
	}
	l.final = !auth.Renewable && !l.expires.IsZero()
	if whole, ok := s.Data["creation_ttl"].(json.Number); ok {
		if n, err := whole.Int64(); err == nil && n > 0 && n <= 1<<31 {
			l.began = l.expires.Add(-time.Duration(n) * time.Second)
		}
	}
	return l, used, nil
}

// appRole logs in as an AppRole.
type appRole struct {
	c *connector
	a AuthConfig

	wrapping, secretID string // the wrapping token that was used up, and what it yielded
}

func (r *appRole) name() string { return AuthAppRole }
func (r *appRole) own() bool    { return true }
func (r *appRole) stale() bool  { return false }

func (r *appRole) remedy() string {
	return fmt.Sprintf("check that %q and %q hold the ids of a role of auth/%s that is still valid; they are not sent again before they change, a retry or reload, or %s, "+
		"as the server would lock the role", r.a.RoleIDFile, r.a.SecretIDFile, r.a.Mount, refusedFor)
}

func (r *appRole) login(ctx context.Context) (l *login, used secrets, err error) {
	roleID, err := readFile(r.a.RoleIDFile, false)
	if err != nil {
		return nil, nil, &fileError{err}
	}
	secretID, err := readFile(r.a.SecretIDFile, true)
	if err != nil {
		return nil, nil, &fileError{err}
	}
	used = secrets{secretID}
	client, err := r.c.client()
	if err != nil {
		return nil, used, err
	}
	// As they are in the files: a wrapping token that was used up is refused as well.
	ids := sha256.Sum256([]byte(roleID + "\n" + secretID))
	if err := r.c.cfg.Refusals.of(ids); err != nil {
		return nil, used, err
	}
	defer func() {
		if refused := (*api.ResponseError)(nil); errors.As(err, &refused) && (refused.StatusCode == http.StatusBadRequest || refused.StatusCode == http.StatusForbidden) {
			r.c.cfg.Refusals.keep(ids, err)
		} else if err == nil {
			r.c.cfg.Refusals.Forget()
		}
	}()
	if r.a.SecretIDWrapped {
		if secretID, err = r.unwrap(ctx, client, secretID); err != nil {
			return nil, used, err
		}
		used = append(used, secretID)
	}
	m, err := approle.NewAppRoleAuth(roleID, &approle.SecretID{FromString: secretID}, approle.WithMountPath(r.a.Mount))
	if err != nil {
		return nil, used, err
	}
	return logInWith(ctx, client, m, used)
}

// unwrap returns the secret id behind a wrapping token, which can be asked for once.
func (r *appRole) unwrap(ctx context.Context, client *api.Client, wrapping string) (string, error) {
	if wrapping == r.wrapping {
		return r.secretID, nil
	}
	s, err := client.Logical().UnwrapWithContext(ctx, wrapping)
	if err != nil {
		return "", err
	}
	var id string
	if s != nil {
		id, _ = s.Data["secret_id"].(string)
	}
	if id == "" {
		return "", &fault{text: "transit: the wrapping token in the secret id's file does not yield a secret id", classes: []error{ErrLogin, errNoAnswer}}
	}
	r.wrapping, r.secretID = wrapping, id
	return id, nil
}

// kubernetesRole logs in with the token of a Kubernetes service account.
type kubernetesRole struct {
	c *connector
	a AuthConfig
}

func (k *kubernetesRole) name() string { return AuthKubernetes }
func (k *kubernetesRole) own() bool    { return true }
func (k *kubernetesRole) stale() bool  { return false }

func (k *kubernetesRole) remedy() string {
	return fmt.Sprintf("check that role %q of auth/%s admits this service account, and that %q holds its present token", k.a.Role, k.a.Mount, k.a.JWTFile)
}

func (k *kubernetesRole) login(ctx context.Context) (*login, secrets, error) {
	jwt, err := readFile(k.a.JWTFile, false)
	if err != nil {
		return nil, nil, &fileError{err}
	}
	used := secrets{jwt}
	client, err := k.c.client()
	if err != nil {
		return nil, used, err
	}
	m, err := kubernetes.NewKubernetesAuth(k.a.Role, kubernetes.WithServiceAccountToken(jwt), kubernetes.WithMountPath(k.a.Mount))
	if err != nil {
		return nil, used, err
	}
	return logInWith(ctx, client, m, used)
}

func logInWith(ctx context.Context, client *api.Client, m api.AuthMethod, used secrets) (*login, secrets, error) {
	s, err := m.Login(ctx, client)
	if err != nil {
		return nil, used, err
	}
	l, err := loggedIn(client, s)
	if err != nil {
		return nil, used, err
	}
	client.SetToken(l.secret.ClientToken)
	return l, append(used, l.secret.ClientToken), nil
}

// trim takes the address off an error of net/http: the home's name says it.
func trim(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
