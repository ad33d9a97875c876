package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/unixsock"
)

// hostName is the Host of requests on the socket.
const hostName = "keyhaven-edge"

// Deadlines and bounds of the server.
const (
	headerTimeout  = 5 * time.Second
	readTimeout    = 10 * time.Second
	requestTimeout = 20 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = 60 * time.Second
	drainTimeout   = 5 * time.Second
	maxHeader      = 16 << 10
	maxConns       = 64 // further callers wait in the socket's queue
)

// A Server answers on one Unix socket. Make one with [Listen].
type Server struct {
	path     string
	ln       net.Listener
	http     *http.Server
	log      *slog.Logger
	identify func(net.Conn) (uid uint32, err error)
	allowed  func(uid uint32) bool
}

// Listen binds the socket at path, with mode 0600. A socket that a dead process left there is replaced; one that is
// answered is an error, as is a file that is no socket. If log is nil, nothing is logged.
func Listen(path string, c *control.Control, log *slog.Logger) (*Server, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	ln, err := unixsock.Listen(path, maxConns)
	if err != nil {
		return nil, fmt.Errorf("admin: %w", err)
	}
	own := uint32(os.Geteuid())
	s := &Server{path: path, ln: ln, log: log, identify: unixsock.PeerUID,
		allowed: func(uid uint32) bool { return uid == 0 || uid == own }}
	s.http = &http.Server{
		Handler:           s.guard(newMux(c)),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
	}
	return s, nil
}

type connKey struct{}

// Serve answers until ctx ends, then lets requests in flight finish, removes the socket and returns.
func (s *Server) Serve(ctx context.Context) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if err := s.http.Shutdown(drain); err != nil {
			s.http.Close()
		}
	})
	err := s.http.Serve(s.ln)
	if stop() {
		s.http.Close() // serving failed by itself
		return fmt.Errorf("admin: serve %s: %w", s.path, err)
	}
	<-stopped
	return nil
}

// Close releases the socket of a server that does not serve.
func (s *Server) Close() error { return s.http.Close() }

// guard refuses callers who may not, and requests that a web page could have made.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		conn, _ := ctx.Value(connKey{}).(net.Conn)
		uid, err := s.identify(conn)
		if err != nil || !s.allowed(uid) {
			s.log.Warn("caller refused", "uid", uid, "err", err)
			w.Header().Set("Connection", "close")
			writeError(w, http.StatusForbidden, &Error{Code: CodeDenied, Message: fmt.Sprintf("user %d may not administer this edge", uid),
				Remedy: "use root, or the user that the edge runs as"})
			return
		}
		if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" || r.Host != hostName {
			writeError(w, http.StatusForbidden, &Error{Code: CodeDenied, Message: "requests of web pages are refused", Remedy: "use keyhaven-edge"})
			return
		}
		start := time.Now()
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(rec, r.WithContext(ctx))
		level := slog.LevelDebug
		if r.Method != http.MethodGet {
			level = slog.LevelInfo
		}
		s.log.Log(ctx, level, "admin request", "op", r.Method+" "+r.URL.Path, "status", rec.status, "uid", uid, "dur", time.Since(start))
	})
}

type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

// A reply is what a handler returns: a value to show, or an error.
type handler func(r *http.Request, q url.Values) (any, error)

// An endpoint is a path with its methods and the query parameters that each takes.
type endpoint struct {
	path    string
	methods map[string]method
}

type method struct {
	serve handler
	query []string
}

// newMux builds the routes of the API from its table.
func newMux(c *control.Control) http.Handler {
	mux := http.NewServeMux()
	for _, e := range endpoints(api{c}) {
		mux.Handle(e.path, e)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, http.StatusNotFound, &Error{Code: CodeNoSuchPath, Message: fmt.Sprintf("there is no %q here", clip(r.URL.Path)),
			Remedy: "use a keyhaven-edge command of the same version as the edge"})
	})
	return mux
}

// ServeHTTP implements http.Handler.
func (e endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m, ok := e.methods[r.Method]
	if !ok {
		allow := make([]string, 0, len(e.methods))
		for name := range e.methods {
			allow = append(allow, name)
		}
		sort.Strings(allow)
		w.Header().Set("Allow", strings.Join(allow, ", "))
		writeError(w, http.StatusMethodNotAllowed, &Error{Code: CodeMethod, Message: fmt.Sprintf("%s does not take %s", e.path, clip(r.Method)),
			Remedy: "use " + strings.Join(allow, " or ")})
		return
	}
	q, err := parseQuery(r.URL.RawQuery, m.query)
	var v any
	if err == nil {
		v, err = m.serve(r, q)
	}
	if err != nil {
		status, e := errorOf(err)
		writeError(w, status, e)
		return
	}
	writeJSON(w, http.StatusOK, v)
}

func parseQuery(raw string, known []string) (url.Values, error) {
	q, err := url.ParseQuery(raw)
	if err != nil {
		return nil, badRequest("the query cannot be read: %v", err)
	}
	for name, values := range q {
		if len(values) > 1 {
			return nil, badRequest("query parameter %q is given twice", clip(name))
		}
		found := false
		for _, k := range known {
			found = found || k == name
		}
		if !found {
			return nil, badRequest("unknown query parameter %q", clip(name))
		}
	}
	return q, nil
}

// body decodes the request's body into dst.
func body(r *http.Request, dst any) error {
	if ct := r.Header.Get("Content-Type"); ct != "application/json" {
		return badRequest("the content type is %q, not application/json", clip(ct))
	}
	b, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if err != nil {
		return badRequest("the body cannot be read: %v", err)
	}
	if len(b) > maxBody {
		return &Error{Code: CodeTooLarge, Message: fmt.Sprintf("the body is larger than %d bytes", maxBody), Status: http.StatusRequestEntityTooLarge}
	}
	if err := decodeStrict(b, dst); err != nil {
		return badRequest("the body cannot be read: %v", err)
	}
	return nil
}

func badRequest(format string, args ...any) error {
	return &Error{Code: CodeBadRequest, Message: fmt.Sprintf(format, args...), Status: http.StatusBadRequest,
		Remedy: "use a keyhaven-edge command of the same version as the edge"}
}

// errorOf gives an error its form on the socket. The text of unforeseen errors is shown too: the caller is the operator.
func errorOf(err error) (int, *Error) {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Status, e
	}
	if e, ok := errors.AsType[*control.Error](err); ok {
		return statusOf(e.Code), &Error{Code: e.Code, Message: e.Message, Remedy: e.Remedy, Users: e.Users}
	}
	return http.StatusInternalServerError, &Error{Code: CodeInternal, Message: err.Error(), Remedy: "look into the edge's log"}
}

func statusOf(c control.Code) int {
	switch c {
	case control.CodeInvalid:
		return http.StatusBadRequest
	case control.CodeNotFound, control.CodeNoRoute, control.CodeTokenUnknown:
		return http.StatusNotFound
	case control.CodeExists, control.CodeInUse, control.CodeDefaultVNet, control.CodeRevoked, control.CodeConflict,
		control.CodeTokenUsed, control.CodeTokenExpired:
		return http.StatusConflict
	case control.CodeLimit, control.CodeTunnelDown:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

func writeError(w http.ResponseWriter, status int, e *Error) { writeJSON(w, status, errorBody{e}) }

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status, b = http.StatusInternalServerError, []byte(`{"error":{"code":"internal","message":"the reply cannot be encoded"}}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
