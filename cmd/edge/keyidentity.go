package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
)

func newKeyIdentity() *cobra.Command {
	cmd := &cobra.Command{Use: "key-identity", Short: "The identity with which the edge asks key servers for signatures"}
	cmd.AddCommand(newKeyIdentityRequest(), newKeyIdentityInstall())
	return cmd
}

func newKeyIdentityRequest() *cobra.Command {
	var dir string
	var replace bool
	cmd := &cobra.Command{
		Use:   "request",
		Short: "Make a key, which stays on this host, and a request for the key owner to certify it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fingerprint, err := mtls.WriteRequest(dir, replace)
			if errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("%w; have it certified, or give --replace to make another", err)
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "made %s; the key owner certifies it with: keyhaven-keyserver client add NAME --csr %s …\nfingerprint of the key: %s\n",
				filepath.Join(dir, mtls.RequestFile), mtls.RequestFile, fingerprint)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory of the identity, key_identity.dir of the configuration; an identity in it stays until install")
	cmd.Flags().BoolVar(&replace, "replace", false, "make another request in the place of one that waits")
	required(cmd, "dir")
	return cmd
}

func newKeyIdentityInstall() *cobra.Command {
	var dir, cert, ca string
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put the certificate for the request in place",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			id, err := mtls.InstallCertificate(dir, cert, ca, mtls.AcceptKinds(mtls.KindEdge))
			switch {
			case errors.Is(err, mtls.ErrNoRequest):
				return fmt.Errorf("%w; make one with keyhaven-edge key-identity request", err)
			case err != nil:
				return cli.ConfigError(err)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "installed %s in %s; SIGHUP has a running edge take it up\n", id, dir)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory in which the request was made")
	cmd.Flags().StringVar(&cert, "cert", "", "the certificate from the key owner (PEM)")
	cmd.Flags().StringVar(&ca, "ca", "", "root of the key owner's authority (PEM)")
	required(cmd, "dir", "cert", "ca")
	return cmd
}
