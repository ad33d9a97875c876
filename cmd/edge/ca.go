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
	cmd := &cobra.Command{Use: "ca", Short: "Make the edge operator's authority, and identities of edges"}
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
			fmt.Fprintf(cmd.OutOrStdout(), "authority of %s made in %s\n", domain, dir)
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
	var ca, out string
	var lifetime time.Duration
	var replace bool
	issue := &cobra.Command{
		Use:   "edge NAME",
		Short: "Issue the identity of an edge, with a new key",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			authority, err := mtls.OpenAuthority(ca)
			if err != nil {
				return err
			}
			id := mtls.Identity{TrustDomain: authority.TrustDomain(), Kind: mtls.KindEdge, Name: args[0]}
			if err := id.Validate(); err != nil {
				return cli.UsageError("%w", err)
			}
			if err := issueIdentity(authority, id, lifetime, out, replace); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s issued to %s\n", id, out)
			return nil
		},
	}
	issue.Flags().StringVar(&ca, "ca-dir", "", "directory of the authority")
	issue.Flags().StringVar(&out, "out", "", "directory that gets key.pem, cert.pem and ca.pem")
	issue.Flags().DurationVar(&lifetime, "lifetime", 0, "validity of the certificate, which a running edge renews by itself (default 720h)")
	issue.Flags().BoolVar(&replace, "replace", false, "replace the identity in the directory, if there is one")
	required(issue, "ca-dir", "out")
	cmd.AddCommand(issue)
	return cmd
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
