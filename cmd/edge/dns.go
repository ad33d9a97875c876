package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/keyhaven/keyhaven/edge/dns"
	"github.com/keyhaven/keyhaven/internal/cli"
)

// dnsConfig is one name server for a virtual network.
type dnsConfig struct {
	Listen   string   `mapstructure:"listen"`   // host:port, UDP and TCP
	VNet     string   `mapstructure:"vnet"`     // name or id; empty: the default network
	Upstream []string `mapstructure:"upstream"` // addresses in the network, for names without a host route; empty: those are refused
	Allow    []string `mapstructure:"allow"`    // prefixes that may ask; empty admits nobody
	Rate     int      `mapstructure:"rate"`     // queries a second and source; zero: 200
}

// compile turns the texts into addresses.
func (d dnsConfig) compile(fault func(key, format string, args ...any)) (c dns.Config) {
	c = dns.Config{Listen: d.Listen, VNet: d.VNet, Rate: d.Rate}
	if err := hostPort(d.Listen, true); err != nil {
		fault("listen", "%v", err)
	}
	for i, s := range d.Upstream {
		a, err := netip.ParseAddrPort(s)
		if ip, ipErr := netip.ParseAddr(s); err != nil && ipErr == nil {
			a, err = netip.AddrPortFrom(ip, 53), nil
		}
		if err != nil {
			fault("upstream["+strconv.Itoa(i)+"]", "%q is no name server; write an address, with a port if it is not 53", s)
		}
		c.Upstream = append(c.Upstream, a)
	}
	for i, s := range d.Allow {
		p, err := netip.ParsePrefix(s)
		if a, aErr := netip.ParseAddr(s); err != nil && aErr == nil {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil {
			fault("allow["+strconv.Itoa(i)+"]", "%q is no prefix, such as 10.0.0.0/8", s)
		}
		c.Allow = append(c.Allow, p.Masked())
	}
	if len(d.Allow) == 0 {
		fault("allow", "nobody may ask; list prefixes")
	}
	if d.Rate < 0 {
		fault("rate", "%d is negative", d.Rate)
	}
	return c
}

// compileDNS reads the section dns.
func (c *config) compileDNS(errorf func(key, format string, args ...any)) (list []dns.Config) {
	for i, d := range c.DNS {
		list = append(list, d.compile(func(key, format string, args ...any) { errorf(fmt.Sprintf("dns[%d].%s", i, key), format, args...) }))
	}
	return list
}

// listenDNS opens the name servers.
func (p *process) listenDNS() error {
	if len(p.cfg.DNS) == 0 {
		return nil
	}
	metrics, err := dns.NewMetrics(p.registry)
	if err != nil {
		return err
	}
	for _, c := range p.cfg.compileDNS(func(string, string, ...any) {}) { // load has checked it
		c.Dialer, c.Metrics, c.Logger = p.control, metrics, p.log
		s, err := dns.Listen(c)
		if err != nil {
			return cli.ListenError(err)
		}
		p.names = append(p.names, s)
	}
	return nil
}

func (p *process) closeDNS() error {
	var errs []error
	for _, s := range p.names {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}
