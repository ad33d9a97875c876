// Package ops serves what operators and their tools ask of a running program: liveness, readiness and metrics.
package ops

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// A Server answers on /healthz (200 while the process runs), /readyz (200 if Ready says nil, else 503 with the
// reason) and /metrics (Prometheus text format). It has no authentication, so it listens on loopback only unless
// AllowNonLoopback is set.
type Server struct {
	// Addr is host:port with an IP literal or localhost. If empty, Run serves nothing and waits for its context.
	Addr string
	// AllowNonLoopback permits any Addr.
	AllowNonLoopback bool
	// Ready is asked at each request to /readyz, with a deadline of 5 s. Nil means always ready.
	Ready func(context.Context) error
	// Degraded is asked by /readyz when Ready says nil; the answer says, a line each, what does not work while the whole does. Nil means
	// always none.
	Degraded func() []string
	// Registry is what /metrics shows. Nil shows nothing.
	Registry *prometheus.Registry
	// Logger takes what goes wrong. Nil discards.
	Logger *slog.Logger
	// Listening, if set, is called with the bound address before the first request is served.
	Listening func(net.Addr)
	// Listen binds Addr. Nil is net.Listen.
	Listen func(network, addr string) (net.Listener, error)
}

// Config is the section of a program's configuration that a [Server] is made from.
type Config struct {
	// Listen is host:port; empty serves nothing.
	Listen string `mapstructure:"listen"`
	// AllowNonLoopback permits addresses that others reach.
	AllowNonLoopback bool `mapstructure:"allow_non_loopback"`
}

// Check reports whether the address may be served on.
func (c Config) Check() error { return CheckAddr(c.Listen, c.AllowNonLoopback) }

// NewRegistry returns a registry that already holds the metrics of the Go run time and of the process.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// CheckAddr reports whether addr may be served on: host and port, loopback unless allowAny.
func CheckAddr(addr string, allowAny bool) error {
	if addr == "" {
		return nil
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not host:port: %w", addr, err)
	}
	if ip := net.ParseIP(host); allowAny || host == "localhost" || ip != nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("%q is not a loopback address; metrics and health have no authentication: use 127.0.0.1 or [::1]", addr)
}

// Run serves until ctx ends, then finishes open requests for up to a second. Nothing is left running when it returns.
func (s *Server) Run(ctx context.Context) error {
	if s.Addr == "" {
		<-ctx.Done()
		return nil
	}
	if err := CheckAddr(s.Addr, s.AllowNonLoopback); err != nil {
		return fmt.Errorf("ops: %w", err)
	}
	listen := s.Listen
	if listen == nil {
		listen = net.Listen
	}
	ln, err := listen("tcp", s.Addr)
	if err != nil {
		return fmt.Errorf("ops: %w", err)
	}
	if s.Listening != nil {
		s.Listening(ln.Addr())
	}
	logger := s.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	srv := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	err = srv.Serve(ln)
	if !stop() {
		<-done
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("ops: %w", err)
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		if s.Ready != nil {
			if err := s.Ready(ctx); err != nil {
				http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
				return
			}
		}
		fmt.Fprintln(w, "ready")
		if s.Degraded != nil {
			for _, line := range s.Degraded() {
				fmt.Fprintln(w, "degraded:", line)
			}
		}
	})
	if s.Registry != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(s.Registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	}
	return mux
}
