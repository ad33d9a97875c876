package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newTunnel() *cobra.Command {
	cmd := &cobra.Command{Use: "tunnel", Short: "Tunnels: the ways to private sites"}
	cmd.AddCommand(tunnelCreate(), tunnelList(), tunnelInfo(), tunnelSet(), tunnelToken(), tunnelCleanup(), tunnelDelete(), tunnelConfigs())
	return cmd
}

func tunnelCreate() *cobra.Command {
	var comment string
	cmd := doing(&cobra.Command{
		Use:     "create NAME",
		Short:   "Create a tunnel",
		Example: "  keyhaven-edge tunnel create plant --comment 'machine hall'\n  keyhaven-edge tunnel token create plant --out plant.token",
		Args:    cobra.ExactArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) (control.TunnelView, error) {
		return c.AddTunnel(ctx, args[0], comment)
	}, func(t control.TunnelView, _ []string) string {
		return fmt.Sprintf("tunnel %q created (%s); enrol a connector with 'tunnel token create %s'", t.Name, t.ID, t.Name)
	})
	cmd.Flags().StringVar(&comment, "comment", "", "text for people")
	return cmd
}

func tunnelList() *cobra.Command {
	return showing(&cobra.Command{Use: "list", Short: "List the tunnels and how they are"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.TunnelView, error) {
			return c.Tunnels(ctx)
		},
		func(w io.Writer, list []control.TunnelView) { tunnelTable(w, list...) })
}

func tunnelTable(w io.Writer, list ...control.TunnelView) {
	row(w, "NAME", "STATUS", "CONNECTORS", "SESSIONS", "FLOWS", "MAX FLOWS", "ROUTES", "UP SINCE", "LAST SEEN", "ID", "COMMENT")
	for _, t := range list {
		row(w, t.Name, t.Status, t.Connectors, t.Sessions, t.Flows, bound(t.MaxFlows), t.Routes, when(t.Since), when(t.LastSeen), t.ID, t.Comment)
	}
}

func tunnelInfo() *cobra.Command {
	return complete(showing(&cobra.Command{
		Use:   "info NAME",
		Short: "Show a tunnel with its connectors, their sessions, and its routes",
		Args:  cobra.ExactArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) (control.TunnelDetail, error) {
		return c.Tunnel(ctx, args[0])
	}, tunnelPage), tunnelNames)
}

func tunnelPage(w io.Writer, t control.TunnelDetail) {
	tunnelTable(w, t.TunnelView)
	if len(t.ConnectorList) > 0 {
		fmt.Fprintln(w)
		connectorTable(w, t.ConnectorList...)
	}
	sessionTable(w, t.ConnectorList)
	elsewhereTable(w, t.ConnectorList)
	if len(t.RouteList) > 0 {
		fmt.Fprintln(w)
		routeTable(w, t.RouteList...)
	}
}

func sessionTable(w io.Writer, connectors []control.ConnectorView) {
	first := true
	for _, k := range connectors {
		for _, s := range k.Sessions {
			if first {
				fmt.Fprintln(w)
				row(w, "CONNECTOR", "CONN", "INSTANCE", "REMOTE", "CARRIER", "ROLE", "RTT", "FLOWS", "SINCE", "DRAINING", "VERSION")
				first = false
			}
			row(w, k.Name, s.Index, s.Instance, s.Remote, s.Carrier, s.Role, rtt(s.RTT), s.Flows, when(s.Since), mark(s.Draining), s.Version)
		}
	}
}

// elsewhereTable shows what other edges have of the connectors.
func elsewhereTable(w io.Writer, connectors []control.ConnectorView) {
	first := true
	for _, k := range connectors {
		for _, e := range k.Elsewhere {
			if first {
				fmt.Fprintln(w)
				row(w, "CONNECTOR", "AT EDGE", "SESSIONS", "COMPLETE")
				first = false
			}
			row(w, k.Name, e.Edge, e.Sessions, mark(e.Complete))
		}
	}
}

// rtt prints a round trip in seconds, of which zero was not measured.
func rtt(seconds float64) string {
	if seconds == 0 {
		return ""
	}
	return time.Duration(seconds * float64(time.Second)).Round(100 * time.Microsecond).String()
}

func tunnelSet() *cobra.Command {
	var change control.TunnelChange
	cmd := &cobra.Command{
		Use:     "set NAME",
		Short:   "Change a tunnel",
		Example: "  keyhaven-edge tunnel set plant --max-flows 500",
		Args:    cobra.ExactArgs(1),
	}
	read := changeFlags(cmd, &change.Comment, &change.MaxFlows)
	doing(cmd, func(ctx context.Context, c *admin.Client, args []string) (control.TunnelView, error) {
		if !read() {
			return control.TunnelView{}, cli.UsageError("nothing to change; give --comment or --max-flows")
		}
		return c.SetTunnel(ctx, args[0], change)
	}, func(t control.TunnelView, _ []string) string { return fmt.Sprintf("tunnel %q changed", t.Name) })
	return complete(cmd, tunnelNames)
}

func tunnelCleanup() *cobra.Command {
	spec := control.CleanupSpec{Unseen: control.DefaultUnseen}
	cmd := &cobra.Command{
		Use:   "cleanup [NAME]",
		Short: "Remove connectors that are gone, and join tokens that nobody can use",
		Long: "Remove connectors that are revoked, or that no edge has seen for a time, and join tokens that are used or have expired.\n" +
			"A connector that is removed needs a new join token to come back. Connectors with a session stay, and those that a pool\nnames.",
		Example: "  keyhaven-edge tunnel cleanup --dry-run\n  keyhaven-edge tunnel cleanup plant --unseen 168h",
		Args:    cobra.MaximumNArgs(1),
	}
	cmd.Flags().DurationVar(&spec.Unseen, "unseen", spec.Unseen, "remove connectors that were away for longer; at least 1h")
	cmd.Flags().BoolVar(&spec.DryRun, "dry-run", false, "only show what would be removed")
	showing(cmd, func(ctx context.Context, c *admin.Client, args []string) ([]control.Cleaned, error) {
		if len(args) > 0 {
			spec.Tunnel = args[0]
		}
		if spec.Unseen <= 0 {
			return nil, cli.UsageError("--unseen %s: use a duration above zero", spec.Unseen)
		}
		return c.Cleanup(ctx, spec)
	}, func(w io.Writer, list []control.Cleaned) {
		if len(list) == 0 {
			fmt.Fprintln(w, "nothing to clean up")
			return
		}
		row(w, map[bool]string{true: "WOULD REMOVE", false: "REMOVED"}[spec.DryRun], "NAME", "TUNNEL", "REASON", "SINCE")
		for _, f := range list {
			row(w, f.Kind, f.Name, f.TunnelName, f.Reason, when(f.Since))
		}
	})
	return complete(cmd, tunnelNames)
}

func tunnelDelete() *cobra.Command {
	var force bool
	cmd := deleting("tunnel", func(ctx context.Context, c *admin.Client, name string) error { return c.DeleteTunnel(ctx, name, force) })
	cmd.Long = "Delete a tunnel that nothing uses. One that a port, a zone or the configuration names is never deleted."
	cmd.Flags().BoolVar(&force, "force", false, "delete its routes, connectors and join tokens with it")
	return complete(cmd, tunnelNames)
}
