package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newVNet() *cobra.Command {
	cmd := &cobra.Command{Use: "vnet", Short: "Virtual networks: address spaces that may overlap"}
	cmd.AddCommand(vnetAdd(), vnetList(), vnetInfo(), vnetSet(), vnetDelete())
	return cmd
}

func vnetAdd() *cobra.Command {
	var comment string
	var isDefault bool
	cmd := doing(&cobra.Command{
		Use:     "add NAME",
		Short:   "Add a virtual network",
		Example: "  keyhaven-edge vnet add red --comment 'the other site'",
		Args:    cobra.ExactArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) (control.VNetView, error) {
		return c.AddVNet(ctx, args[0], comment, isDefault)
	}, func(v control.VNetView, _ []string) string {
		return fmt.Sprintf("virtual network %q added (%s)%s", v.Name, v.ID, ifTrue(v.Default, ", now the default"))
	})
	cmd.Flags().StringVar(&comment, "comment", "", "text for people")
	cmd.Flags().BoolVar(&isDefault, "default", false, "make it the default network")
	return cmd
}

func vnetList() *cobra.Command {
	return showing(&cobra.Command{Use: "list", Short: "List the virtual networks"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.VNetView, error) {
			return c.VNets(ctx)
		},
		func(w io.Writer, list []control.VNetView) { vnetTable(w, list...) })
}

func vnetTable(w io.Writer, list ...control.VNetView) {
	row(w, "NAME", "ID", "DEFAULT", "ROUTES", "MAX FLOWS", "CREATED", "COMMENT")
	for _, v := range list {
		row(w, v.Name, v.ID, mark(v.Default), v.Routes, bound(v.MaxFlows), when(v.Created), v.Comment)
	}
}

func vnetInfo() *cobra.Command {
	return complete(showing(&cobra.Command{Use: "info NAME", Short: "Show a virtual network and its routes", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, c *admin.Client, args []string) (control.VNetDetail, error) {
			return c.VNet(ctx, args[0])
		},
		func(w io.Writer, v control.VNetDetail) {
			vnetTable(w, v.VNetView)
			if len(v.RouteList) > 0 {
				fmt.Fprintln(w)
				routeTable(w, v.RouteList...)
			}
		}), vnetNames)
}

func vnetSet() *cobra.Command {
	var change control.VNetChange
	cmd := &cobra.Command{
		Use:     "set NAME",
		Short:   "Change a virtual network",
		Example: "  keyhaven-edge vnet set red --default\n  keyhaven-edge vnet set red --max-flows 2000",
		Args:    cobra.ExactArgs(1),
	}
	read := changeFlags(cmd, &change.Comment, &change.MaxFlows)
	cmd.Flags().BoolVar(&change.Default, "default", false, "make it the default network")
	doing(cmd, func(ctx context.Context, c *admin.Client, args []string) (control.VNetView, error) {
		if !read() && !change.Default {
			return control.VNetView{}, cli.UsageError("nothing to change; give --comment, --max-flows or --default")
		}
		return c.SetVNet(ctx, args[0], change)
	}, func(v control.VNetView, _ []string) string {
		return fmt.Sprintf("virtual network %q changed%s", v.Name, ifTrue(v.Default, "; it is the default"))
	})
	return complete(cmd, vnetNames)
}

// changeFlags adds --comment and --max-flows and returns how to read those that are given, and whether one is.
func changeFlags(cmd *cobra.Command, comment **string, maxFlows **int) (read func() bool) {
	text := cmd.Flags().String("comment", "", "text for people")
	n := cmd.Flags().Int("max-flows", 0, "most open flows at a time, on each edge; 0 is no bound")
	return func() bool {
		if cmd.Flags().Changed("comment") {
			*comment = text
		}
		if cmd.Flags().Changed("max-flows") {
			*maxFlows = n
		}
		return *comment != nil || *maxFlows != nil
	}
}

func vnetDelete() *cobra.Command {
	var force bool
	cmd := deleting("virtual network", func(ctx context.Context, c *admin.Client, name string) error { return c.DeleteVNet(ctx, name, force) })
	cmd.Long = "Delete a virtual network that nothing uses. The default network is never deleted, nor one that a pool, a port, a zone or\n" +
		"the configuration names."
	cmd.Flags().BoolVar(&force, "force", false, "delete its routes with it")
	return complete(cmd, vnetNames)
}
