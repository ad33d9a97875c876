package ingressconf

import (
	"crypto/x509"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/vnet"
)

// A Target is a checked rule: what it matches and where it leads. Every option is set.
type Target struct {
	Rule    Rule // as it was given
	Service Service
	Origin  OriginOptions // the rule's, completed by the defaults
	// Bandwidth is what all flows of the rule may carry together, in each direction, in bytes per second. Zero: any amount.
	Bandwidth int64

	host  string // exact, or what stands behind "*."; "" for any
	below bool   // host was a pattern
	path  *regexp.Regexp
}

// compiler collects what is wrong.
type compiler struct {
	errs   Errors
	remote bool
}

func (c *compiler) fault(key, format string, args ...any) {
	c.errs = append(c.errs, &Error{key, fmt.Sprintf(format, args...)})
}

func compile(rules []Rule, origin OriginOptions, remote bool) (*Config, Errors) {
	c := compiler{remote: remote}
	cfg := &Config{}
	c.options("ingress_origin", origin)
	defaults := merge(origin, Defaults())
	if len(rules) > maxRules {
		c.fault("ingress", "has %d rules, at most %d are allowed", len(rules), maxRules)
		return nil, c.errs
	}
	for i, r := range rules {
		cfg.targets = append(cfg.targets, c.rule(fmt.Sprintf("ingress[%d]", i), r, defaults))
	}
	c.order(cfg)
	if len(c.errs) > 0 {
		return nil, c.errs
	}
	return cfg, nil
}

func (c *compiler) rule(key string, r Rule, defaults OriginOptions) *Target {
	t := &Target{Rule: r, Origin: merge(r.Origin, defaults)}
	var err error
	if t.Service, err = ParseService(r.Service); err != nil {
		c.fault(key+".service", "%v", err)
	}
	if t.Service.Scheme == Unix && c.remote {
		c.fault(key+".service", "%q: only the connector's own file may name its Unix sockets", r.Service)
	}
	switch {
	case r.Hostname == "" || r.Hostname == "*":
	case strings.Contains(strings.TrimPrefix(r.Hostname, "*."), "*"):
		c.fault(key+".hostname", "%q: one *. may stand at the beginning and nowhere else", r.Hostname)
	default:
		if t.host, err = vnet.CanonicalHost(r.Hostname); err != nil {
			c.fault(key+".hostname", "%v", err)
		}
		t.host, t.below = strings.CutPrefix(t.host, "*.")
	}
	if len(r.Path) > maxPath {
		c.fault(key+".path", "has %d bytes, at most %d are allowed", len(r.Path), maxPath)
	} else if r.Path != "" {
		if t.path, err = regexp.Compile(r.Path); err != nil {
			c.fault(key+".path", "%q is no regular expression (RE2): %s", r.Path, strings.TrimPrefix(err.Error(), "error parsing regexp: "))
		}
	}
	if r.Bandwidth != "" {
		if t.Bandwidth, err = ParseBandwidth(r.Bandwidth); err != nil {
			c.fault(key+".bandwidth", "%v", err)
		}
	}
	c.options(key+".origin", r.Origin)
	c.fits(key, t)
	return t
}

// fits finds options that the service cannot have.
func (c *compiler) fits(key string, t *Target) {
	scheme := t.Service.Scheme
	if (scheme == TCP || scheme == UDP) && t.path != nil {
		c.fault(key+".path", "a %s:// service carries no requests, so it has no path; remove path", scheme)
	}
	if scheme == UDP && t.proxied() {
		c.fault(key+".origin.proxy_protocol", "is for connections, and a udp:// service has none; write off, and use proxy_protocol of the edge's port")
	}
	if (scheme == HTTPStatus || scheme == HelloWorld) && t.Bandwidth != 0 {
		c.fault(key+".bandwidth", "the rule leads to no service; remove bandwidth")
	}
	if True(t.Origin.HTTP2Origin) && t.proxied() {
		c.fault(key+".origin.proxy_protocol", "cannot go with http2_origin, whose connections carry several visitors' requests; switch one of them off")
	}
}

func (t *Target) proxied() bool {
	return t.Origin.ProxyProtocol == "v1" || t.Origin.ProxyProtocol == "v2"
}

