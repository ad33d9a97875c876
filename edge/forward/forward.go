package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/internal/household"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	defaultMax     = 10_000
	leastPerSource = 16 // connections that one visitor address may have, whatever the port's limit
	dialTimeout    = 10 * time.Second
	retryOpen      = 2 * time.Second // between attempts to open a port
)

// A Dialer reaches services through the tunnel.
type Dialer interface {
	Dial(ctx context.Context, q control.Query) (net.Conn, error)
	DialPacket(ctx context.Context, q control.Query) (tunnel.PacketConn, error)
}

// A Config is what a [Forwarder] needs.
type Config struct {
	// Dialer is required.
	Dialer Dialer
	// Balancer has the pools that ports lead to. If nil, there are none.
	Balancer *balance.Balancer
	// Logger gets what happens to ports. If nil, nothing is logged.
	Logger *slog.Logger
	// Registry gets the metrics. If nil, they are not collected.
	Registry prometheus.Registerer
	// Listen binds TCP ports. If nil, net.Listen does.
	Listen func(network, addr string) (net.Listener, error)
}

// A Fault is a port that is not served, and why.
type Fault struct{ Name, Text string }

// A Forwarder serves ports. It is safe for concurrent use.
type Forwarder struct {
	cfg     Config
	log     *slog.Logger
	listen  func(network, addr string) (net.Listener, error)
	metrics *metrics

	mu      sync.Mutex // guards the rest
	ctx     context.Context
	configs []spec.PortConfig
	ports   map[string]*port
	running sync.WaitGroup // ports
}

// New returns a forwarder without ports.
func New(cfg Config) (*Forwarder, error) {
	if cfg.Dialer == nil {
		return nil, errors.New("forward: a dialer is required")
	}
	f := &Forwarder{cfg: cfg, log: cfg.Logger, listen: cfg.Listen, ports: map[string]*port{}}
	if f.listen == nil {
		f.listen = net.Listen
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if f.metrics, err = newMetrics(cfg.Registry); err != nil {
		return nil, fmt.Errorf("forward: %w", err)
	}
	return f, nil
}

// Close takes the metrics out of the registry.
func (f *Forwarder) Close() { f.metrics.unregister(f.cfg.Registry) }

// Run serves the ports until ctx ends. What is open then may go on for the time of drain. Nothing is left running when it
// returns.
func (f *Forwarder) Run(ctx context.Context, drain time.Duration) error {
	base, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	f.mu.Lock()
	f.ctx = base
	f.applyLocked()
	f.mu.Unlock()
	tick := time.NewTicker(retryOpen)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			f.mu.Lock()
			for _, p := range f.ports {
				p.open()
			}
			f.mu.Unlock()
		}
	}
	f.mu.Lock()
	f.ctx = nil
	for _, p := range f.ports {
		p.stopListening()
	}
	f.mu.Unlock()
	stop := time.AfterFunc(drain, cut)
	defer stop.Stop()
	f.running.Wait()
	return nil
}

// Set replaces all ports. Those that are wrong are left out; the error names them. It takes effect at once.
func (f *Forwarder) Set(ports []spec.PortConfig) error {
	var errs []error
	var sound []spec.PortConfig
	for _, p := range ports {
		bad := p.Validate()
		if slices.ContainsFunc(sound, func(q spec.PortConfig) bool { return q.Name == p.Name }) {
			bad = append(bad, &spec.FieldError{Field: "name", Text: fmt.Sprintf("%q names two ports", p.Name)})
		}
		if len(bad) > 0 {
			errs = append(errs, fmt.Errorf("port %q: %w", p.Name, errors.Join(bad...)))
			continue
		}
		sound = append(sound, p)
	}
	f.expect(sound)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.configs = sound
	f.applyLocked()
	return errors.Join(errs...)
}

// An expecter is a dialer that makes ready for flows of many bytes.
type expecter interface{ ExpectBulk(qs []control.Query) }

