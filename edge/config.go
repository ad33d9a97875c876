package edge

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/edge/proxyproto"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/mtls"
)

// Config is the visitor part of an edge's configuration. Start from [Defaults]; the zero value has no limits set and does
// not validate.
type Config struct {
	Listen     Listen        `mapstructure:"listen"`
	Limits     Limits        `mapstructure:"limits"`
	Tickets    Tickets       `mapstructure:"tickets"`
	KeyServers []KeyServer   `mapstructure:"key_servers"`
	Zones      []zone.Config `mapstructure:"zones"`
	// Pools and Ports stand beside those of the control plane; see [Server.Publish].
	Pools []spec.PoolConfig `mapstructure:"pools"`
	Ports []spec.PortConfig `mapstructure:"ports"`
}

// Listen says where visitors arrive. Changing it needs a restart.
type Listen struct {
	// TLS holds the host:port addresses for TLS over TCP. At least one.
	TLS []string `mapstructure:"tls"`
	// HTTP3 adds a QUIC listener on the UDP port of each TLS address.
	HTTP3 bool `mapstructure:"http3"`
	// Redirect holds host:port addresses that answer plain HTTP with a redirect to https. May be empty.
	Redirect []string `mapstructure:"redirect"`
	// PublicPort is the port that visitors dial, for Alt-Svc and redirects, where it differs from the port of the
	// listener (port forwarding). If zero, the port of the first TLS listener.
	PublicPort int `mapstructure:"public_port"`
	// ProxyProtocolFrom holds the prefixes of load balancers whose connections begin with a PROXY protocol header, which
	// names the visitor. From them a connection without one is refused; from all others nothing is believed. HTTP/3 has no
	// such header.
	ProxyProtocolFrom []string `mapstructure:"proxy_protocol_from"`
}

// Limits bounds what one visitor can hold. Every field but OriginResponseTimeout must be positive.
type Limits struct {
	Connections           int           `mapstructure:"connections"`             // per listener: of TCP, further ones wait in the kernel's queue; of QUIC, further ones are refused
	ConnectionsPerAddress int           `mapstructure:"connections_per_address"` // per listener and IPv4 address or IPv6 /64; further ones are closed
	HandshakeTimeout      time.Duration `mapstructure:"handshake_timeout"`       // from accept to the end of the TLS handshake
	HeaderTimeout         time.Duration `mapstructure:"header_timeout"`          // for the whole header of a request
	HeaderBytes           int           `mapstructure:"header_bytes"`            // of a request's header
	IdleTimeout           time.Duration `mapstructure:"idle_timeout"`            // between requests of a connection
	BodyIdleTimeout       time.Duration `mapstructure:"body_idle_timeout"`       // for a visitor to send the next part of a body, or to take that of a response; open streams may be silent
	Streams               int           `mapstructure:"streams"`                 // concurrent requests on one HTTP/2 or HTTP/3 connection
	OriginConnectTimeout  time.Duration `mapstructure:"origin_connect_timeout"`  // to reach an origin through the tunnel
	OriginResponseTimeout time.Duration `mapstructure:"origin_response_timeout"` // for an origin's response header; zero: none
	OriginConnections     int           `mapstructure:"origin_connections"`      // idle connections kept per origin
	DrainTimeout          time.Duration `mapstructure:"drain_timeout"`           // for requests in flight when the edge stops
}

// Fixed returns the limits that a running server cannot change; the others, those towards origins, are zero.
func (l Limits) Fixed() Limits {
	l.OriginConnectTimeout, l.OriginResponseTimeout, l.OriginConnections = 0, 0, 0
	return l
}

// Tickets governs session resumption.
type Tickets struct {
	Rotate      time.Duration `mapstructure:"rotate"`      // age at which a new key is made
	Generations int           `mapstructure:"generations"` // keys that are accepted, the current one included
}

// KeyServer is a group of key servers that hold the same keys. All servers of a group are equal.
type KeyServer struct {
	// Name is what zones refer to.
	Name string `mapstructure:"name"`
	// VNet is the virtual network of the servers' addresses. Empty means the default network.
	VNet string `mapstructure:"vnet"`
	// Servers holds host:port addresses.
	Servers []string `mapstructure:"servers"`
	// Pool names a pool whose endpoints are the servers, in place of Servers and VNet. Those that are down come last.
	Pool string `mapstructure:"pool"`
	// Monitor watches Servers. Those that are down come last.
	Monitor *spec.Monitor `mapstructure:"monitor"`
	// Expect holds the identities (URI SANs) that a server of the group may have. At least one.
	Expect []string `mapstructure:"expect"`
	// Connections is the number of connections to each server. If zero, 2.
	Connections int `mapstructure:"connections"`
	// Timeout bounds one signature, a retry included. It must stay below 3 s, because a slow signer stalls the whole
	// QUIC connection of a visitor. If zero, 2 s.
	Timeout time.Duration `mapstructure:"timeout"`
	// Identity is the directory of the client certificate for this group (cert.pem, key.pem, ca.pem), where the key owner
	// differs from that of [Deps.KeyIdentity].
	Identity string `mapstructure:"identity"`
}

