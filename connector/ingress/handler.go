package ingress

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/ingressconf"
)

// A Permit decides what rules from the edge may reach. Its methods may be called by several goroutines.
type Permit interface {
	// Name reports whether any address of the host name could be permitted.
	Name(name string, port uint16) bool
	// Addr reports whether an address may be reached. name is the host name that led to it, empty if none did.
	Addr(name string, to netip.AddrPort) bool
}

// A HandlerConfig describes a [Handler]. The zero value serves nothing and takes no configuration from the edge.
type HandlerConfig struct {
	// Local are the rules of the connector's own file. Nil or empty: none.
	Local *ingressconf.Config
	// Remote permits the edge to configure the rules. While it has, they stand in place of Local.
	Remote bool
	// File keeps the last good configuration from the edge over a restart. If empty, none is kept.
	File string
	// Resolver resolves origins. If nil, the host's configuration is used.
	Resolver *net.Resolver
	// Logger gets what happens. If nil, nothing is logged.
	Logger *slog.Logger
	// Registerer takes the metrics. If nil, nobody sees them.
	Registerer prometheus.Registerer
}

// A Handler serves flows by the rules that hold at the moment. Its methods may be called by several goroutines. Make one
// with [New], and Close it.
type Handler struct {
	cfg     HandlerConfig
	log     *slog.Logger
	metrics *metrics
	dialer  *dialer
	server  *http.Server
	conns   *listener
	served  sync.WaitGroup
	faults  throttle
	rules   atomic.Pointer[rules]

	flowsMu sync.Mutex             // guards the field below
	flows   map[*flowConn]struct{} // nil after Close

	mu     sync.Mutex // guards the fields below, and the order of changes
	local  *ingressconf.Config
	remote remoteConfig
	closed bool
}

// New returns a handler that serves at once, by the rules of cfg or those that the edge configured before a restart. An
// error means that a file which the rules name cannot be used.
func New(cfg HandlerConfig) (*Handler, error) {
	h := &Handler{cfg: cfg, log: cfg.Logger, metrics: newMetrics(), dialer: &dialer{resolver: cfg.Resolver}, conns: newListener(), flows: map[*flowConn]struct{}{}, local: cfg.Local}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	h.load()
	if err := h.applyLocked(); err != nil { // nobody else has it yet
		return nil, fmt.Errorf("ingress: %w", err)
	}
	if err := h.metrics.register(cfg.Registerer); err != nil {
		return nil, fmt.Errorf("ingress: metrics: %w", err)
	}
	h.server = h.newServer()
	h.served.Go(func() { h.server.Serve(h.conns) }) //nolint:errcheck // it ends with Close
	return h, nil
}

// Sources of the rules in force.
const (
	SourceNone   = "none"   // there are no rules
	SourceLocal  = "local"  // the connector's own file
	SourceRemote = "remote" // the edge
)

// Status says which rules are in force.
type Status struct {
	Source  string // SourceNone, SourceLocal or SourceRemote
	Version uint64 // of the last configuration that was taken from the edge; 0 if there was none
	Rules   int
}

// Status returns what is in force.
func (h *Handler) Status() Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.rules.Load()
	return Status{Source: r.source, Version: h.remote.Version, Rules: r.config.Len()}
}

// Version is the version of the last configuration that was taken from the edge, 0 if there was none.
func (h *Handler) Version() uint64 { return h.Status().Version }

// SetPermit says what rules from the edge may reach; before it is called they reach nothing. Open connections of such
// rules that p does not permit are cut, and how many is returned. The connector calls it with its allow-list, and again
// when that has changed.
func (h *Handler) SetPermit(p Permit) (cut int) { return h.dialer.setPermit(p) }

// SetLocal puts new rules in place of those of the connector's own file. An error means that a file they name cannot be
// used; then the old ones stay. What is in flight goes on as it began.
func (h *Handler) SetLocal(c *ingressconf.Config) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.local
	h.local = c
	if err := h.applyLocked(); err != nil {
		h.local = old
		return err
	}
	return nil
}

// Close ends every connection and waits until nothing is left running.
func (h *Handler) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	err := h.server.Close()
	h.cutFlows()
	h.served.Wait()
	h.rules.Swap(&rules{source: SourceNone}).retire(nil)
	return err
}