// expect tells the dialer where connections of TCP ports may go. Where pools lead to shows with the first one.
func (f *Forwarder) expect(ports []spec.PortConfig) {
	e, ok := f.cfg.Dialer.(expecter)
	if !ok {
		return
	}
	var qs []control.Query
	for _, c := range ports {
		if c.Protocol == "tcp" && c.Pool == "" {
			qs = append(qs, destination(&c, c.Listen))
		}
	}
	e.ExpectBulk(qs)
}

// destination is where a port without a pool leads.
func destination(c *spec.PortConfig, listen string) control.Query {
	if c.Tunnel != "" {
		return control.Query{Tunnel: c.Tunnel, Service: c.Protocol, Host: c.Service, Port: portOf(listen)}
	}
	return control.Query{VNet: c.VNet, Host: c.Host, Port: c.Port}
}

// applyLocked makes the ports be as configured: first what goes, as its address may be taken by what comes.
func (f *Forwarder) applyLocked() {
	if f.ctx == nil {
		return
	}
	for name, p := range f.ports {
		i := slices.IndexFunc(f.configs, func(c spec.PortConfig) bool { return c.Name == name })
		if i < 0 || f.configs[i].Listen != p.listen || f.configs[i].Protocol != p.protocol {
			p.close(errRemoved)
			delete(f.ports, name)
		}
	}
	for _, c := range f.configs {
		p := f.ports[c.Name]
		if p == nil {
			p = newPort(f, c)
			f.ports[c.Name] = p
		} else {
			p.change(c)
		}
		p.open()
	}
}

// Faults lists the ports that cannot be opened.
func (f *Forwarder) Faults() []Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []Fault
	for _, c := range f.configs {
		if p := f.ports[c.Name]; p != nil && p.fault != nil {
			list = append(list, Fault{c.Name, p.fault.Error()})
		}
	}
	return list
}

// Addr returns the address that a port listens on, nil if it does not.
func (f *Forwarder) Addr(name string) net.Addr {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p := f.ports[name]; p != nil {
		return p.addr
	}
	return nil
}

// Why connections are cut.
var (
	errRemoved   = errors.New("forward: the port was taken away")
	errForbidden = errors.New("forward: the visitor is no longer on the allow-list")
	errIdle      = errors.New("forward: idle for too long")
)

// A port is one that is open, or should be.
type port struct {
	f                      *Forwarder
	name, protocol, listen string
	count                  counts

	// Guarded by f.mu.
	fault  error
	addr   net.Addr
	closer interface{ Close() error } // the socket; nil while it is not open
	pause  func()                     // lets what is open go on without taking anything new

	mu    sync.Mutex // guards the rest
	cfg   spec.PortConfig
	allow []netip.Prefix
	flows map[*open]struct{}
	by    map[netip.Addr]int // flows of a source
}

// open is one connection or session.
type open struct {
	source netip.Addr
	cut    context.CancelCauseFunc
}

func newPort(f *Forwarder, c spec.PortConfig) *port {
	p := &port{f: f, name: c.Name, protocol: c.Protocol, listen: c.Listen, count: f.metrics.of(c.Name), flows: map[*open]struct{}{}, by: map[netip.Addr]int{}}
	p.change(c)
	return p
}

