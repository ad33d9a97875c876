// Package lab builds whole installations out of the real programs, for the demo, the integration tests and the bench:
// a token with keys, both authorities, an edge, and sites with key server, origin and connector.
package lab

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// The trust domains of the two owners.
const (
	EdgeDomain = "edge.keyhaven.test"
	KeyDomain  = "keys.keyhaven.test"
)

// A Plan says what to build.
type Plan struct {
	// Dir is a directory for all files of the lab. It must exist and be private.
	Dir string
	// Bin holds the built programs.
	Bin string
	// Tools holds the program that serves as origin: it is run as "<Tools> origin --listen ADDR --name NAME".
	Tools string
	// Edge is where the edge runs. MoreEdges are further ones of the same installation; with any, all keep their state in
	// Etcd, which the lab starts.
	Edge      EdgePlan
	MoreEdges []EdgePlan
	Etcd      EtcdPlan
	// Sites are the private networks. The first has the key server.
	Sites []SitePlan
	// KeyServers are further ones beside the first site's, over the same token.
	KeyServers []KeyServerPlan
	// Zones are what the edge serves.
	Zones []ZonePlan
	// Adapt, if set, changes the configuration of a program before it is written to the file of that name in Dir.
	Adapt func(file string, cfg map[string]any)
	// Sink, if set, gets each line that a process prints. If nil, the output goes to files, at no cost to the lab.
	Sink func(process, line string)
	// Quiet keeps the key server's lines for single operations out of its log, which take time of what is measured.
	Quiet bool
}

// EdgePlan is the public side.
type EdgePlan struct {
	NS       *testnet.Namespace // nil: the lab's own
	Tunnel   string             // host:port for connectors to dial
	Listen   string             // host:port for the tunnel; "" is the same as Tunnel
	Visitors string             // host:port for visitors
	Ops      string             // loopback host:port
}

// SitePlan is one private network with an origin, a connector and perhaps a key server.
type SitePlan struct {
	Name      string
	NS        *testnet.Namespace // nil: the lab's own
	VNet      string             // "" is the default network
	Routes    []netip.Prefix     // what the tunnel leads to
	Origin    string             // host:port
	KeyServer string             // host:port; "" for none
	// Ops is the loopback address of the connector's health endpoint; KeyServerOps that of the key server's.
	Ops, KeyServerOps string
	// Replicas are further connectors of the site's tunnel, with identities of their own.
	Replicas []ConnectorPlan
}

// ZonePlan is one host name with a key of its own.
type ZonePlan struct {
	Host     string
	KeyType  string // as keyhaven-keyserver key generate takes it
	Site     int    // whose origin answers
	Decrypt  bool   // allow RSA key exchange, everywhere it must be allowed
	AllowFor []string
}

// A Lab is a running installation.
type Lab struct {
	Plan     Plan
	Token    *softhsm.Token
	Issuer   *Issuer
	Edges    []*Edge
	EdgeProc *Process // the first of Edges
	EtcdProc *Process // nil for a single edge
	Sites    []*Site
	// KeyServers are the key servers. KeyServer is the first of them, the first site's.
	KeyServers []*KeyServer
	KeyServer  *Process

	mu    sync.Mutex // guards procs
	procs []*Process
}

// A Site is a running private network.
type Site struct {
	SitePlan
	Origin     *Process
	Connectors []*Connector
	Connector  *Process // the first of Connectors
}

// New makes the files of the plan: token, keys, authorities, certificates and configurations. Nothing runs yet.
func New(ctx context.Context, p Plan) (*Lab, error) {
	l := &Lab{Plan: p}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"token", l.makeToken},
		{"key owner's authority", l.makeKeyOwner},
		{"edge operator's authority", l.makeEdgeOwner},
		{"keys and certificates", l.makeKeys},
		{"etcd", l.makeEtcd},
		{"configurations", l.makeConfigs},
		{"programs", l.makeProcesses},
	} {
		if err := step.do(ctx); err != nil {
			return nil, fmt.Errorf("lab: %s: %w", step.name, err)
		}
	}
	return l, nil
}

// Path names a file of the lab.
func (l *Lab) Path(parts ...string) string {
	return filepath.Join(append([]string{l.Plan.Dir}, parts...)...)
}

// Roots is the file with the authority that visitors trust.
func (l *Lab) Roots() string { return l.Path("visitors-ca.pem") }

// Tool runs one of the programs to its end and returns what it printed on standard output.
func (l *Lab) Tool(ctx context.Context, prog string, args ...string) (string, error) {
	return l.tool(ctx, l.Path("edge.sock"), prog, args...)
}

