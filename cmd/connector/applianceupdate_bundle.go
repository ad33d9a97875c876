package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"aead.dev/minisign"
	"github.com/spf13/cobra"

	updates "github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/slot"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func applianceBundleCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Make and check updates of appliances",
	}
	cmd.AddCommand(bundleMakeCommand(), bundleVerifyCommand(), bundleIndexCommand())
	return cmd
}

// signingFlags name a secret key.
type signingFlags struct{ key, passwordFile string }

func (s *signingFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.key, "key", "", "file with the secret key, in minisign's form")
	cmd.Flags().StringVar(&s.passwordFile, "password-file", "", `file with the password of the key, if it has one; "-" is standard input`)
	_ = cmd.MarkFlagRequired("key") // it is there
}

func (s *signingFlags) load(cmd *cobra.Command) (minisign.PrivateKey, error) {
	key, err := updates.LoadPrivateKey(s.key, func() (string, error) {
		if s.passwordFile == "" {
			return "", fmt.Errorf("--key %s has a password; name the file with it by --password-file", s.key)
		}
		return firstLine(cmd, s.passwordFile)
	})
	return key, cli.ConfigError(err)
}

// firstLine reads the first line of a small file.
func firstLine(cmd *cobra.Command, name string) (string, error) {
	in := cmd.InOrStdin()
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return "", err
		}
		defer f.Close()
		in = f
	}
	line, err := bufio.NewReader(io.LimitReader(in, 4<<10)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", err
	}
	return strings.TrimRight(line, "\r\n"), nil
}

func bundleMakeCommand() *cobra.Command {
	var m updates.Manifest
	var sign signingFlags
	var built, output string
	cmd := &cobra.Command{
		Use:   "make --key FILE --version VERSION --arch ARCH --board BOARD --output FILE SLOT",
		Short: "Make an update of the image of a slot",
		Long: `Make compresses and signs the image of a slot and prints the manifest. The same image, values and key give the same bytes. Where
the image holds a slot.json the values must be the same as there; those that are not given are taken from there.`,
		Example: `  keyhaven-connector appliance bundle make --key minisign.key --output keyhaven-0.6.0-arm64.update slot.img`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" {
				return cli.UsageError("--output is missing: name the file to write")
			}
			if built != "" {
				t, err := time.Parse(time.RFC3339, built)
				if err != nil {
					return cli.UsageError("--built %q: write it like 2026-01-31T12:00:00Z", built)
				}
				m.Built = t
			}
			return bundleMake(cmd, m, sign, args[0], output)
		},
	}
	sign.register(cmd)
	cmd.Flags().StringVar(&m.Version, "version", "", "version of the system, such as 0.6.0")
	cmd.Flags().StringVar(&m.Arch, "arch", "", "architecture: "+strings.Join(updates.Archs(), ", "))
	cmd.Flags().Var(&boards{&m.Boards}, "board", "board that it starts on, such as raspberrypi,4-model-b; repeat it for more")
	cmd.Flags().StringVar(&built, "built", "", "time of the build, such as 2026-01-31T12:00:00Z")
	cmd.Flags().StringVar(&m.MinVersion, "min-version", "", "oldest version that can be updated from")
	cmd.Flags().StringVar(&m.Channel, "channel", "", "channel that it is published for")
	cmd.Flags().StringVar(&m.Notes, "notes", "", "what changed, for people")
	cmd.Flags().StringVar(&output, "output", "", "file to write")
	return cmd
}

// boards is a flag whose values may hold commas, as boards' names do.
type boards struct{ list *[]string }

func (b *boards) Set(s string) error { *b.list = append(*b.list, strings.Fields(s)...); return nil }
func (b *boards) String() string     { return strings.Join(*b.list, " ") }
func (b *boards) Type() string       { return "board" }