// change puts a configuration in place, and cuts whom it does not admit.
func (p *port) change(c spec.PortConfig) {
	var allow []netip.Prefix
	for _, a := range c.Allow {
		if prefix, err := netip.ParsePrefix(a); err == nil { // checked before
			allow = append(allow, prefix)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cfg, p.allow = c, allow
	for o := range p.flows {
		if !p.admitsLocked(o.source) {
			o.cut(errForbidden)
		}
	}
}

func (p *port) admitsLocked(a netip.Addr) bool {
	return slices.ContainsFunc(p.allow, func(prefix netip.Prefix) bool { return prefix.Contains(a) })
}

// enter counts a new connection of a source, or says why it is refused.
func (p *port) enter(source netip.Addr, cut context.CancelCauseFunc) (o *open, cfg spec.PortConfig, refusal string) {
	limit := p.limit()
	p.mu.Lock()
	defer p.mu.Unlock()
	home := household.Of(source)
	switch {
	case !p.admitsLocked(source):
		return nil, p.cfg, refusedForbidden
	case len(p.flows) >= limit:
		return nil, p.cfg, refusedLimit
	case p.by[home] >= max(leastPerSource, limit/10):
		return nil, p.cfg, refusedSource
	}
	o = &open{source, cut}
	p.flows[o] = struct{}{}
	p.by[home]++
	return o, p.cfg, ""
}

func (p *port) leave(o *open) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.flows[o]; !ok {
		return
	}
	delete(p.flows, o)
	home := household.Of(o.source)
	if p.by[home]--; p.by[home] == 0 {
		delete(p.by, home)
	}
}

func (p *port) limit() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cfg.MaxConnections == 0 {
		return defaultMax
	}
	return p.cfg.MaxConnections
}

// open opens the socket if it is not open. The caller holds f.mu.
func (p *port) open() {
	if p.closer != nil || p.f.ctx == nil {
		return
	}
	var err error
	if p.protocol == "udp" {
		err = p.openUDP(p.f.ctx)
	} else {
		err = p.openTCP(p.f.ctx)
	}
	if err == nil {
		p.fault = nil
		p.f.log.Info("port open", "port", p.name, "addr", p.addr.String(), "protocol", p.protocol)
		return
	}
	if p.fault == nil {
		p.f.log.Warn("port cannot be opened, trying again", "port", p.name, "err", err)
	}
	p.fault = explain(p.protocol, p.listen, err)
}

func explain(protocol, listen string, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%s %s is in use already: end the program that has it, or choose another port; it is tried again every %v: %w", protocol, listen, retryOpen, err)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%s %s needs a privilege: let the edge bind low ports (CAP_NET_BIND_SERVICE), or choose a port above 1023: %w", protocol, listen, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%s %s is no address of this host; it is tried again every %v: %w", protocol, listen, retryOpen, err)
	}
	return fmt.Errorf("%s %s: %w", protocol, listen, err)
}

// stopListening takes nothing new. The caller holds f.mu.
func (p *port) stopListening() {
	if p.closer != nil {
		p.pause()
	}
}

// close closes the socket and cuts what is open. The caller holds f.mu.
func (p *port) close(why error) {
	if p.closer != nil {
		_ = p.closer.Close()
		p.closer = nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for o := range p.flows {
		o.cut(why)
	}
	p.allow = nil // for a connection that is just being accepted
	p.f.log.Info("port closed", "port", p.name)
}

// target returns where a connection goes. lease is nil without a pool.
func (p *port) target(ctx context.Context, cfg *spec.PortConfig, visitor netip.AddrPort, tried []*balance.Lease) (q control.Query, version string, lease *balance.Lease, err error) {
	version = cfg.ProxyProtocol
	switch {
	case cfg.Pool == "":
		q = destination(cfg, p.listen)
	case p.f.cfg.Balancer == nil:
		return q, version, nil, balance.ErrNoPool
	default:
		lease, err = p.f.cfg.Balancer.Pick(ctx, cfg.Pool, balance.Visit{IP: visitor.Addr(), Tried: tried})
		if err != nil {
			return q, version, nil, err
		}
		e := lease.Endpoint()
		q.VNet, q.Host, q.Port, q.Connector = e.VNet, e.Host, e.Port, e.Connector
		if version == "" {
			version = lease.ProxyProtocol()
		}
	}
	q.Visitor, q.Class = visitor, tunnel.ClassBulk
	return q, version, lease, nil
}

func portOf(listen string) uint16 {
	_, text, _ := net.SplitHostPort(listen)
	ap, _ := netip.ParseAddrPort("0.0.0.0:" + text)
	return ap.Port()
}
