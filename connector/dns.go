package connector

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

// ResolverHost is the host name by which an edge asks for the site's name server: the flow's network chooses which. It is
// served only if Config.ServeDNS says so.
const ResolverHost = "_dns"

const dnsPort = 53

// resolvConf is where the host's name servers stand.
const resolvConf = "/etc/resolv.conf"

// errNoResolver says that no name server is known.
var errNoResolver = errors.New("no name server is configured for the network, and " + resolvConf + " has none")

// nameServers are those of the site.
type nameServers struct {
	byVNet map[vnet.ID][]netip.AddrPort
	serve  bool
	turn   atomic.Uint32

	resolvers map[vnet.ID]Resolver
}

func newNameServers(cfg Config) *nameServers {
	n := &nameServers{byVNet: cfg.Resolvers, serve: cfg.ServeDNS, resolvers: map[vnet.ID]Resolver{}}
	for v, servers := range cfg.Resolvers {
		if len(servers) > 0 {
			n.resolvers[v] = newVNetResolver(servers)
		}
	}
	return n
}

// resolver is what resolves the names of a network's flows, if it has servers of its own.
func (n *nameServers) resolver(v vnet.ID) (Resolver, bool) {
	if n == nil {
		return nil, false
	}
	r, ok := n.resolvers[v]
	return r, ok
}

// target finds the name servers for a flow to ResolverHost, another one first each time.
func (n *nameServers) target(f tunnel.Flow) (target, error) {
	t := target{vnet: f.VNet, name: ResolverHost, port: dnsPort}
	if !n.serve {
		return t, fmt.Errorf("the site's name servers are not served (dns.serve): %w", errDenied)
	}
	if f.Port != dnsPort {
		return t, fmt.Errorf("port %d of the site's name servers: %w", f.Port, errDenied)
	}
	servers := n.byVNet[f.VNet]
	if len(servers) == 0 {
		servers = hostNameServers(resolvConf)
	}
	if len(servers) == 0 {
		return t, errNoResolver
	}
	first := int(n.turn.Add(1)) % len(servers)
	t.servers = append(append(t.servers, servers[first:]...), servers[:first]...)
	return t, nil
}

// hostNameServers reads the name servers of a resolv.conf(5).
func hostNameServers(path string) (list []netip.AddrPort) {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan() && len(list) < 3; {
		fields := strings.Fields(sc.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil {
			list = append(list, netip.AddrPortFrom(a.Unmap(), dnsPort))
		}
	}
	return list
}

// A vnetResolver resolves names with servers of its own. The host's /etc/hosts comes first, as everywhere on the host;
// its search list does not count.
type vnetResolver struct {
	r *net.Resolver
}

func newVNetResolver(servers []netip.AddrPort) *vnetResolver {
	var turn atomic.Uint32
	return &vnetResolver{&net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		// Go asks its servers in turn until one answers; ours take the places of those.
		to := servers[int(turn.Add(1)-1)%len(servers)]
		return new(net.Dialer).DialContext(ctx, network, to.String())
	}}}
}

// LookupNetIP implements Resolver.
func (v *vnetResolver) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	return v.r.LookupNetIP(ctx, network, strings.TrimSuffix(host, ".")+".")
}

// target reads a flow's destination.
func (c *Connector) target(f tunnel.Flow) (target, error) {
	if f.Host == ResolverHost {
		return c.dialer.names.target(f)
	}
	return parseTarget(f)
}

// locate finds the permitted addresses of a destination, within the time that the flow has and while the edge waits.
func (c *Connector) locate(ctx context.Context, in incoming, t target) ([]netip.AddrPort, error) {
	limit := c.cfg.DialTimeout
	if d := in.Flow().Deadline; d > 0 {
		limit = min(limit, d)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-in.Cancelled():
			cancel()
		case <-ctx.Done():
		}
	})
	defer wg.Wait()
	defer cancel()
	return c.dialer.locate(ctx, c.allow.Load(), t)
}
