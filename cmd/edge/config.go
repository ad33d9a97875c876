package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"reflect"
	"slices"
	"strconv"
	"time"

	"github.com/keyhaven/keyhaven/edge"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/internal/tracing"
	"github.com/keyhaven/keyhaven/mtls"
)

const (
	defaultConfig = "/etc/keyhaven/edge.yaml"
	defaultSocket = "/run/keyhaven/edge.sock"
	envPrefix     = "KEYHAVEN_EDGE"
)

// config is the whole configuration. What can change while the edge runs are the zones, the key server groups, the limits
// towards origins and the operators; [fixed] names the rest.
type config struct {
	State       stateConfig    `mapstructure:"state"`
	Admin       adminConfig    `mapstructure:"admin"`
	Identity    identityConfig `mapstructure:"identity"`
	KeyIdentity keyIdentity    `mapstructure:"key_identity"`
	Tunnel      tunnelConfig   `mapstructure:"tunnel"`
	Ops         opsConfig      `mapstructure:"ops"`
	Tracing     tracing.Config `mapstructure:"tracing"`
	Visitors    edge.Config    `mapstructure:"visitors"`
	DNS         []dnsConfig    `mapstructure:"dns"`
}

type adminConfig struct {
	Socket    string   `mapstructure:"socket"`
	Listen    string   `mapstructure:"listen"`    // host:port of HTTPS with mutual TLS; empty: not served
	Operators []string `mapstructure:"operators"` // names of those who may come in there; empty admits nobody
}

type identityConfig struct {
	CADir string `mapstructure:"ca_dir"` // the edge operator's authority, made by "ca init"
	Dir   string `mapstructure:"dir"`    // this edge's own certificate, made by "ca issue edge"
}

type keyIdentity struct {
	Dir string `mapstructure:"dir"` // certificate from the key owner; empty if every key server group has its own
}

type tunnelConfig struct {
	Listen            string        `mapstructure:"listen"`             // host:port, UDP
	ListenTCP         string        `mapstructure:"listen_tcp"`         // host:port, TCP; empty: as Listen; "off": none
	BulkCarrier       string        `mapstructure:"bulk_carrier"`       // auto, quic or tcp
	Advertise         []string      `mapstructure:"advertise"`          // host:port addresses that connectors dial
	ConnectorLifetime time.Duration `mapstructure:"connector_lifetime"` // of connectors' certificates
	DrainTimeout      time.Duration `mapstructure:"drain_timeout"`      // for open flows when the edge stops
}

type opsConfig struct {
	Listen           string `mapstructure:"listen"` // empty: not served
	AllowNonLoopback bool   `mapstructure:"allow_non_loopback"`
}

// listenOff stands for no listener where an empty value means the default one.
const listenOff = "off"

// tcpAddr is the address for connectors that come over TCP, as [tunnel.ListenConfig] takes it.
func (t *tunnelConfig) tcpAddr() string {
	if t.ListenTCP == listenOff {
		return "-"
	}
	return t.ListenTCP
}

func defaults() *config {
	return &config{
		State:    stateConfig{File: defaultState, Etcd: etcdConfig{Prefix: defaultPrefix, Timeout: 5 * time.Second}},
		Admin:    adminConfig{Socket: defaultSocket},
		Identity: identityConfig{CADir: "/etc/keyhaven/edge-ca", Dir: "/etc/keyhaven/edge-identity"},
		Tunnel:   tunnelConfig{Listen: ":7844", BulkCarrier: "auto", ConnectorLifetime: 24 * time.Hour, DrainTimeout: 30 * time.Second},
		Tracing:  tracing.Defaults(),
		Visitors: edge.Defaults(),
	}
}

// load reads and checks the configuration without touching the system beyond the files that it names. The remarks are
// for people, and stop nothing; [edge.New] and [edge.Server.Reload] log them themselves.
func load(path string) (cfg *config, remarks []string, err error) {
	cfg = defaults()
	file, err := conf.Load(cfg, conf.Options{Path: path, EnvPrefix: envPrefix, EnvOthers: []string{envPrefix + "_SOCKET", envPrefix + "_SERVER", envPrefix + "_OPERATOR"}})
	if err != nil {
		return nil, nil, err
	}
	var errs conf.Errors
	errorf := func(key, format string, args ...any) { errs = append(errs, file.Errorf(key, format, args...)) }
	cfg.validate(errorf)
	remarks = cfg.Visitors.Validate(func(key, format string, args ...any) { errorf("visitors."+key, format, args...) })
	if _, err := openIdentities(cfg, nil); err != nil {
		if e, ok := errors.AsType[*keyError](err); ok {
			errorf(e.key, "%v", e.err)
		} else {
			errs = append(errs, err)
		}
	}
	if err := errs.Err(); err != nil {
		return nil, remarks, err
	}
	return cfg, remarks, nil
}

