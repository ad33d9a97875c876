package lab

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"strings"
	"time"
)

type obj = map[string]any

// makeConfigs writes the configuration of each program.
func (l *Lab) makeConfigs(context.Context) error {
	for i := range l.Plan.keyServers() {
		if err := l.writeConfig(filepath.Base(l.keyServerFile(i, ".yaml")), l.keyServerConfig(i)); err != nil {
			return err
		}
	}
	for i := range l.Plan.edges() {
		if err := l.writeConfig(filepath.Base(l.edgeFile(i, "edge", ".yaml")), l.edgeConfig(i)); err != nil {
			return err
		}
	}
	for _, s := range l.Plan.Sites {
		for _, c := range s.connectors() {
			if err := l.writeConfig("connector-"+c.Name+".yaml", l.connectorConfig(s, c)); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeConfig writes the configuration of a program, as the plan wants it.
func (l *Lab) writeConfig(name string, cfg obj) error {
	if l.Plan.Adapt != nil {
		l.Plan.Adapt(name, cfg)
	}
	return l.WriteYAML(name, cfg)
}

// EdgeConfig is the first edge's configuration, with a state of its own, as the plan has it, for tests that change it.
func (l *Lab) EdgeConfig() obj {
	var zones []obj
	for _, z := range l.Plan.Zones {
		site := l.Plan.Sites[z.Site]
		zone := obj{"name": strings.ReplaceAll(z.Host, ".", "-"), "hosts": []string{z.Host}, "certificate": l.Chain(z.Host), "key_server": "hsm",
			"origins": []obj{{"url": "http://" + site.Origin, "vnet": site.VNet}}}
		if z.Decrypt {
			zone["allow_rsa_decrypt"] = true
		}
		zones = append(zones, zone)
	}
	var servers, expect []string
	for _, k := range l.Plan.keyServers() {
		servers, expect = append(servers, k.Listen), append(expect, "spiffe://"+KeyDomain+"/keyserver/"+k.Name)
	}
	return obj{
		"state":        obj{"file": l.Path("edge-state.db")},
		"admin":        obj{"socket": l.Path("edge.sock")},
		"identity":     obj{"ca_dir": l.Path("edge-ca"), "dir": l.Path("edge-identity")},
		"key_identity": obj{"dir": l.Path("edge-client")},
		"tunnel":       obj{"listen": cmp.Or(l.Plan.Edge.Listen, l.Plan.Edge.Tunnel), "advertise": []string{l.Plan.Edge.Tunnel}},
		"ops":          obj{"listen": l.Plan.Edge.Ops},
		"visitors": obj{
			"listen":      obj{"tls": []string{l.Plan.Edge.Visitors}},
			"key_servers": []obj{{"name": "hsm", "vnet": l.Plan.Sites[0].VNet, "servers": servers, "expect": expect}},
			"zones":       zones,
		},
	}
}

func (l *Lab) connectorConfig(s SitePlan, c ConnectorPlan) obj {
	allow := []obj{allowEntry(s.Origin)}
	if s.KeyServer != "" {
		for _, k := range l.Plan.keyServers() {
			allow = append(allow, allowEntry(k.Listen))
		}
	}
	var edges []string
	for _, e := range l.Plan.edges() {
		edges = append(edges, e.Tunnel)
	}
	return obj{"identity": obj{"dir": l.Path("connector-" + c.Name)}, "edges": edges, "ops": obj{"listen": c.Ops}, "allow": allow}
}

func allowEntry(hostPort string) obj {
	ap := netip.MustParseAddrPort(hostPort)
	return obj{"to": netip.PrefixFrom(ap.Addr(), ap.Addr().BitLen()).String(), "ports": []uint16{ap.Port()}}
}

// makeProcesses prepares the programs, to be started by Start or one by one.
func (l *Lab) makeProcesses(context.Context) error {
	bin := func(prog string) string { return filepath.Join(l.Plan.Bin, prog) }
	l.prepareKeyServers(bin("keyhaven-keyserver"))
	for i, e := range l.Plan.edges() {
		config := l.edgeFile(i, "edge", ".yaml")
		name := strings.TrimSuffix(filepath.Base(config), ".yaml")
		l.Edges = append(l.Edges, &Edge{e, edgeName(i), l.process(name, e.NS, bin("keyhaven-edge"), "run", "--config", config)})
	}
	l.EdgeProc = l.Edges[0].Proc
	for _, plan := range l.Plan.Sites {
		s := &Site{SitePlan: plan, Origin: l.process("origin-"+plan.Name, plan.NS, l.Plan.Tools, "origin", "--listen", plan.Origin, "--name", plan.Name)}
		for _, c := range plan.connectors() {
			name := "connector-" + c.Name
			s.Connectors = append(s.Connectors, &Connector{c, l.process(name, c.NS, bin("keyhaven-connector"), "run", "--config", l.Path(name+".yaml"))})
		}
		s.Connector = s.Connectors[0].Proc
		l.Sites = append(l.Sites, s)
	}
	return nil
}

// Start starts everything in an order in which it comes up at once, and returns when all of it is ready.
func (l *Lab) Start(ctx context.Context) error {
	if err := l.startEtcd(ctx); err != nil {
		return err
	}
	for _, k := range l.KeyServers {
		if err := k.Proc.Start(); err != nil {
			return err
		}
	}
	for _, e := range l.Edges {
		if err := e.Proc.Start(); err != nil {
			return err
		}
	}
	for _, s := range l.Sites {
		if err := s.Origin.Start(); err != nil {
			return err
		}
	}
	if err := l.AwaitEdge(ctx); err != nil {
		return err
	}
	for _, s := range l.Sites {
		if err := l.enrol(ctx, s); err != nil {
			return err
		}
		for _, c := range s.Connectors {
			if err := c.Proc.Start(); err != nil {
				return err
			}
		}
	}
	if err := l.AwaitTunnels(ctx); err != nil {
		return err
	}
	return l.AwaitReady(ctx)
}

// AwaitEdge waits until every edge answers its administration socket.
func (l *Lab) AwaitEdge(ctx context.Context) error {
	for i, e := range l.Edges {
		err := l.eventually(ctx, e.Proc, func(ctx context.Context) error {
			_, err := l.EdgeAt(ctx, i, "status")
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// AwaitTunnels waits until every connector says that it is ready.
func (l *Lab) AwaitTunnels(ctx context.Context) error {
	for _, s := range l.Sites {
		for _, c := range s.Connectors {
			if err := l.awaitReady(ctx, c.Proc, c.Ops); err != nil {
				return err
			}
		}
	}
	return nil
}

// AwaitReady waits until every edge says that it is ready, which takes a key server.
func (l *Lab) AwaitReady(ctx context.Context) error {
	for _, e := range l.Edges {
		if err := l.awaitReady(ctx, e.Proc, e.Ops); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) awaitReady(ctx context.Context, p *Process, ops string) error {
	return l.eventually(ctx, p, func(ctx context.Context) error {
		out, err := p.ns.Command(ctx, "curl", "-sS", "--fail-with-body", "-m", "2", "http://"+ops+"/readyz").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s is not ready: %w: %s", p.name, err, out)
		}
		return nil
	})
}

func (l *Lab) eventually(ctx context.Context, p *Process, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err := Eventually(ctx, func(ctx context.Context) error {
		if !p.Running() {
			cancel()
			return fmt.Errorf("%s has ended", p.name)
		}
		return f(ctx)
	})
	if err != nil {
		return fmt.Errorf("lab: %w; %s said:\n%s", err, p.name, tail(p.Log(), 15))
	}
	return nil
}

// enrol makes network, tunnel and routes of a site at the edge, and joins its connectors, each with a token.
func (l *Lab) enrol(ctx context.Context, s *Site) error {
	if s.VNet != "" {
		if _, err := l.Edge(ctx, "vnet", "add", s.VNet); err != nil {
			return err
		}
	}
	if _, err := l.Edge(ctx, "tunnel", "create", s.Name); err != nil {
		return err
	}
	for _, r := range s.Routes {
		args := []string{"route", "add", r.String(), "--tunnel", s.Name}
		if s.VNet != "" {
			args = append(args, "--vnet", s.VNet)
		}
		if _, err := l.Edge(ctx, args...); err != nil {
			return err
		}
	}
	for _, c := range s.Connectors {
		if err := l.enrolConnector(ctx, s, c); err != nil {
			return err
		}
	}
	return nil
}

// Join enrols a connector of the site with the token in a file.
func (l *Lab) Join(ctx context.Context, s *Site, tokenFile, dir, name string) error {
	cmd := s.NS.Command(ctx, filepath.Join(l.Plan.Bin, "keyhaven-connector"), "join", "--token-file", tokenFile, "--dir", dir, "--name", name)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("lab: join %s: %w: %s", name, err, out)
	}
	return nil
}

// WriteLogs writes what every process has printed.
func (l *Lab) WriteLogs(w io.Writer) { io.WriteString(w, l.Logs()) }
