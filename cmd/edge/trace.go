package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newTraceroute() *cobra.Command {
	var f echoFlags
	var hops, tries int
	cmd := &cobra.Command{
		Use:   "traceroute HOST",
		Short: "Show the routers from a connector to a host behind it",
		RunE: func(cmd *cobra.Command, args []string) error {
			if hops < 1 || hops > 255 || tries < 1 || tries > 10 {
				return cli.UsageError("--max-hops is 1 to 255, --queries 1 to 10")
			}
			return asked(cmd, func(c *admin.Client) error {
				w := cmd.OutOrStdout()
				fmt.Fprintf(w, "traceroute to %s, %d hops max, %d data bytes\n", args[0], hops, f.size)
				return trace(cmd.Context(), w, hops, tries, func(ctx context.Context, seq, ttl int) (admin.Echo, error) {
					return c.Echo(ctx, f.request(args[0], seq, ttl))
				})
			})
		},
	}
	f.add(cmd, 32)
	cmd.Flags().IntVarP(&hops, "max-hops", "m", 30, "most hops to look at")
	cmd.Flags().IntVarP(&tries, "queries", "q", 3, "requests for each hop")
	return cmd
}

// trace asks each hop in turn until the host has answered, or refused.
func trace(ctx context.Context, w io.Writer, hops, tries int, ping func(ctx context.Context, seq, ttl int) (admin.Echo, error)) error {
	for ttl := 1; ttl <= hops; ttl++ {
		last, reached, refused := "", false, false
		for i := range tries {
			e, err := ping(ctx, ttl*tries+i, ttl)
			if err != nil {
				if i > 0 {
					fmt.Fprintln(w)
				}
				return err
			}
			if i == 0 {
				fmt.Fprintf(w, "%2d ", ttl)
			}
			if e.Type == admin.EchoFailed {
				fmt.Fprintln(w)
				return fmt.Errorf("hop %d: %s", ttl, e.Text)
			}
			if e.Type == admin.EchoTimedOut {
				fmt.Fprint(w, " *")
				continue
			}
			if e.From != last {
				fmt.Fprintf(w, " %s", e.From)
				last = e.From
			}
			fmt.Fprintf(w, "  %.3f ms%s", float64(e.HostRTTUS)/1000, refusalMark(e))
			reached = reached || e.Type == admin.EchoReply
			refused = refused || e.Type == admin.EchoUnreachable
		}
		fmt.Fprintln(w)
		if reached {
			return nil
		}
		if refused {
			break
		}
	}
	return cli.Quiet(errNoReply)
}

// refusalMark is how traceroute shows who refused a request.
func refusalMark(e admin.Echo) string {
	if e.Type != admin.EchoUnreachable {
		return ""
	}
	switch e.Code {
	case 0:
		return " !N"
	case 1:
		return " !H"
	case 2:
		return " !P"
	case 3:
		return " !p"
	case 13:
		return " !X"
	}
	return fmt.Sprintf(" !%d", e.Code)
}