// maxSignTimeout is where a signature's deadline must stay below: clients of QUIC give up a silent handshake at 5 s.
const maxSignTimeout = 3 * time.Second

const (
	defaultSignTimeout = 2 * time.Second
	defaultKeyConns    = 2
)

// Defaults returns a configuration with every limit set and no listener, key server or zone.
func Defaults() Config {
	return Config{
		Listen: Listen{HTTP3: true},
		Limits: Limits{
			Connections:           20_000,
			ConnectionsPerAddress: 1_000,
			HandshakeTimeout:      10 * time.Second,
			HeaderTimeout:         10 * time.Second,
			HeaderBytes:           64 << 10,
			IdleTimeout:           2 * time.Minute,
			BodyIdleTimeout:       time.Minute,
			Streams:               250,
			OriginConnectTimeout:  10 * time.Second,
			OriginResponseTimeout: 100 * time.Second,
			OriginConnections:     64,
			DrainTimeout:          30 * time.Second,
		},
		Tickets: Tickets{Rotate: 12 * time.Hour, Generations: 3},
	}
}

// Validate reports every fault to errorf, with the key relative to this section ("zones[1].hosts[0]"), and returns
// remarks that do not stop the edge, such as a certificate about to expire. It reads the certificate files and opens no
// socket.
func (c *Config) Validate(errorf func(key, format string, args ...any)) (warnings []string) {
	_, warnings = c.validate(errorf)
	return warnings
}

// compile is Validate with the zones that are sound, and the faults joined into one error.
func (c *Config) compile() (zones []*zone.Zone, warnings []string, err error) {
	var errs []error
	zones, warnings = c.validate(func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	})
	return zones, warnings, errors.Join(errs...)
}

func (c *Config) validate(errorf func(key, format string, args ...any)) (zones []*zone.Zone, warnings []string) {
	c.Listen.validate(errorf)
	c.Limits.validate(errorf)
	if c.Tickets.Rotate < time.Minute || c.Tickets.Rotate > 72*time.Hour {
		errorf("tickets.rotate", "must lie between 1m and 72h, have %v", c.Tickets.Rotate)
	}
	if c.Tickets.Generations < 1 || c.Tickets.Generations > 16 {
		errorf("tickets.generations", "must lie between 1 and 16, have %d", c.Tickets.Generations)
	}
	groups := make(map[string]bool, len(c.KeyServers))
	for i := range c.KeyServers {
		c.KeyServers[i].validate(fmt.Sprintf("key_servers[%d]", i), groups, errorf)
	}
	for i, errs := range spec.CheckPools(c.Pools) {
		report(errorf, fmt.Sprintf("pools[%d].", i), errs)
	}
	for i := range c.Ports {
		report(errorf, fmt.Sprintf("ports[%d].", i), c.Ports[i].Validate())
		if slices.ContainsFunc(c.Ports[:i], func(p spec.PortConfig) bool { return p.Name == c.Ports[i].Name }) {
			errorf(fmt.Sprintf("ports[%d].name", i), "%q names two ports", c.Ports[i].Name)
		}
	}
	return zone.Compile("zones", c.Zones, func(group string) bool { return groups[group] }, errorf)
}

// report passes on faults of a value at a key that ends with a dot.
func report(errorf func(key, format string, args ...any), at string, errs []error) {
	for _, err := range errs {
		if f, ok := errors.AsType[*spec.FieldError](err); ok {
			errorf(at+f.Field, "%s", f.Text)
		} else {
			errorf(strings.TrimSuffix(at, "."), "%v", err)
		}
	}
}

