package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/freeport"
	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// The hosts whose keys are in the token, by key type.
var hosts = map[string]string{"P-256": "ec.keyhaven.test", "RSA-2048": "rsa.keyhaven.test"}

// keyTypes is the order of the report.
var keyTypes = []string{"P-256", "RSA-2048"}

// A bench is an installation on loopback. Key server and connector are the real programs; the edge's parts run in this
// process, so that each can be measured for itself.
type bench struct {
	options
	report *report
	dir    string
	lab    *lab.Lab
	peer   string // the existing key server's program, once it is built
	runs   int    // of key servers with a configuration of the bench

	store   state.Store
	control *control.Control
	stop    context.CancelFunc // ends the tunnel listener
	stopped chan error
	edgeID  *mtls.Source // towards key servers
}

// start makes the files of the installation, unless they are there.
func (b *bench) start(ctx context.Context) (err error) {
	if b.lab != nil {
		return nil
	}
	ports, err := freePorts(6)
	if err != nil {
		return err
	}
	plan := lab.Plan{
		Quiet: true,
		Dir:   b.dir, Bin: b.bin,
		Edge: lab.EdgePlan{Tunnel: ports[0], Visitors: ports[1], Ops: ports[2]},
		Sites: []lab.SitePlan{{Name: "site", KeyServer: ports[3], Origin: ports[4], Ops: ports[5],
			Routes: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}},
		Zones: []lab.ZonePlan{{Host: hosts["P-256"], KeyType: "p256"}, {Host: hosts["RSA-2048"], KeyType: "rsa2048"}},
	}
	l, err := lab.New(ctx, plan)
	if err != nil {
		return err
	}
	b.lab = l
	return nil
}

// install starts the parts that a tunnel takes, unless they run.
func (b *bench) install(ctx context.Context) (err error) {
	if b.edgeID != nil {
		return nil
	}
	if err := b.lab.KeyServer.Start(); err != nil {
		return err
	}
	if b.edgeID, err = mtls.OpenDir(b.lab.Path("edge-client"), nil); err != nil {
		return err
	}
	return b.startTunnel(ctx)
}

// startTunnel wires the edge's control and tunnel listener as cmd/edge does, and enrols the connector.
func (b *bench) startTunnel(ctx context.Context) error {
	authority, err := mtls.OpenAuthority(b.lab.Path("edge-ca"))
	if err != nil {
		return err
	}
	own, err := mtls.OpenDir(b.lab.Path("edge-identity"), nil)
	if err != nil {
		return err
	}
	if b.store, err = state.OpenBolt(b.lab.Path("edge-state.db")); err != nil {
		return err
	}
	addr := b.lab.Plan.Edge.Tunnel
	if b.control, err = control.Open(ctx, control.Config{Store: b.store, Authority: authority, Edges: []string{addr}}); err != nil {
		return err
	}
	ln, err := tunnel.Listen(tunnel.ListenConfig{Addr: addr, Identity: own, Admit: b.control.Admit, Handle: b.control.Handle,
		Join: b.control.Join, Renew: b.control.Renew, DrainTimeout: time.Second})
	if err != nil {
		return err
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	b.stop, b.stopped = stop, make(chan error, 1)
	go func() { b.stopped <- ln.Serve(serving) }()
	if _, err := b.control.AddTunnel(ctx, "site", ""); err != nil {
		return err
	}
	if _, err := b.control.AddRoute(ctx, control.RouteSpec{Prefix: "127.0.0.1/32", Tunnel: "site"}); err != nil {
		return err
	}
	grant, err := b.control.CreateToken(ctx, "site", time.Hour)
	if err != nil {
		return err
	}
	file := b.lab.Path("token-site")
	if err := os.WriteFile(file, []byte(grant.Token), 0o600); err != nil {
		return err
	}
	site := b.lab.Sites[0]
	if err := b.lab.Join(ctx, site, file, b.lab.Path("connector-site"), "site"); err != nil {
		return err
	}
	if err := site.Connector.Start(); err != nil {
		return err
	}
	return b.lab.AwaitTunnels(ctx)
}

func (b *bench) close() error {
	var errs []error
	if b.lab != nil {
		errs = append(errs, b.lab.Stop())
	}
	if b.stop != nil {
		b.stop()
		errs = append(errs, <-b.stopped)
	}
	if b.control != nil {
		errs = append(errs, b.control.Close())
	}
	if b.store != nil {
		errs = append(errs, b.store.Close())
	}
	return errors.Join(errs...)
}

// throughTunnel dials an address of the site as the edge does.
func (b *bench) throughTunnel(ctx context.Context, addr string) (net.Conn, error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return nil, err
	}
	return b.control.DialContext(ctx, "", host, uint16(port), netip.AddrPort{})
}

// client makes a keyless client as the edge does.
func (b *bench) client(dial func(context.Context, string) (net.Conn, error)) (*keyless.Client, error) {
	want, err := mtls.ParseIdentity("spiffe://" + lab.KeyDomain + "/keyserver/ks1")
	if err != nil {
		return nil, err
	}
	return keyless.NewClient(keyless.ClientConfig{
		Servers: []string{b.lab.Plan.Sites[0].KeyServer}, Dial: dial,
		TLS: func(string) *tls.Config {
			return b.edgeID.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptIdentities(want)})
		},
	})
}

// freePorts returns n loopback addresses that are free for TCP and UDP.
func freePorts(n int) ([]string, error) {
	addrs := make([]string, n)
	for i := range addrs {
		var err error
		if addrs[i], err = freeport.Addr("127.0.0.1"); err != nil {
			return nil, err
		}
	}
	return addrs, nil
}

// A way is how a client reaches the site.
type way struct {
	name string
	dial func(ctx context.Context, addr string) (net.Conn, error)
}

// pids are the processes that do the work: this one, the key server with its workers, and the connector.
func (b *bench) pids() []int {
	return append(descendants(b.lab.KeyServer.PID()), os.Getpid(), b.lab.Sites[0].Connector.PID())
}