func bundleMake(cmd *cobra.Command, m updates.Manifest, sign signingFlags, image, output string) error {
	key, err := sign.load(cmd)
	if err != nil {
		return err
	}
	f, err := os.Open(image)
	if err != nil {
		return cli.ConfigError(err)
	}
	defer f.Close()
	if info, err := slot.ReadInfo(f); err == nil {
		if err := complete(&m, info); err != nil {
			return cli.ConfigError(err)
		}
	} else if !errors.Is(err, slot.ErrEmpty) {
		return cli.ConfigError(fmt.Errorf("%s: %w", image, err))
	}
	err = writeNew(output, func(w io.Writer) (err error) {
		m, err = updates.Write(w, m, f, updates.Signer(key, "update "+m.Version+" "+m.Arch))
		return err
	})
	if err != nil {
		return err
	}
	return printJSON(cmd, m)
}

// complete takes from slot.json what flags left open. What both say must be the same.
func complete(m *updates.Manifest, i slot.Info) error {
	differ := func(flag, got, want string) error {
		return fmt.Errorf("--%s is %s, slot.json in the image has %s; leave the flag out or build the image again", flag, got, want)
	}
	switch {
	case m.Version != "" && m.Version != i.Version:
		return differ("version", m.Version, i.Version)
	case m.Arch != "" && m.Arch != i.Arch:
		return differ("arch", m.Arch, i.Arch)
	case !m.Built.IsZero() && !m.Built.Equal(i.Built):
		return differ("built", m.Built.Format(time.RFC3339), i.Built.Format(time.RFC3339))
	case len(m.Boards) > 0 && strings.Join(m.Boards, " ") != strings.Join(i.Boards, " "):
		return differ("board", strings.Join(m.Boards, " "), strings.Join(i.Boards, " "))
	}
	m.Version, m.Arch, m.Boards, m.Built = i.Version, i.Arch, i.Boards, i.Built
	return nil
}

// writeNew writes a file that is whole or not there.
func writeNew(name string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".new-")
	if err != nil {
		return cli.ConfigError(err)
	}
	defer os.Remove(f.Name()) // fails once it has its name
	w := bufio.NewWriterSize(f, 1<<20)
	err = write(w)
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func printJSON(cmd *cobra.Command, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", b)
	return err
}

func bundleVerifyCommand() *cobra.Command {
	var keys string
	cmd := &cobra.Command{
		Use:     "verify --keys FILE|DIR BUNDLE",
		Short:   "Check an update to its last byte and print its manifest",
		Example: "  keyhaven-connector appliance bundle verify --keys minisign.pub keyhaven-0.6.0-arm64.update",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			pub, err := publicKeys(keys)
			if err != nil {
				return cli.ConfigError(err)
			}
			m, _, err := readBundle(args[0], pub)
			if err != nil {
				return cli.ConfigError(fmt.Errorf("%s: %w", args[0], err))
			}
			return printJSON(cmd, m)
		},
	}
	cmd.Flags().StringVar(&keys, "keys", updateKeys, "public key in minisign's form, or directory with keys whose names end in .pub")
	return cmd
}

func publicKeys(path string) ([]minisign.PublicKey, error) {
	if info, err := os.Stat(path); err != nil || info.IsDir() {
		return updates.LoadKeys(path)
	}
	key, err := updates.LoadKey(path)
	return []minisign.PublicKey{key}, err
}

