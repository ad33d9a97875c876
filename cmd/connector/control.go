package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"runtime/pprof"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/internal/takeover"
)

// Bounds of the control socket.
const (
	controlHost    = fleet.Host // the Host of requests
	controlConns   = 8
	controlHeader  = 16 << 10
	controlTimeout = 30 * time.Second
	maxReply       = 32 << 20
)

// Paths of the control socket.
const (
	pathStatus     = "/v1/status"
	pathLog        = "/v1/log"
	pathGoroutines = "/v1/goroutines"
	pathMetrics    = "/v1/metrics"
	pathDevice     = fleet.Path // PUT, of an agent
)

// control answers the commands status and diag of a user of this host on a Unix socket, and an agent that reports how the
// device is.
type control struct {
	process  *takeover.Process
	path     string
	status   func() connector.Status
	device   func(report []byte) (fleet.Directive, error)
	log      *logRing
	registry *prometheus.Registry
	logger   *slog.Logger
	uid      uint32 // the user besides root who may ask
}

// run serves until ctx ends. Without a path it serves nothing.
func (c *control) run(ctx context.Context) error {
	if c.path == "" {
		<-ctx.Done()
		return nil
	}
	ln, err := listenControl(c.process, c.path)
	if err != nil {
		return fmt.Errorf("control: %w", err)
	}
	srv := &http.Server{
		Handler: c.guard(c.handler()), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second,
		WriteTimeout: controlTimeout, IdleTimeout: 10 * time.Second, MaxHeaderBytes: controlHeader,
		ErrorLog: slog.NewLogLogger(c.logger.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, conn)
		},
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
	return fmt.Errorf("control: %w", err)
}

type callerKey struct{}

// guard refuses callers who may not, and requests that a web page could have made.
func (c *control) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _ := r.Context().Value(callerKey{}).(net.Conn)
		if err := mayCall(conn, c.uid); err != nil {
			c.logger.Warn("caller of the control socket refused", "err", err)
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" || r.Host != controlHost {
			http.Error(w, "requests of web pages are refused; use keyhaven-connector", http.StatusForbidden)
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

func (c *control) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, func(w http.ResponseWriter, _ *http.Request) {
		b, err := json.Marshal(c.status())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(b) //nolint:errcheck // a caller who left wants no answer
	})
	mux.HandleFunc("PUT "+pathDevice, c.takeReport)
	mux.HandleFunc("GET "+pathLog, func(w http.ResponseWriter, _ *http.Request) {
		w.Write(c.log.bytes()) //nolint:errcheck // a caller who left wants no answer
	})
	mux.HandleFunc("GET "+pathGoroutines, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%d goroutines\n\n", runtime.NumGoroutine())
		pprof.Lookup("goroutine").WriteTo(w, 1) //nolint:errcheck // a caller who left wants no answer
	})
	mux.Handle("GET "+pathMetrics, promhttp.HandlerFor(c.registry, promhttp.HandlerOpts{Timeout: 10 * time.Second}))
	return mux
}

// takeReport takes an agent's report and answers with the newest directive.
func (c *control) takeReport(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(io.LimitReader(r.Body, fleet.MaxSize+1))
	if err != nil {
		http.Error(w, "the report did not come whole", http.StatusBadRequest)
		return
	}
	d, err := c.device(b)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer, err := d.Encode()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(answer) //nolint:errcheck // a caller who left wants no answer
}

// ask gets a document of the connector that runs.
func ask(ctx context.Context, socket, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+controlHost+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := transport.RoundTrip(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("no connector answers on %s; start it with keyhaven-connector run, or name its socket with --control: %w", socket, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("this user may not use %s; use root, or the user that the connector runs as: %w", socket, err)
	case err != nil:
		return nil, fmt.Errorf("ask the connector on %s: %w", socket, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return nil, fmt.Errorf("read the answer of the connector on %s: %w", socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the connector on %s answered with status %s: %.200s", socket, resp.Status, b)
	}
	return b, nil
}

// online adds what commands have that ask a running connector.
func online(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().String("config", defaultConfig, configHelp)
	cmd.Flags().String("control", "", "control socket of the running connector, in place of the configuration's control")
	return cmd
}

// controlPath is the socket that the command line or the configuration names. Nothing else of the configuration has to be
// right.
func controlPath(cmd *cobra.Command) (string, error) {
	if path := cmd.Flag("control").Value.String(); path != "" {
		return path, nil
	}
	name := cmd.Flag("config").Value.String()
	c := defaults()
	_, err := conf.Load(c, conf.Options{Path: name, EnvPrefix: "KEYHAVEN_CONNECTOR"})
	switch {
	case err != nil:
		return "", cli.ConfigError(fmt.Errorf("%w (--control names the socket without a configuration)", err))
	case c.Control == "":
		return "", cli.ConfigError(fmt.Errorf("%s names no control socket; add control: /run/keyhaven-connector/control.sock and restart the connector", name))
	}
	return c.Control, nil
}
