package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/unixsock"
)

// Bounds of the control socket.
const (
	controlHost    = "keyhaven-keyserver" // the Host of requests
	controlConns   = 16
	controlHeader  = 16 << 10
	controlBody    = 64 << 10
	controlTimeout = 2 * time.Minute // for a request; a reload opens tokens
	controlDrain   = 5 * time.Second
)

// A control answers commands on a Unix socket: HTTP with JSON, for root and the server's own user. A nil control serves nobody.
type control struct {
	ln      net.Listener
	http    *http.Server
	logger  *slog.Logger
	allowed func(uid uint32) bool
	workers func() []int // process ids
}

type connKey struct{}

// listenControl binds the control socket, or none without a path.
func (s *server) listenControl(path string) (*control, error) {
	if path == "" {
		return nil, nil
	}
	socket, err := s.self.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	ln := unixsock.Limit(socket, controlConns)
	own := uint32(os.Geteuid())
	c := &control{ln: ln, logger: s.logger, allowed: func(uid uint32) bool { return uid == 0 || uid == own }, workers: s.keys.workers}
	c.http = &http.Server{
		Handler: c.guard(s.controlAPI()), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: controlTimeout + 5*time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: controlHeader,
		ErrorLog: slog.NewLogLogger(s.logger.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
	}
	return c, nil
}

// serve answers until ctx ends, then finishes requests in progress for a short time and removes the socket.
func (c *control) serve(ctx context.Context) error {
	if c == nil {
		return nil
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), controlDrain)
		defer cancel()
		if c.http.Shutdown(drain) != nil {
			c.http.Close()
		}
	})
	err := c.http.Serve(c.ln)
	if stop() {
		c.http.Close()
		return fmt.Errorf("control: %w", err) // serving failed by itself
	}
	<-stopped
	return nil
}

// close gives the socket up, if serve has not.
func (c *control) close() {
	if c != nil {
		_ = c.ln.Close() // closed already, after serve
	}
}

// byWorker reports whether the caller is a worker, or was started by one: those run as the same user as the server, with a module's code in them. A
// caller that has ended meanwhile belongs to nobody.
func (c *control) byWorker(conn net.Conn) bool {
	pid, err := unixsock.PeerPID(conn)
	if err != nil {
		return true
	}
	group, err := syscall.Getpgid(pid)
	return err == nil && slices.Contains(c.workers(), group) // each worker leads a group of its own
}

// guard refuses callers who may not, and requests that a web page could have made.
func (c *control) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _ := r.Context().Value(connKey{}).(net.Conn)
		uid, err := unixsock.PeerUID(conn)
		if err != nil || !c.allowed(uid) {
			c.logger.Warn("caller of the control socket refused", "uid", uid, "err", err)
			w.Header().Set("Connection", "close")
			answer(w, http.StatusForbidden, controlError{fmt.Sprintf("user %d may not control this server; use root, or the user that it runs as", uid)})
			return
		}
		if c.byWorker(conn) {
			c.logger.Warn("worker process at the control socket refused")
			answer(w, http.StatusForbidden, controlError{"worker processes may not control the server"})
			return
		}
		if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" || r.Host != controlHost {
			answer(w, http.StatusForbidden, controlError{"requests of web pages are refused; use keyhaven-keyserver"})
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), controlTimeout)
		defer cancel()
		start := time.Now()
		next.ServeHTTP(w, r.WithContext(ctx))
		level := slog.LevelDebug
		if r.Method != http.MethodGet {
			level = slog.LevelInfo
		}
		c.logger.Log(ctx, level, "control request", "op", fmt.Sprintf("%.10s %.60s", r.Method, r.URL.Path), "uid", uid, "dur", time.Since(start))
	})
}

// A controlError is the answer to a request that failed.
type controlError struct {
	Error string `json:"error"`
}

func answer(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status, b = http.StatusInternalServerError, []byte(`{"error":"the answer cannot be encoded"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // a caller who left wants no answer
}

// decode reads one JSON object of a few known names, and nothing after it.
func decode(r io.Reader, v any) error {
	d := json.NewDecoder(io.LimitReader(r, controlBody))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("the request is not understood: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("the request is not understood: there is more after the JSON object")
	}
	return nil
}

// A retryRequest names the token that is to be tried.
type retryRequest struct {
	Name string `json:"name"`
}

// until returns a context that also ends when the server is to stop.
func (s *server) until(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.stopped, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// controlAPI is what the socket offers.
func (s *server) controlAPI() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		answer(w, http.StatusOK, s.status(r.Context()))
	})
	mux.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, r *http.Request) {
		ctx, end := s.until(context.WithoutCancel(r.Context())) // a caller who leaves does not stop it half way
		defer end()
		answer(w, http.StatusOK, s.reload(ctx))
	})
	mux.HandleFunc("POST /v1/tokens/retry", func(w http.ResponseWriter, r *http.Request) {
		var in retryRequest
		if err := decode(r.Body, &in); err != nil {
			answer(w, http.StatusBadRequest, controlError{err.Error()})
			return
		}
		ctx, end := s.until(r.Context())
		defer end()
		switch err := s.keys.retry(ctx, in.Name); {
		case errors.Is(err, errNoHome):
			answer(w, http.StatusNotFound, controlError{fmt.Sprintf("there is no token %.100q; token list shows those that there are", in.Name)})
		case err != nil:
			answer(w, http.StatusConflict, controlError{err.Error()})
		default:
			s.probes.set(s.current.Load().cfg.Probe.Interval)
			answer(w, http.StatusOK, s.status(r.Context()))
		}
	})
	mux.HandleFunc("POST /v1/policy/test", func(w http.ResponseWriter, r *http.Request) {
		var in policyQuery
		if err := decode(r.Body, &in); err != nil {
			answer(w, http.StatusBadRequest, controlError{err.Error()})
			return
		}
		out, err := s.current.Load().test(in, s.keys.registry)
		if err != nil {
			answer(w, http.StatusBadRequest, controlError{err.Error()})
			return
		}
		answer(w, http.StatusOK, out)
	})
	return mux
}
