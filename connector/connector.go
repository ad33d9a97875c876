package connector

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/connector/ingress"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

// renewTimeout bounds one edge's answer to a certificate request; edges give up earlier.
const renewTimeout = 45 * time.Second

// A Config describes a connector. New copies it.
type Config struct {
	// Identity is the connector's certificate, which Run keeps renewed. Required.
	Identity *mtls.Source
	// Edges are the edges to dial first, as host:port; a missing port is 7844. A name may have several addresses: the
	// sessions spread over them. At least one, at most 64. Once an edge tells which edges there are, those are dialled in
	// their place, and these again while none of those answers.
	Edges []string
	// Allow is what may be dialled. Nil permits nothing.
	Allow *Allow
	// Limits bound the flows at a time; SetLimits changes them.
	Limits Limits
	// Carrier says over what sessions go: CarrierAuto (also if empty), CarrierQUIC or CarrierTCP.
	Carrier string
	// Proxy returns the HTTP proxy that sessions over TCP go through, or nil for none. It is called for each attempt. If
	// Proxy is nil, there is none.
	Proxy func() (*tunnel.ProxyConfig, error)
	// Bulk is how many sessions for bulk flows there may be to one edge, beside the main ones, if the edge asks for them.
	// At most 8. If zero, none.
	Bulk int
	// Ingress serves the flows that are for this connector's own ingress, and takes the configurations of edges unless
	// OnConfig does. If nil, such flows are refused as unsupported. The caller closes it, after Run.
	Ingress *ingress.Handler
	// OnConfig takes a configuration that an edge pushes. Its error's text goes back to the edge. Several edges may push
	// the same version, at the same time. If nil, pushed configurations are refused as unsupported.
	OnConfig func(ctx context.Context, version uint64, body []byte) error
	// Device lets an agent on this host report, and edges ask, how the device is that the connector runs on. See ReportDevice.
	Device bool
	// Resolvers are the name servers of single virtual networks, for their flows to host names. Networks that are not in
	// it use Resolver.
	Resolvers map[vnet.ID][]netip.AddrPort
	// ServeDNS lets edges ask the site's name servers: those of Resolvers, or for other networks those of the host's
	// /etc/resolv.conf. See ResolverHost.
	ServeDNS bool
	// UDPIdle is how long a flow of packets may carry nothing. If zero, 5m.
	UDPIdle time.Duration
	// EdgesFile keeps the addresses of edges that edges told, for the next start. If empty, they are forgotten.
	EdgesFile string
	// DialTimeout bounds how long a destination may take to be resolved and connected. If zero, 10s.
	DialTimeout time.Duration
	// DrainTimeout is how long Run waits for open flows when its context ends. If zero, 30s.
	DrainTimeout time.Duration
	// Version is told to the edge.
	Version string
	// Resolver resolves edges and destinations. If nil, the host's configuration is used.
	Resolver Resolver
	// Logger gets what happens. If nil, nothing is logged.
	Logger *slog.Logger
	// Registerer takes the metrics. If nil, nobody sees them.
	Registerer prometheus.Registerer
}

// A Connector keeps sessions to edges and serves their flows. Its methods may be called by several goroutines.
type Connector struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	dialer   dialer
	allow    atomic.Pointer[Allow]
	flows    flowSet
	udp      udpTable
	denied   throttle
	refusals refusals
	device   device
	edges    edgeSet
	host     surroundings

	suspension suspension
	beat       atomic.Int64 // when the loop that arranges the sessions came round, since began; 0: never

	dial func(context.Context, tunnel.DialConfig) (session, error)

	quicFirst    time.Duration       // of each line's path; 0 but in tests
	registration tunnel.Registration // what all sessions tell alike

	running sync.WaitGroup // sessions

	mu        sync.Mutex           // guards the fields below
	endpoints []*endpoint          // in the order in which they were added
	live      map[session]struct{} // sessions that have not ended, those that drain included
	mains     int                  // of them, main sessions
	up        time.Time            // since when mains is not zero
}

