package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge"
	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/dns"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/notify"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/internal/takeover"
	"github.com/keyhaven/keyhaven/internal/tracing"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

func newRun() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the edge until SIGTERM; SIGHUP reloads the configuration",
		Long: `Run serves until SIGINT or SIGTERM, and then finishes what is open, for as long as the configuration says. SIGHUP reads
the configuration again. SIGUSR2 starts the program anew, from where it was started and with the same arguments: once the new
process has found the configuration good, this one stops accepting, finishes what is open, and hands over. Visitors who come
meanwhile wait in the queues of the listeners.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			self, err := takeover.Begin() // before a signal can come that it is to take
			if err != nil {
				return err
			}
			log, err := cli.Logger(cmd)
			if err != nil {
				return err
			}
			cfg, _, err := load(path)
			if err != nil {
				return cli.ConfigError(err)
			}
			// The state and the UDP ports have one owner: a predecessor hands over when it has finished.
			if err := self.Ready(cmd.Context()); err != nil {
				return err
			}
			p, err := start(cmd.Context(), cfg, log, self)
			if err != nil {
				return err
			}
			p.reload = func() (*config, error) {
				next, _, err := load(path)
				return next, err
			}
			return p.serve(cmd.Context(), cli.Hangups(cmd.Context()))
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfig, "configuration file")
	return cmd
}

func newCheck() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration and the files that it names, and start nothing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := cli.Logger(cmd)
			if err != nil {
				return err
			}
			_, remarks, err := load(path)
			for _, r := range remarks {
				log.Warn("configuration", "remark", r)
			}
			if err != nil {
				return cli.ConfigError(err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is good\n", path)
			return nil
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfig, "configuration file")
	return cmd
}

// leaveTimeout bounds how long a stopping edge tries to tell the others.
const leaveTimeout = 5 * time.Second

// A process is everything that a running edge holds.
type process struct {
	cfg    *config
	log    *slog.Logger
	reload func() (*config, error)
	self   *takeover.Process
	next   *takeover.Successor // takes over at the end; nil: none
	notify notify.Notifier

	ids      identities
	store    state.Store
	control  *control.Control
	tunnels  *tunnel.Listener
	visitors *edge.Server
	admin    *admin.Server
	names    []*dns.Server
	spans    *tracing.Provider // nil: no tracing
	registry *prometheus.Registry
}

// start opens the state and binds every listener, so that what is wrong shows before anything is served.
func start(ctx context.Context, cfg *config, log *slog.Logger, self *takeover.Process) (*process, error) {
	p := &process{cfg: cfg, log: log, self: self, notify: notify.Notifier{Logger: log}, registry: ops.NewRegistry()}
	if err := p.open(ctx); err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

// open is start without the cleaning up after a failure.
func (p *process) open(ctx context.Context) (err error) {
	cfg, log := p.cfg, p.log
	if p.ids, err = openIdentities(cfg, log); err != nil {
		return cli.ConfigError(err)
	}
	p.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "keyhaven_edge_identity_not_after_seconds",
		Help: "When the edge's own certificate towards connectors runs out, in Unix time."},
		func() float64 { return float64(p.ids.own.NotAfter().Unix()) }))
	if p.store, err = cfg.State.open(log); err != nil {
		return err
	}
	p.control, err = control.Open(ctx, p.controlConfig())
	if err != nil {
		return err
	}
	p.use(cfg)
	p.tunnels, err = tunnel.Listen(tunnel.ListenConfig{Addr: cfg.Tunnel.Listen, Identity: p.ids.own, Admit: p.control.Admit,
		Handle: p.control.Handle, Join: p.control.Join, Renew: p.control.Renew, Logger: log, DrainTimeout: cfg.Tunnel.DrainTimeout,
		TCPAddr: cfg.Tunnel.tcpAddr(), ListenTCP: p.self.Listen, Peer: p.control.AdmitPeer, HandlePeer: p.control.HandlePeer, Drops: p.control.Drops()})
	if err != nil {
		return cli.ListenError(fmt.Errorf("listen for tunnels: %w", err))
	}
	if p.spans, err = tracing.Open(ctx, cfg.Tracing, "keyhaven-edge", p.ids.own.Identity().String(), log); err != nil {
		return err
	}
	p.visitors, err = edge.New(cfg.Visitors, edge.Deps{Dialer: p.control, Store: p.store, KeyIdentity: p.ids.key, Logger: log,
		Tracer: p.spans.Tracer("edge"), Registry: p.registry, Listen: p.self.Listen})
	if err != nil {
		return cli.ListenError(err)
	}
	p.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "keyhaven_edge_faults",
		Help: "Zones, public ports and pools that are out of service because they are wrong or cannot be opened."},
		func() float64 { return float64(len(p.visitors.Faults())) }))
	p.control.OnPublished(p.publish)
	p.admin, err = admin.Listen(admin.Config{Control: p.control, Socket: cfg.Admin.Socket, Listen: cfg.Admin.Listen, Identity: p.ids.own,
		Operators: cfg.Admin.Operators, Serving: p.serving(), Bind: p.self.Listen, Logger: log})
	if err != nil {
		return cli.ListenError(err)
	}
	return p.listenDNS()
}

// serving tells the admin API how what visitors are served is.
func (p *process) serving() admin.Serving {
	return admin.Serving{Health: p.visitors.Pools, Faults: func() (list []admin.Fault) {
		for _, f := range p.visitors.Faults() {
			list = append(list, admin.Fault(f))
		}
		return list
	}}
}

// controlConfig is what the control plane works with. Where the state is shared, other edges know this one by the name of
// its certificate.
func (p *process) controlConfig() control.Config {
	c := control.Config{Store: p.store, Authority: p.ids.authority, Edges: p.cfg.Tunnel.Advertise, Identity: p.ids.own,
		Listen: p.cfg.Tunnel.Listen, Version: cli.Version(), BulkCarrier: p.cfg.Tunnel.BulkCarrier,
		ConnectorLifetime: p.cfg.Tunnel.ConnectorLifetime, Registry: p.registry, Logger: p.log}
	if p.cfg.State.shared() {
		c.Name = p.ids.own.Identity().Name
	}
	return c
}

// publish puts in service what the store tells edges to serve. What is wrong of it stays out, and is logged where it is
// found.
func (p *process) publish(s control.Published) {
	if err := p.visitors.Publish(s.Pools, s.Ports, s.Zones); err != nil {
		p.log.Debug("not all that is published is in service", "err", err)
	}
}

// leave tells the other edges, once this one stops, to send nothing more here. What has come is still served.
func (p *process) leave(ctx context.Context) {
	<-ctx.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	if err := p.control.Leave(ctx); err != nil {
		p.log.Warn("other edges notice late that this one stops", "err", err)
	}
}

// use tells the control which networks the configuration uses, and the operator which of them do not exist.
func (p *process) use(cfg *config) {
	p.control.SetLocal(cfg.local())
	for _, ref := range cfg.vnetRefs() {
		if _, err := p.control.VNet(ref); err != nil {
			p.log.Warn("the configuration uses a virtual network that does not exist", "vnet", ref, "remedy", "keyhaven-edge vnet add "+ref)
		}
	}
}

// close releases what start opened and serve has not.
func (p *process) close() error {
	errs := []error{p.closeDNS()}
	if p.admin != nil {
		errs = append(errs, p.admin.Close())
	}
	if p.visitors != nil {
		errs = append(errs, p.visitors.Close())
	}
	if p.tunnels != nil {
		ended, end := context.WithCancel(context.Background())
		end()
		errs = append(errs, p.tunnels.Serve(ended)) // releases the socket
	}
	if p.control != nil {
		errs = append(errs, p.control.Close())
	}
	if p.store != nil {
		errs = append(errs, p.store.Close())
	}
	errs = append(errs, p.spans.Close(context.Background()))
	return errors.Join(errs...)
}

// serve runs all parts until ctx ends or one of them fails. Each part outlives those that lean on it: visitors are
// drained first, then the tunnels that carry them, then what is behind both.
func (p *process) serve(ctx context.Context, hangups <-chan os.Signal) error {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	behind, stopBehind := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBehind()
	carrying, stopCarrying := context.WithCancel(context.WithoutCancel(ctx))
	defer stopCarrying()
	var behindDone, carryingDone, namesDone sync.WaitGroup
	run := func(wg *sync.WaitGroup, ctx context.Context, what string, f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				fail(fmt.Errorf("%s: %w", what, err))
			}
		})
	}
	health := &ops.Server{Addr: p.cfg.Ops.Listen, AllowNonLoopback: p.cfg.Ops.AllowNonLoopback, Registry: p.registry, Logger: p.log, Listen: p.self.Listen,
		Ready: func(context.Context) error { return p.ready(ctx) }}
	run(&behindDone, behind, "health and metrics", health.Run)
	run(&behindDone, behind, "administration", p.admin.Serve)
	run(&behindDone, behind, "renew the edge's certificate", p.renewOwn)
	run(&carryingDone, carrying, "tunnels", p.tunnels.Serve)
	p.log.Info("edge up", "peer", p.ids.own.Identity().String(), "tunnels", p.tunnels.Addr().String(), "socket", p.cfg.Admin.Socket)
	behindDone.Go(func() {
		if p.attend(ctx, hangups) {
			fail(nil)
		}
	})
	run(&behindDone, behind, "watchdog", func(ctx context.Context) error { return p.notify.Watchdog(ctx, p.alive) })
	behindDone.Go(func() { ops.BoundGarbage(behind, mostGarbage) })
	behindDone.Go(func() { p.leave(ctx) })
	for _, s := range p.names {
		run(&namesDone, ctx, "names", s.Serve)
	}

	p.awaitReady(ctx)
	p.notify.Ready(p.summary())
	err := p.visitors.Run(ctx)
	if err != nil && ctx.Err() == nil {
		fail(fmt.Errorf("visitors: %w", err))
	}
	fail(nil) // where nothing has failed yet: a part that ends by itself ends the edge
	p.log.Info("visitors drained")
	namesDone.Wait()
	stopCarrying()
	carryingDone.Wait()
	stopBehind()
	behindDone.Wait()
	p.admin, p.tunnels, p.names = nil, nil, nil // they released their sockets at their end
	closed := p.close()
	if p.next != nil {
		closed = errors.Join(closed, p.next.Release(p.notify))
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return errors.Join(cause, closed)
	}
	p.log.Info("edge down")
	return closed
}

// mostGarbage is how many bytes of memory may await collection, roughly.
const mostGarbage = 64 << 20

// readyWait is how long the first visitors of a starting edge wait for a key server to be reached.
const readyWait = 3 * time.Second

// awaitReady gives connectors and key servers a moment to be there. Visitors who come meanwhile wait in the queues of the
// listeners, which are open, where they would otherwise be turned away.
func (p *process) awaitReady(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for p.ready(ctx) != nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// ready reports what keeps the edge from serving visitors.
func (p *process) ready(ctx context.Context) error {
	if ctx.Err() != nil {
		return errors.New("the edge is stopping")
	}
	if err := p.ids.own.Check(); err != nil {
		return err
	}
	return p.visitors.Ready(ctx)
}

// tryReload puts a new configuration in place as a whole, or not at all.
func (p *process) tryReload() error {
	next, err := p.reload()
	if err != nil {
		return err
	}
	if changed := fixed(p.cfg, next); len(changed) > 0 {
		return fmt.Errorf("%v cannot change while the edge runs: restart it, or put them back", changed)
	}
	if err := p.visitors.Reload(next.Visitors); err != nil {
		return err
	}
	p.cfg = next
	p.use(next)
	p.admin.SetOperators(next.Admin.Operators)
	// load found the identities' files good a moment ago. Where they are no longer, the certificates in use stay.
	errs := []error{p.ids.own.Reload()}
	if p.ids.key != nil {
		errs = append(errs, p.ids.key.Reload())
	}
	if err := errors.Join(errs...); err != nil {
		p.log.Warn("certificates not reread, the old ones stay", "err", err)
	}
	return nil
}
