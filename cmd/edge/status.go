package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newStatus() *cobra.Command {
	return cli.WithOutput(&cobra.Command{
		Use:   "status",
		Short: "Show how the edge and its tunnels are",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return asked(cmd, func(c *admin.Client) error {
				s, err := c.Status(cmd.Context())
				if err != nil {
					return err
				}
				return cli.Show(cmd, s, func(w io.Writer) {
					fmt.Fprintf(w, "edge of %s, up since %s: %d virtual networks, %d routes, %d connectors, %d sessions, %d flows\n",
						s.TrustDomain, when(s.Started), s.VNets, s.Routes, s.Connectors, s.Sessions, s.Flows)
					if len(s.Tunnels) > 0 {
						fmt.Fprintln(w)
						tunnelTable(w, s.Tunnels...)
					}
				})
			})
		},
	})
}
