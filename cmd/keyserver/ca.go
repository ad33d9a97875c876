package main

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/mtls"
)

func newCA() *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "The key owner's authority, which names key servers and their clients"}
	cmd.AddCommand(newCAInit(), newCAIssue())
	return cmd
}

func newCAInit() *cobra.Command {
	var dir, domain string
	cmd := &cobra.Command{
		Use:   "init --ca-dir DIR --trust-domain NAME",
		Short: "Make an authority for a trust domain in a directory of its own",
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := mtls.InitAuthority(dir, domain)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "made the authority of %s in %s; keep ca.key away from others, and make a copy\n", a.TrustDomain(), dir)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "ca-dir", "", "directory of the authority")
	cmd.Flags().StringVar(&domain, "trust-domain", "", "trust domain, such as keys.example")
	required(cmd, "ca-dir", "trust-domain")
	return cmd
}

func newCAIssue() *cobra.Command {
	var f issueFlags
	var dns []string
	var ips []net.IP
	cmd := &cobra.Command{
		Use:   "issue NAME --ca-dir DIR --out DIR",
		Short: "Make the identity of a key server: key, certificate and root in a directory",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := f.authority()
			if err != nil {
				return err
			}
			id := mtls.Identity{TrustDomain: a.TrustDomain(), Kind: mtls.KindKeyServer, Name: args[0]}
			_, err = f.issue(a, mtls.IssueRequest{Identity: id, Lifetime: f.lifetime, DNSNames: dns, IPs: ips})
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "issued %s in %s\n", id, f.out)
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().StringSliceVar(&dns, "dns", nil, "host names for clients that check one (Keyhaven's edges check the identity)")
	cmd.Flags().IPSliceVar(&ips, "ip", nil, "IP addresses for clients that check one")
	return cmd
}

// issueFlags are common to what issues an identity.
type issueFlags struct {
	caDir, out string
	lifetime   time.Duration
	replace    bool
}

// authority opens the authority that issues.
func (f *issueFlags) authority() (*mtls.Authority, error) {
	a, err := mtls.OpenAuthority(f.caDir)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w; make an authority with keyhaven-keyserver ca init, or correct --ca-dir", err)
	}
	return a, err
}

func (f *issueFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.caDir, "ca-dir", "", "directory of the authority")
	cmd.Flags().StringVar(&f.out, "out", "", "directory to write key.pem, cert.pem and ca.pem to")
	cmd.Flags().DurationVar(&f.lifetime, "lifetime", 0, "how long the certificate is valid (30 days if not given, at most 398)")
	cmd.Flags().BoolVar(&f.replace, "replace", false, "replace an identity that is in the directory, or issue again for a name that has one")
	required(cmd, "ca-dir", "out")
}

// issue makes a key, has the authority issue a certificate for it, and writes both.
func (f *issueFlags) issue(a *mtls.Authority, r mtls.IssueRequest) ([][]byte, error) {
	for _, name := range []string{mtls.KeyFileName, mtls.CertFileName} {
		path := filepath.Join(f.out, name)
		if _, err := os.Lstat(path); !f.replace && !errors.Is(err, fs.ErrNotExist) {
			if err == nil {
				err = fmt.Errorf("%s is there already: choose another directory, or give --replace", path)
			}
			return nil, err
		}
	}
	key, _, err := mtls.NewKeyCSR()
	if err != nil {
		return nil, err
	}
	r.Public = key.Public()
	chain, err := a.Issue(r)
	if err != nil {
		return nil, err
	}
	return chain, mtls.WriteIdentity(f.out, key, chain, a.RootPEM())
}

// readCertificate reads the first certificate of a file, in PEM or DER.
func readCertificate(path string) (*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	der := text
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			der = block.Bytes
			break
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%s holds no certificate in PEM or DER: %w", path, err)
	}
	return cert, nil
}

func required(cmd *cobra.Command, flags ...string) {
	for _, f := range flags {
		if err := cmd.MarkFlagRequired(f); err != nil {
			panic(err)
		}
	}
}
