package spec

import (
	"net"
	"time"
)

// Ways to choose an endpoint of a pool, for [PoolConfig.Steering].
const (
	SteerRandom           = "random"            // by weight
	SteerRoundRobin       = "round_robin"       // by weight, in turn
	SteerHash             = "hash"              // by the visitor's address and weight; few visitors move when endpoints change
	SteerLeastRequests    = "least_requests"    // fewest outstanding requests for their weight
	SteerLeastConnections = "least_connections" // fewest open connections for their weight
)

// Ways to choose a member of a pool of pools, for [PoolConfig.PoolSteering]. SteerRandom and SteerLeastRequests are such
// ways too.
const (
	SteerFailover = "failover" // the first healthy one
	SteerLatency  = "latency"  // the one whose probes took the least time of late
)

// Kinds of affinity, for [Affinity.Type].
const (
	AffinityNone     = "none"
	AffinityCookie   = "cookie"
	AffinityIPCookie = "ip_cookie" // a cookie, whose first endpoint follows from the visitor's address
	AffinityHeader   = "header"
)

// Kinds of monitors, for [Monitor.Type].
const (
	MonitorHTTP  = "http"
	MonitorHTTPS = "https"
	MonitorTCP   = "tcp"
	MonitorICMP  = "icmp"
)

// Versions of the PROXY protocol.
const (
	ProxyV1 = "v1"
	ProxyV2 = "v2"
)

// A PoolConfig is a set of endpoints, or of other pools, among which requests and connections are shared out. It has
// endpoints or members, not both.
type PoolConfig struct {
	// Name is what origins, ports, key server groups and other pools refer to.
	Name string `mapstructure:"name" json:"name"`
	// Endpoints are the servers of the pool.
	Endpoints []Endpoint `mapstructure:"endpoints" json:"endpoints,omitempty"`
	// Steering is how one of Endpoints is chosen. Empty means random.
	Steering string `mapstructure:"steering" json:"steering,omitempty"`
	// Monitor watches the endpoints. Without one they are not steered by health.
	Monitor *Monitor `mapstructure:"monitor" json:"monitor,omitempty"`
	// Minimum is how many healthy endpoints make the pool healthy. If zero, 1.
	Minimum int `mapstructure:"minimum" json:"minimum,omitempty"`
	// Next is the pool that takes over while this one is not healthy.
	Next string `mapstructure:"next" json:"next,omitempty"`
	// Members are other pools, in order, for a pool of pools.
	Members []string `mapstructure:"members" json:"members,omitempty"`
	// PoolSteering is how one of Members is chosen. Empty means failover.
	PoolSteering string `mapstructure:"pool_steering" json:"pool_steering,omitempty"`
	// Affinity keeps a visitor at one endpoint.
	Affinity *Affinity `mapstructure:"affinity" json:"affinity,omitempty"`
	// ProxyProtocol tells the endpoints the visitor's address: "", "v1" or "v2". Each visitor's connection then has one
	// of its own to the endpoint.
	ProxyProtocol string `mapstructure:"proxy_protocol" json:"proxy_protocol,omitempty"`
}

// An Endpoint is one server of a pool.
type Endpoint struct {
	// Name is the endpoint's in metrics and commands; unique in the pool. Empty means host:port.
	Name string `mapstructure:"name" json:"name,omitempty"`
	// VNet is the virtual network of Host, name or id. Empty means the default network.
	VNet string `mapstructure:"vnet" json:"vnet,omitempty"`
	// Host is an address or a host name.
	Host string `mapstructure:"host" json:"host"`
	// Port is where the service listens.
	Port uint16 `mapstructure:"port" json:"port"`
	// Weight is the endpoint's share, from 0 to 1. Nil means 1. An endpoint of weight 0 gets what affinity sends to it, and
	// what nobody else can take.
	Weight *float64 `mapstructure:"weight" json:"weight,omitempty"`
	// HostHeader replaces the Host header that the endpoint sees.
	HostHeader string `mapstructure:"host_header" json:"host_header,omitempty"`
	// Connector, name or id, makes the endpoint one that is reached through that connector alone.
	Connector string `mapstructure:"connector" json:"connector,omitempty"`
	// Disabled takes the endpoint out at once. What is in flight ends in peace.
	Disabled bool `mapstructure:"disabled" json:"disabled,omitempty"`
	// Drain gives the endpoint no new visitors: only those whom affinity sends to it.
	Drain bool `mapstructure:"drain" json:"drain,omitempty"`
}

// Addr returns host:port.
func (e *Endpoint) Addr() string { return net.JoinHostPort(e.Host, port(e.Port)) }

// Label returns the name in metrics and commands.
func (e *Endpoint) Label() string {
	if e.Name != "" {
		return e.Name
	}
	if e.VNet != "" {
		return e.VNet + "/" + e.Addr()
	}
	return e.Addr()
}

// Share returns the weight.
func (e *Endpoint) Share() float64 {
	if e.Weight == nil {
		return 1
	}
	return *e.Weight
}

