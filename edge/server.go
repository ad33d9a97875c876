package edge

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
)

// A Dialer reaches addresses behind the tunnel. An empty vnet is the default network; visitor is the zero value where a
// connection is not made for one visitor. Connections that can close their writing side have CloseWrite.
type Dialer interface {
	DialContext(ctx context.Context, vnet, host string, port uint16, visitor netip.AddrPort) (net.Conn, error)
}

// Deps is what a [Server] needs from the rest of the edge. Dialer and Store are required.
type Deps struct {
	Dialer Dialer
	// Store keeps the session ticket keys, so that a restart and other edges accept the same tickets.
	Store state.Store
	// KeyIdentity is the edge's client certificate towards key servers, issued by the key owner. It may be nil if every
	// key server group has an identity of its own.
	KeyIdentity *mtls.Source
	// Logger gets the records. If nil, they are discarded.
	Logger *slog.Logger
	// Registry gets the metrics. If nil, they are not collected.
	Registry prometheus.Registerer
}

var errNotYet = errors.New("edge: not built")

// A Server serves visitors. Make one with [New].
type Server struct{}

// New checks cfg, loads the certificates and binds the listeners, so that faults of either show before anything runs.
// A server that is never run must be closed with [Server.Close].
func New(cfg Config, d Deps) (*Server, error) { return nil, errNotYet }

// Run serves until ctx ends, then stops accepting, lets requests in flight finish within the drain timeout, and returns
// with nothing left running. It may be called once.
func (s *Server) Run(ctx context.Context) error { return errNotYet }

// Reload replaces zones, key server groups and limits of the proxy at once; what is in flight goes on with what it began
// with. On an error everything stays as it was. Listeners do not change.
func (s *Server) Reload(cfg Config) error { return errNotYet }

// Close releases the listeners of a server that was not run. It is idempotent.
func (s *Server) Close() error { return nil }
