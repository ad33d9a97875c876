package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
)

func newCA() *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "Make the edge operator's authority, and identities of edges and operators"}
	cmd.AddCommand(newCAInit(), newCAIssue())
	return cmd
}

func newCAInit() *cobra.Command {
	var dir, domain string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a new authority",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := mtls.InitAuthority(dir, domain); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "made the authority of %s in %s; keep ca.key away from others, and make a copy\n", domain, dir)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "ca-dir", "", "directory of the authority; the key in it stays on this host")
	cmd.Flags().StringVar(&domain, "trust-domain", "", "domain of all identities, such as edge.example.com")
	required(cmd, "ca-dir", "trust-domain")
	return cmd
}

func newCAIssue() *cobra.Command {
	cmd := &cobra.Command{Use: "issue", Short: "Issue an identity"}
	cmd.AddCommand(
		caIssue(mtls.KindEdge, "Issue the identity of an edge, with a new key",
			"validity of the certificate, which a running edge renews by itself (default 720h)"),
		caIssue(mtls.KindOperator, "Issue the identity of an operator, who may administer the edges that name them, with a new key",
			"validity of the certificate (default 720h)"))
	return cmd
}

func caIssue(kind mtls.Kind, short, lifetimeUsage string) *cobra.Command {
	var ca, out string
	var lifetime time.Duration
	var replace bool
	issue := &cobra.Command{
		Use:     string(kind) + " NAME",
		Short:   short,
		Example: fmt.Sprintf("  keyhaven-edge ca issue %[1]s %[1]s1 --ca-dir edge-ca --out %[1]s1", kind),
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			authority, err := mtls.OpenAuthority(ca)
			if errors.Is(err, fs.ErrNotExist) {
				err = remedy(err, "make an authority with 'keyhaven-edge ca init', or correct --ca-dir")
			}
			if err != nil {
				return err
			}
			id := mtls.Identity{TrustDomain: authority.TrustDomain(), Kind: kind, Name: args[0]}
			if err := id.Validate(); err != nil {
				return cli.UsageError("%w", err)
			}
			if err := issueIdentity(authority, id, lifetime, out, replace); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "issued %s in %s\n", id, out)
			return nil
		},
	}
	issue.Flags().StringVar(&ca, "ca-dir", "", "directory of the authority")
	issue.Flags().StringVar(&out, "out", "", "directory that gets key.pem, cert.pem and ca.pem")
	issue.Flags().DurationVar(&lifetime, "lifetime", 0, lifetimeUsage)
	issue.Flags().BoolVar(&replace, "replace", false, "replace the identity in the directory, if there is one")
	required(issue, "ca-dir", "out")
	return issue
}

func issueIdentity(a *mtls.Authority, id mtls.Identity, lifetime time.Duration, out string, replace bool) error {
	if _, err := os.Lstat(filepath.Join(out, mtls.CertFileName)); !errors.Is(err, fs.ErrNotExist) && !replace {
		if err != nil {
			return err
		}
		return fmt.Errorf("%s holds an identity already; use --replace, or choose another directory", out)
	}
	key, csr, err := mtls.NewKeyCSR()
	if err != nil {
		return err
	}
	chain, err := a.IssueCSR(csr, id, lifetime)
	if err != nil {
		return err
	}
	return mtls.WriteIdentity(out, key, chain, a.RootPEM())
}

func required(cmd *cobra.Command, flags ...string) {
	for _, f := range flags {
		if err := cmd.MarkFlagRequired(f); err != nil {
			panic(err) // a flag that the command does not have
		}
	}
}
