package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newConnector() *cobra.Command {
	cmd := &cobra.Command{Use: "connector", Short: "Connectors: the enrolled far ends of tunnels"}
	cmd.AddCommand(connectorList(), connectorRevoke())
	return cmd
}

func connectorList() *cobra.Command {
	var tunnel string
	cmd := cli.WithOutput(&cobra.Command{
		Use:   "list",
		Short: "List the connectors and how they are",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return asked(cmd, func(c *admin.Client) error {
				list, err := c.Connectors(cmd.Context(), tunnel)
				if err != nil {
					return err
				}
				return cli.Show(cmd, list, func(w io.Writer) { connectorTable(w, list...) })
			})
		},
	})
	cmd.Flags().StringVar(&tunnel, "tunnel", "", "only those of this tunnel")
	return cmd
}

func connectorTable(w io.Writer, list ...control.ConnectorView) {
	row(w, "NAME", "TUNNEL", "STATUS", "SESSIONS", "LAST SEEN", "ORIGIN", "VERSION", "HOST", "ENROLLED")
	for _, k := range list {
		row(w, k.Name, k.TunnelName, k.Status, len(k.Sessions), when(k.LastSeen), k.Origin, k.Version, k.Hostname, when(k.Created))
	}
}

func connectorRevoke() *cobra.Command {
	return &cobra.Command{
		Use:   "revoke NAME",
		Short: "Revoke a connector: end its sessions and let it in no more",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				k, err := c.RevokeConnector(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "connector %q of tunnel %q revoked\n", k.Name, k.TunnelName)
				return err
			})
		},
	}
}