func (l *Lab) tool(ctx context.Context, socket, prog string, args ...string) (string, error) {
	var ns *testnet.Namespace
	cmd := ns.Command(ctx, filepath.Join(l.Plan.Bin, prog), args...)
	cmd.Env = append(os.Environ(), l.Token.Env(), "KEYHAVEN_EDGE_SOCKET="+socket)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", prog, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Edge runs an administration command of the first edge.
func (l *Lab) Edge(ctx context.Context, args ...string) (string, error) {
	return l.Tool(ctx, "keyhaven-edge", args...)
}

func (l *Lab) makeToken(context.Context) (err error) {
	l.Token, err = softhsm.Create(l.Path("token"))
	return err
}

func (l *Lab) makeKeyOwner(ctx context.Context) error {
	if _, err := l.Tool(ctx, "keyhaven-keyserver", "ca", "init", "--ca-dir", l.Path("key-ca"), "--trust-domain", KeyDomain); err != nil {
		return err
	}
	for i, k := range l.Plan.keyServers() {
		if _, err := l.Tool(ctx, "keyhaven-keyserver", "ca", "issue", k.Name, "--ca-dir", l.Path("key-ca"), "--out", l.keyServerFile(i, "")); err != nil {
			return err
		}
	}
	for i := range l.Plan.edges() {
		if _, err := l.Tool(ctx, "keyhaven-keyserver", "client", "add", edgeName(i), "--ca-dir", l.Path("key-ca"), "--out", l.edgeFile(i, "edge-client", "")); err != nil {
			return err
		}
	}
	_, err := l.Tool(ctx, "keyhaven-keyserver", "audit", "keygen", "--out", l.Path("audit.key"), "--public", l.Path("audit.pub"))
	return err
}

func (l *Lab) makeEdgeOwner(ctx context.Context) error {
	if _, err := l.Edge(ctx, "ca", "init", "--ca-dir", l.Path("edge-ca"), "--trust-domain", EdgeDomain); err != nil {
		return err
	}
	for i := range l.Plan.edges() {
		if _, err := l.Edge(ctx, "ca", "issue", "edge", edgeName(i), "--ca-dir", l.Path("edge-ca"), "--out", l.edgeFile(i, "edge-identity", "")); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) makeKeys(ctx context.Context) (err error) {
	if l.Issuer, err = NewIssuer(l.Roots()); err != nil {
		return err
	}
	for _, z := range l.Plan.Zones {
		if err := l.AddKey(ctx, z); err != nil {
			return err
		}
	}
	return nil
}

// AddKey generates a zone's key inside the token, has its certificate issued and puts it beside the key. The certificate
// chain is then in Chain(z.Host).
func (l *Lab) AddKey(ctx context.Context, z ZonePlan) error {
	uri := l.Token.URI()
	gen := []string{"key", "generate", "--uri", uri, "--label", z.Host, "--type", z.KeyType}
	if z.Decrypt {
		gen = append(gen, "--decrypt")
	}
	if _, err := l.Tool(ctx, "keyhaven-keyserver", gen...); err != nil {
		return err
	}
	csr, err := l.Tool(ctx, "keyhaven-keyserver", "key", "csr", "--uri", uri, "--key", z.Host, "--dns", z.Host)
	if err != nil {
		return err
	}
	if err := l.Issuer.Sign([]byte(csr), l.Chain(z.Host)); err != nil {
		return err
	}
	_, err = l.Tool(ctx, "keyhaven-keyserver", "key", "import-cert", "--uri", uri, "--key", z.Host, l.Chain(z.Host))
	return err
}

// Chain is the file with the certificate chain of a host.
func (l *Lab) Chain(host string) string { return l.Path(host + ".pem") }

// WriteYAML writes a configuration file.
func (l *Lab) WriteYAML(name string, v any) error {
	b, err := yaml.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(l.Path(name), b, 0o600)
}

// Process adds one more program to the lab, not yet started: one of Plan.Bin, or any other by its absolute path.
func (l *Lab) Process(name string, ns *testnet.Namespace, prog string, args ...string) *Process {
	if !filepath.IsAbs(prog) {
		prog = filepath.Join(l.Plan.Bin, prog)
	}
	return l.process(name, ns, prog, args...)
}

// process adds a program to the lab, not yet started.
func (l *Lab) process(name string, ns *testnet.Namespace, path string, args ...string) *Process {
	p := &Process{name: name, ns: ns, path: path, args: args, sink: l.Plan.Sink, file: l.Path(name + ".log"),
		env: []string{"KEYHAVEN_EDGE_SOCKET=" + l.Path("edge.sock"), l.Token.Env()}}
	l.mu.Lock()
	l.procs = append(l.procs, p)
	l.mu.Unlock()
	return p
}

// Stop ends all processes, the last started first, and reports what did not end by itself.
func (l *Lab) Stop() error {
	l.mu.Lock()
	procs := slices.Clone(l.procs)
	l.mu.Unlock()
	var wg sync.WaitGroup
	errs := make(chan error, len(procs))
	for _, p := range procs {
		wg.Go(func() {
			if err := p.Stop(); err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		return err
	}
	return nil
}

// Alive lists the process ids that still run.
func (l *Lab) Alive() (pids []int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.procs {
		if p.Running() {
			pids = append(pids, p.cmd.Process.Pid)
		}
	}
	return pids
}

// Logs returns what every process has printed, under headings.
func (l *Lab) Logs() string {
	l.mu.Lock()
	procs := slices.Clone(l.procs)
	l.mu.Unlock()
	var b strings.Builder
	for _, p := range procs {
		fmt.Fprintf(&b, "--- %s\n%s\n", p.name, p.Log())
	}
	return b.String()
}

// Eventually calls f until it succeeds or ctx ends, and then returns its last error.
func Eventually(ctx context.Context, f func(context.Context) error) error {
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}
