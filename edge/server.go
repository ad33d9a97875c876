package edge

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/forward"
	"github.com/keyhaven/keyhaven/edge/proxy"
	"github.com/keyhaven/keyhaven/edge/proxyproto"
	"github.com/keyhaven/keyhaven/edge/ticket"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A Dialer reaches what lies behind the tunnel. Connections that can close their writing side have CloseWrite.
type Dialer interface {
	Dial(ctx context.Context, q control.Query) (net.Conn, error)
	DialPacket(ctx context.Context, q control.Query) (tunnel.PacketConn, error)
	Echo(ctx context.Context, q control.Query, e tunnel.EchoRequest) (tunnel.EchoReply, error)
}

// Deps is what a [Server] needs from the rest of the edge. Dialer and Store are required.
type Deps struct {
	Dialer Dialer
	// Store keeps the session ticket keys, so that a restart and other edges accept the same tickets.
	Store state.Store
	// KeyIdentity is the edge's client certificate towards key servers, issued by the key owner and renewed by the server
	// through the key servers. It may be nil if every key server group has an identity of its own.
	KeyIdentity *mtls.Source
	// Logger gets the records. If nil, they are discarded.
	Logger *slog.Logger
	// Tracer makes a span of each signature for a visitor, which the key server is told of. If nil, there are none.
	Tracer trace.Tracer
	// Registry gets the metrics. If nil, they are not collected.
	Registry prometheus.Registerer
	// Listen binds TCP ports. If nil, net.Listen does.
	Listen func(network, addr string) (net.Listener, error)
}

// openTimeout bounds the first reading of the ticket keys.
const openTimeout = 10 * time.Second

// maxSignerLines is how many failed signatures are logged in a second.
const maxSignerLines = 20

// A Server serves visitors. Make one with [New].
type Server struct {
	cfg          Config
	deps         Deps
	log          *slog.Logger
	metrics      *metrics
	tickets      *ticket.Keys
	listeners    *listeners
	signerFaults rate
	balancer     *balance.Balancer
	forward      *forward.Forwarder
	trust        proxyproto.Trust // load balancers in front of the listeners

	now      atomic.Pointer[snapshot]
	requests tracker // in flight, hijacked connections included
	stopping atomic.Bool

	ctx     context.Context
	stop    context.CancelFunc // ends what runs beside the requests
	retired sync.WaitGroup     // what ends with ctx, such as what waits for the end of old snapshots

	reload    sync.Mutex // held while a configuration is put in place, started or closed; guards the rest
	groups    map[string]*keyGroup
	file      Config       // the one in place
	fileZones []*zone.Zone // its zones
	published published
	heard     bool // something was published: what is missing now is at fault
	faults    []Fault
	started   bool
	closed    bool
}

// A snapshot is what one configuration compiles to. It is immutable.
type snapshot struct {
	table    *zone.Table
	tcp      *visitorTLS
	quic     *visitorTLS
	proxy    *proxy.Handler
	groups   map[string]*keyGroup
	requests *tracker
}