func (c *config) validate(errorf func(key, format string, args ...any)) {
	if err := c.Tracing.Check(); err != nil {
		errorf("tracing.otlp_endpoint", "%v", err)
	}
	if r := c.Tracing.SampleRatio; !(r >= 0 && r <= 1) {
		errorf("tracing.sample_ratio", "%v is no share; write 0 to 1", r)
	}
	c.State.validate(errorf)
	c.compileDNS(errorf)
	c.Admin.validate(errorf)
	if err := hostPort(c.Tunnel.Listen, true); err != nil {
		errorf("tunnel.listen", "%v", err)
	}
	if a := c.Tunnel.ListenTCP; a != "" && a != listenOff {
		if err := hostPort(a, true); err != nil {
			errorf("tunnel.listen_tcp", "%v; or write %q for none", err, listenOff)
		}
	}
	if b := c.Tunnel.BulkCarrier; b != control.BulkAuto && b != control.BulkQUIC && b != control.BulkTCP {
		errorf("tunnel.bulk_carrier", "%q is none of auto, quic and tcp", b)
	}
	if len(c.Tunnel.Advertise) == 0 {
		errorf("tunnel.advertise", "is empty; give the host:port at which connectors reach this edge, such as edge1.example.com:7844")
	}
	if len(c.Tunnel.Advertise) > 8 {
		errorf("tunnel.advertise", "has %d addresses; the limit is 8", len(c.Tunnel.Advertise))
	}
	for i, a := range c.Tunnel.Advertise {
		if err := hostPort(a, false); err != nil {
			errorf(fmt.Sprintf("tunnel.advertise[%d]", i), "%v", err)
		}
	}
	if c.Tunnel.ConnectorLifetime < time.Minute || c.Tunnel.ConnectorLifetime > 90*24*time.Hour {
		errorf("tunnel.connector_lifetime", "must lie between 1m and 2160h, have %s", c.Tunnel.ConnectorLifetime)
	}
	if c.Tunnel.DrainTimeout <= 0 {
		errorf("tunnel.drain_timeout", "must be positive, have %s", c.Tunnel.DrainTimeout)
	}
	if err := ops.CheckAddr(c.Ops.Listen, c.Ops.AllowNonLoopback); err != nil {
		errorf("ops.listen", "%v", err)
	}
	c.validateKeyIdentity(errorf)
}

func (a *adminConfig) validate(errorf func(key, format string, args ...any)) {
	if a.Socket == "" {
		errorf("admin.socket", "is empty; name the socket for administration")
	} else if len(a.Socket) > 100 {
		errorf("admin.socket", "has %d bytes; the system takes up to about 100", len(a.Socket))
	}
	if a.Listen != "" {
		if err := hostPort(a.Listen, true); err != nil {
			errorf("admin.listen", "%v", err)
		}
		if len(a.Operators) == 0 {
			errorf("admin.operators", "is empty, so nobody could come in at admin.listen; name the operators, or leave admin.listen out")
		}
	}
	for i, name := range a.Operators {
		if err := (mtls.Identity{TrustDomain: "x", Kind: mtls.KindOperator, Name: name}).Validate(); err != nil {
			errorf(fmt.Sprintf("admin.operators[%d]", i), "%v; write the name alone, as in 'ca issue operator NAME'", err)
		}
	}
}

// fixed leaves out what can change while the edge runs.
func (a adminConfig) fixed() adminConfig {
	a.Operators = nil
	return a
}

func (c *config) validateKeyIdentity(errorf func(key, format string, args ...any)) {
	for i, g := range c.Visitors.KeyServers {
		if c.KeyIdentity.Dir == "" && g.Identity == "" {
			errorf(fmt.Sprintf("visitors.key_servers[%d]", i), "the group has no client certificate; set key_identity.dir, or the group's own identity")
		}
	}
}

// hostPort checks an address; an address to listen on may lack the host and have port 0.
func hostPort(addr string, listen bool) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not host:port: %w", addr, err)
	}
	if host == "" && !listen {
		return fmt.Errorf("%q has no host", addr)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 && !listen {
		return fmt.Errorf("%q has no port from 1 to 65535", addr)
	}
	return nil
}

// fixed names the sections that differ between two configurations and cannot change without a restart.
func fixed(old, new *config) (changed []string) {
	for _, s := range []struct {
		name     string
		old, new any
	}{
		{"state", old.State, new.State}, {"admin (but its operators)", old.Admin.fixed(), new.Admin.fixed()}, {"identity", old.Identity, new.Identity},
		{"key_identity", old.KeyIdentity, new.KeyIdentity}, {"tunnel", old.Tunnel, new.Tunnel}, {"ops", old.Ops, new.Ops}, {"tracing", old.Tracing, new.Tracing}, {"dns", old.DNS, new.DNS},
		{"visitors.listen", old.Visitors.Listen, new.Visitors.Listen}, {"visitors.tickets", old.Visitors.Tickets, new.Visitors.Tickets},
		{"visitors.limits (but those of origins)", old.Visitors.Limits.Fixed(), new.Visitors.Limits.Fixed()},
	} {
		if !reflect.DeepEqual(s.old, s.new) {
			changed = append(changed, s.name)
		}
	}
	return changed
}

