package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/connector/ingress"
	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/reqtarget"
)

// remoteFile is where the last good configuration from the edge is kept, beside the identity.
const remoteFile = "remote.json"

func (s *settings) remotePath() string { return filepath.Join(s.Identity.Dir, remoteFile) }

// compileIngress checks the rules.
func (s *settings) compileIngress(fault func(key, format string, args ...any)) *ingressconf.Config {
	c, err := ingressconf.New(s.Ingress, s.IngressOrigin)
	var faults ingressconf.Errors
	if errors.As(err, &faults) {
		for _, f := range faults {
			fault(f.Key, "%s", f.Msg)
		}
	}
	return c
}

// newIngress makes what serves the rules, those that the edge configured before a restart included.
func (s *settings) newIngress(log *slog.Logger, registry prometheus.Registerer) (*ingress.Handler, error) {
	for _, w := range s.ingress.Warnings() {
		log.Warn("ingress rule without effect", "rule", w)
	}
	h, err := ingress.New(ingress.HandlerConfig{Local: s.ingress, Remote: s.RemoteConfig, File: s.remotePath(), Logger: log, Registerer: registry})
	return h, cli.ConfigError(err)
}

func ingressCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "ingress", Short: "Ingress rules: what this connector publishes by itself"}
	cmd.AddCommand(ingressValidate(), ingressRule())
	return cmd
}

func ingressValidate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "validate",
		Short: "Say what is wrong with the ingress rules of a configuration",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := load(cmd)
			if err != nil {
				return err
			}
			// Files that the rules name are read as at a start.
			h, err := ingress.New(ingress.HandlerConfig{Local: s.ingress})
			if err != nil {
				return cli.ConfigError(err)
			}
			if err := h.Close(); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			for i, t := range s.ingress.Targets() {
				fmt.Fprintf(out, "ingress[%d]  %s  %s\n", i, matches(t), leads(t))
			}
			for _, w := range s.ingress.Warnings() {
				fmt.Fprintf(out, "warning   %s\n", w)
			}
			if version, c, err := ingress.Kept(s.remotePath()); err == nil && s.RemoteConfig && c.Len() > 0 {
				fmt.Fprintf(out, "warning   the edge's configuration, version %d, stands in place of these rules\n", version)
			}
			if s.ingress.Len() == 0 {
				fmt.Fprintln(out, "warning   there are no ingress rules")
			}
			fmt.Fprintln(out, "ok")
			return nil
		},
	}
	cmd.Flags().String("config", defaultConfig, configHelp)
	return cmd
}

// leads says where a rule leads, and with what bandwidth.
func leads(t *ingressconf.Target) string {
	if t.Bandwidth == 0 {
		return t.Service.String()
	}
	return fmt.Sprintf("%s  at most %s (%d bytes per second)", t.Service, t.Rule.Bandwidth, t.Bandwidth)
}

// matches says what a rule takes.
func matches(t *ingressconf.Target) string {
	host := t.Rule.Hostname
	if host == "" {
		host = "*"
	}
	if t.Rule.Path != "" {
		return host + " " + t.Rule.Path
	}
	return host
}

func ingressRule() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rule URL",
		Short: "Show which ingress rule takes a request for a URL, and why",
		Long: `Show which ingress rule takes a request for a URL, and why. The rules are those of the edge's configuration, if one is
kept beside the identity, and else those of the configuration file. tcp://host asks for a flow of bytes, udp://host for one of
packets. The exit code is 1 if no rule takes the request.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := load(cmd)
			if err != nil {
				return err
			}
			rules, from, err := s.rulesInForce()
			if err != nil {
				return err
			}
			return explain(cmd.OutOrStdout(), rules, from, args[0])
		},
	}
	cmd.Flags().String("config", defaultConfig, configHelp)
	return cmd
}

// rulesInForce returns the rules that the connector uses, and where they are from.
func (s *settings) rulesInForce() (*ingressconf.Config, string, error) {
	if s.RemoteConfig {
		version, c, err := ingress.Kept(s.remotePath())
		switch {
		case err == nil && c.Len() > 0:
			return c, fmt.Sprintf("the edge's configuration, version %d", version), nil
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return nil, "", cli.ConfigError(fmt.Errorf("%s: %w", s.remotePath(), err))
		}
	}
	return s.ingress, "the configuration file", nil
}

// explain prints the rules up to the one that takes a request for the URL.
func explain(out io.Writer, rules *ingressconf.Config, from, raw string) error {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || !slices.Contains([]string{"http", "https", "tcp", "udp"}, u.Scheme) {
		return cli.UsageError("%q: write http://host/path, https://host/path, tcp://host, or udp://host", raw)
	}
	host, err := ingressconf.CanonicalHost(u.Host)
	if err != nil {
		return cli.UsageError("%q: %w", raw, err)
	}
	fmt.Fprintf(out, "rules of %s\n", from)
	if u.Scheme == "tcp" || u.Scheme == "udp" {
		return explainFlow(out, rules, u.Scheme, host)
	}
	path := u.EscapedPath()
	if path == "" {
		path = "/"
	}
	if rules.Ambiguous(host, reqtarget.Target{Path: path}) {
		return errors.New("refused with status 400: rules for this host look at the path, and this one can be read in more than one way")
	}
	fmt.Fprintln(out, strings.Join(rules.Explain(host, path), "\n"))
	_, t := rules.Match(host, path)
	if t == nil {
		return errors.New("no rule takes it")
	}
	if t.Bandwidth > 0 {
		fmt.Fprintf(out, "bandwidth: at most %s (%d bytes per second)\n", t.Rule.Bandwidth, t.Bandwidth)
	}
	return nil
}

// explainFlow prints the rule that takes a flow without requests.
func explainFlow(out io.Writer, rules *ingressconf.Config, scheme, host string) error {
	what, schemes := "bytes", []ingressconf.Scheme{ingressconf.TCP, ingressconf.Unix}
	if scheme == "udp" {
		what, schemes = "packets", []ingressconf.Scheme{ingressconf.UDP}
	}
	i, t := rules.MatchFlow(host)
	switch {
	case t == nil:
		return errors.New("no rule takes it")
	case !slices.Contains(schemes, t.Service.Scheme):
		return fmt.Errorf("ingress[%d] takes it and leads to %s, which carries no plain %s: it is refused", i, t.Service, what)
	}
	fmt.Fprintf(out, "ingress[%d]: takes flows of %s for %s: %s\n", i, what, matches(t), leads(t))
	return nil
}