func (l *Listen) validate(errorf func(key, format string, args ...any)) {
	if len(l.TLS) == 0 {
		errorf("listen.tls", "no address to listen on; give at least one, such as \":443\"")
	}
	for i, a := range l.TLS {
		if err := checkAddr(a, false); err != nil {
			errorf(fmt.Sprintf("listen.tls[%d]", i), "%v", err)
		}
	}
	for i, a := range l.Redirect {
		key := fmt.Sprintf("listen.redirect[%d]", i)
		if err := checkAddr(a, false); err != nil {
			errorf(key, "%v", err)
		} else if slices.Contains(l.TLS, a) && !strings.HasSuffix(a, ":0") {
			errorf(key, "%s is a TLS listener already; plain HTTP needs a port of its own, such as \":80\"", a)
		}
	}
	for i, a := range l.ProxyProtocolFrom {
		if _, err := proxyproto.ParseTrust([]string{a}); err != nil {
			errorf(fmt.Sprintf("listen.proxy_protocol_from[%d]", i), "%v", err)
		}
	}
	if l.PublicPort < 0 || l.PublicPort > 65535 {
		errorf("listen.public_port", "%d is not a port", l.PublicPort)
	}
}

func (l *Limits) validate(errorf func(key, format string, args ...any)) {
	for _, n := range []struct {
		key   string
		value int
	}{
		{"connections", l.Connections}, {"connections_per_address", l.ConnectionsPerAddress}, {"header_bytes", l.HeaderBytes},
		{"streams", l.Streams}, {"origin_connections", l.OriginConnections},
	} {
		if n.value <= 0 {
			errorf("limits."+n.key, "must be positive, have %d", n.value)
		}
	}
	for _, d := range []struct {
		key   string
		value time.Duration
	}{
		{"handshake_timeout", l.HandshakeTimeout}, {"header_timeout", l.HeaderTimeout}, {"idle_timeout", l.IdleTimeout},
		{"body_idle_timeout", l.BodyIdleTimeout},
		{"origin_connect_timeout", l.OriginConnectTimeout}, {"drain_timeout", l.DrainTimeout},
	} {
		if d.value <= 0 {
			errorf("limits."+d.key, "must be positive, have %v", d.value)
		}
	}
	if l.OriginResponseTimeout < 0 {
		errorf("limits.origin_response_timeout", "must not be negative, have %v; \"0s\" means no limit", l.OriginResponseTimeout)
	}
}

func (k *KeyServer) validate(at string, groups map[string]bool, errorf func(key, format string, args ...any)) {
	switch {
	case k.Name == "":
		errorf(at+".name", "the group has no name; zones refer to it by name")
	case groups[k.Name]:
		errorf(at+".name", "%q names two groups", k.Name)
	default:
		groups[k.Name] = true
	}
	switch {
	case k.Pool != "" && (len(k.Servers) > 0 || k.VNet != "" || k.Monitor != nil):
		errorf(at+".pool", "stands in place of servers, vnet and monitor; the pool has its own")
	case k.Pool == "" && len(k.Servers) == 0:
		errorf(at+".servers", "no server; give at least one host:port, or a pool")
	}
	if k.Monitor != nil && len(k.Servers) > 0 {
		p := k.ownPool()
		for _, err := range p.Validate() {
			if f, ok := errors.AsType[*spec.FieldError](err); ok && strings.HasPrefix(f.Field, "monitor.") {
				errorf(at+"."+f.Field, "%s", f.Text)
			}
		}
	}
	for i, s := range k.Servers {
		if err := checkAddr(s, true); err != nil {
			errorf(fmt.Sprintf("%s.servers[%d]", at, i), "%v", err)
		}
	}
	if len(k.Expect) == 0 {
		errorf(at+".expect", "no identity is expected, so no key server would be trusted; give its URI, such as spiffe://owner.example/keyserver/hsm1")
	}
	for i, e := range k.Expect {
		if id, err := mtls.ParseIdentity(e); err != nil {
			errorf(fmt.Sprintf("%s.expect[%d]", at, i), "%v", err)
		} else if id.Kind != mtls.KindKeyServer {
			errorf(fmt.Sprintf("%s.expect[%d]", at, i), "%s is of kind %q; a key server's identity is spiffe://<trust-domain>/keyserver/<name>", e, id.Kind)
		}
	}
	if k.Connections < 0 || k.Connections > 64 {
		errorf(at+".connections", "must lie between 1 and 64, have %d", k.Connections)
	}
	if k.Timeout < 0 || k.Timeout >= maxSignTimeout {
		errorf(at+".timeout", "must lie below %v, have %v: a slow signer stalls a visitor's whole QUIC connection", maxSignTimeout, k.Timeout)
	}
}

// checkAddr checks a host:port; the host may be empty unless needHost.
func checkAddr(addr string, needHost bool) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not host:port: %w", addr, err)
	}
	if needHost && host == "" {
		return fmt.Errorf("%q has no host", addr)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || (needHost && n == 0) {
		return fmt.Errorf("%q: port %q is not a number from 1 to 65535", addr, port)
	}
	return nil
}
