package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// EtcdPlan is the store that several edges share: one member of etcd, with mutual TLS.
type EtcdPlan struct {
	NS     *testnet.Namespace // nil: the lab's own
	Client string             // IP:port for the edges
	Peer   string             // loopback host:port, which only the member itself uses
}

// ConnectorPlan is one further connector of a site's tunnel.
type ConnectorPlan struct {
	Name string             // unique in the lab
	NS   *testnet.Namespace // nil: the site's
	Ops  string             // loopback host:port of its health endpoint
}

// An Edge is one running edge.
type Edge struct {
	EdgePlan
	Name string // "edge1" for the first
	Proc *Process
}

// A Connector is one running connector of a site.
type Connector struct {
	ConnectorPlan
	Proc *Process
}

// edges are the plans of all edges, the first first.
func (p *Plan) edges() []EdgePlan { return append([]EdgePlan{p.Edge}, p.MoreEdges...) }

// check finds what cannot work before anything is made.
func (p *Plan) check() error {
	if len(p.MoreEdges) > 0 && (p.Etcd.Client == "" || p.Etcd.Peer == "") {
		return errors.New("several edges need Etcd with Client and Peer")
	}
	seen := map[string]bool{}
	for _, s := range p.Sites {
		for _, c := range s.connectors() {
			if seen[c.Name] {
				return fmt.Errorf("two connectors have the name %q", c.Name)
			}
			seen[c.Name] = true
		}
	}
	return nil
}

// connectors are the plans of the site's connectors. The first has the site's name.
func (s *SitePlan) connectors() []ConnectorPlan {
	all := []ConnectorPlan{{Name: s.Name, NS: s.NS, Ops: s.Ops}}
	for _, c := range s.Replicas {
		if c.NS == nil {
			c.NS = s.NS
		}
		all = append(all, c)
	}
	return all
}

func edgeName(i int) string { return fmt.Sprintf("edge%d", i+1) }

// edgeFile names a file of the i-th edge. The first has the plain name.
func (l *Lab) edgeFile(i int, base, ext string) string {
	if i > 0 {
		base += "-" + edgeName(i)
	}
	return l.Path(base + ext)
}

// EdgeAt runs an administration command of the i-th edge, from 0.
func (l *Lab) EdgeAt(ctx context.Context, i int, args ...string) (string, error) {
	return l.tool(ctx, l.edgeFile(i, "edge", ".sock"), "keyhaven-edge", args...)
}

// edgeConfig is the configuration of the i-th edge.
func (l *Lab) edgeConfig(i int) obj {
	plan, cfg := l.Plan.edges()[i], l.EdgeConfig()
	cfg["admin"] = obj{"socket": l.edgeFile(i, "edge", ".sock")}
	cfg["identity"] = obj{"ca_dir": l.Path("edge-ca"), "dir": l.edgeFile(i, "edge-identity", "")}
	cfg["key_identity"] = obj{"dir": l.edgeFile(i, "edge-client", "")}
	cfg["tunnel"] = obj{"listen": cmp.Or(plan.Listen, plan.Tunnel), "advertise": []string{plan.Tunnel}}
	cfg["ops"] = obj{"listen": plan.Ops}
	cfg["visitors"].(obj)["listen"] = obj{"tls": []string{plan.Visitors}}
	if len(l.Plan.MoreEdges) > 0 {
		cfg["state"] = obj{"etcd": obj{"endpoints": []string{"https://" + l.Plan.Etcd.Client}, "ca": l.Path("etcd-ca.pem"),
			"cert": l.Path("etcd-client.pem"), "key": l.Path("etcd-client.key")}}
	}
	return cfg
}

// makeEtcd makes the certificates of the shared store and prepares its process.
func (l *Lab) makeEtcd(context.Context) error {
	if len(l.Plan.MoreEdges) == 0 {
		return nil
	}
	program, err := exec.LookPath("etcd")
	if err != nil {
		return fmt.Errorf("%w: run make setup", err)
	}
	host, _, err := net.SplitHostPort(l.Plan.Etcd.Client)
	if err != nil {
		return err
	}
	ca, err := NewIssuer(l.Path("etcd-ca.pem"))
	if err != nil {
		return err
	}
	for name, san := range map[string]string{"etcd-server": host, "etcd-client": "edge"} {
		if err := ca.Identity(san, l.Path(name+".pem"), l.Path(name+".key")); err != nil {
			return err
		}
	}
	client, peer := "https://"+l.Plan.Etcd.Client, "http://"+l.Plan.Etcd.Peer
	l.EtcdProc = l.process("etcd", l.Plan.Etcd.NS, program, "--name", "lab", "--data-dir", l.Path("etcd"), "--logger", "zap", "--log-level", "warn",
		"--listen-client-urls", client, "--advertise-client-urls", client, "--cert-file", l.Path("etcd-server.pem"), "--key-file", l.Path("etcd-server.key"),
		"--client-cert-auth", "--trusted-ca-file", l.Path("etcd-ca.pem"),
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "lab="+peer)
	return nil
}

