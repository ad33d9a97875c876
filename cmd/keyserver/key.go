package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

func newKey() *cobra.Command {
	cmd := &cobra.Command{Use: "key", Short: "Keys in a token: make, list, request a certificate, store it"}
	cmd.AddCommand(newKeyGenerate(), newKeyList(), newKeyCSR(), newKeyImport())
	return cmd
}

// tokenFlags say which token a command works on.
type tokenFlags struct {
	uri, config, token, module, pinFile string
	extractable, finalTry               bool
}

func (f *tokenFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.uri, "uri", "", "PKCS#11 URI of the token, such as 'pkcs11:token=site?module-path=/usr/lib/softhsm/libsofthsm2.so'")
	cmd.Flags().StringVarP(&f.config, "config", "c", defaultConfig, "without --uri, take the token from this configuration")
	cmd.Flags().StringVar(&f.token, "token", "", "label or serial of the token, if the configuration has several")
	cmd.Flags().StringVar(&f.module, "module", "", "path of the PKCS#11 module, if the URI has none")
	cmd.Flags().StringVar(&f.pinFile, "pin-file", "", "file of mode 600 that holds the PIN, if the URI has no pin-source; without either the terminal is asked")
	cmd.Flags().BoolVar(&f.finalTry, "allow-final-try", false, "log in even if the token says that one more wrong PIN would lock it")
}

