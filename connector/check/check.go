// Package check looks at what a connector needs from its surroundings: the edges' names and ports, the clock, the
// identity, and what the kernel permits. Each finding names its remedy.
package check

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A Level says how good a finding is.
type Level string

// Levels.
const (
	// OK: as it should be.
	OK Level = "ok"
	// Warn: the connector works, but not as well as it could, or not for everything.
	Warn Level = "warn"
	// Fail: the connector does not work, or not with one of its edges.
	Fail Level = "fail"
)

// A Finding is the result of one check.
type Finding struct {
	Check  string `json:"check"`            // what was looked at, such as "udp edge.example.com:7844"
	Level  Level  `json:"level"`            //
	Detail string `json:"detail"`           // what was found
	Remedy string `json:"remedy,omitempty"` // what to do, if not all is well
}

// Config says what to look at.
type Config struct {
	// Identity is the connector's. Required.
	Identity *mtls.Source
	// Edges are host:port addresses.
	Edges []Edge
	// Carrier is "auto", "quic" or "tcp", as the connector is configured: what is not used is not looked at.
	Carrier string
	// Proxy is the connector's; see tunnel.DialConfig.
	Proxy func() (*tunnel.ProxyConfig, error)
	// Resolver resolves the edges. If nil, the host's configuration is used.
	Resolver interface {
		LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
	}
	// Timeout bounds each check of an edge. If zero, 5s.
	Timeout time.Duration
}

// An Edge is one to look at.
type Edge struct {
	Host string
	Port uint16
}

func (e Edge) String() string { return net.JoinHostPort(e.Host, fmt.Sprint(e.Port)) }

// Run looks at everything and returns the findings in a steady order. Edges are looked at side by side, without registering
// there, so that a connector that runs with the same identity is left alone.
func Run(ctx context.Context, cfg Config) []Finding {
	if cfg.Timeout <= 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.Resolver == nil {
		cfg.Resolver = &net.Resolver{PreferGo: true}
	}
	findings := identity(cfg.Identity)
	perEdge := make([][]Finding, len(cfg.Edges))
	var wg sync.WaitGroup
	for i, e := range cfg.Edges {
		wg.Go(func() { perEdge[i] = cfg.edge(ctx, e) })
	}
	wg.Wait()
	findings = append(findings, slices.Concat(perEdge...)...)
	findings = append(findings, clock(findings)...)
	return append(findings, host()...)
}

// Worst returns the worst level of the findings.
func Worst(findings []Finding) Level {
	worst := OK
	for _, f := range findings {
		if f.Level == Fail || f.Level == Warn && worst == OK {
			worst = f.Level
		}
	}
	return worst
}

const rejoin = "ask the edge's operator for a new join token and join into a new directory"

// identity looks at certificate and key, which the source has found to match.
func identity(src *mtls.Source) []Finding {
	f := Finding{Check: "identity", Level: OK,
		Detail: fmt.Sprintf("%s, valid until %s; the key matches", src.Identity(), src.NotAfter().UTC().Format(time.RFC3339))}
	leaf := src.Leaf()
	switch err := src.Check(); {
	case errors.Is(err, mtls.ErrNotYetValid):
		f.Level, f.Detail = Fail, err.Error()
		f.Remedy = "this host's clock is behind: set it, and keep it set with NTP"
	case err != nil:
		f.Level, f.Detail = Fail, err.Error()
		f.Remedy = "if this host's clock is ahead, set it; else the connector was off for longer than its certificate lives: " + rejoin
	case time.Until(leaf.NotAfter) < leaf.NotAfter.Sub(leaf.NotBefore)/4:
		f.Level, f.Remedy = Warn, "it renews itself once a session is up; if it does not, look for renewal in the log"
	}
	return []Finding{f}
}

// edge looks at one edge.
func (cfg *Config) edge(ctx context.Context, e Edge) (list []Finding) {
	resolved := cfg.dns(ctx, e)
	proxy, proxyFinding := cfg.proxy()
	if resolved.Level == Fail && proxy != nil {
		resolved.Level = Warn
		resolved.Detail += "; the proxy resolves it for TCP"
	}
	list = append(append(list, resolved), proxyFinding...)
	if resolved.Level == Fail {
		return list
	}
	var quic, tcp Finding
	var wg sync.WaitGroup
	if cfg.Carrier != "tcp" {
		wg.Go(func() { quic = cfg.reach(ctx, e, tunnel.CarrierQUIC, "udp") })
	}
	if cfg.Carrier != "quic" {
		wg.Go(func() { tcp = cfg.reach(ctx, e, tunnel.CarrierTCP, "tcp") })
	}
	wg.Wait()
	// One way of two is enough to work.
	if quic.Level == Fail && tcp.Level == OK {
		quic.Level = Warn
		quic.Detail += "; TCP works and is used"
	}
	if tcp.Level == Fail && quic.Level == OK {
		tcp.Level = Warn
		tcp.Detail += "; UDP works and is used, without bulk sessions"
	}
	for _, f := range []Finding{quic, tcp} {
		if f.Check != "" {
			list = append(list, f)
		}
	}
	return list
}