// check completes the configuration and says what is wrong with it.
func (cfg *Config) check() error {
	if cfg.Identity == nil {
		return errors.New("connector: no identity")
	}
	if len(cfg.Edges) == 0 {
		return errors.New("connector: no edge to dial")
	}
	if len(cfg.Edges) > maxEdges {
		return fmt.Errorf("connector: %d edges to dial, at most %d allowed; give those of one name one entry", len(cfg.Edges), maxEdges)
	}
	seen := map[string]bool{}
	for _, e := range cfg.Edges {
		key, err := edgeKey(e)
		if err != nil {
			return fmt.Errorf("connector: %w", err)
		}
		if seen[key] {
			return fmt.Errorf("connector: edge %q is listed twice; remove one", e)
		}
		seen[key] = true
	}
	for _, d := range []*time.Duration{&cfg.DialTimeout, &cfg.DrainTimeout, &cfg.UDPIdle} {
		if *d < 0 {
			return errors.New("connector: a timeout is negative")
		}
	}
	if cfg.Bulk < 0 || cfg.Bulk > maxBulk {
		return fmt.Errorf("connector: %d bulk sessions, want 0 to %d", cfg.Bulk, maxBulk)
	}
	switch cfg.Carrier {
	case "":
		cfg.Carrier = CarrierAuto
	case CarrierAuto, CarrierQUIC, CarrierTCP:
	default:
		return fmt.Errorf("connector: carrier %q, want %s, %s or %s", cfg.Carrier, CarrierAuto, CarrierQUIC, CarrierTCP)
	}
	if cfg.Carrier == CarrierQUIC {
		cfg.Bulk = 0 // they would be TCP
	}
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = 10 * time.Second
	}
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = 30 * time.Second
	}
	if cfg.UDPIdle == 0 {
		cfg.UDPIdle = defaultUDPIdle
	}
	if cfg.Resolver == nil {
		cfg.Resolver = &net.Resolver{PreferGo: true}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// New checks cfg and returns a connector that does nothing before Run.
func New(cfg Config) (*Connector, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	c := &Connector{
		cfg: cfg, log: cfg.Logger, metrics: newMetrics(), live: map[session]struct{}{}, host: thisHost,
		dialer: dialer{resolver: cfg.Resolver, names: newNameServers(cfg)},
		edges:  edgeSet{seeds: slices.Clone(cfg.Edges), told: map[string][]string{}, missing: map[string]time.Time{}, changed: make(chan struct{}, 1)},
		dial: func(ctx context.Context, d tunnel.DialConfig) (session, error) {
			s, err := tunnel.Dial(ctx, d)
			if err != nil {
				return nil, err // not a nil *ClientSession in an interface
			}
			return s, nil
		},
	}
	c.allow.Store(cfg.Allow)
	c.bindIngress()
	c.SetLimits(cfg.Limits)
	hostname, err := os.Hostname()
	if err != nil {
		hostname = "unknown"
	}
	c.registration = tunnel.Registration{Instance: rand.Text(), Version: cfg.Version, Hostname: hostname, Arch: runtime.GOOS + "/" + runtime.GOARCH}
	c.loadEdges()
	if cfg.Registerer != nil {
		if err := c.register(cfg.Registerer); err != nil {
			return nil, fmt.Errorf("connector: metrics: %w", err)
		}
	}
	return c, nil
}

// Run keeps the sessions and serves flows until ctx ends. Then it dials no more, tells the edges, waits up to
// Config.DrainTimeout for the open flows, and cuts what is left. On return nothing is left running. Run may be called
// once. The error is nil after an orderly end.
func (c *Connector) Run(ctx context.Context) error {
	base := context.WithoutCancel(ctx)
	lives, cut := context.WithCancel(base)
	defer cut()
	c.warnEcho()
	var wg sync.WaitGroup
	wg.Go(func() { c.keepEdges(ctx, lives) })
	wg.Go(func() { c.watch(ctx) })
	wg.Go(func() {
		if err := c.cfg.Identity.KeepRenewed(ctx, c.renew); err != nil && ctx.Err() == nil {
			c.log.Error("certificate renewal ended", "err", err)
		}
	})
	wg.Wait()
	c.drain(base)
	cut()
	c.running.Wait()
	c.udp.close()
	return nil
}

// drain ends all sessions, gently while DrainTimeout lasts.
func (c *Connector) drain(base context.Context) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(base, c.cfg.DrainTimeout)
	defer cancel()
	c.log.Info("draining", "flows", c.flows.len(), "grace", c.cfg.DrainTimeout)
	var wg sync.WaitGroup
	c.mu.Lock()
	for s := range c.live {
		wg.Go(func() {
			if err := s.Drain(ctx); err != nil {
				c.log.Warn("drain cut short", "peer", s.RemoteAddr(), "err", err)
			}
		})
	}
	c.mu.Unlock()
	wg.Wait()
	c.log.Info("drained", "dur", time.Since(start))
}

// errNoSession says that nothing can be asked of an edge now.
var errNoSession = errors.New("connector: no session to an edge")

// renew has an edge sign a certificate request.
func (c *Connector) renew(ctx context.Context, csrDER []byte) ([][]byte, error) {
	c.mu.Lock()
	sessions := make([]session, 0, len(c.live))
	for s := range c.live {
		sessions = append(sessions, s)
	}
	c.mu.Unlock()
	err := errNoSession
	for _, s := range sessions { // another edge may do what the first cannot
		var chain [][]byte
		answer, cancel := context.WithTimeout(ctx, renewTimeout)
		chain, err = s.Renew(answer, csrDER)
		cancel()
		if err == nil {
			return chain, nil
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

func (c *Connector) enter(s session, role string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.live[s] = struct{}{}
	if role != RoleMain {
		return
	}
	if c.mains++; c.mains == 1 {
		c.up = time.Now()
	}
}

func (c *Connector) leave(s session, role string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.live, s)
	if role != RoleMain {
		return
	}
	if c.mains--; c.mains == 0 {
		c.up = time.Time{}
	}
}

// SetAllow replaces the allow-list. It counts for new flows at once, and open flows that it does not permit are cut.
// It returns how many those were.
func (c *Connector) SetAllow(a *Allow) (cut int) {
	// The order matters: a flow that is added after the sweep sees the new list.
	c.allow.Store(a)
	return c.flows.sweep(a) + c.permitIngress(a)
}

// SetLimits changes how many flows there may be at a time. Open flows stay; new ones are refused until there are fewer
// than the limit.
func (c *Connector) SetLimits(l Limits) { c.flows.set(l) }

// Ready returns nil if at least one session takes flows, and else why none does.
func (c *Connector) Ready(context.Context) error {
	var last error
	for _, s := range c.Status().Sessions {
		if s.Role != RoleMain {
			continue
		}
		if s.State == StateConnected {
			return nil
		}
		if s.Err != nil {
			last = fmt.Errorf("%s: %w", s.Edge, s.Err)
		}
	}
	if last == nil {
		last = errNoSession
	}
	return last
}
