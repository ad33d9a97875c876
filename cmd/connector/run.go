package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"reflect"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/connector/ingress"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/notify"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/internal/takeover"
	"github.com/keyhaven/keyhaven/mtls"
)

const (
	defaultConfig = "/etc/keyhaven/connector.yaml"
	configHelp    = "the YAML configuration file"
)

func runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Keep sessions to the edges and serve their flows",
		Long: `Run keeps four sessions, spread over two edges where there are two, and serves flows until it gets SIGINT or SIGTERM.
Then it tells the edges, waits for open flows for drain.grace at most, and exits; a second signal ends it at once. SIGHUP
reads the allow-list, the ingress rules, the limits of flows and the certificate again: open flows that are no longer
permitted are cut. SIGUSR2 starts the program anew, from where it was started and with the same arguments: when the new process
has its sessions this one finishes the open flows and exits; if it gets none this one goes on.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd) },
	}
	cmd.Flags().String("config", defaultConfig, configHelp)
	return cmd
}

func run(cmd *cobra.Command) error {
	process, err := takeover.Begin() // before a signal can come that it is to take
	if err != nil {
		return err
	}
	ring := &logRing{}
	cmd.SetErr(io.MultiWriter(cmd.ErrOrStderr(), ring))
	log, err := cli.Logger(cmd)
	if err != nil {
		return err
	}
	s, err := load(cmd)
	if err != nil {
		return err
	}
	src, err := s.identity(log)
	if err != nil {
		return err
	}
	if _, err := s.Transport.Proxy.password("transport.proxy.password_file"); err != nil {
		return err
	}
	registry := ops.NewRegistry()
	in, err := s.newIngress(log, registry)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // nothing depends on how it ends
	c, err := connector.New(connector.Config{
		Identity: src, Edges: s.edges, EdgesFile: s.edgesFile(), Carrier: s.Transport.Carrier, Proxy: s.Transport.Proxy.dialer(), Bulk: s.Transport.BulkSessions,
		Allow: s.allow, Limits: s.Limits.flows(), DialTimeout: s.Limits.DialTimeout, Resolvers: s.resolvers, ServeDNS: s.DNS.Serve, UDPIdle: s.Limits.UDPIdle,
		DrainTimeout: s.Drain.Grace, Version: cli.Version(), Logger: log, Registerer: registry, Ingress: in, Device: s.Control != "",
	})
	if err != nil {
		return err
	}
	if s.allow.Len() == 0 {
		log.Warn("the allow-list is empty: every flow will be denied")
	}
	log.Info("starting", "identity", src.Identity(), "edges", s.edges, "rules", s.allow.Len(), "version", cli.Version())
	side := &ops.Server{Addr: s.Ops.Listen, AllowNonLoopback: s.Ops.AllowNonLoopback, Ready: c.Ready, Degraded: c.Degraded, Registry: registry, Logger: log,
		Listening: func(a net.Addr) { log.Info("health and metrics", "addr", a) }, Listen: process.Listen}
	local := &control{process: process, path: s.Control, status: c.Status, device: c.ReportDevice, log: ring, registry: registry, logger: log, uid: ownUID()}
	r := &running{process: process, notify: notify.Notifier{Logger: log}, settings: s, log: log, connector: c, ops: side, control: local,
		reload: func(old *settings) *settings { return reload(cmd, old, log, src, c, in) }, check: func(ctx context.Context) { s.logChecks(ctx, src, c.Ready, log) }}
	return r.run(cmd.Context())
}

// reload reads configuration and certificate again. What is wrong is logged, and the old stays.
func reload(cmd *cobra.Command, old *settings, log *slog.Logger, src *mtls.Source, c *connector.Connector, in *ingress.Handler) *settings {
	if err := src.Reload(); err != nil {
		log.Error("certificate not reloaded, the old one stays", "err", err)
	}
	s, err := load(cmd)
	if err != nil {
		log.Error("configuration not reloaded, the old one stays", "err", err)
		return old
	}
	if err := in.SetLocal(s.ingress); err != nil { // first: it alone can fail
		log.Error("configuration not reloaded, the old one stays", "err", err)
		return old
	}
	cut := c.SetAllow(s.allow)
	c.SetLimits(s.Limits.flows())
	log.Info("configuration reloaded", "rules", s.allow.Len(), "flows_cut", cut)
	if s.allow.Len() == 0 {
		log.Warn("the allow-list is empty: every flow will be denied")
	}
	fixed := func(c config) config {
		c.takeLive(config{})
		return c
	}
	if !reflect.DeepEqual(fixed(*s.config), fixed(*old.config)) {
		log.Warn("other settings changed too; they need a restart")
		// Keep what runs, so that the warning comes again until the restart.
		kept := *old.config
		kept.takeLive(*s.config)
		s.config = &kept
	}
	return s
}

// takeLive takes from another configuration what can change without a restart.
func (c *config) takeLive(from config) {
	c.Allow, c.Ingress, c.IngressOrigin = from.Allow, from.Ingress, from.IngressOrigin
	c.Limits.MaxFlows, c.Limits.PerVNet = from.Limits.MaxFlows, from.Limits.PerVNet
}