// vnetRefs returns the names and ids of the networks that the configuration uses, the default network left out.
func (c *config) vnetRefs() (refs []string) {
	add := func(ref string) {
		if ref != "" && !slices.Contains(refs, ref) {
			refs = append(refs, ref)
		}
	}
	for _, g := range c.Visitors.KeyServers {
		add(g.VNet)
	}
	for _, d := range c.DNS {
		add(d.VNet)
	}
	for _, z := range c.Visitors.Zones {
		for _, o := range z.Origins {
			add(o.VNet)
		}
	}
	for _, p := range c.Visitors.Pools {
		for _, e := range p.Endpoints {
			add(e.VNet)
		}
	}
	for _, p := range c.Visitors.Ports {
		add(p.VNet)
	}
	return refs
}

// local is what the control is to know of the configuration.
func (c *config) local() control.Local {
	l := control.Local{Users: c.users}
	for _, g := range c.Visitors.KeyServers {
		l.KeyServers = append(l.KeyServers, g.Name)
	}
	return l
}

// users describes what in the configuration uses a thing.
func (c *config) users(thing control.Thing, name, id string) (users []string) {
	uses := func(is control.Thing, ref string) bool { return is == thing && ref != "" && (ref == name || ref == id) }
	for _, g := range c.Visitors.KeyServers {
		if uses(control.ThingVNet, g.VNet) || uses(control.ThingPool, g.Pool) {
			users = append(users, fmt.Sprintf("key server group %q of the configuration file", g.Name))
		}
	}
	for _, z := range c.Visitors.Zones {
		if slices.ContainsFunc(z.Origins, func(o zone.Origin) bool {
			return uses(control.ThingVNet, o.VNet) || uses(control.ThingTunnel, o.Tunnel) || uses(control.ThingPool, o.Pool)
		}) {
			users = append(users, fmt.Sprintf("zone %q of the configuration file", z.Name))
		}
	}
	for _, p := range c.Visitors.Pools {
		if slices.ContainsFunc(p.Endpoints, func(e spec.Endpoint) bool { return uses(control.ThingVNet, e.VNet) }) {
			users = append(users, fmt.Sprintf("pool %q of the configuration file", p.Name))
		}
	}
	for _, p := range c.Visitors.Ports {
		if uses(control.ThingVNet, p.VNet) || uses(control.ThingTunnel, p.Tunnel) || uses(control.ThingPool, p.Pool) {
			users = append(users, fmt.Sprintf("port %q of the configuration file", p.Name))
		}
	}
	return users
}

// identities are the certificates that an edge works with.
type identities struct {
	authority *mtls.Authority
	own       *mtls.Source
	key       *mtls.Source // nil if there is none
}

// keyError is a fault of what a key of the configuration names.
type keyError struct {
	key string
	err error
}

func (e *keyError) Error() string { return e.key + ": " + e.err.Error() }
func (e *keyError) Unwrap() error { return e.err }

func openIdentities(cfg *config, log *slog.Logger) (identities, error) {
	var ids identities
	var err error
	if ids.authority, err = mtls.OpenAuthority(cfg.Identity.CADir); err != nil {
		return ids, &keyError{"identity.ca_dir", remedy(err, "make one with 'keyhaven-edge ca init'")}
	}
	if ids.own, err = mtls.OpenDir(cfg.Identity.Dir, log); err != nil {
		return ids, &keyError{"identity.dir", remedy(err, "make one with 'keyhaven-edge ca issue edge'")}
	}
	if err := ids.checkOwn(); err != nil {
		return ids, &keyError{"identity.dir", err}
	}
	if cfg.KeyIdentity.Dir == "" {
		return ids, nil
	}
	if ids.key, err = mtls.OpenDir(cfg.KeyIdentity.Dir, log); err != nil {
		return ids, &keyError{"key_identity.dir", remedy(err, "make a request with 'keyhaven-edge key-identity request', which the key owner certifies with 'keyhaven-keyserver client add --csr'")}
	}
	if id := ids.key.Identity(); id.Kind != mtls.KindEdge {
		return ids, &keyError{"key_identity.dir", fmt.Errorf("holds the identity %s; an edge's is needed", id)}
	}
	return ids, nil
}

func remedy(err error, what string) error {
	return fmt.Errorf("%w; %s", err, what)
}

func (ids identities) checkOwn() error {
	id := ids.own.Identity()
	if id.Kind != mtls.KindEdge {
		return fmt.Errorf("holds the identity %s; an edge's is needed", id)
	}
	if id.TrustDomain != ids.authority.TrustDomain() {
		return fmt.Errorf("holds the identity %s, which is not of the authority's trust domain %s", id, ids.authority.TrustDomain())
	}
	return nil
}
