package main

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/signer/audit"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "The record of private-key operations: verify, show, export"}
	cmd.AddCommand(newAuditKeygen(), newAuditVerify(), newAuditShow(), newAuditExport(), newAuditRepair())
	return cmd
}

func newAuditKeygen() *cobra.Command {
	var out, public string
	cmd := &cobra.Command{
		Use:   "keygen --out FILE",
		Short: "Make an Ed25519 key that signs the log's checkpoints, and print its public half",
		RunE: func(cmd *cobra.Command, _ []string) error {
			pub, key, err := ed25519.GenerateKey(rand.Reader)
			if err != nil {
				return err
			}
			der, err := x509.MarshalPKCS8PrivateKey(key)
			if err != nil {
				return err
			}
			if err := writeNew(out, 0o600, &pem.Block{Type: "PRIVATE KEY", Bytes: der}); err != nil {
				return err
			}
			if err := showPublic(cmd, pub, public); err != nil {
				return errors.Join(err, os.Remove(out)) // half a pair is of no use, and would be in the way next time
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&out, "out", "o", "", "file to write the private key to, with mode 600")
	cmd.Flags().StringVar(&public, "public", "", "file to write the public key to, in place of standard output; keep it where the server cannot write")
	required(cmd, "out")
	return cmd
}

func showPublic(cmd *cobra.Command, pub crypto.PublicKey, path string) error {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return err
	}
	block := &pem.Block{Type: "PUBLIC KEY", Bytes: der}
	if path != "" {
		return writeNew(path, 0o644, block)
	}
	return pem.Encode(cmd.OutOrStdout(), block)
}

// writeNew writes a file that must not be there yet.
func writeNew(path string, mode os.FileMode, block *pem.Block) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; it is not written over: name another file, or move it away", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := pem.Encode(f, block); err != nil {
		return err
	}
	return f.Sync()
}

// logFlags say which log a command reads.
type logFlags struct {
	config string
	dir    string
	files  []string
}

func (f *logFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.config, "config", "c", defaultConfig, "without --dir and --file, take the directory from this configuration")
	cmd.Flags().StringVar(&f.dir, "dir", "", "directory of the log")
	cmd.Flags().StringSliceVar(&f.files, "file", nil, "files to read in place of a directory, in their order")
}

// source returns the log that the flags name. Nothing of the configuration but the audit's directory needs to be right.
func (f *logFlags) source() (audit.Source, error) {
	switch {
	case f.dir != "" && len(f.files) > 0:
		return audit.Source{}, cli.UsageError("--dir and --file both name a log; keep one")
	case f.dir != "" || len(f.files) > 0:
		return audit.Source{Dir: f.dir, Files: f.files}, nil
	}
	cfg, file, err := read(loadOptions{path: f.config})
	switch {
	case file == nil || cfg.Audit.Dir == "" && err != nil:
		return audit.Source{}, cli.ConfigError(fmt.Errorf("%w (--dir names a log without a configuration)", err))
	case cfg.Audit.Dir == "":
		return audit.Source{}, cli.ConfigError(fmt.Errorf("%s has no audit.dir; name a log with --dir or --file", f.config))
	}
	return audit.Source{Dir: cfg.Audit.Dir}, nil
}

