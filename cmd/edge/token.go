package main

import (
	"context"
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

func tunnelToken() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Join tokens: each enrols one connector"}
	cmd.AddCommand(tokenCreate(), tokenList(), tokenRevoke())
	return cmd
}

func tokenCreate() *cobra.Command {
	var ttl time.Duration
	var out string
	cmd := &cobra.Command{
		Use:   "create TUNNEL",
		Short: "Make a join token, which enrols one connector",
		Long: "Make a join token, which enrols one connector. The token is shown this once. It is a secret until it has been used\n" +
			"or has expired: hand it over in a file, not on a command line.",
		Example: "  keyhaven-edge tunnel token create plant --out plant.token --ttl 10m",
		Args:    cobra.ExactArgs(1),
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
	return complete(cmd, tunnelNames)
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

func tokenList() *cobra.Command {
	cmd := showing(&cobra.Command{
		Use:   "list [TUNNEL]",
		Short: "List the join tokens, without their secrets",
		Args:  cobra.MaximumNArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) ([]control.TokenView, error) {
		tunnel := ""
		if len(args) > 0 {
			tunnel = args[0]
		}
		return c.Tokens(ctx, tunnel)
	}, func(w io.Writer, list []control.TokenView) {
		row(w, "ID", "TUNNEL", "STATUS", "EXPIRES", "USED AT", "USED BY")
		for _, t := range list {
			row(w, t.ID, t.TunnelName, t.Status, when(t.Expires), when(t.UsedAt), t.UsedBy)
		}
	})
	return complete(cmd, tunnelNames)
}

func tokenRevoke() *cobra.Command {
	return complete(doing(&cobra.Command{
		Use:   "revoke ID",
		Short: "Make a join token worthless that has not been used",
		Args:  cobra.ExactArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) (control.TokenView, error) {
		return c.RevokeToken(ctx, args[0])
	}, func(t control.TokenView, _ []string) string {
		return fmt.Sprintf("join token %s of tunnel %q revoked", t.ID, t.TunnelName)
	}), tokenIDs)
}