// with opens the token, runs f and closes the token.
func (f *tokenFlags) with(cmd *cobra.Command, work func(ctx context.Context, t *pkcs11.Token) error) (err error) {
	logger, err := cli.Logger(cmd)
	if err != nil {
		return err
	}
	c, err := f.tokenConfig(cmd.Context(), cmd.Flags().Changed("config"))
	if err != nil {
		return err
	}
	if logger.Enabled(cmd.Context(), slog.LevelDebug) { // else the error, which ends the command, says all there is to say
		c.Logger = logger
	}
	t, err := pkcs11.Open(cmd.Context(), c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	return work(cmd.Context(), t)
}

func (f *tokenFlags) tokenConfig(ctx context.Context, configGiven bool) (pkcs11.Config, error) {
	switch {
	case f.uri != "" && configGiven:
		return pkcs11.Config{}, cli.UsageError("--uri and --config both name a token; keep one")
	case f.uri == "" && f.pinFile+f.module != "":
		return pkcs11.Config{}, cli.UsageError("without --uri the configuration names module and PIN; leave --module and --pin-file out")
	case f.uri == "":
		return f.fromConfig()
	}
	if strings.Contains(f.uri, "pin-value") {
		return pkcs11.Config{}, cli.UsageError("--uri has a pin-value, which others can see in the list of processes; use pin-source, --pin-file or the terminal")
	}
	uri, err := pkcs11.ParseURI(f.uri)
	if err != nil {
		return pkcs11.Config{}, cli.UsageError("--uri: %w", err)
	}
	c := tokenConfig(uri, f.module, nil)
	c.AllowExtractable, c.AllowFinalTry = f.extractable, f.finalTry
	switch {
	case f.pinFile != "" && uri.PINSource != "":
		return c, cli.UsageError("--pin-file and the URI's pin-source both name a PIN; keep one")
	case f.pinFile != "":
		c.PIN = func() (pkcs11.PIN, error) { return pkcs11.ReadPINFile(f.pinFile) }
	case uri.PINSource == "":
		c.PIN = func() (pkcs11.PIN, error) { return promptPIN(ctx) }
	}
	return c, nil
}

// fromConfig picks the token from a configuration, of which nothing but the tokens needs to be right.
func (f *tokenFlags) fromConfig() (pkcs11.Config, error) {
	cfg, file, err := read(loadOptions{path: f.config})
	if file == nil {
		return pkcs11.Config{}, cli.ConfigError(fmt.Errorf("%w (--uri names a token without a configuration)", err))
	}
	var fits []pkcs11.Config
	for i, t := range cfg.Tokens {
		c, err := t.token(cfg.Modules)
		if err != nil {
			return pkcs11.Config{}, cli.ConfigError(file.Errorf(fmt.Sprintf("tokens[%d].uri", i), "%v", err))
		}
		if f.token == "" || f.token == c.URI.Token || f.token == c.URI.Serial {
			c.AllowExtractable, c.AllowFinalTry = c.AllowExtractable || f.extractable, c.AllowFinalTry || f.finalTry
			fits = append(fits, c)
		}
	}
	if len(fits) != 1 {
		return pkcs11.Config{}, cli.UsageError("%s has %d tokens that fit; name one with --token", f.config, len(fits))
	}
	return fits[0], nil
}

func newKeyGenerate() *cobra.Command {
	var f tokenFlags
	var o pkcs11.GenerateOptions
	var id string
	cmd := &cobra.Command{
		Use:   "generate --uri URI --label NAME",
		Short: "Make a key pair inside the token; the private key can never leave it",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.ID, err = hex.DecodeString(id); err != nil {
				return cli.UsageError("--id %q is not hexadecimal", id)
			}
			return f.with(cmd, func(ctx context.Context, t *pkcs11.Token) error {
				k, err := t.Generate(ctx, o)
				if err != nil {
					return err
				}
				return printKeys(cmd, []signer.Key{k})
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&o.Label, "label", "", "label of the new key")
	cmd.Flags().StringVar(&id, "id", "", "CKA_ID of the new key in hexadecimal (the SKI if not given)")
	cmd.Flags().StringVar(&o.Type, "type", "p256", "type of the new key: "+strings.Join(pkcs11.KeyTypes(), ", "))
	cmd.Flags().BoolVar(&o.Decrypt, "decrypt", false, "the key may also decrypt (RSA, for TLS 1.2 clients without ECDHE)")
	required(cmd, "label")
	return cli.WithOutput(cmd)
}

func newKeyList() *cobra.Command {
	var f tokenFlags
	cmd := &cobra.Command{
		Use:   "list --uri URI",
		Short: "List the private keys of a token",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.with(cmd, func(ctx context.Context, t *pkcs11.Token) error {
				keys, err := t.Keys(ctx)
				if err != nil {
					return err
				}
				return printKeys(cmd, keys)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&f.extractable, "allow-extractable", false, "list keys too that the token would give away")
	return cli.WithOutput(cmd)
}

// listedKey is a key as "key list" shows it.
type listedKey struct {
	SKI              string    `json:"ski"`
	Type             string    `json:"type"`
	Label            string    `json:"label"`
	ID               string    `json:"id"`
	Extractable      bool      `json:"extractable"`
	NeverExtractable bool      `json:"never_extractable"`
	Local            bool      `json:"local"` // made inside the token
	Decrypts         bool      `json:"decrypts"`
	Hosts            []string  `json:"hosts,omitempty"` // of its certificate
	Until            time.Time `json:"until,omitzero"`  // of its certificate
}

func printKeys(cmd *cobra.Command, keys []signer.Key) error {
	list := make([]listedKey, 0, len(keys))
	for _, k := range keys {
		i := k.Info()
		l := listedKey{SKI: i.SKI.String(), Type: i.Type, Label: i.Label, ID: hex.EncodeToString(i.ID),
			Extractable: i.Extractable, NeverExtractable: i.NeverExtractable, Local: i.Local}
		_, l.Decrypts = k.(signer.Decrypter)
		if i.Certificate != nil {
			l.Hosts, l.Until = i.Certificate.DNSNames, i.Certificate.NotAfter.UTC()
		}
		list = append(list, l)
	}
	return cli.Show(cmd, list, func(w io.Writer) {
		fmt.Fprintln(w, "SKI\tTYPE\tLABEL\tID\tEXTRACTABLE\tMADE HERE\tDECRYPTS\tCERTIFICATE")
		for _, l := range list {
			cert := "-"
			if !l.Until.IsZero() {
				cert = strings.Join(append(l.Hosts, "until "+l.Until.Format("2006-01-02")), " ")
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.SKI, l.Type, l.Label, l.ID, l.extractable(), yesNo(l.Local), yesNo(l.Decrypts), cert)
		}
	})
}

func (l listedKey) extractable() string {
	switch {
	case l.Extractable:
		return "yes"
	case l.NeverExtractable:
		return "never"
	}
	return "not now"
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func newKeyCSR() *cobra.Command {
	var f tokenFlags
	var name, cn, out string
	var dns []string
	var ips []net.IP
	cmd := &cobra.Command{
		Use:   "csr --uri URI --key NAME --dns HOST",
		Short: "Write a certificate request (PKCS#10, PEM) signed by a key of the token",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(dns)+len(ips) == 0 {
				return cli.UsageError("a certificate needs a name: give --dns or --ip")
			}
			return f.withKey(cmd, name, func(ctx context.Context, _ *pkcs11.Token, k signer.Key) error {
				tmpl := &x509.CertificateRequest{Subject: pkix.Name{CommonName: cn}, DNSNames: dns, IPAddresses: ips}
				der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, pkcs11.Signer(ctx, k))
				if err != nil {
					return fmt.Errorf("sign a certificate request with %s: %w", name, err)
				}
				text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
				if out != "" {
					return os.WriteFile(out, text, 0o644)
				}
				_, err = cmd.OutOrStdout().Write(text)
				return err
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&name, "key", "", "the key: SKI, label, or id: and hexadecimal digits")
	cmd.Flags().StringSliceVar(&dns, "dns", nil, "host names for the certificate")
	cmd.Flags().IPSliceVar(&ips, "ip", nil, "IP addresses for the certificate")
	cmd.Flags().StringVar(&cn, "common-name", "", "common name of the subject, if the authority wants one")
	cmd.Flags().StringVarP(&out, "out", "o", "", "file to write to, in place of standard output")
	required(cmd, "key")
	return cmd
}

func newKeyImport() *cobra.Command {
	var f tokenFlags
	var name string
	cmd := &cobra.Command{
		Use:   "import-cert --uri URI --key NAME FILE",
		Short: "Store the certificate of a key beside it in the token",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cert, err := readCertificate(args[0])
			if err != nil {
				return err
			}
			return f.withKey(cmd, name, func(ctx context.Context, t *pkcs11.Token, k signer.Key) error {
				err := t.ImportCertificate(ctx, pkcs11.Selector{SKI: k.Info().SKI}, cert)
				if errors.Is(err, pkcs11.ErrCertificateMismatch) {
					return fmt.Errorf("%s: %w: have the certificate issued for the request that key csr --key %s writes", args[0], err, name)
				}
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "stored the certificate of %s, valid until %s\n", k.Info().SKI, cert.NotAfter.UTC().Format("2006-01-02"))
				return nil
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&name, "key", "", "the key: SKI, label, or id: and hexadecimal digits")
	required(cmd, "key")
	return cmd
}

// withKey is with for one key of the token.
func (f *tokenFlags) withKey(cmd *cobra.Command, name string, work func(context.Context, *pkcs11.Token, signer.Key) error) error {
	sel, err := pkcs11.ParseSelector(name)
	if err != nil {
		return cli.UsageError("--key: %w", err)
	}
	return f.with(cmd, func(ctx context.Context, t *pkcs11.Token) error {
		k, err := t.Key(ctx, sel)
		if err != nil {
			return err
		}
		return work(ctx, t, k)
	})
}