func newAuditVerify() *cobra.Command {
	var f logFlags
	var keys []string
	var anchor string
	var c audit.VerifyConfig
	cmd := &cobra.Command{
		Use:   "verify --public-key FILE",
		Short: "Look for the first record that was altered, removed, reordered or cut off",
		Long: `Verify reads a log, or an export of one, and needs no server. Exit code 0: everything is as it was written. 1: something is not, and
the output names the first such line; or the log could not be read. Without --public-key the chain alone is checked, which whoever can write the files can make anew.
What no checkpoint covers yet, which are the records of the last interval, somebody could have changed; the output says how many those are,
and --all-signed, for a server that has ended, allows none. --anchor is a file with a checkpoint line that was kept elsewhere, such as what a
log host got from this server: with it nobody can cut off what came before.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.source()
			if err != nil {
				return err
			}
			c.Dir, c.Files = s.Dir, s.Files
			if len(keys) > 0 {
				if c.Keys, err = audit.LoadKeys(keys...); err != nil {
					return err
				}
			} else if c.AllSigned {
				return cli.UsageError("--all-signed needs --public-key")
			}
			if anchor != "" {
				if c.Anchor, err = audit.LoadAnchor(anchor); err != nil {
					return err
				}
			}
			r, err := audit.Verify(cmd.Context(), c)
			if err != nil {
				return err
			}
			if err := cli.Show(cmd, r, func(w io.Writer) { reportTable(w, r) }); err != nil || r.Problem == nil {
				return err
			}
			return cli.Quiet(r.Problem)
		},
	}
	f.add(cmd)
	cmd.Flags().StringSliceVar(&keys, "public-key", nil, "files with the public keys that may have signed checkpoints (PEM)")
	cmd.Flags().StringVar(&anchor, "anchor", "", "file with checkpoint lines that were kept elsewhere; the last one counts")
	cmd.Flags().BoolVar(&c.Partial, "partial", false, "the log may begin after its first record, because older files were moved away")
	cmd.Flags().BoolVar(&c.AllSigned, "all-signed", false, "every operation must be covered by a checkpoint")
	cmd.Flags().BoolVar(&c.Repaired, "repaired", false, "damage that a repair has noted counts as known")
	return cli.WithOutput(cmd)
}

func reportTable(w io.Writer, r audit.Report) {
	what := "log"
	if r.Export {
		what = "export of log"
	}
	fmt.Fprintf(w, "%s\t%s of %s\n", what, r.Log, r.Server)
	fmt.Fprintf(w, "lines\t%d to %d in %d files\n", r.First, r.Last, r.Files)
	fmt.Fprintf(w, "operations\t%d, and the server says that it lost %d\n", r.Records, r.Lost)
	switch {
	case !r.KeysGiven:
		fmt.Fprintf(w, "signed\tnot checked: give --public-key\n")
	case r.LastCheckpoint.IsZero():
		fmt.Fprintf(w, "signed\t0 by %d checkpoints, %d at the end by none yet\n", r.Checkpoints, r.Uncovered)
	default:
		fmt.Fprintf(w, "signed\t%d by %d checkpoints, the last of %s, %d at the end by none yet\n", r.Covered, r.Checkpoints, r.LastCheckpoint.Format(time.RFC3339), r.Uncovered)
	}
	switch {
	case r.Anchored:
		fmt.Fprintf(w, "anchor\tfits\n")
	case r.KeysGiven && !r.Export:
		fmt.Fprintf(w, "anchor\tnone: whether lines behind seq %d were removed cannot be told without --anchor\n", r.Last)
	}
	fmt.Fprintf(w, "head\t%s\n", r.Head)
	for _, d := range r.Damage {
		fmt.Fprintf(w, "known damage\t%s\n", d.Error())
	}
	verdict, text := "good", "every record is as it was written"
	switch {
	case r.Problem != nil:
		verdict, text = "BAD", r.Problem.Error()
	case !r.KeysGiven:
		text = "the lines fit together, but whoever can write the files could have made them anew"
	case r.Uncovered > 0:
		text = fmt.Sprintf("every record up to seq %d is as it was written; what follows is not signed yet and could have been changed", r.SignedTo)
	}
	if r.Problem == nil && len(r.Damage) > 0 {
		text += ", but for the known damage"
	}
	fmt.Fprintf(w, "%s\t%s\n", verdict, text)
}

// filterFlags choose lines.
type filterFlags struct {
	audit.Filter
	since, until string
}

func (f *filterFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.since, "since", "", "from this time on (RFC 3339)")
	cmd.Flags().StringVar(&f.until, "until", "", "before this time (RFC 3339)")
	cmd.Flags().Uint64Var(&f.First, "first", 0, "from the line with this number on")
	cmd.Flags().Uint64Var(&f.Last, "last", 0, "up to the line with this number")
	cmd.Flags().StringVar(&f.Client, "client", "", `identity of the client; "*" stands for any text`)
	cmd.Flags().StringVar(&f.Key, "key", "", "SKI or label of the key")
	cmd.Flags().StringVar(&f.Op, "op", "", "operation")
	cmd.Flags().StringVar(&f.Result, "result", "", "ok, refused or failed")
	cmd.Flags().StringVar(&f.SNI, "sni", "", `server name; "*" stands for any text`)
}

func (f *filterFlags) filter() (audit.Filter, error) {
	for _, t := range []struct {
		flag, text string
		to         *time.Time
	}{{"since", f.since, &f.Since}, {"until", f.until, &f.Until}} {
		if t.text == "" {
			continue
		}
		var err error
		if *t.to, err = time.Parse(time.RFC3339, t.text); err != nil {
			return f.Filter, cli.UsageError("--%s %q: write a time such as 2026-01-31T06:00:00Z", t.flag, t.text)
		}
	}
	if err := f.Check(); err != nil {
		return f.Filter, cli.UsageError("%w", err)
	}
	return f.Filter, nil
}

func newAuditShow() *cobra.Command {
	return newAuditReader("show", "Show records as a table, or as they stand in the log", "table", []string{"table", "json"}, audit.Show)
}

func newAuditExport() *cobra.Command {
	return newAuditReader("export", "Write a range of the log as one file: jsonl, which verify reads, or csv", "jsonl", []string{"jsonl", "csv"}, audit.Export)
}

func newAuditReader(name, short, format string, formats []string, read func(context.Context, audit.Source, audit.Filter, string, io.Writer) error) *cobra.Command {
	var f logFlags
	var choose filterFlags
	cmd := &cobra.Command{
		Use:   name,
		Short: short,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != formats[0] && format != formats[1] {
				return cli.UsageError("--format %q: use %s or %s", format, formats[0], formats[1])
			}
			filter, err := choose.filter()
			if err != nil {
				return err
			}
			s, err := f.source()
			if err != nil {
				return err
			}
			return read(cmd.Context(), s, filter, format, cmd.OutOrStdout())
		},
	}
	f.add(cmd)
	choose.add(cmd)
	cmd.Flags().StringVar(&format, "format", format, formats[0]+" or "+formats[1])
	return cmd
}

func newAuditRepair() *cobra.Command {
	var f logFlags
	var reason string
	cmd := &cobra.Command{
		Use:   "repair --reason TEXT",
		Short: "Consent to the log going on after damage; what is damaged stays, and the reason goes into the log",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.source()
			if err != nil {
				return err
			}
			if s.Dir == "" {
				return cli.UsageError("repair is about a directory; name it with --dir")
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), repairTimeout)
			defer cancel()
			taken, err := audit.Repair(ctx, s.Dir, reason)
			switch {
			case err != nil:
				return err
			case taken:
				fmt.Fprintln(cmd.OutOrStdout(), "the running server goes on with a new file")
			default:
				fmt.Fprintln(cmd.OutOrStdout(), "the server takes the consent when it starts next, if its log is damaged then")
			}
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&reason, "reason", "", "what happened, for the log")
	required(cmd, "reason")
	return cmd
}

// repairTimeout is how long a running server has to take the consent.
const repairTimeout = 10 * time.Second
