package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/vault/sdk/logical"
)

const (
	tokenHeader     = "X-Vault-Token"
	namespaceHeader = "X-Vault-Namespace"
	maxBody         = 1 << 20
)

// Server is an [http.Handler] that answers as a Vault server with a Transit engine does. All methods may be called from several goroutines at once.
type Server struct {
	ctx   context.Context
	mount string

	mu      sync.Mutex
	engines map[string]*engine // by namespace
	tokens  map[string]*token
	wrapped map[string]string // wrapping token to secret id
	roles   []role
	faults  []*Fault

	counts counts
}

type counts struct {
	logins, renewals, lookups, revocations, signRequests, signItems, reads, faults atomic.Int64
}

// Counters says what a server has done.
type Counters struct {
	Logins, Renewals, Lookups, Revocations int64
	SignRequests                           int64 // requests to sign, batches as one
	SignItems                              int64 // signatures asked for
	Reads                                  int64 // keys read
	Faults                                 int64 // faults that fired
}

// New returns a server with one engine, mounted at transit in the root namespace. The engine ends with ctx.
func New(ctx context.Context) (*Server, error) {
	s := &Server{ctx: ctx, mount: "transit", engines: map[string]*engine{}, tokens: map[string]*token{}, wrapped: map[string]string{}}
	return s, s.AddNamespace("")
}

// AddNamespace adds a namespace with an engine of its own.
func (s *Server) AddNamespace(name string) error {
	e, err := newEngine(s.ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.engines[name] = e
	return nil
}

// Do performs a request of an administrator in the root namespace's engine: Do("keys/web", map[string]any{"type": "ecdsa-p256"}).
func (s *Server) Do(path string, data map[string]any) (map[string]any, error) {
	return s.DoIn("", path, data)
}

// DoIn is Do in a namespace. Without data it reads.
func (s *Server) DoIn(namespace, path string, data map[string]any) (map[string]any, error) {
	var op logical.Operation = logical.UpdateOperation
	if data == nil {
		op = logical.ReadOperation
	}
	return s.perform(namespace, op, path, data)
}

// Delete deletes a path in the root namespace's engine.
func (s *Server) Delete(path string) error {
	_, err := s.perform("", logical.DeleteOperation, path, nil)
	return err
}

func (s *Server) perform(namespace string, op logical.Operation, path string, data map[string]any) (map[string]any, error) {
	e := s.engine(namespace)
	if e == nil {
		return nil, fmt.Errorf("no namespace %q", namespace)
	}
	status, body, err := e.do(s.ctx, op, path, data)
	if err != nil {
		return nil, err
	}
	if status >= 300 {
		return nil, fmt.Errorf("%s %s: HTTP %d: %s", op, path, status, body)
	}
	var answer struct {
		Data map[string]any `json:"data"`
	}
	if len(body) > 0 {
		err = json.Unmarshal(body, &answer)
	}
	return answer.Data, err
}

func (s *Server) engine(namespace string) *engine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.engines[strings.Trim(namespace, "/")]
}

// Counters returns what the server has done so far.
func (s *Server) Counters() Counters {
	c := &s.counts
	return Counters{
		c.logins.Load(), c.renewals.Load(), c.lookups.Load(), c.revocations.Load(),
		c.signRequests.Load(), c.signItems.Load(), c.reads.Load(), c.faults.Load(),
	}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path, ok := strings.CutPrefix(r.URL.Path, "/v1/")
	if !ok {
		refuse(w, http.StatusNotFound)
		return
	}
	// Read first: only then does the connection tell of a client that gives up while a fault delays the answer.
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		refuse(w, http.StatusRequestEntityTooLarge, "http: request body too large")
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(raw))
	if s.strike(w, r, path) {
		return
	}
	data, err := body(r)
	if err != nil {
		refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	if s.engine(r.Header.Get(namespaceHeader)) == nil {
		refuse(w, http.StatusNotFound, "no handler for route \""+path+"\". route entry not found.")
		return
	}
	switch {
	case strings.HasPrefix(path, "auth/") || path == "sys/wrapping/unwrap":
		s.auth(w, r, path, data)
	case strings.HasPrefix(path, s.mount+"/"):
		s.transit(w, r, strings.TrimPrefix(path, s.mount+"/"), data)
	default:
		refuse(w, http.StatusNotFound, "no handler for route \""+path+"\". route entry not found.")
	}
}

// transit hands a request to the engine if its token may do that.
func (s *Server) transit(w http.ResponseWriter, r *http.Request, path string, data map[string]any) {
	if t := s.token(r); t == nil || t.denied(path) {
		refuse(w, http.StatusForbidden, "permission denied")
		return
	}
	var op logical.Operation = logical.ReadOperation
	switch r.Method {
	case http.MethodPut, http.MethodPost:
		op = logical.UpdateOperation
	case http.MethodDelete:
		op = logical.DeleteOperation
	}
	switch {
	case op == logical.UpdateOperation && strings.HasPrefix(path, "sign/"):
		s.counts.signRequests.Add(1)
		items := int64(1)
		if batch, ok := data["batch_input"].([]any); ok {
			items = int64(len(batch))
		}
		s.counts.signItems.Add(items)
	case op == logical.ReadOperation && strings.HasPrefix(path, "keys/"):
		s.counts.reads.Add(1)
	}
	status, out, err := s.engine(r.Header.Get(namespaceHeader)).do(r.Context(), op, path, data)
	if err != nil {
		refuse(w, http.StatusInternalServerError, err.Error())
		return
	}
	reply(w, status, out)
}

func body(r *http.Request) (map[string]any, error) {
	data := map[string]any{}
	if r.Method == http.MethodGet || r.ContentLength == 0 {
		return data, nil
	}
	dec := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxBody))
	dec.UseNumber()
	if err := dec.Decode(&data); err != nil {
		return nil, errors.New("failed to parse JSON input")
	}
	return data, nil
}

func reply(w http.ResponseWriter, status int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(body)
}

func refuse(w http.ResponseWriter, status int, messages ...string) {
	if messages == nil {
		messages = []string{}
	}
	body, err := json.Marshal(map[string]any{"errors": messages})
	if err != nil {
		panic(err)
	}
	reply(w, status, body)
}