// A Monitor probes the endpoints of a pool through the tunnel, from every edge.
type Monitor struct {
	// Type is "http", "https", "tcp" or "icmp".
	Type string `mapstructure:"type" json:"type"`
	// Method is that of HTTP probes. Empty means GET.
	Method string `mapstructure:"method" json:"method,omitempty"`
	// Path is that of HTTP probes. Empty means "/".
	Path string `mapstructure:"path" json:"path,omitempty"`
	// Port is probed instead of the endpoint's. Zero means the endpoint's.
	Port uint16 `mapstructure:"port" json:"port,omitempty"`
	// HostHeader is the Host of HTTP probes. Empty means the endpoint's.
	HostHeader string `mapstructure:"host_header" json:"host_header,omitempty"`
	// Headers are further headers of HTTP probes.
	Headers map[string]string `mapstructure:"headers" json:"headers,omitempty"`
	// Expect holds the status codes of a good answer, such as "200" or "200-399", with commas between several. Empty means "200-399".
	Expect string `mapstructure:"expect" json:"expect,omitempty"`
	// Body is a text that must stand in the first 64 KiB of the answer.
	Body string `mapstructure:"body" json:"body,omitempty"`
	// FollowRedirects judges the answer that redirects within the endpoint lead to.
	FollowRedirects bool `mapstructure:"follow_redirects" json:"follow_redirects,omitempty"`
	// VerifyTLS verifies the certificate of https endpoints for the host header with the system's roots. Without it any will do.
	VerifyTLS bool `mapstructure:"verify_tls" json:"verify_tls,omitempty"`
	// Interval is the time between probes. Zero means 10s.
	Interval Duration `mapstructure:"interval" json:"interval,omitzero"`
	// Timeout bounds one probe. Zero means 5s, or Interval if that is shorter.
	Timeout Duration `mapstructure:"timeout" json:"timeout,omitzero"`
	// Retries is how often a failed probe is repeated at once before it counts.
	Retries int `mapstructure:"retries" json:"retries,omitempty"`
	// Up is how many good probes in a row make an endpoint healthy. Zero means 1.
	Up int `mapstructure:"up" json:"up,omitempty"`
	// Down is how many failed probes in a row make it unhealthy. Zero means 1.
	Down int `mapstructure:"down" json:"down,omitempty"`
}

// Affinity keeps a visitor at one endpoint.
type Affinity struct {
	// Type is "none", "cookie", "ip_cookie" or "header".
	Type string `mapstructure:"type" json:"type"`
	// Name is the cookie's or the header's. A cookie's may be left out.
	Name string `mapstructure:"name" json:"name,omitempty"`
	// TTL is how long a cookie is good (23h if zero), or how long a header's value may be idle (30m if zero).
	TTL Duration `mapstructure:"ttl" json:"ttl,omitzero"`
}

// A PortConfig is a public TCP or UDP port that leads to a private service: an address, a pool or a service of a
// connector's ingress.
type PortConfig struct {
	// Name is the port's in metrics and commands.
	Name string `mapstructure:"name" json:"name"`
	// Protocol is "tcp" or "udp".
	Protocol string `mapstructure:"protocol" json:"protocol"`
	// Listen is the public host:port.
	Listen string `mapstructure:"listen" json:"listen"`
	// VNet, Host and Port are the service's address.
	VNet string `mapstructure:"vnet" json:"vnet,omitempty"`
	Host string `mapstructure:"host" json:"host,omitempty"`
	Port uint16 `mapstructure:"port" json:"port,omitempty"`
	// Pool names a pool instead of the address.
	Pool string `mapstructure:"pool" json:"pool,omitempty"`
	// Tunnel, name or id, and Service, the host name of one of its ingress rules, stand instead of the address.
	Tunnel  string `mapstructure:"tunnel" json:"tunnel,omitempty"`
	Service string `mapstructure:"service" json:"service,omitempty"`
	// Allow holds the prefixes of the visitors who may connect. Empty admits nobody.
	Allow []string `mapstructure:"allow" json:"allow,omitempty"`
	// ProxyProtocol tells the service the visitor's address: "", "v1" (TCP) or "v2".
	ProxyProtocol string `mapstructure:"proxy_protocol" json:"proxy_protocol,omitempty"`
	// IdleTimeout ends a connection or session that carries nothing. Zero means 10m for TCP, 1m for UDP.
	IdleTimeout Duration `mapstructure:"idle_timeout" json:"idle_timeout,omitzero"`
	// MaxConnections bounds the connections or sessions at one time. Zero means 10000. One visitor address (IPv6: a /64) has
	// a tenth of them, or 16.
	MaxConnections int `mapstructure:"max_connections" json:"max_connections,omitempty"`
}

// Every is the time between probes.
func (m *Monitor) Every() time.Duration { return m.Interval.D(10 * time.Second) }

// Patience bounds one probe.
func (m *Monitor) Patience() time.Duration { return m.Timeout.D(min(5*time.Second, m.Every())) }