// startEtcd starts the shared store, if there is one, and waits until it answers.
func (l *Lab) startEtcd(ctx context.Context) error {
	if l.EtcdProc == nil {
		return nil
	}
	if err := l.EtcdProc.Start(); err != nil {
		return err
	}
	return l.AwaitEtcd(ctx)
}

// AwaitEtcd waits until the shared store says that it is healthy.
func (l *Lab) AwaitEtcd(ctx context.Context) error {
	return l.eventually(ctx, l.EtcdProc, func(ctx context.Context) error {
		out, err := l.Plan.Etcd.NS.Command(ctx, "curl", "-sS", "--fail-with-body", "-m", "2", "--cacert", l.Path("etcd-ca.pem"), "--cert", l.Path("etcd-client.pem"),
			"--key", l.Path("etcd-client.key"), "https://"+l.Plan.Etcd.Client+"/health").CombinedOutput()
		if err != nil {
			return fmt.Errorf("etcd is not healthy: %w: %s", err, out)
		}
		return nil
	})
}

// RestartEdge ends the i-th edge, from 0, in order or by a kill, starts it again and waits until it is ready.
func (l *Lab) RestartEdge(ctx context.Context, i int, kill bool) error {
	e := l.Edges[i]
	if err := e.Proc.restart(kill); err != nil {
		return err
	}
	return l.awaitReady(ctx, e.Proc, e.Ops)
}

// Restart ends a connector, in order or by a kill, starts it again and waits until it is ready.
func (l *Lab) Restart(ctx context.Context, c *Connector, kill bool) error {
	if err := c.Proc.restart(kill); err != nil {
		return err
	}
	return l.awaitReady(ctx, c.Proc, c.Ops)
}

func (p *Process) restart(kill bool) error {
	end := p.Stop
	if kill {
		end = p.Kill
	}
	return errors.Join(end(), p.Start())
}

// AddConnector enrols one more connector of a site while the lab runs, and prepares its process.
func (l *Lab) AddConnector(ctx context.Context, s *Site, plan ConnectorPlan) (*Connector, error) {
	if plan.NS == nil {
		plan.NS = s.NS
	}
	name := "connector-" + plan.Name
	if err := l.writeConfig(name+".yaml", l.connectorConfig(s.SitePlan, plan)); err != nil {
		return nil, err
	}
	c := &Connector{plan, l.process(name, plan.NS, filepath.Join(l.Plan.Bin, "keyhaven-connector"), "run", "--config", l.Path(name+".yaml"))}
	s.Connectors = append(s.Connectors, c)
	return c, l.enrolConnector(ctx, s, c)
}

// enrolConnector joins a connector with a token of its own.
func (l *Lab) enrolConnector(ctx context.Context, s *Site, c *Connector) error {
	token := l.Path("token-" + c.Name)
	if _, err := l.Edge(ctx, "tunnel", "token", "create", s.Name, "--out", token); err != nil {
		return err
	}
	joiner := *s
	joiner.NS = c.NS
	return l.Join(ctx, &joiner, token, l.Path("connector-"+c.Name), c.Name)
}

// Curl makes a command that asks for https://host/path in a namespace, at the edges in their order: when one cannot be
// connected to, at the next. All edges must serve visitors on one port.
func (l *Lab) Curl(ctx context.Context, from *testnet.Namespace, host, path string, args ...string) (*exec.Cmd, error) {
	var addrs []string
	_, port, err := net.SplitHostPort(l.Plan.Edge.Visitors)
	for _, e := range l.Plan.edges() {
		h, p, splitErr := net.SplitHostPort(e.Visitors)
		if err = errors.Join(err, splitErr); p != port {
			err = errors.Join(err, fmt.Errorf("lab: edges serve visitors on ports %s and %s; curl takes one", port, p))
		}
		addrs = append(addrs, h)
	}
	if err != nil {
		return nil, err
	}
	args = append([]string{"-sS", "--cacert", l.Roots(), "--resolve", host + ":" + port + ":" + strings.Join(addrs, ",")}, args...)
	cmd := from.Command(ctx, "curl", append(args, "https://"+net.JoinHostPort(host, port)+path)...)
	cmd.Env = os.Environ()
	return cmd, nil
}
