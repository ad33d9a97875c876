package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
)

func newStatus() *cobra.Command {
	return showing(&cobra.Command{
		Use:   "status",
		Short: "Show how the edge, its tunnels and its pools are, and what is out of service",
	}, func(ctx context.Context, c *admin.Client, _ []string) (admin.Status, error) {
		return c.Status(ctx)
	}, statusPage)
}

func statusPage(w io.Writer, s admin.Status) {
	fmt.Fprintf(w, "edge of %s, up since %s: %d virtual networks, %d routes, %d connectors, %d sessions, %d flows\n",
		s.TrustDomain, when(s.Started), s.VNets, s.Routes, s.Connectors, s.Sessions, s.Flows)
	fmt.Fprintf(w, "of the store: %d zones, %d public ports\n", s.Zones, s.Ports)
	if len(s.Faults) > 0 {
		fmt.Fprintln(w)
		row(w, "OUT OF SERVICE", "NAME", "WHY")
		for _, f := range s.Faults {
			row(w, f.Kind, f.Name, f.Text)
		}
	}
	if len(s.Edges) > 1 {
		fmt.Fprintln(w)
		edgeTable(w, s.Edges...)
	}
	if len(s.Tunnels) > 0 {
		fmt.Fprintln(w)
		tunnelTable(w, s.Tunnels...)
	}
	if len(s.Pools) > 0 {
		fmt.Fprintln(w)
		healthTable(w, s.Pools...)
	}
}
