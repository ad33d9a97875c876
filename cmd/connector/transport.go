package main

import (
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/credential"
	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

// faultFunc takes a fault of the configuration.
type faultFunc = func(key, format string, args ...any)

type transportConfig struct {
	Carrier      string      `mapstructure:"carrier"` // auto, quic or tcp
	Proxy        proxyConfig `mapstructure:"proxy"`
	BulkSessions int         `mapstructure:"bulk_sessions"` // at most, to each edge; 0: none
}

type proxyConfig struct {
	URL          string `mapstructure:"url"` // http or https; empty: no proxy
	User         string `mapstructure:"user"`
	PasswordFile string `mapstructure:"password_file"`
}

func (t *transportConfig) check(fault faultFunc) {
	switch t.Carrier {
	case connector.CarrierAuto, connector.CarrierQUIC, connector.CarrierTCP:
	default:
		fault("transport.carrier", "is %q; use auto (QUIC, and TCP where UDP does not pass), quic or tcp", t.Carrier)
	}
	if t.BulkSessions < 0 || t.BulkSessions > 8 {
		fault("transport.bulk_sessions", "must be 0 to 8, not %d", t.BulkSessions)
	}
	t.Proxy.check(fault)
	if t.Proxy.URL != "" && t.Carrier == connector.CarrierQUIC {
		fault("transport.proxy.url", "has no effect with carrier quic, since proxies carry TCP alone; use auto or tcp")
	}
}

func (p *proxyConfig) check(fault faultFunc) {
	if p.URL == "" {
		if p.User != "" || p.PasswordFile != "" {
			fault("transport.proxy.url", "is missing; user and password_file mean nothing without it")
		}
		return
	}
	u, err := url.Parse(p.URL)
	switch {
	case err != nil: // the error would quote the URL, which may hold a password
		fault("transport.proxy.url", "is no URL; write http://host:port or https://host:port")
	case u.User != nil:
		fault("transport.proxy.url", "must not hold a user or a password; give the user by itself, and the password as a file (password_file)")
	case u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		fault("transport.proxy.url", "is not of the form http://host:port or https://host:port")
	}
	if (p.User == "") != (p.PasswordFile == "") {
		fault("transport.proxy", "needs both user and password_file, or neither")
	}
}

// dialer returns what sessions ask for their proxy, or nil without one.
func (p proxyConfig) dialer() func() (*tunnel.ProxyConfig, error) {
	if p.URL == "" {
		return nil
	}
	return func() (*tunnel.ProxyConfig, error) {
		file, err := p.password("transport.proxy.password_file")
		return &tunnel.ProxyConfig{URL: p.URL, User: p.User, PasswordFile: file}, err
	}
}

// password is the file with the password, which is its owner's alone or a credential; "" without one. key is what names it.
func (p *proxyConfig) password(key string) (string, error) {
	if p.PasswordFile == "" {
		return "", nil
	}
	file, err := credential.File(p.PasswordFile)
	if err != nil {
		return "", cli.ConfigError(fmt.Errorf("%s: %w", key, err))
	}
	return file, nil
}

func (l *limitsConfig) check(fault faultFunc) {
	if l.MaxFlows < 1 {
		fault("limits.max_flows", "must be at least 1, not %d", l.MaxFlows)
	}
	for _, id := range slices.Sorted(maps.Keys(l.PerVNet)) {
		if n := l.PerVNet[id]; n < 0 {
			fault("limits.per_vnet."+id, "must be 0, to refuse all flows, or more, not %d", n)
		}
	}
}

// flows are the limits as the connector takes them.
func (l *limitsConfig) flows() connector.Limits {
	out := connector.Limits{MaxFlows: l.MaxFlows, PerVNet: map[vnet.ID]int{}}
	for id, n := range l.PerVNet {
		out.PerVNet[vnet.ID(id)] = n
	}
	return out
}

type dnsConfig struct {
	Resolvers map[string][]string `mapstructure:"resolvers"` // addresses of name servers, by id of the virtual network
	Serve     bool                `mapstructure:"serve"`     // edges may ask the site's name servers
}

// compile reads the addresses of the name servers.
func (d *dnsConfig) compile(fault faultFunc) map[vnet.ID][]netip.AddrPort {
	out := map[vnet.ID][]netip.AddrPort{}
	for _, id := range slices.Sorted(maps.Keys(d.Resolvers)) {
		key := "dns.resolvers." + id
		if len(d.Resolvers[id]) == 0 {
			fault(key, "is empty; list addresses of name servers, or leave the network out")
		}
		for i, text := range d.Resolvers[id] {
			at, err := parseServer(text)
			if err != nil {
				fault(fmt.Sprintf("%s[%d]", key, i), "%q is no address of a name server; write an address, or address:port", text)
				continue
			}
			out[vnet.ID(id)] = append(out[vnet.ID(id)], at)
		}
	}
	return out
}

// parseServer reads a name server's address; without a port it is 53.
func parseServer(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	return netip.ParseAddrPort(s)
}
