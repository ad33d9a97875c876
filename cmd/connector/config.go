package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/vnet"
)

// config is the configuration file. Only allow, ingress, ingress_origin and the flow limits can change without a restart.
type config struct {
	Identity  identityConfig  `mapstructure:"identity"`
	Edges     []string        `mapstructure:"edges"`
	Transport transportConfig `mapstructure:"transport"`
	Allow     []allowConfig   `mapstructure:"allow"`
	Limits    limitsConfig    `mapstructure:"limits"`
	DNS       dnsConfig       `mapstructure:"dns"`
	Drain     drainConfig     `mapstructure:"drain"`
	Control   string          `mapstructure:"control"` // path of the control socket; empty: none
	Ops       ops.Config      `mapstructure:"ops"`

	Ingress       []ingressconf.Rule        `mapstructure:"ingress"`
	IngressOrigin ingressconf.OriginOptions `mapstructure:"ingress_origin"`
	RemoteConfig  bool                      `mapstructure:"remote_config"` // the edge may configure the ingress
}

type identityConfig struct {
	Dir string `mapstructure:"dir"` // where join put certificate and key
}

type allowConfig struct {
	To    string `mapstructure:"to"`    // prefix, address, host name or *.host name
	Ports []any  `mapstructure:"ports"` // ports, "first-last", or "*"
	VNet  string `mapstructure:"vnet"`  // id of a virtual network; empty: all
}

type limitsConfig struct {
	MaxFlows    int            `mapstructure:"max_flows"`
	PerVNet     map[string]int `mapstructure:"per_vnet"` // by id of the virtual network
	DialTimeout time.Duration  `mapstructure:"dial_timeout"`
	UDPIdle     time.Duration  `mapstructure:"udp_idle"`
}

type drainConfig struct {
	Grace time.Duration `mapstructure:"grace"`
}

func defaults() *config {
	return &config{
		Transport: transportConfig{Carrier: "auto", BulkSessions: 4},

		Limits: limitsConfig{MaxFlows: 8192, DialTimeout: 10 * time.Second, UDPIdle: 5 * time.Minute},
		Drain:  drainConfig{Grace: 30 * time.Second},

		IngressOrigin: ingressconf.Defaults(),
		RemoteConfig:  true,
	}
}

// joined is what join leaves beside the identity, so that run needs no list of edges.
type joined struct {
	Identity string   `json:"identity"`
	Tunnel   string   `json:"tunnel"`
	Edges    []string `json:"edges"`
}

const joinedFile = "join.json"

// settings are a configuration that was found good.
type settings struct {
	*config
	allow   *connector.Allow
	ingress *ingressconf.Config
	edges   []string

	resolvers map[vnet.ID][]netip.AddrPort
}

// load reads and validates the configuration that the command's flags name. It touches nothing else.
func load(cmd *cobra.Command) (*settings, error) {
	path, err := cmd.Flags().GetString("config")
	if err != nil {
		return nil, err
	}
	c := defaults()
	file, err := conf.Load(c, conf.Options{Path: path, EnvPrefix: "KEYHAVEN_CONNECTOR", EnvOthers: []string{}})
	if err != nil {
		return nil, cli.ConfigError(err)
	}
	s := &settings{config: c}
	errs := s.validate(file)
	if err := errs.Err(); err != nil {
		return nil, cli.ConfigError(err)
	}
	return s, nil
}

func (s *settings) validate(file *conf.File) (errs conf.Errors) {
	fault := func(key, format string, args ...any) { errs = append(errs, file.Errorf(key, format, args...)) }
	if s.Identity.Dir == "" {
		fault("identity.dir", "is missing; name the directory that keyhaven-connector join --dir wrote")
	}
	if s.Allow == nil {
		fault("allow", "is missing; list what may be reached, or write allow: [] to permit nothing")
	}
	s.allow = s.compile(fault)
	s.ingress = s.compileIngress(fault)
	seen := map[string]int{}
	for i, e := range s.Edges {
		key := fmt.Sprintf("edges[%d]", i)
		host, port, err := connector.ParseEdge(e)
		if err != nil {
			fault(key, "%v", err)
			continue
		}
		at := fmt.Sprintf("%s %d", host, port)
		if first, dup := seen[at]; dup {
			fault(key, "%q is the same as edges[%d]; remove one", e, first)
		}
		seen[at] = i
	}
	s.Transport.check(fault)
	s.Limits.check(fault)
	s.resolvers = s.DNS.compile(fault)
	if s.Limits.DialTimeout <= 0 {
		fault("limits.dial_timeout", "must be positive, not %s", s.Limits.DialTimeout)
	}
	if s.Drain.Grace <= 0 {
		fault("drain.grace", "must be positive, not %s", s.Drain.Grace)
	}
	if err := s.Ops.Check(); err != nil {
		fault("ops.listen", "%v, or set ops.allow_non_loopback", err)
	}
	return errs
}

// compile turns the rules into an allow-list.
func (s *settings) compile(fault func(key, format string, args ...any)) *connector.Allow {
	rules := make([]connector.Rule, len(s.Allow))
	good := true
	for i, r := range s.Allow {
		rules[i] = connector.Rule{VNet: vnet.ID(r.VNet), To: r.To}
		for j, p := range r.Ports {
			ports, err := connector.ParsePorts(fmt.Sprint(p))
			if err != nil {
				fault(fmt.Sprintf("allow[%d].ports[%d]", i, j), "%v", err)
				good = false
				continue
			}
			rules[i].Ports = append(rules[i].Ports, ports)
		}
		if r.To == "" {
			fault(fmt.Sprintf("allow[%d].to", i), "is missing; write a prefix, an address, a host name, or *. and a host name")
			good = false
		}
	}
	if !good {
		return nil
	}
	allow, err := connector.NewAllow(rules)
	for _, e := range unjoin(err) {
		if r, ok := errors.AsType[*connector.RuleError](e); ok {
			fault(fmt.Sprintf("allow[%d].%s", r.Index, r.Field), "%v", r.Err)
		} else {
			fault("allow", "%v", e)
		}
	}
	return allow
}

func unjoin(err error) []error {
	if err == nil {
		return nil
	}
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		return j.Unwrap()
	}
	return []error{err}
}

// identity opens the certificate and completes the list of edges from what join left.
func (s *settings) identity(log *slog.Logger) (*mtls.Source, error) {
	dir := s.Identity.Dir
	src, err := mtls.OpenDir(dir, log)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, cli.ConfigError(fmt.Errorf("identity.dir %s: %w; run keyhaven-connector join --dir %s first", dir, err, dir))
	case err != nil:
		return nil, cli.ConfigError(fmt.Errorf("identity.dir %s: %w", dir, err))
	}
	if k := src.Identity().Kind; k != mtls.KindConnector {
		return nil, cli.ConfigError(fmt.Errorf("identity.dir %s: the certificate is for %s %q, not for a connector", dir, k, src.Identity().Name))
	}
	if s.edges = s.Edges; len(s.edges) > 0 {
		return src, nil
	}
	path := filepath.Join(dir, joinedFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, cli.ConfigError(fmt.Errorf("no edges: %w; list them under edges", err))
	}
	var j joined
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, cli.ConfigError(fmt.Errorf("%s: %w; list the edges under edges", path, err))
	}
	if len(j.Edges) == 0 {
		return nil, cli.ConfigError(fmt.Errorf("%s names no edges; list them under edges", path))
	}
	s.edges = j.Edges
	return src, nil
}
