package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
)

func newEdge() *cobra.Command {
	cmd := &cobra.Command{Use: "edge", Short: "The edges of the installation"}
	list := showing(&cobra.Command{Use: "list", Short: "List the edges and whether they are there"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.EdgeView, error) {
			return c.Edges(ctx)
		},
		func(w io.Writer, list []control.EdgeView) { edgeTable(w, list...) })
	cmd.AddCommand(list, edgeRemove(), edgeRestore())
	return cmd
}

func edgeRemove() *cobra.Command {
	return complete(doing(&cobra.Command{
		Use:   "remove NAME",
		Short: "Keep an edge out: the others have nothing to do with it from now on, and connectors leave it",
		Args:  cobra.ExactArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) (control.EdgeView, error) {
		return c.RemoveEdge(ctx, args[0])
	}, func(_ control.EdgeView, args []string) string { return fmt.Sprintf("edge %q removed", args[0]) }), otherEdges)
}

func edgeRestore() *cobra.Command {
	return complete(doing(&cobra.Command{
		Use:   "restore NAME",
		Short: "Take back the removal of an edge; one whose key may have been taken needs a new name instead",
		Args:  cobra.ExactArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) (control.EdgeView, error) {
		return c.RestoreEdge(ctx, args[0])
	}, func(_ control.EdgeView, args []string) string { return fmt.Sprintf("edge %q restored", args[0]) }), removedEdges)
}

// edgeTable lists edges; below it stands what is wrong.
func edgeTable(w io.Writer, list ...control.EdgeView) {
	row(w, "NAME", "ALIVE", "HERE", "SESSIONS", "ADVERTISED", "STARTED", "VERSION", "REMOVED")
	for _, e := range list {
		row(w, e.Name, mark(e.Alive), mark(e.Here), e.Sessions, strings.Join(e.Advertise, " "), when(e.Started), e.Version, when(e.Removed))
	}
	for _, e := range list {
		if e.Problem != "" {
			fmt.Fprintf(w, "edge %s: %s\n", e.Name, e.Problem)
		}
	}
}
