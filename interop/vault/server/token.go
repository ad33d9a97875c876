package server

import (
	"crypto/rand"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Lifetime bounds a token. TTL is what a login or a renewal gives, Max the most since the login. The zero value never ends. Both
// are rounded to seconds in answers, as a Vault server does.
type Lifetime struct {
	TTL, Max time.Duration
}

// token is a login.
type token struct {
	life    Lifetime
	made    time.Time
	expires time.Time // zero: never
	deny    []string  // paths below the mount that it must not use
}

// renew moves the end as far as allowed.
func (t *token) renew(now time.Time) {
	if t.life.TTL == 0 {
		return
	}
	t.expires = now.Add(t.life.TTL)
	if t.life.Max > 0 && t.expires.After(t.made.Add(t.life.Max)) {
		t.expires = t.made.Add(t.life.Max)
	}
}

func (t *token) left(now time.Time) int {
	if t.expires.IsZero() {
		return 0
	}
	return int(t.expires.Sub(now).Round(time.Second) / time.Second)
}

func (t *token) denied(path string) bool {
	return slices.ContainsFunc(t.deny, func(p string) bool { return path == p || strings.HasPrefix(path, p+"/") })
}

// role is a way to log in.
type role struct {
	kind   string // approle or kubernetes
	mount  string
	id     string // role_id, or the role's name
	secret string // secret_id, or the service account's token
	life   Lifetime
	deny   []string
}

// NewToken makes a token. It must not use the paths in deny, given below the mount: "sign/web".
func (s *Server) NewToken(life Lifetime, deny ...string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newTokenLocked(life, deny)
}

func (s *Server) newTokenLocked(life Lifetime, deny []string) string {
	name, now := "hvs."+rand.Text(), time.Now()
	t := &token{life: life, made: now, deny: deny}
	t.renew(now)
	s.tokens[name] = t
	return name
}

// AddAppRole lets a role log in at auth/MOUNT with its ids. Tokens that it gets must not use the paths in deny.
func (s *Server) AddAppRole(mount, roleID, secretID string, life Lifetime, deny ...string) {
	s.addRole(role{"approle", mount, roleID, secretID, life, deny})
}

// AddKubernetes lets a service account's token log in to a role at auth/MOUNT.
func (s *Server) AddKubernetes(mount, name, jwt string, life Lifetime, deny ...string) {
	s.addRole(role{"kubernetes", mount, name, jwt, life, deny})
}

// addRole adds a role, in place of one of the same mount and name.
func (s *Server) addRole(r role) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roles = slices.DeleteFunc(s.roles, func(o role) bool { return o.mount == r.mount && o.id == r.id })
	s.roles = append(s.roles, r)
}

// Wrap returns a token that yields a secret id once.
func (s *Server) Wrap(secretID string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := "hvs.wrap" + rand.Text()
	s.wrapped[name] = secretID
	return name
}

// RevokeAll forgets all tokens.
func (s *Server) RevokeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// Tokens returns how many tokens have not ended.
func (s *Server) Tokens() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, now := 0, time.Now()
	for _, t := range s.tokens {
		if t.expires.IsZero() || now.Before(t.expires) {
			n++
		}
	}
	return n
}

// token returns the login that a request shows, or nil.
func (s *Server) token(r *http.Request) *token {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tokens[r.Header.Get(tokenHeader)]
	if t == nil || !t.expires.IsZero() && !time.Now().Before(t.expires) {
		return nil
	}
	return t
}

// auth answers what has to do with logins.
func (s *Server) auth(w http.ResponseWriter, r *http.Request, path string, data map[string]any) {
	word := func(name string) string { v, _ := data[name].(string); return v }
	mount, isLogin := strings.CutSuffix(strings.TrimPrefix(path, "auth/"), "/login")
	switch {
	case isLogin:
		s.logIn(w, mount, word)
	case path == "sys/wrapping/unwrap":
		s.unwrap(w, r)
	case s.token(r) == nil:
		refuse(w, http.StatusForbidden, "permission denied")
	case path == "auth/token/lookup-self":
		s.counts.lookups.Add(1)
		t, now := s.token(r), time.Now()
		s.mu.Lock()
		defer s.mu.Unlock()
		data := map[string]any{"ttl": t.left(now), "renewable": t.life.TTL > 0, "expire_time": nil}
		if !t.expires.IsZero() {
			data["expire_time"] = t.expires
		}
		answer(w, map[string]any{"data": data})
	case path == "auth/token/renew-self":
		s.counts.renewals.Add(1)
		t := s.token(r)
		s.mu.Lock()
		defer s.mu.Unlock()
		t.renew(time.Now())
		s.grantLocked(w, r.Header.Get(tokenHeader))
	case path == "auth/token/revoke-self":
		s.counts.revocations.Add(1)
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.tokens, r.Header.Get(tokenHeader))
		w.WriteHeader(http.StatusNoContent)
	default:
		refuse(w, http.StatusNotFound)
	}
}

func (s *Server) logIn(w http.ResponseWriter, mount string, word func(string) string) {
	s.counts.logins.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.roles {
		id, secret := word("role_id"), word("secret_id")
		if r.kind == "kubernetes" {
			id, secret = word("role"), word("jwt")
		}
		if r.mount == mount && r.id == id && r.secret == secret {
			s.grantLocked(w, s.newTokenLocked(r.life, r.deny))
			return
		}
	}
	refuse(w, http.StatusBadRequest, "invalid role or secret ID")
}

func (s *Server) unwrap(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := r.Header.Get(tokenHeader)
	id, ok := s.wrapped[name]
	if !ok {
		refuse(w, http.StatusBadRequest, "wrapping token is not valid or does not exist")
		return
	}
	delete(s.wrapped, name)
	answer(w, map[string]any{"data": map[string]any{"secret_id": id}})
}

func (s *Server) grantLocked(w http.ResponseWriter, name string) {
	t := s.tokens[name]
	answer(w, map[string]any{"auth": map[string]any{
		"client_token": name, "lease_duration": t.left(time.Now()), "renewable": t.life.TTL > 0, "token_type": "service", "policies": []string{"default"},
	}})
}

func answer(w http.ResponseWriter, v map[string]any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	reply(w, http.StatusOK, body)
}
