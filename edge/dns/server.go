package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// maxUDPReply is the longest reply over UDP, whatever the asker offers: it passes every path whole.
	maxUDPReply = 1232
	// maxTCP bounds the connections at a time.
	maxTCP = 256
	// maxTCPPerSource bounds those of one source, an IPv4 address or an IPv6 /64.
	maxTCPPerSource = 32
	// maxTCPQueries bounds the queries of one connection.
	maxTCPQueries = 128
	// tcpTimeout is how long a connection may take for a query, and idle.
	tcpTimeout = 8 * time.Second
	// maxAsking bounds the different questions that are being asked at a time; more are answered with SERVFAIL.
	maxAsking = 1024
	// maxWaiting bounds the queries that are being answered at a time, such as many for one slow question; more are dropped.
	maxWaiting = 8192
	// defaultRate is Config.Rate if that is zero.
	defaultRate = 200
)

// A Dialer opens flows into virtual networks. [*control.Control] is one.
type Dialer interface {
	Dial(ctx context.Context, q control.Query) (net.Conn, error)
	DialPacket(ctx context.Context, q control.Query) (tunnel.PacketConn, error)
}

// A Config describes a server.
type Config struct {
	// Listen is the address for UDP and TCP, with a port.
	Listen string
	// VNet is the network whose names are answered: its name or id. Empty: the default network.
	VNet string
	// Upstream are name servers in the network, as address and port, for names without a host route. If empty, those are
	// refused.
	Upstream []netip.AddrPort
	// Allow is who may ask. Empty admits nobody.
	Allow []netip.Prefix
	// Rate is how many queries a second one source (an IPv4 address or an IPv6 /64) may send; more are dropped. If zero, 200.
	Rate int
	// Dialer is the way into the network. Required.
	Dialer Dialer
	// Metrics counts queries. If nil, nobody does.
	Metrics *Metrics
	// Logger gets what happens. If nil, nothing is logged.
	Logger *slog.Logger
}

// Metrics are the numbers of all servers of an edge.
type Metrics struct {
	queries *prometheus.CounterVec
	cached  *prometheus.CounterVec
	seconds prometheus.Histogram
}

// NewMetrics registers the numbers.
func NewMetrics(r prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		queries: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_dns_queries_total",
			Help: "DNS queries for names of virtual networks, by result (ok, name_error, failed, refused, malformed, denied, limited)."}, []string{"result"}),
		cached: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_dns_cache_total",
			Help: "DNS questions that were looked up in the cache, by result (hit, miss)."}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "keyhaven_edge_dns_upstream_seconds",
			Help: "Time that name servers behind tunnels took to answer.", Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}}),
	}
	if r == nil {
		return m, nil
	}
	return m, errors.Join(r.Register(m.queries), r.Register(m.cached), r.Register(m.seconds))
}

// A Server answers queries.
type Server struct {
	cfg     Config
	log     *slog.Logger
	metrics *Metrics
	gate    *gate
	cache   *cache
	asking  askers
	waiting chan struct{} // one entry for each query that is being answered

	udp net.PacketConn
	tcp net.Listener
}

// Listen opens the sockets of a server that answers nothing before Serve.
func Listen(cfg Config) (*Server, error) {
	if cfg.Dialer == nil {
		return nil, errors.New("dns: a dialer is required")
	}
	if len(cfg.Allow) == 0 {
		return nil, fmt.Errorf("dns: listen on %s: nobody may ask; list prefixes in allow", cfg.Listen)
	}
	if cfg.Rate <= 0 {
		cfg.Rate = defaultRate
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics, _ = NewMetrics(nil)
	}
	s := &Server{cfg: cfg, log: cfg.Logger.With("vnet", cfg.VNet), metrics: cfg.Metrics, cache: newCache(maxCached), waiting: make(chan struct{}, maxWaiting)}
	s.gate = &gate{allow: cfg.Allow, limiter: limiter{rate: float64(cfg.Rate)},
		denied: s.metrics.queries.WithLabelValues("denied").Inc, limited: s.metrics.queries.WithLabelValues("limited").Inc}
	var err error
	if s.udp, s.tcp, err = listen(cfg.Listen); err != nil {
		return nil, fmt.Errorf("dns: %w", err)
	}
	return s, nil
}

