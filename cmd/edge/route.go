package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newRoute() *cobra.Command {
	cmd := &cobra.Command{Use: "route", Short: "Routes: which tunnel has which prefix or host name"}
	cmd.AddCommand(routeAdd(), routeList(), routeGet(), routeDelete())
	return cmd
}

// targetFlags adds the flags that name a route, and returns how to read them.
func targetFlags(cmd *cobra.Command, s *control.RouteSpec) func(args []string) error {
	cmd.Args = cobra.MaximumNArgs(1)
	cmd.Flags().StringVar(&s.Host, "hostname", "", "host name, exact or *.NAME, in place of a prefix")
	cmd.Flags().StringVar(&s.VNet, "vnet", "", "virtual network (default the default network)")
	completeFlag(cmd, "vnet", vnetNames)
	return func(args []string) error {
		if (len(args) == 1) == (s.Host != "") {
			return cli.UsageError("give either a prefix, such as 10.0.0.0/8, or --hostname NAME")
		}
		if len(args) == 1 {
			s.Prefix = args[0]
		}
		return nil
	}
}

func routeAdd() *cobra.Command {
	var s control.RouteSpec
	cmd := &cobra.Command{
		Use:   "add [PREFIX]",
		Short: "Add a route",
		Example: "  keyhaven-edge route add 10.0.0.0/8 --tunnel plant --vnet red --comment 'machine hall'\n" +
			"  keyhaven-edge route add --hostname '*.corp.example' --tunnel office",
	}
	target := targetFlags(cmd, &s)
	cmd.Flags().StringVar(&s.Tunnel, "tunnel", "", "tunnel that has it")
	cmd.Flags().StringVar(&s.Comment, "comment", "", "text for people")
	required(cmd, "tunnel")
	completeFlag(cmd, "tunnel", tunnelNames)
	complete(cmd, words())
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := target(args); err != nil {
			return err
		}
		return asked(cmd, func(c *admin.Client) error {
			r, err := c.AddRoute(cmd.Context(), s)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "route %s added in virtual network %q\n", r, r.VNetName)
			return err
		})
	}
	return cmd
}

func routeDelete() *cobra.Command {
	var s control.RouteSpec
	cmd := &cobra.Command{Use: "delete [PREFIX]", Short: "Delete a route",
		Example: "  keyhaven-edge route delete 10.0.0.0/8 --vnet red\n  keyhaven-edge route delete --hostname '*.corp.example'"}
	target := targetFlags(cmd, &s)
	complete(cmd, routePrefixes)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := target(args); err != nil {
			return err
		}
		return asked(cmd, func(c *admin.Client) error {
			r, err := c.DeleteRoute(cmd.Context(), s)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "route %s deleted from virtual network %q\n", r, r.VNetName)
			return err
		})
	}
	return cmd
}

func routeList() *cobra.Command {
	var vnet string
	cmd := showing(&cobra.Command{Use: "list", Short: "List the routes"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.RouteView, error) {
			return c.Routes(ctx, vnet)
		},
		func(w io.Writer, list []control.RouteView) { routeTable(w, list...) })
	cmd.Flags().StringVar(&vnet, "vnet", "", "only those of this virtual network")
	completeFlag(cmd, "vnet", vnetNames)
	return cmd
}

func routeTable(w io.Writer, list ...control.RouteView) {
	row(w, "VNET", "ROUTE", "TUNNEL", "CREATED", "COMMENT")
	for _, r := range list {
		row(w, r.VNetName, r.Target(), r.TunnelName, when(r.Created), r.Comment)
	}
}

// errNoRoute is what 'route get' ends with if nothing has the host, for scripts.
var errNoRoute = errors.New("no route")

func routeGet() *cobra.Command {
	var vnet string
	cmd := cli.WithOutput(&cobra.Command{
		Use:     "get HOST",
		Short:   "Show which tunnel has an address, prefix or host name, and what overlaps",
		Example: "  keyhaven-edge route get 10.1.2.3 --vnet red\n  keyhaven-edge route get 10.0.0.0/8\n  keyhaven-edge route get db.corp.example",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				a, err := c.FindHost(cmd.Context(), args[0], vnet)
				if err != nil {
					return err
				}
				if err := cli.Show(cmd, a, func(w io.Writer) { routeAnswer(w, a) }); err != nil {
					return err
				}
				if a.Chosen == nil {
					return fmt.Errorf("%w to %s in virtual network %q; add one with 'route add'", errNoRoute, a.Query, a.VNetName)
				}
				return nil
			})
		},
	})
	cmd.Flags().StringVar(&vnet, "vnet", "", "virtual network (default the default network)")
	completeFlag(cmd, "vnet", vnetNames)
	return cmd
}

func routeAnswer(w io.Writer, a control.RouteAnswer) {
	if a.Chosen != nil {
		fmt.Fprintf(w, "%s in virtual network %q goes to tunnel %q by the route %s\n", a.Query, a.VNetName, a.Chosen.TunnelName, a.Chosen.Target())
	}
	if len(a.Everywhere) > 0 {
		fmt.Fprintf(w, "\nby virtual network:\n")
		routeTable(w, a.Everywhere...)
	}
	if len(a.Overlaps) > 0 {
		fmt.Fprintf(w, "\nother prefixes that overlap, over all virtual networks:\n")
		routeTable(w, a.Overlaps...)
	}
}
