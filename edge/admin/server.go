package admin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/netutil"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/takeover"
	"github.com/keyhaven/keyhaven/internal/unixsock"
	"github.com/keyhaven/keyhaven/mtls"
)

// hostName is the Host of all requests. No name that a web page can lead to is accepted in its place.
const hostName = "keyhaven-edge"

// Deadlines and bounds of the server.
const (
	headerTimeout  = 5 * time.Second // and of the TLS handshake
	readTimeout    = 10 * time.Second
	requestTimeout = 20 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = 60 * time.Second
	drainTimeout   = 5 * time.Second
	maxHeader      = 16 << 10
	maxConns       = 64 // on the socket, and as many over HTTPS; further callers wait in the kernel's queue
)

// Config says what a [Server] answers from, and where.
type Config struct {
	// Control is asked, and told. Required.
	Control *control.Control
	// Socket is the path of the Unix socket. Required.
	Socket string
	// Listen is the host:port of HTTPS with mutual TLS. Empty: not served.
	Listen string
	// Identity is the edge's own, which HTTPS presents and whose authority names operators. Required with Listen.
	Identity *mtls.Source
	// Operators are the names of those who may come in over HTTPS. Empty admits nobody.
	Operators []string
	// Serving tells how what the edge serves to visitors is. If nil, nothing is told.
	Serving Serving
	// Bind opens the sockets, networks unix and tcp. If nil, they are bound anew.
	Bind func(network, addr string) (net.Listener, error)
	// Logger gets each change, with who made it. If nil, nothing is logged.
	Logger *slog.Logger
}

// A Server answers on a Unix socket and, where that is configured, over HTTPS. Make one with [Listen].
type Server struct {
	cfg       Config
	log       *slog.Logger
	doors     []*door
	operators atomic.Pointer[[]string]
	identify  func(net.Conn) (uid uint32, err error)
	allowed   func(uid uint32) bool
}

// A door is one way in.
type door struct {
	name string // for errors
	ln   net.Listener
	http *http.Server
}

// Listen binds the socket, with mode 0600, and the port of HTTPS. A socket that a dead process left there is replaced; one
// that is answered is an error, as is a file that is no socket.
func Listen(cfg Config) (*Server, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Bind == nil {
		cfg.Bind = new(takeover.Process).Listen
	}
	socket, err := cfg.Bind("unix", cfg.Socket)
	if err != nil {
		return nil, fmt.Errorf("admin: %w", err)
	}
	ln := unixsock.Limit(socket, maxConns)
	own := uint32(os.Geteuid())
	s := &Server{cfg: cfg, log: cfg.Logger, identify: unixsock.PeerUID, allowed: func(uid uint32) bool { return uid == 0 || uid == own }}
	s.SetOperators(cfg.Operators)
	mux := newMux(api{cfg.Control, cfg.Serving})
	s.addDoor(cfg.Socket, ln, s.guard(s.callerOnSocket, mux))
	if cfg.Listen == "" {
		return s, nil
	}
	if cfg.Identity == nil {
		return nil, errors.Join(errors.New("admin: HTTPS needs the edge's identity"), s.Close())
	}
	tcp, err := cfg.Bind("tcp", cfg.Listen)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("admin: %w", err), s.Close())
	}
	// Who is on the list is asked at each request, where it can be said what is wrong.
	conf := cfg.Identity.ServerConfig(mtls.ServerOptions{ALPN: []string{"http/1.1"}, Accept: mtls.AcceptKinds(mtls.KindOperator)})
	s.addDoor("https://"+tcp.Addr().String(), tls.NewListener(netutil.LimitListener(tcp, maxConns), conf), s.guard(s.callerOverTLS, mux))
	return s, nil
}

func (s *Server) addDoor(name string, ln net.Listener, h http.Handler) {
	s.doors = append(s.doors, &door{name, ln, &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
	}})
}

// SetOperators replaces the list of those who may come in over HTTPS. It holds for the next request of each.
func (s *Server) SetOperators(names []string) {
	names = slices.Clone(names)
	s.operators.Store(&names)
}

// Addr is the address of HTTPS, nil if it is not served.
func (s *Server) Addr() net.Addr {
	if len(s.doors) < 2 {
		return nil
	}
	return s.doors[1].ln.Addr()
}

// Serve answers until ctx ends, then lets requests in flight finish, removes the socket and returns.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(s.doors))
	var wg sync.WaitGroup
	for i, d := range s.doors {
		wg.Go(func() {
			defer cancel() // where one door fails, the others close
			errs[i] = d.serve(ctx)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (d *door) serve(ctx context.Context) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if err := d.http.Shutdown(drain); err != nil {
			d.http.Close()
		}
	})
	err := d.http.Serve(d.ln)
	if stop() {
		d.http.Close() // serving failed by itself
		return fmt.Errorf("admin: serve %s: %w", d.name, err)
	}
	<-stopped
	return nil
}

// Close releases the listeners of a server that does not serve.
func (s *Server) Close() error {
	var errs []error
	for _, d := range s.doors {
		errs = append(errs, d.ln.Close())
	}
	return errors.Join(errs...)
}
