package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newTunnel() *cobra.Command {
	cmd := &cobra.Command{Use: "tunnel", Short: "Tunnels: the ways to private sites"}
	cmd.AddCommand(tunnelAdd(), tunnelList(), tunnelGet(), tunnelToken(), tunnelDelete())
	return cmd
}

func tunnelAdd() *cobra.Command {
	var comment string
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a tunnel",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				t, err := c.AddTunnel(cmd.Context(), args[0], comment)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "tunnel %q added (%s); enrol a connector with 'tunnel token %s'\n", t.Name, t.ID, t.Name)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&comment, "comment", "", "text for people")
	return cmd
}

func tunnelList() *cobra.Command {
	return cli.WithOutput(&cobra.Command{
		Use:   "list",
		Short: "List the tunnels and how they are",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return asked(cmd, func(c *admin.Client) error {
				list, err := c.Tunnels(cmd.Context())
				if err != nil {
					return err
				}
				return cli.Show(cmd, list, func(w io.Writer) { tunnelTable(w, list...) })
			})
		},
	})
}

func tunnelTable(w io.Writer, list ...control.TunnelView) {
	row(w, "NAME", "STATUS", "CONNECTORS", "SESSIONS", "FLOWS", "ROUTES", "LAST SEEN", "ID", "COMMENT")
	for _, t := range list {
		row(w, t.Name, t.Status, t.Connectors, t.Sessions, t.Flows, t.Routes, when(t.LastSeen), t.ID, t.Comment)
	}
}

func tunnelGet() *cobra.Command {
	return cli.WithOutput(&cobra.Command{
		Use:   "get NAME",
		Short: "Show a tunnel with its connectors, their sessions, and its routes",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				t, err := c.Tunnel(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return cli.Show(cmd, t, func(w io.Writer) { tunnelPage(w, t) })
			})
		},
	})
}

func tunnelPage(w io.Writer, t control.TunnelDetail) {
	tunnelTable(w, t.TunnelView)
	if len(t.ConnectorList) > 0 {
		fmt.Fprintln(w)
		connectorTable(w, t.ConnectorList...)
	}
	first := true
	for _, k := range t.ConnectorList {
		for _, s := range k.Sessions {
			if first {
				fmt.Fprintln(w)
				row(w, "CONNECTOR", "CONN", "INSTANCE", "REMOTE", "FLOWS", "SINCE", "DRAINING", "VERSION")
				first = false
			}
			row(w, k.Name, s.Index, s.Instance, s.Remote, s.Flows, when(s.Since), mark(s.Draining), s.Version)
		}
	}
	if len(t.RouteList) > 0 {
		fmt.Fprintln(w)
		routeTable(w, t.RouteList...)
	}
}

func tunnelToken() *cobra.Command {
	var ttl time.Duration
	var out string
	cmd := &cobra.Command{
		Use:   "token NAME",
		Short: "Make a join token, which enrols one connector",
		Long: "Make a join token, which enrols one connector. The token is shown this once. It is a secret until it has been used\n" +
			"or has expired: hand it over in a file, not on a command line.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				if ttl <= 0 {
					return cli.UsageError("--ttl %s: use a duration above zero", ttl)
				}
				return makeToken(cmd, c, args[0], ttl, out)
			})
		},
	}
	cmd.Flags().DurationVar(&ttl, "ttl", control.DefaultTokenTTL, "how long it can be used")
	cmd.Flags().StringVar(&out, "out", "", "new file that gets the token, with mode 0600 (default standard output)")
	return cmd
}

// makeToken opens the file before it asks for the token, so that none is made that nobody has.
func makeToken(cmd *cobra.Command, c *admin.Client, name string, ttl time.Duration, out string) (err error) {
	w := cmd.OutOrStdout()
	if out != "" {
		f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return fmt.Errorf("write the token: %w; name a file that is not there yet", err)
		}
		done := false
		defer func() {
			f.Close()
			if !done {
				os.Remove(out)
			}
		}()
		g, err := c.CreateToken(cmd.Context(), name, ttl)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintln(f, g.Token); err != nil {
			return fmt.Errorf("write the token: %w", err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("write the token: %w", err)
		}
		done = true
		return tokenNote(cmd, g)
	}
	g, err := c.CreateToken(cmd.Context(), name, ttl)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(w, g.Token); err != nil {
		return err
	}
	return tokenNote(cmd, g)
}

// tokenNote goes to standard error, so that standard output holds the token alone.
func tokenNote(cmd *cobra.Command, g control.JoinGrant) error {
	_, err := fmt.Fprintf(cmd.ErrOrStderr(), "join token %s enrols one connector of tunnel %q until %s\n", g.ID, g.Tunnel, when(g.Expires))
	return err
}

func tunnelDelete() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a tunnel that nothing uses",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				if err := c.DeleteTunnel(cmd.Context(), args[0], force); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "tunnel %q deleted\n", args[0])
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "delete its routes, connectors and join tokens with it")
	return cmd
}