func (cfg *Config) dns(ctx context.Context, e Edge) Finding {
	f := Finding{Check: "dns " + e.Host, Level: OK}
	if _, err := netip.ParseAddr(e.Host); err == nil {
		f.Detail = "an address, nothing to resolve"
		return f
	}
	ctx, cancel := context.WithTimeout(ctx, cfg.Timeout)
	defer cancel()
	addrs, err := cfg.Resolver.LookupNetIP(ctx, "ip", e.Host)
	if err != nil || len(addrs) == 0 {
		f.Level, f.Detail = Fail, "no address"
		if err != nil {
			f.Detail = err.Error()
		}
		f.Remedy = "correct the name under edges, or let this host reach its name servers; see /etc/resolv.conf"
		return f
	}
	texts := make([]string, len(addrs))
	for i, a := range addrs {
		texts[i] = a.Unmap().String()
	}
	f.Detail = strings.Join(texts, " ")
	return f
}

// proxy looks at the proxy's configuration; whether it works shows in the check of TCP.
func (cfg *Config) proxy() (*tunnel.ProxyConfig, []Finding) {
	if cfg.Proxy == nil || cfg.Carrier == "quic" {
		return nil, nil
	}
	p, err := cfg.Proxy()
	switch {
	case err != nil:
		return nil, []Finding{{Check: "proxy", Level: Fail, Detail: err.Error(), Remedy: "correct transport.proxy"}}
	case p == nil:
		return nil, nil
	}
	return p, []Finding{{Check: "proxy", Level: OK, Detail: "TCP goes through " + p.URL}}
}

func (cfg *Config) reach(ctx context.Context, e Edge, carrier tunnel.Carrier, name string) Finding {
	f := Finding{Check: fmt.Sprintf("%s %s", name, e), Level: OK}
	ctx, cancel := context.WithTimeout(ctx, cfg.Timeout)
	defer cancel()
	r, err := tunnel.Reach(ctx, tunnel.DialConfig{Addr: e.String(), Identity: cfg.Identity, Carrier: carrier, Proxy: cfg.Proxy})
	if err != nil {
		f.Level, f.Detail = Fail, err.Error()
		f.Remedy = Remedy(err)
		if f.Remedy == "" {
			f.Remedy = closed(name, e.Port)
		}
		return f
	}
	f.Detail = fmt.Sprintf("%s answers after %v", r.Peer, r.Took.Round(100*time.Microsecond))
	return f
}

// closed is the remedy for a port that does not answer.
func closed(network string, port uint16) string {
	if network == "udp" {
		return fmt.Sprintf("let this host send UDP to port %d of the edge, and let the answers back in; without it TCP is used", port)
	}
	return fmt.Sprintf("let this host open TCP connections to port %d of the edge, or name a proxy under transport.proxy", port)
}

// Remedy returns what a person has to do about an error of a connection to an edge, or "" if it does not say.
func Remedy(err error) string {
	var invalid x509.CertificateInvalidError
	var authority x509.UnknownAuthorityError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the edge's certificate is out of its time: if this host's clock is wrong, set it and keep it set with NTP; else tell the edge's operator"
	case errors.As(err, &authority), errors.Is(err, mtls.ErrRefused):
		return "this is an edge of another installation, or no edge: correct its address under edges, or join that installation with a token of its own"
	case errors.Is(err, tunnel.ErrCertificate) && strings.Contains(err.Error(), "expired certificate"):
		return "the edge finds this connector's certificate out of its time: compare the clocks of both hosts; if this one's is right, " + rejoin
	case errors.Is(err, tunnel.ErrCertificate):
		return "the edge does not accept this connector's certificate, because it is of another installation, or finds it out of its time: is this the right edge, and are the clocks of both hosts right? If so, " + rejoin
	}
	return ""
}

// clock sums up what the other checks say of the clock. Certificates are what the clock matters for.
func clock(findings []Finding) []Finding {
	f := Finding{Check: "clock", Level: OK, Detail: "it is " + time.Now().UTC().Format(time.RFC3339) + "; every certificate that was seen is within its time"}
	if year := time.Now().Year(); year < 2025 {
		f.Level, f.Detail = Fail, fmt.Sprintf("this host believes that it is %d", year)
		f.Remedy = "set the clock of this host, and keep it set with NTP"
		return []Finding{f}
	}
	i := slices.IndexFunc(findings, func(o Finding) bool { return o.Level != OK && strings.Contains(o.Remedy, "this host's clock") })
	if i >= 0 {
		f.Level = Fail
		f.Detail = fmt.Sprintf("it is %s here, which the check %q is at odds with", time.Now().UTC().Format(time.RFC3339), findings[i].Check)
		f.Remedy = "compare this host's clock with another; set it if it is wrong, and keep it set with NTP"
	}
	return []Finding{f}
}
