package ingressconf

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/internal/conf"
)

// Limits of a configuration.
const (
	// MaxSize bounds a configuration that is handed from one program to another, in bytes.
	MaxSize  = 256 << 10
	maxRules = 1000
	maxPath  = 1024 // bytes of a path's expression
	maxValue = 1024 // bytes of another string
	maxPool  = 64 << 10
	maxConns = 100_000
)

// A Rule leads requests to a service.
type Rule struct {
	// Hostname is a host name, or "*." and a host name for every name below it. Empty: every host.
	Hostname string `mapstructure:"hostname"`
	// Path is a regular expression (RE2) that is looked for in the path as it was sent, undecoded and without the
	// query. Empty: every path.
	Path string `mapstructure:"path"`
	// Service is http://host:port, https://host:port, tcp://host:port, udp://host:port, unix:/path, http_status:NNN or
	// hello_world.
	Service string `mapstructure:"service"`
	// Bandwidth bounds what all flows of the rule carry together in each direction, such as 2Mbit/s or 250kB/s; see
	// [ParseBandwidth]. Empty: there is no bound.
	Bandwidth string `mapstructure:"bandwidth"`
	// Origin holds the rule's own options. What is not set is taken from Config.Origin.
	Origin OriginOptions `mapstructure:"origin"`
}

// OriginOptions say how a service is reached. The zero value of a field, or nil, means that it is not set.
type OriginOptions struct {
	ConnectTimeout         time.Duration `mapstructure:"connect_timeout"`          // to resolve and connect
	TLSTimeout             time.Duration `mapstructure:"tls_timeout"`              // for the TLS handshake
	KeepAliveConnections   int           `mapstructure:"keep_alive_connections"`   // idle ones that are kept
	KeepAliveTimeout       time.Duration `mapstructure:"keep_alive_timeout"`       // how long an idle one is kept
	HTTPHostHeader         string        `mapstructure:"http_host_header"`         // in place of the visitor's
	OriginServerName       string        `mapstructure:"origin_server_name"`       // in the certificate, in place of the service's host
	CAPool                 string        `mapstructure:"ca_pool"`                  // file of the connector, or the certificates themselves, PEM
	NoTLSVerify            *bool         `mapstructure:"no_tls_verify"`            // any certificate will do
	HTTP2Origin            *bool         `mapstructure:"http2_origin"`             // HTTP/2; with http:// without TLS (h2c)
	DisableChunkedEncoding *bool         `mapstructure:"disable_chunked_encoding"` // bodies of unknown length are collected first
	ProxyProtocol          string        `mapstructure:"proxy_protocol"`           // "v1", "v2" or "off"
}

// Defaults are the options that count where neither the rule nor the configuration sets one.
func Defaults() OriginOptions {
	return OriginOptions{ConnectTimeout: 30 * time.Second, TLSTimeout: 10 * time.Second, KeepAliveConnections: 100,
		KeepAliveTimeout: 90 * time.Second}
}

// A Config is an ordered list of rules, checked and ready to be asked. It is immutable and safe for concurrent use. Make
// one with [New] or [Parse].
type Config struct {
	targets []*Target
	notes   []string
}

// An Error is one fault of a configuration. Key names the field, such as ingress[2].service.
type Error struct{ Key, Msg string }

// Error implements error.
func (e *Error) Error() string { return e.Key + ": " + e.Msg }

// Errors are all faults of one configuration, a line each.
type Errors []*Error

// Error implements error.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, err := range e {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n")
}

// document is how a configuration stands in a file, and on its way from the edge.
type document struct {
	Rules  []Rule        `mapstructure:"ingress"`
	Origin OriginOptions `mapstructure:"ingress_origin"`
}

// Parse reads a configuration in YAML or JSON: the list ingress and the group ingress_origin, named and checked as in the
// connector's file. Anything else is an error, as is a size above [MaxSize]. A document without rules is the empty
// configuration, which publishes nothing. Errors name line and field, all of them at once.
func Parse(b []byte) (*Config, error) { return parse(b, false) }

// ParseRemote is Parse for a configuration that did not come from the connector's owner: it may not name files of the
// connector's host, neither by unix: nor in ca_pool.
func ParseRemote(b []byte) (*Config, error) { return parse(b, true) }

func parse(b []byte, remote bool) (*Config, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("the configuration has %d bytes, at most %d are allowed", len(b), MaxSize)
	}
	var d document
	d.Origin = Defaults()
	file, err := conf.Decode(&d, b)
	if err != nil {
		return nil, err
	}
	c, faults := compile(d.Rules, d.Origin, remote)
	var errs conf.Errors
	for _, f := range faults {
		errs = append(errs, file.Errorf(f.Key, "%s", f.Msg))
	}
	return c, errs.Err()
}

// Canonical checks a document as [ParseRemote] does and returns it as JSON with one spelling for each content.
func Canonical(b []byte) (json.RawMessage, error) {
	if _, err := ParseRemote(b); err != nil {
		return nil, err
	}
	return toJSON(b, nil)
}

// FromFile takes the rules and their defaults out of a connector's configuration file, as a document for [Parse]. A file
// without rules is an error. The rest of the file is not looked at.
func FromFile(b []byte) (json.RawMessage, error) {
	doc, err := toJSON(b, []string{"ingress", "ingress_origin"})
	if err != nil {
		return nil, err
	}
	c, err := Parse(doc)
	switch {
	case err != nil:
		return nil, err
	case c.Len() == 0:
		return nil, fmt.Errorf("the file has no ingress rules; is it a connector's configuration?")
	}
	return doc, nil
}

// toJSON returns a YAML mapping as JSON, of all keys or of those that are named.
func toJSON(b []byte, keys []string) (json.RawMessage, error) {
	m := map[string]any{}
	if err := yaml.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("not valid YAML: %s", strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if keys != nil {
		all := m
		m = map[string]any{}
		for _, k := range keys {
			if v, ok := all[k]; ok {
				m[k] = v
			}
		}
	}
	out, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("the configuration has no form in JSON: %w", err)
	}
	return out, nil
}

// New checks rules and the options that hold for all of them. The keys of its errors, which are [Errors], are those of
// the connector's file. Without rules it returns the empty configuration.
func New(rules []Rule, origin OriginOptions) (*Config, error) {
	c, errs := compile(rules, origin, false)
	if len(errs) > 0 {
		return nil, errs
	}
	return c, nil
}

// Len returns the number of rules. Nil has none.
func (c *Config) Len() int {
	if c == nil {
		return 0
	}
	return len(c.targets)
}

// Targets returns where the rules lead, in their order. The caller does not change them.
func (c *Config) Targets() []*Target {
	if c == nil {
		return nil
	}
	return c.targets
}

// Warnings are for people: rules that no request can reach.
func (c *Config) Warnings() []string { return c.notes }
