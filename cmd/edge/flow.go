package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
)

func newFlow() *cobra.Command {
	cmd := &cobra.Command{Use: "flow", Short: "Open flows through the tunnels"}
	cmd.AddCommand(flowList())
	return cmd
}

func flowList() *cobra.Command {
	var vnet, tunnel string
	var limit int
	cmd := showing(&cobra.Command{
		Use:     "list",
		Short:   "List the open flows of this edge, oldest first, with their carrier",
		Example: "  keyhaven-edge flow list --tunnel plant --limit 20",
	}, func(ctx context.Context, c *admin.Client, _ []string) (admin.FlowList, error) {
		return c.Flows(ctx, vnet, tunnel, limit)
	}, func(w io.Writer, list admin.FlowList) {
		row(w, "KIND", "VNET", "DESTINATION", "VISITOR", "TUNNEL", "CONNECTOR", "CARRIER", "ROLE", "EDGE", "IN", "OUT", "SINCE")
		for _, f := range list.Flows {
			row(w, f.Kind, f.VNet, net.JoinHostPort(f.Host, strconv.Itoa(int(f.Port))), f.Visitor, f.Tunnel, f.Connector, f.Carrier, f.Role, f.Edge, f.BytesIn, f.BytesOut, when(f.Since))
		}
		if n := list.Total - len(list.Flows); n > 0 {
			fmt.Fprintf(w, "and %d more; --limit shows them\n", n)
		}
	})
	cmd.Flags().StringVar(&vnet, "vnet", "", "only those of this virtual network")
	cmd.Flags().StringVar(&tunnel, "tunnel", "", "only those of this tunnel")
	cmd.Flags().IntVar(&limit, "limit", 1000, "most flows listed")
	completeFlag(cmd, "vnet", vnetNames)
	completeFlag(cmd, "tunnel", tunnelNames)
	return cmd
}
