package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
)

func newConnector() *cobra.Command {
	cmd := &cobra.Command{Use: "connector", Short: "Connectors: the enrolled far ends of tunnels"}
	cmd.AddCommand(connectorList(), connectorRevoke())
	return cmd
}

func connectorList() *cobra.Command {
	var tunnel string
	cmd := showing(&cobra.Command{Use: "list", Short: "List the connectors and how they are"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.ConnectorView, error) {
			return c.Connectors(ctx, tunnel)
		},
		func(w io.Writer, list []control.ConnectorView) { connectorTable(w, list...) })
	cmd.Flags().StringVar(&tunnel, "tunnel", "", "only those of this tunnel")
	completeFlag(cmd, "tunnel", tunnelNames)
	return cmd
}

func connectorTable(w io.Writer, list ...control.ConnectorView) {
	row(w, "NAME", "TUNNEL", "STATUS", "SESSIONS", "LAST SEEN", "ORIGIN", "VERSION", "HOST", "ENROLLED")
	for _, k := range list {
		row(w, k.Name, k.TunnelName, k.Status, len(k.Sessions), when(k.LastSeen), k.Origin, k.Version, k.Hostname, when(k.Created))
	}
}

func connectorRevoke() *cobra.Command {
	return complete(doing(&cobra.Command{
		Use:   "revoke NAME",
		Short: "Revoke a connector: end its sessions and let it in no more",
		Args:  cobra.ExactArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) (control.ConnectorView, error) {
		return c.RevokeConnector(ctx, args[0])
	}, func(k control.ConnectorView, _ []string) string {
		return fmt.Sprintf("connector %q of tunnel %q revoked", k.Name, k.TunnelName)
	}), connectorNames)
}
