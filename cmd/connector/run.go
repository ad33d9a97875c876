package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"reflect"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/connector/ingress"
	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/ops"
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
		Long: `Run keeps four sessions to each edge and serves flows until it gets SIGINT or SIGTERM. Then it tells the edges,
waits for open flows for drain.grace at most, and exits; a second signal ends it at once. SIGHUP reads the allow-list,
the ingress rules, limits.max_flows and the certificate again: open flows that are no longer permitted are cut.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd) },
	}
	cmd.Flags().String("config", defaultConfig, configHelp)
	return cmd
}

func checkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say what is wrong with a configuration",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := load(cmd)
			if err != nil {
				return err
			}
			src, err := s.identity(nil)
			if err != nil {
				return err
			}
			if err := src.Check(); err != nil {
				return cli.ConfigError(fmt.Errorf("identity.dir %s: %w; check this host's clock, else join again with a new token", s.Identity.Dir, err))
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "identity  %s, valid until %s\n", src.Identity(), src.NotAfter().UTC().Format(time.RFC3339))
			fmt.Fprintf(out, "edges     %v\n", s.edges)
			fmt.Fprintf(out, "allow     %d rules\n", s.allow.Len())
			if s.allow.Len() == 0 {
				fmt.Fprintln(out, "warning   the allow-list is empty: every flow will be denied")
			}
			fmt.Fprintln(out, "ok")
			return nil
		},
	}
	cmd.Flags().String("config", defaultConfig, configHelp)
	return cmd
}

func run(cmd *cobra.Command) error {
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
	registry := ops.NewRegistry()
	in, err := s.newIngress(log, registry)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // nothing depends on how it ends
	c, err := connector.New(connector.Config{
		Identity: src, Edges: s.edges, Allow: s.allow, Limits: connector.Limits{MaxFlows: s.Limits.MaxFlows}, DialTimeout: s.Limits.DialTimeout,
		DrainTimeout: s.Drain.Grace, Version: cli.Version(), Logger: log, Registerer: registry, Ingress: in,
	})
	if err != nil {
		return err
	}
	if s.allow.Len() == 0 {
		log.Warn("the allow-list is empty: every flow will be denied")
	}
	log.Info("starting", "identity", src.Identity(), "edges", s.edges, "rules", s.allow.Len(), "version", cli.Version())
	side := &ops.Server{Addr: s.Ops.Listen, AllowNonLoopback: s.Ops.AllowNonLoopback, Ready: c.Ready, Registry: registry, Logger: log,
		Listening: func(a net.Addr) { log.Info("health and metrics", "addr", a) }}
	return serve(cmd, s, log, src, c, in, side)
}

// serve runs the connector, what operators ask it, and reloads, and waits for all of them.
func serve(cmd *cobra.Command, s *settings, log *slog.Logger, src *mtls.Source, c *connector.Connector, in *ingress.Handler, side *ops.Server) error {
	ctx, stop := context.WithCancel(cmd.Context())
	defer stop()
	sideCtx, stopSide := context.WithCancel(context.WithoutCancel(ctx)) // it answers while the connector drains
	defer stopSide()
	var wg sync.WaitGroup
	var sideErr error
	wg.Go(func() {
		if sideErr = cli.ListenError(side.Run(sideCtx)); sideErr != nil {
			stop()
		}
	})
	hangups := cli.Hangups(ctx)
	wg.Go(func() {
		for {
			select {
			case <-hangups:
				s = reload(cmd, s, log, src, c, in)
			case <-ctx.Done():
				return
			}
		}
	})
	err := c.Run(ctx)
	stop()
	stopSide()
	wg.Wait()
	return errors.Join(err, sideErr)
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
	c.SetLimits(connector.Limits{MaxFlows: s.Limits.MaxFlows})
	log.Info("configuration reloaded", "rules", s.allow.Len(), "flows_cut", cut)
	if s.allow.Len() == 0 {
		log.Warn("the allow-list is empty: every flow will be denied")
	}
	fixed := func(c config) config {
		c.Allow, c.Limits.MaxFlows, c.Ingress, c.IngressOrigin = nil, 0, nil, ingressconf.OriginOptions{}
		return c
	}
	if !reflect.DeepEqual(fixed(*s.config), fixed(*old.config)) {
		log.Warn("other settings changed too; they need a restart")
		// Keep what runs, so that the warning comes again until the restart.
		kept := *old.config
		kept.Allow, kept.Limits.MaxFlows, kept.Ingress, kept.IngressOrigin = s.Allow, s.Limits.MaxFlows, s.Ingress, s.IngressOrigin
		s.config = &kept
	}
	return s
}
