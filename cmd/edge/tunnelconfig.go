package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func tunnelConfigs() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "The ingress rules that the edge hands to a tunnel's connectors",
		Long: "The ingress rules that the edge hands to a tunnel's connectors. They stand in place of the rules in the connectors' own\n" +
			"files. Each connector checks them against its allow-list, and keeps what it has if it refuses.",
	}
	cmd.AddCommand(tunnelConfigGet(), tunnelConfigSet(), tunnelConfigImport(), tunnelConfigClear())
	return cmd
}

func tunnelConfigGet() *cobra.Command {
	return complete(showing(&cobra.Command{
		Use:   "get TUNNEL",
		Short: "Show the rules, their version, and how the connectors took them",
		Args:  cobra.ExactArgs(1),
	}, func(ctx context.Context, c *admin.Client, args []string) (control.TunnelConfigView, error) {
		return c.TunnelConfig(ctx, args[0])
	}, tunnelConfigPage), tunnelNames)
}

func tunnelConfigPage(w io.Writer, v control.TunnelConfigView) {
	row(w, "TUNNEL", "VERSION", "RULES", "UPDATED")
	rules, err := ingressconf.Parse(v.Body)
	n := "cannot be read by this version"
	if err == nil {
		n = fmt.Sprint(rules.Len())
	}
	row(w, v.TunnelName, v.Version, n, when(v.Updated))
	if rules.Len() > 0 {
		fmt.Fprintln(w)
		row(w, "RULE", "HOSTNAME", "PATH", "SERVICE")
		for i, t := range rules.Targets() {
			row(w, i, t.Rule.Hostname, t.Rule.Path, t.Service)
		}
	}
	if len(v.Connectors) > 0 {
		fmt.Fprintln(w)
		row(w, "CONNECTOR", "APPLIED", "REFUSED", "WHY")
		for _, k := range v.Connectors {
			row(w, k.Connector, version(k.Applied), version(k.Refused), k.Error)
		}
	}
}

func version(n uint64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func tunnelConfigSet() *cobra.Command {
	return changesConfig(&cobra.Command{
		Use:   "set TUNNEL FILE",
		Short: "Replace the rules by those of a file",
		Long: "Replace the rules by those of a file, YAML or JSON, with the keys ingress and ingress_origin; - is standard input.\n" +
			"docs/ingress.md describes them.",
		Args: cobra.ExactArgs(2),
	}, func(cmd *cobra.Command, args []string) (json.RawMessage, error) {
		b, err := readFile(cmd, args[1])
		if err != nil {
			return nil, err
		}
		return ingressconf.Canonical(b)
	})
}

func tunnelConfigImport() *cobra.Command {
	return changesConfig(&cobra.Command{
		Use:   "import TUNNEL FILE",
		Short: "Make the rules in a connector's configuration file those of the tunnel",
		Long: "Make the rules in a connector's configuration file, its keys ingress and ingress_origin, those of the tunnel. The\n" +
			"contents of the files that ca_pool names are put in their place. - is standard input.",
		Args: cobra.ExactArgs(2),
	}, func(cmd *cobra.Command, args []string) (json.RawMessage, error) {
		b, err := readFile(cmd, args[1])
		if err != nil {
			return nil, err
		}
		doc, err := ingressconf.FromFile(b)
		if err != nil {
			return nil, err
		}
		if doc, err = ingressconf.Inline(doc, readBounded); err != nil {
			return nil, err
		}
		return ingressconf.Canonical(doc)
	})
}

func tunnelConfigClear() *cobra.Command {
	return changesConfig(&cobra.Command{
		Use:   "clear TUNNEL",
		Short: "Take the rules back: the connectors use those of their own files",
		Args:  cobra.ExactArgs(1),
	}, func(*cobra.Command, []string) (json.RawMessage, error) { return nil, nil })
}

// changesConfig completes a command that sets the configuration which read returns.
func changesConfig(cmd *cobra.Command, read func(cmd *cobra.Command, args []string) (json.RawMessage, error)) *cobra.Command {
	var ifVersion uint64
	doing(complete(cmd, tunnelNames), func(ctx context.Context, c *admin.Client, args []string) (control.TunnelConfigView, error) {
		doc, err := read(cmd, args)
		if err != nil && len(args) > 1 {
			err = cli.ConfigError(fmt.Errorf("%s:\n%w", args[1], err))
		}
		if err != nil {
			return control.TunnelConfigView{}, err
		}
		var want *uint64
		if cmd.Flags().Changed("if-version") {
			want = &ifVersion
		}
		v, err := c.SetTunnelConfig(ctx, args[0], doc, want)
		if rules, perr := ingressconf.Parse(v.Body); err == nil && perr == nil {
			for _, w := range rules.Warnings() {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: %s\n", w)
			}
		}
		return v, err
	}, func(v control.TunnelConfigView, _ []string) string {
		return fmt.Sprintf("tunnel %q has configuration version %d; 'tunnel config get %s' shows how the connectors took it",
			v.TunnelName, v.Version, v.TunnelName)
	})
	cmd.Flags().Uint64Var(&ifVersion, "if-version", 0, "change only if this is the current version; 0: if there has never been one")
	return cmd
}

// readFile reads a file of rules, or standard input.
func readFile(cmd *cobra.Command, path string) ([]byte, error) {
	if path == "-" {
		return bounded(cmd.InOrStdin())
	}
	return readBounded(path)
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return bounded(f)
}

// maxRulesFile bounds what is read: a connector's configuration may hold more than rules.
const maxRulesFile = 4 << 20

func bounded(r io.Reader) ([]byte, error) {
	var b bytes.Buffer
	n, err := io.Copy(&b, io.LimitReader(r, maxRulesFile+1))
	if err == nil && n > maxRulesFile {
		err = fmt.Errorf("it is larger than %d bytes", maxRulesFile)
	}
	return b.Bytes(), err
}
