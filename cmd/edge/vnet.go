package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newVNet() *cobra.Command {
	cmd := &cobra.Command{Use: "vnet", Short: "Virtual networks: address spaces that may overlap"}
	cmd.AddCommand(vnetAdd(), vnetList(), vnetGet(), vnetDefault(), vnetDelete())
	return cmd
}

func vnetAdd() *cobra.Command {
	var comment string
	var isDefault bool
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a virtual network",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				v, err := c.AddVNet(cmd.Context(), args[0], comment, isDefault)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "virtual network %q added (%s)%s\n", v.Name, v.ID, ifTrue(v.Default, ", now the default"))
				return err
			})
		},
	}
	cmd.Flags().StringVar(&comment, "comment", "", "text for people")
	cmd.Flags().BoolVar(&isDefault, "default", false, "make it the default network")
	return cmd
}

func vnetList() *cobra.Command {
	return cli.WithOutput(&cobra.Command{
		Use:   "list",
		Short: "List the virtual networks",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return asked(cmd, func(c *admin.Client) error {
				list, err := c.VNets(cmd.Context())
				if err != nil {
					return err
				}
				return cli.Show(cmd, list, func(w io.Writer) { vnetTable(w, list...) })
			})
		},
	})
}

func vnetTable(w io.Writer, list ...control.VNetView) {
	row(w, "NAME", "ID", "DEFAULT", "ROUTES", "CREATED", "COMMENT")
	for _, v := range list {
		row(w, v.Name, v.ID, mark(v.Default), v.Routes, when(v.Created), v.Comment)
	}
}

func vnetGet() *cobra.Command {
	return cli.WithOutput(&cobra.Command{
		Use:   "get NAME",
		Short: "Show a virtual network and its routes",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				v, err := c.VNet(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return cli.Show(cmd, v, func(w io.Writer) {
					vnetTable(w, v.VNetView)
					if len(v.RouteList) > 0 {
						fmt.Fprintln(w)
						routeTable(w, v.RouteList...)
					}
				})
			})
		},
	})
}

func vnetDefault() *cobra.Command {
	return &cobra.Command{
		Use:   "default NAME",
		Short: "Make a virtual network the default one",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				v, err := c.SetVNet(cmd.Context(), args[0], control.VNetChange{Default: true})
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "virtual network %q is the default\n", v.Name)
				return err
			})
		},
	}
}

func vnetDelete() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a virtual network that nothing uses",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				if err := c.DeleteVNet(cmd.Context(), args[0], force); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "virtual network %q deleted\n", args[0])
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "delete its routes with it")
	return cmd
}

func ifTrue(b bool, s string) string {
	if b {
		return s
	}
	return ""
}
