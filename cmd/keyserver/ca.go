package main

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
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
			a, err := mtls.OpenAuthority(f.caDir)
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

func (f *issueFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.caDir, "ca-dir", "", "directory of the authority")
	cmd.Flags().StringVar(&f.out, "out", "", "directory to write key.pem, cert.pem and ca.pem to")
	cmd.Flags().DurationVar(&f.lifetime, "lifetime", 0, "how long the certificate is valid (30 days if not given, at most 398)")
	cmd.Flags().BoolVar(&f.replace, "replace", false, "replace an identity that is in the directory, or issue again for a name that has one")
	required(cmd, "ca-dir", "out")
}

// issue makes a key, has the authority issue a certificate for it, and writes both.
func (f *issueFlags) issue(a *mtls.Authority, r mtls.IssueRequest) ([][]byte, error) {
	path := filepath.Join(f.out, mtls.KeyFileName)
	if _, err := os.Lstat(path); !f.replace && !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = fmt.Errorf("%s is there already: choose another directory, or give --replace", path)
		}
		return nil, err
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

func newClient() *cobra.Command {
	cmd := &cobra.Command{Use: "client", Short: "Clients of the key server: edges that may ask for signatures"}
	cmd.AddCommand(newClientAdd(), newClientList(), newClientRevoke())
	return cmd
}

func newClientAdd() *cobra.Command {
	var f issueFlags
	cmd := &cobra.Command{
		Use:   "add NAME --ca-dir DIR --out DIR",
		Short: "Make the identity of a client: key, certificate and root in a directory to take to it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := mtls.OpenAuthority(f.caDir)
			if err != nil {
				return err
			}
			id := mtls.Identity{TrustDomain: a.TrustDomain(), Kind: mtls.KindEdge, Name: args[0]}
			if err := id.Validate(); err != nil {
				return cli.UsageError("%w", err)
			}
			revoked, err := a.Revocations()
			if err != nil {
				return err
			}
			if err := revoked.Accept(id); err != nil {
				return fmt.Errorf("%w: choose another name", err)
			}
			if _, err := os.Lstat(clientFile(f.caDir, id.Name)); err == nil && !f.replace {
				return fmt.Errorf("client %s exists: choose another name, or give --replace to issue again", id.Name)
			}
			chain, err := f.issue(a, mtls.IssueRequest{Identity: id, Lifetime: f.lifetime})
			if err != nil {
				return err
			}
			if err := recordClient(f.caDir, id, chain); err != nil {
				return err
			}
			hint := "; now write a rule for it under clients in the configuration"
			if f.replace { // it has one
				hint = ""
			}
			fmt.Fprintf(cmd.OutOrStdout(), "issued %s in %s%s\n", id, f.out, hint)
			return nil
		},
	}
	f.add(cmd)
	return cmd
}

func newClientList() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "list --ca-dir DIR",
		Short: "List the clients that the authority has named",
		RunE: func(cmd *cobra.Command, _ []string) error {
			revoked, err := mtls.OpenRevocations(dir)
			if err != nil {
				return err
			}
			files, err := filepath.Glob(clientFile(dir, "*"))
			if err != nil {
				return err
			}
			var clients []listedClient
			for _, path := range files {
				leaf, id, err := readClient(path)
				if err != nil {
					return err
				}
				state := "valid"
				if time.Now().After(leaf.NotAfter) {
					state = "expired"
				}
				if revoked.AcceptCert(id, leaf) != nil {
					state = "revoked"
				}
				clients = append(clients, listedClient{id.String(), state, leaf.NotAfter.UTC()})
			}
			return cli.Show(cmd, clients, func(w io.Writer) {
				fmt.Fprintln(w, "IDENTITY\tSTATE\tCERTIFICATE UNTIL")
				for _, c := range clients {
					fmt.Fprintf(w, "%s\t%s\t%s\n", c.Identity, c.State, c.Until.Format(time.RFC3339))
				}
			})
		},
	}
	cmd.Flags().StringVar(&dir, "ca-dir", "", "directory of the authority")
	required(cmd, "ca-dir")
	return cli.WithOutput(cmd)
}

// listedClient is a client as "client list" shows it.
type listedClient struct {
	Identity string    `json:"identity"`
	State    string    `json:"state"` // valid, expired or revoked
	Until    time.Time `json:"until"`
}

func newClientRevoke() *cobra.Command {
	var dir, reason string
	cmd := &cobra.Command{
		Use:   "revoke NAME --ca-dir DIR",
		Short: "Refuse a client from now on; SIGHUP makes a running server close its connections too",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if filepath.Base(args[0]) != args[0] {
				return cli.UsageError("%q is no name of a client", args[0])
			}
			revoked, err := mtls.OpenRevocations(dir)
			if err != nil {
				return err
			}
			_, id, err := readClient(clientFile(dir, args[0]))
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("there is no client %s here; keyhaven-keyserver client list shows the clients", args[0])
			}
			if err != nil {
				return err
			}
			if err := revoked.RevokeIdentity(id, reason); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "revoked %s: new connections are refused at once; send SIGHUP to the server to close open ones\n", id)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "ca-dir", "", "directory of the authority")
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the list")
	required(cmd, "ca-dir")
	return cmd
}

// clientFile is where the latest certificate of a client is kept.
func clientFile(caDir, name string) string { return filepath.Join(caDir, "clients", name+".pem") }

// recordClient keeps the certificate that a client was given, for lists and revocation.
func recordClient(caDir string, id mtls.Identity, chain [][]byte) error {
	path := clientFile(caDir, id.Name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	err = pem.Encode(temp, &pem.Block{Type: "CERTIFICATE", Bytes: chain[0]})
	if err = errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return err
	}
	return os.Rename(temp.Name(), path)
}

func readClient(path string) (*x509.Certificate, mtls.Identity, error) {
	leaf, err := readCertificate(path)
	if err != nil {
		return nil, mtls.Identity{}, err
	}
	id, err := mtls.IdentityOf(leaf)
	if err != nil {
		return nil, id, fmt.Errorf("%s: %w", path, err)
	}
	return leaf, id, nil
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
