// Command keyhaven-demo runs a whole installation on one machine: a token with keys made inside it, a key server, an
// origin and two connectors on a private network, and two edges, which share their state in etcd, that serve visitors with
// those keys.
//
// As root the private side lives in a network namespace with one outgoing link. Without root everything shares loopback.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

func main() {
	ctx, stop := cli.SignalContext()
	root := cli.New("keyhaven-demo", "Run a whole Keyhaven installation on this machine until Ctrl-C")
	var check bool
	root.RunE = func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), check) }
	root.Flags().BoolVar(&check, "check", false, "check the installation from outside, say each result and end")
	root.AddCommand(originCommand())
	code := cli.Execute(ctx, root, os.Stderr)
	stop()
	os.Exit(code)
}

// originCommand is the private web server, run by the lab inside the site's namespace.
func originCommand() *cobra.Command {
	var listen, name string
	cmd := &cobra.Command{Use: "origin", Short: "Serve as a private origin", Hidden: true, RunE: func(cmd *cobra.Command, _ []string) error {
		srv := &http.Server{Addr: listen, Handler: lab.Origin(name), ReadHeaderTimeout: 10 * time.Second}
		stop := context.AfterFunc(cmd.Context(), func() { srv.Close() })
		defer stop()
		if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}}
	cmd.Flags().StringVar(&listen, "listen", "", "host:port to listen on")
	cmd.Flags().StringVar(&name, "name", "origin", "what the origin calls itself")
	return cmd
}

// A demo is a lab with the ground that it stands on.
type demo struct {
	lab      *lab.Lab
	net      *testnet.Net // nil without root
	site     *testnet.Namespace
	dir      string
	visitors string // host:port of the edge
	sigs     *signatures
}

const (
	ecHost  = "www.keyhaven.test"
	rsaHost = "rsa.keyhaven.test"
)

func run(ctx context.Context, check bool) (err error) {
	d := &demo{sigs: &signatures{quiet: check}}
	// What was started is taken down whatever happens in between.
	defer func() { err = errors.Join(err, d.close(check)) }()
	started := time.Now()
	if err := d.start(ctx); err != nil {
		return err
	}
	fmt.Printf("Up in %.1f s.\n\n", time.Since(started).Seconds())
	if check {
		return d.check(ctx)
	}
	fmt.Println("First, curl loops while each worker process, in which the HSM's module runs, is killed with kill -9.")
	report("no visitor was turned away, and the key server lived on", d.workersKilled(ctx))
	fmt.Println("Then each connector is, and each edge.")
	report("no visitor was turned away while connectors were killed", d.connectorKilled(ctx))
	report("no visitor was turned away while edges were killed", d.edgeKilled(ctx))
	fmt.Println()
	d.explain()
	<-ctx.Done()
	fmt.Println("\nStopping.")
	return nil
}

func (d *demo) start(ctx context.Context) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "keyhaven-demo-"); err != nil {
		return err
	}
	plan := lab.Plan{
		Dir: d.dir, Bin: filepath.Dir(exe), Tools: exe, Sink: d.sigs.line,
		Zones: []lab.ZonePlan{{Host: ecHost, KeyType: "p256"}, {Host: rsaHost, KeyType: "rsa2048"}},
	}
	site := lab.SitePlan{Name: "site"}
	if os.Geteuid() == 0 {
		if err := d.ground(&plan, &site); err != nil {
			return err
		}
	} else if err := loopback(&plan, &site); err != nil {
		return err
	}
	if err := edges(&plan); err != nil {
		return err
	}
	d.visitors = plan.Edge.Visitors
	plan.Sites = []lab.SitePlan{site}
	fmt.Println("Making a token in SoftHSM2, keys inside it, both authorities and the configurations.")
	if d.lab, err = lab.New(ctx, plan); err != nil {
		return err
	}
	fmt.Println("Starting origin, key server, etcd, two edges and two connectors.")
	return d.lab.Start(ctx)
}

// The addresses of the private network, which exist in the namespace alone.
const (
	keyServerAddr = "10.20.0.10:2407"
	originAddr    = "10.20.0.20:8080"
)

// ground makes the site's namespace: its private addresses, and one link out, by which nothing else comes in.
func (d *demo) ground(plan *lab.Plan, site *lab.SitePlan) (err error) {
	testnet.Sweep("khdemo")
	if d.net, err = testnet.New("khdemo"); err != nil {
		return err
	}
	if d.site, err = d.net.Namespace("site"); err != nil {
		return err
	}
	inner, outer := linkAddrs()
	dev, _, err := d.net.Link(d.site, nil, inner, outer)
	if err != nil {
		return err
	}
	for _, a := range []string{keyServerAddr, originAddr} {
		addr := netip.MustParseAddrPort(a).Addr()
		if err := d.site.AddAddr("lo", netip.PrefixFrom(addr, 32)); err != nil {
			return err
		}
	}
	if err := d.site.OutwardOnly(dev, inner.Addr()); err != nil {
		return err
	}
	site.NS, site.KeyServer, site.Origin = d.site, keyServerAddr, originAddr
	site.Ops, site.KeyServerOps = "127.0.0.1:9601", "127.0.0.1:9602"
	site.Replicas = []lab.ConnectorPlan{{Name: "replica", Ops: "127.0.0.1:9603"}}
	site.Routes = []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}
	plan.Edge.Tunnel = netip.AddrPortFrom(outer.Addr(), 7844).String()
	plan.MoreEdges = []lab.EdgePlan{{Tunnel: netip.AddrPortFrom(outer.Addr(), 7845).String()}}
	return nil
}