// readBundle reads and checks the whole of a bundle, and returns what an index says of it.
func readBundle(name string, keys []minisign.PublicKey) (updates.Manifest, updates.Release, error) {
	f, err := os.Open(name)
	if err != nil {
		return updates.Manifest{}, updates.Release{}, err
	}
	defer f.Close()
	h := sha256.New()
	r, err := updates.Open(io.TeeReader(f, h), keys)
	if err != nil {
		return updates.Manifest{}, updates.Release{}, err
	}
	defer r.Close()
	if _, err := io.Copy(io.Discard, r); err != nil {
		return updates.Manifest{}, updates.Release{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return updates.Manifest{}, updates.Release{}, err
	}
	m := r.Manifest()
	return m, updates.Release{Version: m.Version, Size: info.Size(), SHA256: hex.EncodeToString(h.Sum(nil)), Notes: m.Notes}, nil
}

func bundleIndexCommand() *cobra.Command {
	var sign signingFlags
	var channel, base, salt, published, output string
	var percent int
	var valid time.Duration
	cmd := &cobra.Command{
		Use:   "index --key FILE --channel CHANNEL --output FILE BUNDLE...",
		Short: "Make the index of an update source",
		Long: `Index checks the bundles, all of one architecture, and writes the signed index that devices look for at
<source>/<channel>/<arch>.json. Only the newest is for devices of their own accord, --percent of them; the others are there
for rollouts that name a version. Which devices are first is decided by --salt: leave it while the percentage grows. With
--valid it has to be made again before that time is over, or devices take no update by it and say so: they find out if
somebody between them and the source shows an old index and keeps newer ones away.`,
		Example: `  keyhaven-connector appliance bundle index --key minisign.key --channel stable --percent 10 --output stable/arm64.json keyhaven-0.6.0-arm64.update`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" {
				return cli.UsageError("--output is missing: name the file to write")
			}
			x := updates.Index{Channel: channel, Published: time.Now().Truncate(time.Second)}
			if published != "" {
				t, err := time.Parse(time.RFC3339, published)
				if err != nil {
					return cli.UsageError("--published %q: write it like 2026-01-31T12:00:00Z", published)
				}
				x.Published = t
			}
			switch {
			case valid < 0:
				return cli.UsageError("--valid %v: write a time to come, such as 720h", valid)
			case valid > 0:
				x.Expires = x.Published.Add(valid)
			}
			key, err := sign.load(cmd)
			if err != nil {
				return err
			}
			if err := addReleases(&x, args, key, updates.Release{URL: base, Percent: percent, Salt: salt}); err != nil {
				return cli.ConfigError(err)
			}
			err = writeNew(output, func(w io.Writer) error {
				return updates.WriteIndex(w, x, updates.Signer(key, "index "+x.Channel+" "+x.Arch))
			})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: the index for %s, newest %s\n", output, x.Arch, newest(x))
			return err
		},
	}
	sign.register(cmd)
	cmd.Flags().StringVar(&channel, "channel", "stable", "channel of the index")
	cmd.Flags().StringVar(&base, "url", "", "address of the directory with the bundles (default: that of the index)")
	cmd.Flags().IntVar(&percent, "percent", 100, "percentage of devices that may install the newest by themselves")
	cmd.Flags().StringVar(&salt, "salt", "", "any word (default: the version)")
	cmd.Flags().StringVar(&published, "published", "", "time of publication (default: now); devices refuse an index older than one that they saw")
	cmd.Flags().DurationVar(&valid, "valid", 0, "how long after its publication devices take the index, such as 720h (default: for ever)")
	cmd.Flags().StringVar(&output, "output", "", "file to write")
	return cmd
}

// newest is the version that devices are told of.
func newest(x updates.Index) string {
	return slices.MaxFunc(x.Releases, func(a, b updates.Release) int { return updates.Compare(a.Version, b.Version) }).Version
}

// addReleases adds the bundles to x. They are checked with the key that signs the index.
func addReleases(x *updates.Index, files []string, key minisign.PrivateKey, like updates.Release) error {
	pub, ok := key.Public().(minisign.PublicKey)
	if !ok {
		return errors.New("the secret key has no public key")
	}
	for _, name := range files {
		m, r, err := readBundle(name, []minisign.PublicKey{pub})
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", name, err)
		case x.Arch != "" && x.Arch != m.Arch:
			return fmt.Errorf("%s is for %s, the one before for %s; make an index for each", name, m.Arch, x.Arch)
		case m.Channel != "" && m.Channel != x.Channel:
			return fmt.Errorf("%s is for channel %s, the index for %s", name, m.Channel, x.Channel)
		}
		x.Arch = m.Arch
		r.URL = url.PathEscape(filepath.Base(name))
		if like.URL != "" {
			r.URL = strings.TrimRight(like.URL, "/") + "/" + r.URL
		}
		r.Percent, r.Salt = like.Percent, like.Salt
		if r.Salt == "" {
			r.Salt = m.Version
		}
		x.Releases = append(x.Releases, r)
	}
	return nil
}
