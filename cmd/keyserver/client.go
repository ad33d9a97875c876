package main

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
)

func newClient() *cobra.Command {
	cmd := &cobra.Command{Use: "client", Short: "Clients of the key server: edges that may ask for signatures"}
	cmd.AddCommand(newClientAdd(), newClientList(), newClientRevoke())
	return cmd
}

func newClientAdd() *cobra.Command {
	var f issueFlags
	var csr string
	cmd := &cobra.Command{
		Use:   "add NAME --ca-dir DIR --csr FILE --out DIR",
		Short: "Certify a client's own key; without --csr, make a key for it",
		Long: `Add certifies the key of a request (PKCS#10) that the client has made, as keyhaven-edge key-identity request does, and
writes cert.pem and ca.pem for it. Names in the request are ignored. Compare the fingerprint of the key with that which
the client shows. Without --csr it makes the key too and writes key.pem, which then has to be taken to the client by a
way that nobody can read.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := f.authority()
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
			chain, err := f.issueClient(a, id, csr)
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
			if csr != "" {
				leaf, err := x509.ParseCertificate(chain[0])
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "fingerprint of its key: %s\n", mtls.Fingerprint(leaf.RawSubjectPublicKeyInfo))
			}
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&csr, "csr", "", "the client's certificate request (PKCS#10, PEM)")
	return cmd
}

// issueClient issues a certificate for the key of a request, or for a new one if none is named, and writes what the client needs.
func (f *issueFlags) issueClient(a *mtls.Authority, id mtls.Identity, csr string) ([][]byte, error) {
	if csr == "" {
		return f.issue(a, mtls.IssueRequest{Identity: id, Lifetime: f.lifetime})
	}
	if _, err := os.Lstat(filepath.Join(f.out, mtls.KeyFileName)); err == nil {
		return nil, fmt.Errorf("%s holds the private key of an identity, which would not fit; choose another directory", f.out)
	}
	if _, err := os.Lstat(filepath.Join(f.out, mtls.CertFileName)); err == nil && !f.replace {
		return nil, fmt.Errorf("%s holds a certificate already: choose another directory, or give --replace", f.out)
	}
	der, err := mtls.ReadCSR(csr)
	if err != nil {
		return nil, err
	}
	chain, err := a.IssueCSR(der, id, f.lifetime)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", csr, err)
	}
	return chain, mtls.WriteCertificate(f.out, chain, a.RootPEM(), f.replace)
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