// linkAddrs picks one of the 64 links of TEST-NET-2 by process id, so that two demos rarely meet.
func linkAddrs() (inner, outer netip.Prefix) {
	base := byte(os.Getpid() % 64 * 4)
	at := func(n byte) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 100, base + n}), 30)
	}
	return at(2), at(1)
}

// edges gives the two edges their places for visitors: one port, on 127.0.0.1 and on 127.0.0.2; and both their store.
func edges(plan *lab.Plan) (err error) {
	second := &plan.MoreEdges[0]
	for try := 0; second.Visitors == ""; try++ {
		if plan.Edge.Visitors, err = freeAddr("127.0.0.1:8443"); err != nil {
			return err
		}
		_, port, _ := net.SplitHostPort(plan.Edge.Visitors)
		want := net.JoinHostPort("127.0.0.2", port)
		got, err := freeAddr(want)
		if err != nil {
			return err
		}
		if got == want {
			second.Visitors = want
		} else if try == 10 {
			return errors.New("no port is free on both 127.0.0.1 and 127.0.0.2")
		}
	}
	for _, to := range []*string{&plan.Edge.Ops, &second.Ops, &plan.Etcd.Client, &plan.Etcd.Peer} {
		if *to, err = freeAddr("127.0.0.1:0"); err != nil {
			return err
		}
	}
	return nil
}

// loopback plans everything on 127.0.0.1.
func loopback(plan *lab.Plan, site *lab.SitePlan) error {
	site.Replicas = []lab.ConnectorPlan{{Name: "replica"}}
	plan.MoreEdges = []lab.EdgePlan{{}}
	for want, to := range map[string]*string{
		"127.0.0.1:2407": &site.KeyServer, "127.0.0.1:8080": &site.Origin, "127.0.0.1:7844": &plan.Edge.Tunnel,
		"127.0.0.1:7845": &plan.MoreEdges[0].Tunnel, "127.0.0.1:9601": &site.Ops, "127.0.0.1:9602": &site.KeyServerOps, "127.0.0.1:9603": &site.Replicas[0].Ops,
	} {
		addr, err := freeAddr(want)
		if err != nil {
			return err
		}
		*to = addr
	}
	site.Routes = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	return nil
}

// freeAddr returns want if its port is free, for TCP and UDP, else the same host with a free port. Port 0 is none.
func freeAddr(want string) (string, error) {
	host, port, err := net.SplitHostPort(want)
	if err != nil {
		return "", err
	}
	if port != "0" && freeport.Check(want) == nil {
		return want, nil
	}
	return freeport.Addr(host)
}

func (d *demo) explain() {
	if d.net != nil {
		fmt.Printf(`The private side lives in the network namespace %s: key server %s, origin %s.
It has one link, by which its two connectors dialled %s and %s; no packet from here reaches those addresses.
`, d.site.Name(), keyServerAddr, originAddr, d.lab.Plan.Edge.Tunnel, d.lab.Plan.MoreEdges[0].Tunnel)
	} else {
		fmt.Print(`Without root, edge and private side share this machine's loopback. The requests take the same way, but this run
does not prove that the private side is out of reach. Run the demo as root to see that.
`)
	}
	fmt.Println("\nIn another terminal:")
	for _, host := range []string{ecHost, rsaHost} {
		fmt.Println("\n  " + d.curl(host))
	}
	edge := filepath.Join(d.lab.Plan.Bin, "keyhaven-edge")
	fmt.Printf("\nWhat the first edge knows of tunnels and edges:\n\n  %s status --socket %s\n", edge, d.lab.Path("edge.sock"))
	fmt.Printf("\nThe worker processes, to kill one yourself:\n\n  %s token list --control %s\n",
		filepath.Join(d.lab.Plan.Bin, "keyhaven-keyserver"), d.lab.Path("keyserver.sock"))
	fmt.Print("\nEach full handshake takes one signature in the token, shown here as it happens. Ctrl-C ends the demo.\n\n")
	d.sigs.show()
}

func (d *demo) curl(host string) string {
	_, port, _ := net.SplitHostPort(d.visitors)
	return fmt.Sprintf("curl --cacert %s --resolve %s:%s:127.0.0.1,127.0.0.2 https://%s:%s/", d.lab.Roots(), host, port, host, port)
}

// close stops and removes everything. In a check it also reports that nothing is left.
func (d *demo) close(check bool) error {
	var errs []error
	if d.lab != nil {
		errs = append(errs, d.lab.Stop())
	}
	if d.net != nil {
		errs = append(errs, d.net.Close())
	}
	if d.dir != "" {
		errs = append(errs, os.RemoveAll(d.dir))
	}
	err := errors.Join(errs...)
	if !check {
		return err
	}
	if err == nil {
		err = d.leftovers()
	}
	report("nothing is left behind", err)
	return err
}

func (d *demo) leftovers() error {
	if _, err := os.Stat(d.dir); !os.IsNotExist(err) {
		return fmt.Errorf("the directory %s is still there", d.dir)
	}
	if d.site != nil && d.site.Exists() {
		return fmt.Errorf("the namespace %s is still there", d.site.Name())
	}
	if pids := d.lab.Alive(); len(pids) > 0 {
		return fmt.Errorf("processes still run: %v", pids)
	}
	return nil
}