// New checks cfg, loads the certificates and binds the listeners, so that faults of either show before anything runs.
// A server that is never run must be closed with [Server.Close].
func New(cfg Config, d Deps) (*Server, error) {
	if d.Dialer == nil || d.Store == nil {
		return nil, errors.New("edge: a dialer and a store are required")
	}
	s := &Server{cfg: cfg, deps: d, log: d.Logger, signerFaults: rate{limit: maxSignerLines}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	zones, err := s.compile(&cfg)
	if err != nil {
		return nil, err
	}
	s.trust, _ = proxyproto.ParseTrust(cfg.Listen.ProxyProtocolFrom) // checked above
	s.ctx, s.stop = context.WithCancel(context.Background())
	if err := s.open(cfg, zones); err != nil {
		s.stop()
		return nil, errors.Join(fmt.Errorf("edge: %w", err), s.closeGroups())
	}
	return s, nil
}

// open acquires what can fail; New releases the groups after an error.
func (s *Server) open(cfg Config, zones []*zone.Zone) (err error) {
	ctx, cancel := context.WithTimeout(s.ctx, openTimeout)
	defer cancel()
	s.tickets, err = ticket.Open(ctx, s.deps.Store, ticket.Options{Rotate: cfg.Tickets.Rotate, Generations: cfg.Tickets.Generations, Logger: s.log})
	if err != nil {
		return err
	}
	if s.metrics, err = newMetrics(s.deps.Registry, s.keyServersUp, s.expiries); err != nil {
		return err
	}
	if err := s.openPools(ctx); err != nil {
		return errors.Join(err, s.release())
	}
	if s.listeners, err = listen(cfg.Listen, s.deps.Listen); err != nil {
		return errors.Join(err, s.release())
	}
	if err := s.install(cfg, zones); err != nil {
		return errors.Join(err, s.release())
	}
	s.retired.Go(s.followPools)
	return nil
}

// openPools makes what picks endpoints and what serves public ports.
func (s *Server) openPools(ctx context.Context) error {
	key, err := affinityKey(ctx, s.deps.Store)
	if err != nil {
		return err
	}
	s.balancer, err = balance.New(balance.Config{Dialer: s.deps.Dialer, Key: key, Logger: s.log, Registry: s.deps.Registry})
	if err != nil {
		return err
	}
	s.forward, err = forward.New(forward.Config{Dialer: s.deps.Dialer, Balancer: s.balancer, Logger: s.log, Registry: s.deps.Registry, Listen: s.deps.Listen})
	return err
}

// release gives back what open acquired, as far as it came.
func (s *Server) release() (err error) {
	if s.listeners != nil {
		err = s.listeners.close()
	}
	if s.forward != nil {
		s.forward.Close()
	}
	if s.balancer != nil {
		s.balancer.Close()
	}
	s.metrics.unregister(s.deps.Registry)
	return err
}

// compile checks a configuration as a whole.
func (s *Server) compile(cfg *Config) ([]*zone.Zone, error) {
	zones, warnings, err := cfg.compile()
	if err != nil {
		return nil, fmt.Errorf("edge: configuration: %w", err)
	}
	for _, w := range warnings {
		s.log.Warn("configuration", "remark", w)
	}
	return zones, nil
}

// install puts a checked configuration in place and retires the one before.
func (s *Server) install(cfg Config, file []*zone.Zone) error {
	zones := s.withPublished(&cfg, file)
	groups, fresh, err := openGroups(s.groups, cfg.KeyServers, s.openGroup)
	if err != nil {
		return err
	}
	keys, err := keysOf(zones, groups)
	if err != nil {
		for _, f := range fresh {
			err = errors.Join(err, f.close())
		}
		return err
	}
	for _, g := range fresh {
		if g.own {
			g.keepRenewed(s.ctx)
		}
	}
	s.groups, s.file, s.fileZones = groups, cfg, file
	s.applyPools(&cfg)
	next := &snapshot{table: zone.NewTable(zones), groups: groups, requests: new(tracker)}
	next.tcp = s.tlsFor("tcp", zones, keys, (*zone.Zone).Protocols, "h2", "http/1.1")
	next.quic = s.tlsFor("quic", zones, keys, quicProtocols, "h3")
	next.proxy = proxy.New(proxy.Config{
		Zones: next.table, Dialer: s.deps.Dialer, Balancer: s.balancer,
		ConnectTimeout: cfg.Limits.OriginConnectTimeout, ResponseTimeout: cfg.Limits.OriginResponseTimeout, BodyIdleTimeout: s.cfg.Limits.BodyIdleTimeout,
		IdleConns: cfg.Limits.OriginConnections, AltSvc: s.listeners.altSvc(s.cfg.Listen),
		Logger: s.log, OnRequest: s.metrics.request,
	})
	old := s.now.Swap(next)
	if old != nil {
		s.retire(old, next)
	}
	return nil
}

// keysOf returns the keys of the zones' certificates, in their order.
func keysOf(zones []*zone.Zone, groups map[string]*keyGroup) (map[*zone.Zone][]*certificateKey, error) {
	keys := make(map[*zone.Zone][]*certificateKey, len(zones))
	for _, z := range zones {
		for _, c := range z.Certificates {
			_, isRSA := c.Leaf.PublicKey.(*rsa.PublicKey)
			key, err := groups[z.KeyServer].client.Key(c.Leaf.PublicKey, keyless.KeyOptions{Plain: z.PlainDigest, AllowDecrypt: z.AllowRSADecrypt && isRSA})
			if err != nil {
				return nil, fmt.Errorf("zone %s: %s: %w", z.Name, c.File, err)
			}
			keys[z] = append(keys[z], &certificateKey{cert: c, key: key})
		}
	}
	return keys, nil
}

// retire lets what is in flight finish with the old snapshot, and then releases it.
func (s *Server) retire(old, next *snapshot) {
	old.proxy.CloseIdle()
	s.retired.Go(func() {
		_ = old.requests.wait(s.ctx)
		old.proxy.CloseIdle()
	})
	for name, g := range old.groups {
		if next.groups[name] == g {
			continue
		}
		s.retired.Go(func() {
			sleep(s.ctx, s.cfg.Limits.HandshakeTimeout) // handshakes that began before the change have ended by then
			if err := g.close(); err != nil {
				s.log.Warn("key server group did not close", "key_server", name, "err", err)
			}
		})
	}
}

// Reload replaces zones, key server groups and the limits towards origins at once; what is in flight goes on with what it
// began with. On an error everything stays as it was. Listeners, the other limits and the rotation of ticket keys need a
// restart.
func (s *Server) Reload(cfg Config) error {
	zones, err := s.compile(&cfg)
	if err != nil {
		return err
	}
	s.reload.Lock()
	defer s.reload.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	if !reflect.DeepEqual(cfg.Listen, s.cfg.Listen) || cfg.Tickets != s.cfg.Tickets || cfg.Limits.Fixed() != s.cfg.Limits.Fixed() {
		s.log.Warn("listeners, limits or ticket rotation changed in the configuration; they take effect with a restart")
	}
	if err := s.install(cfg, zones); err != nil {
		return fmt.Errorf("edge: %w", err)
	}
	for name, g := range s.groups {
		if !g.own {
			continue
		}
		if err := g.source.Reload(); err != nil {
			s.log.Warn("client certificate for key servers not reread", "key_server", name, "err", err)
		}
	}
	s.log.Info("zones replaced", "zones", len(zones), "key_servers", len(cfg.KeyServers))
	return nil
}

// Ready returns an error if no key server group can be reached, so that no new visitor can be served; those with a ticket
// are served all the same. One group of several that is away is for the metrics to show: it must not take the zones of
// others out of service.
func (s *Server) Ready(context.Context) error {
	var down []error
	for name, up := range s.keyServersUp() {
		if up {
			return nil
		}
		down = append(down, fmt.Errorf("key server group %s cannot be reached", name))
	}
	return errors.Join(down...)
}

// expiries lists the ends of the certificates in use.
func (s *Server) expiries() (all []expiry) {
	now := s.now.Load()
	if now == nil {
		return nil
	}
	for _, z := range now.table.Zones() {
		for _, c := range z.Certificates {
			all = append(all, expiry{"zone", z.Name, c.File, c.Leaf.NotAfter})
		}
	}
	for name, g := range now.groups {
		all = append(all, expiry{"key_server", name, "", g.source.NotAfter()})
	}
	return all
}

// keyServersUp says which key server groups can be reached.
func (s *Server) keyServersUp() map[string]bool {
	up := make(map[string]bool)
	if now := s.now.Load(); now != nil {
		for name, g := range now.groups {
			up[name] = g.client.Healthy()
		}
	}
	return up
}

// Addrs returns the addresses of the TLS listeners, in the order of the configuration.
func (s *Server) Addrs() []net.Addr { return s.listeners.tlsAddrs() }

// RedirectAddrs returns the addresses of the plain HTTP listeners, in the order of the configuration.
func (s *Server) RedirectAddrs() []net.Addr { return s.listeners.redirectAddrs() }

// Close releases a server that was not run. After Run it does nothing. It is idempotent.
func (s *Server) Close() error {
	s.reload.Lock()
	defer s.reload.Unlock()
	if s.started || s.closed {
		return nil
	}
	return s.closeLocked()
}

func (s *Server) closeLocked() error {
	s.closed = true
	s.stop()
	s.retired.Wait()
	err := errors.Join(s.closeGroups(), s.release())
	if now := s.now.Load(); now != nil {
		now.proxy.CloseIdle()
	}
	return err
}

func (s *Server) closeGroups() error {
	var errs []error
	for _, g := range s.groups {
		errs = append(errs, g.close())
	}
	s.groups = nil
	return errors.Join(errs...)
}

func quicProtocols(z *zone.Zone) []string {
	if !z.HTTP3 {
		return nil
	}
	return []string{"h3"}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