// listen opens both sockets on one port. For port 0 that is one that is free for both.
func listen(addr string) (net.PacketConn, net.Listener, error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, nil, err
	}
	for tries := 1; ; tries++ {
		udp, err := net.ListenPacket("udp", addr)
		if err != nil {
			return nil, nil, err
		}
		tcp, err := net.Listen("tcp", udp.LocalAddr().String())
		if err == nil {
			return udp, tcp, nil
		}
		if err = errors.Join(err, udp.Close()); port != "0" || tries == 10 {
			return nil, nil, err
		}
	}
}

// Addr is where the server listens.
func (s *Server) Addr() netip.AddrPort { return s.udp.LocalAddr().(*net.UDPAddr).AddrPort() }

// Close closes the sockets of a server that does not serve.
func (s *Server) Close() error { return errors.Join(s.udp.Close(), s.tcp.Close()) }

// Serve answers until ctx ends. On return nothing is left running. The error is nil after that, and says otherwise which
// socket failed.
func (s *Server) Serve(ctx context.Context) error {
	run, cancel := context.WithCancel(ctx)
	defer cancel()
	handler := mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) { s.handle(run, w, q) })
	gated := func(r mdns.Reader) mdns.Reader { return gatedReader{r, s.gate} }
	udp := &mdns.Server{PacketConn: s.udp, Handler: handler, UDPSize: mdns.MinMsgSize * 8, MsgAcceptFunc: accept, DecorateReader: gated}
	tcp := &mdns.Server{Listener: netutil.LimitListener(gatedListener{s.tcp, s.gate}, maxTCP), DecorateReader: gated, Handler: handler, MaxTCPQueries: maxTCPQueries, MsgAcceptFunc: accept,
		ReadTimeout: tcpTimeout, WriteTimeout: tcpTimeout, IdleTimeout: func() time.Duration { return tcpTimeout }}
	errs := make(chan error, 2)
	var wg sync.WaitGroup
	for _, srv := range []*mdns.Server{udp, tcp} {
		started := make(chan struct{})
		srv.NotifyStartedFunc = sync.OnceFunc(func() { close(started) })
		wg.Go(func() {
			err := srv.ActivateAndServe()
			srv.NotifyStartedFunc()
			errs <- err
		})
		<-started
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	cancel()
	for _, srv := range []*mdns.Server{udp, tcp} {
		srv.ShutdownContext(context.Background()) //nolint:errcheck // one of them may have ended by itself
	}
	wg.Wait()
	s.asking.wait()
	s.Close() //nolint:errcheck // closed already
	if err != nil {
		return fmt.Errorf("dns: serve %s: %w", s.cfg.Listen, err)
	}
	return nil
}

// accept looks at a message's header before the rest is parsed.
func accept(h mdns.Header) mdns.MsgAcceptAction {
	const response = 1 << 15
	if h.Bits&response != 0 {
		return mdns.MsgIgnore // so that two servers cannot keep each other busy
	}
	if opcode := int(h.Bits>>11) & 0xf; opcode != mdns.OpcodeQuery {
		return mdns.MsgRejectNotImplemented
	}
	if h.Qdcount != 1 || h.Ancount != 0 || h.Nscount != 0 || h.Arcount > 2 {
		return mdns.MsgReject
	}
	return mdns.MsgAccept
}

// handle answers one query, which has passed the gate.
func (s *Server) handle(ctx context.Context, w mdns.ResponseWriter, q *mdns.Msg) {
	select {
	case s.waiting <- struct{}{}:
		defer func() { <-s.waiting }()
	default:
		s.gate.limited()
		return
	}
	reply := s.answer(ctx, q)
	s.metrics.queries.WithLabelValues(resultOf(reply.Rcode)).Inc()
	size := mdns.MaxMsgSize
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		size = mdns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = min(max(int(opt.UDPSize()), mdns.MinMsgSize), maxUDPReply)
		}
	}
	reply.Truncate(size)
	if err := w.WriteMsg(reply); err != nil {
		s.log.Debug("DNS reply not sent", "peer", w.RemoteAddr(), "err", err)
	}
}

func resultOf(rcode int) string {
	switch rcode {
	case mdns.RcodeSuccess:
		return "ok"
	case mdns.RcodeNameError:
		return "name_error"
	case mdns.RcodeRefused:
		return "refused"
	case mdns.RcodeFormatError, mdns.RcodeNotImplemented, mdns.RcodeBadVers:
		return "malformed"
	}
	return "failed"
}