// options checks what is set.
func (c *compiler) options(key string, o OriginOptions) {
	for _, d := range []struct {
		name string
		v    time.Duration
	}{{"connect_timeout", o.ConnectTimeout}, {"tls_timeout", o.TLSTimeout}, {"keep_alive_timeout", o.KeepAliveTimeout}} {
		if d.v < 0 || d.v > 24*time.Hour {
			c.fault(key+"."+d.name, "must be positive and at most 24h, not %s", d.v)
		}
	}
	if o.KeepAliveConnections < 0 || o.KeepAliveConnections > maxConns {
		c.fault(key+".keep_alive_connections", "must be from 1 to %d, not %d", maxConns, o.KeepAliveConnections)
	}
	if h := o.HTTPHostHeader; len(h) > maxValue || strings.ContainsFunc(h, notInHost) {
		c.fault(key+".http_host_header", "must be a host, with or without a port")
	}
	if n := o.OriginServerName; n != "" {
		if _, err := canonicalTarget(n); err != nil {
			c.fault(key+".origin_server_name", "%v", err)
		}
	}
	switch {
	case o.CAPool == "":
	case len(o.CAPool) > maxPool:
		c.fault(key+".ca_pool", "has %d bytes, at most %d are allowed", len(o.CAPool), maxPool)
	case InlinePEM(o.CAPool):
		if !x509.NewCertPool().AppendCertsFromPEM([]byte(o.CAPool)) {
			c.fault(key+".ca_pool", "holds no certificate that can be read")
		}
	case c.remote:
		c.fault(key+".ca_pool", "only the connector's own file may name files of its host; put the certificates themselves here, PEM")
	}
	switch o.ProxyProtocol {
	case "", "off", "v1", "v2":
	default:
		c.fault(key+".proxy_protocol", "%q: write v1, v2 or off", o.ProxyProtocol)
	}
}

// InlinePEM reports whether a ca_pool is the certificates themselves rather than the name of a file.
func InlinePEM(s string) bool { return strings.Contains(s, "-----BEGIN ") }

// notInHost finds what no Host header has.
func notInHost(r rune) bool {
	return r <= ' ' || r >= 0x7f || strings.ContainsRune(`/\?#@"<>^|{}`+"`", r)
}

// True reports whether a switch is set and on.
func True(b *bool) bool { return b != nil && *b }

// merge completes o by d.
func merge(o, d OriginOptions) OriginOptions {
	o.ConnectTimeout = either(o.ConnectTimeout, d.ConnectTimeout)
	o.TLSTimeout = either(o.TLSTimeout, d.TLSTimeout)
	o.KeepAliveConnections = either(o.KeepAliveConnections, d.KeepAliveConnections)
	o.KeepAliveTimeout = either(o.KeepAliveTimeout, d.KeepAliveTimeout)
	o.HTTPHostHeader = either(o.HTTPHostHeader, d.HTTPHostHeader)
	o.OriginServerName = either(o.OriginServerName, d.OriginServerName)
	o.CAPool = either(o.CAPool, d.CAPool)
	o.NoTLSVerify = either(o.NoTLSVerify, d.NoTLSVerify)
	o.HTTP2Origin = either(o.HTTP2Origin, d.HTTP2Origin)
	o.DisableChunkedEncoding = either(o.DisableChunkedEncoding, d.DisableChunkedEncoding)
	o.ProxyProtocol = either(o.ProxyProtocol, d.ProxyProtocol)
	return o
}

func either[T comparable](a, b T) T {
	var none T
	if a != none {
		return a
	}
	return b
}

// order checks that every request finds a rule, and notes rules that none finds.
func (c *compiler) order(cfg *Config) {
	last := len(cfg.targets) - 1
	if last < 0 {
		return
	}
	if t := cfg.targets[last]; !t.catchesAll() && t.Service.Scheme != "" {
		c.fault(fmt.Sprintf("ingress[%d]", last), "the last rule must take what the others leave: end the list with a rule without hostname and path, such as service: http_status:404")
	}
	for i, t := range cfg.targets[:last] {
		if t.catchesAll() {
			c.fault(fmt.Sprintf("ingress[%d]", i), "takes every request, so that the rules after it are never reached; give it a hostname or a path, or make it the last")
		}
	}
	for j, t := range cfg.targets {
		for i, earlier := range cfg.targets[:j] {
			if !earlier.catchesAll() && earlier.covers(t) {
				cfg.notes = append(cfg.notes, fmt.Sprintf("ingress[%d]: is never reached, because ingress[%d] takes all of its requests; remove it, or put it first", j, i))
				break
			}
		}
	}
}

func (t *Target) catchesAll() bool { return t.host == "" && t.Rule.Path == "" }

// covers reports whether t certainly takes every request that u would take.
func (t *Target) covers(u *Target) bool {
	host := t.host == "" || u.host != "" && (t.host == u.host && t.below == u.below || t.below && strings.HasSuffix(u.host, "."+t.host))
	return host && (t.Rule.Path == "" || t.Rule.Path == u.Rule.Path)
}
