package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/connector/check"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
)

// checkAfter is how long a start has for a first session before the edges are looked at.
const checkAfter = 5 * time.Second

func checkCommand() *cobra.Command {
	var offline bool
	cmd := cli.WithOutput(&cobra.Command{
		Use:   "check",
		Short: "Say what is wrong with the configuration and with this host",
		Long: `Check reads the configuration, then looks at what the connector needs: the names of the edges, UDP and TCP to them, the
proxy, the clock, the certificate, and what the kernel permits. Each finding that is not ok names its remedy. A running
connector is left alone; run check as the same user. The exit code is 0 if the connector can work, 1 if a check failed, 3 if
the configuration is wrong.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := load(cmd)
			if err != nil {
				return err
			}
			src, err := s.identity(nil)
			if err != nil {
				return err
			}
			findings := append([]check.Finding{s.allowFinding()}, s.look(cmd.Context(), src, !offline)...)
			if err := cli.Show(cmd, findings, func(w io.Writer) { findingsTable(w, findings) }); err != nil {
				return err
			}
			if check.Worst(findings) == check.Fail {
				return cli.Quiet(errors.New("a check failed"))
			}
			return nil
		},
	})
	cmd.Flags().String("config", defaultConfig, configHelp)
	cmd.Flags().BoolVar(&offline, "offline", false, "do not look at the edges")
	return cmd
}

// look looks at the host, and at the edges if asked to.
func (s *settings) look(ctx context.Context, src *mtls.Source, edges bool) []check.Finding {
	cfg := check.Config{Identity: src, Carrier: s.Transport.Carrier, Proxy: s.Transport.Proxy.dialer()}
	if edges {
		for _, e := range s.edges {
			if host, port, err := connector.ParseEdge(e); err == nil { // identity or validate has looked
				cfg.Edges = append(cfg.Edges, check.Edge{Host: host, Port: port})
			}
		}
	}
	return check.Run(ctx, cfg)
}

func (s *settings) allowFinding() check.Finding {
	f := check.Finding{Check: "allow", Level: check.OK, Detail: fmt.Sprintf("%d rules", s.allow.Len())}
	if s.allow.Len() == 0 {
		f.Level, f.Detail = check.Warn, "the allow-list is empty: every flow will be denied"
		f.Remedy = "list under allow what may be reached"
	}
	return f
}

func findingsTable(w io.Writer, findings []check.Finding) {
	for _, f := range findings {
		fmt.Fprintf(w, "%s\t%s\t%s\n", f.Level, f.Check, strings.ReplaceAll(f.Detail, "\n", "; "))
		if f.Remedy != "" {
			fmt.Fprintf(w, "\t\tremedy: %s\n", f.Remedy)
		}
	}
	fmt.Fprintf(w, "%s\n", check.Worst(findings))
}

// logChecks logs once what is not as it should be. The edges are looked at only if there is no session after a while, since
// a session says more than any check.
func (s *settings) logChecks(ctx context.Context, src *mtls.Source, ready func(context.Context) error, log *slog.Logger) {
	select {
	case <-time.After(checkAfter):
	case <-ctx.Done():
		return
	}
	for _, f := range s.look(ctx, src, ready(ctx) != nil) {
		if ctx.Err() != nil {
			return
		}
		switch f.Level {
		case check.Fail:
			log.Error("start-up check failed", "op", f.Check, "err", f.Detail, "remedy", f.Remedy)
		case check.Warn:
			log.Info("start-up check", "op", f.Check, "found", f.Detail, "remedy", f.Remedy)
		}
	}
}

// edgesFile is where the edges that edges told are kept, beside the identity.
func (s *settings) edgesFile() string { return filepath.Join(s.Identity.Dir, "edges.json") }
