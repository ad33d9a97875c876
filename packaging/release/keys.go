package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"aead.dev/minisign"
	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

// Files of a directory of keys. A password stands in a file beside the key and may be missing. Further public keys, of keys
// that came before or will come after, are minisign-*.pub and openpgp-public-*.asc.
const (
	minisignSecret   = "minisign.key"
	minisignPublic   = "minisign.pub"
	minisignPassword = "minisign.password"
	openPGPSecret    = "openpgp-secret.asc"
	openPGPPublic    = "openpgp-public.asc"
	openPGPPassword  = "openpgp.password"
	throwaway        = "THROWAWAY-DEVELOPMENT-KEYS.txt"
)

const throwawayText = `These keys were made on the spot for a development build. Nothing protects them, and nobody vouches for what they sign: do
not publish it, and do not install it where it matters. RELEASE_KEYS=directory names the keys of a release.
`

func keyCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Put public keys into a directory: those of RELEASE_KEYS, else of a throwaway pair made there",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if release := os.Getenv("RELEASE_KEYS"); release != "" {
				return publish(cmd.Context(), release, dir)
			}
			made, err := develop(cmd.Context(), dir)
			if made {
				fmt.Fprintf(cmd.ErrOrStderr(), "release: DEVELOPMENT BUILD: made throwaway keys in %s; nobody should trust what they sign (RELEASE_KEYS names real ones)\n", dir)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", defaultKeys, "the directory")
	return cmd
}

// secrets is the directory whose keys sign.
func secrets(dir string) string {
	if release := os.Getenv("RELEASE_KEYS"); release != "" {
		return release
	}
	return dir
}

// publish checks the keys of a release and copies their public halves, and no more, to dir.
func publish(ctx context.Context, release, dir string) error {
	if _, err := minisignKey(release); err != nil {
		return err
	}
	if err := withOpenPGP(ctx, release, func(*openPGP) error { return nil }); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{minisignSecret, openPGPSecret, throwaway} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, pattern := range []string{minisignPublic, "minisign-*.pub", openPGPPublic, "openpgp-public-*.asc"} {
		names, err := filepath.Glob(filepath.Join(release, pattern))
		if err != nil {
			return err
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), b, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// develop makes throwaway keys in dir, unless it did so before.
func develop(ctx context.Context, dir string) (made bool, err error) {
	if _, err := os.Stat(filepath.Join(dir, throwaway)); err == nil {
		return false, nil
	}
	if _, err := os.Stat(filepath.Join(dir, minisignSecret)); err == nil {
		return false, fmt.Errorf("%s holds keys that are not throwaway ones: name it by RELEASE_KEYS, or another directory by --dir", dir)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return false, err
	}
	public, secret, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		return false, err
	}
	secretText, err := secret.MarshalText()
	if err != nil {
		return false, err
	}
	publicText, err := public.MarshalText()
	if err != nil {
		return false, err
	}
	pgpSecret, pgpPublic, err := generateOpenPGP(ctx)
	if err != nil {
		return false, err
	}
	for _, f := range []struct {
		name string
		mode fs.FileMode
		text []byte
	}{
		{minisignSecret, 0o600, secretText}, {minisignPublic, 0o644, append(publicText, '\n')},
		{openPGPSecret, 0o600, pgpSecret}, {openPGPPublic, 0o644, pgpPublic},
		{throwaway, 0o644, []byte(throwawayText)}, // last: the set is whole
	} {
		if err := os.WriteFile(filepath.Join(dir, f.name), f.text, f.mode); err != nil {
			return false, err
		}
	}
	return true, nil
}

// minisignKey reads the secret key of dir, and checks that its public key is the one beside it.
func minisignKey(dir string) (minisign.PrivateKey, error) {
	path := filepath.Join(dir, minisignSecret)
	b, err := os.ReadFile(path)
	if err != nil {
		return minisign.PrivateKey{}, fmt.Errorf("the key that signs: %w (release key --dir makes one for development; RELEASE_KEYS names the directory of real ones)", err)
	}
	var key minisign.PrivateKey
	if minisign.IsEncrypted(b) {
		password, err := passwordOf(dir, minisignPassword)
		if err != nil {
			return key, err
		}
		if key, err = minisign.DecryptKey(password, b); err != nil {
			return key, fmt.Errorf("%s: %w", path, err)
		}
	} else if err := key.UnmarshalText(b); err != nil {
		return key, fmt.Errorf("%s: %w", path, err)
	}
	public, err := minisign.PublicKeyFromFile(filepath.Join(dir, minisignPublic))
	if err != nil {
		return key, err
	}
	if own, ok := key.Public().(minisign.PublicKey); !ok || !own.Equal(public) {
		return key, fmt.Errorf("%s is not the public key of %s", minisignPublic, path)
	}
	return key, nil
}

func passwordOf(dir, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return "", fmt.Errorf("the key is encrypted: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}

// openPGP is GnuPG with a home of its own, which holds the secret keys of one directory.
type openPGP struct {
	home     string
	password string // a file; empty without one
	keys     []string
}

// generateOpenPGP makes an RSA key without a password, which the package tools of old distributions know as well.
func generateOpenPGP(ctx context.Context) (secret, public []byte, err error) {
	err = withHome(ctx, func(p *openPGP) error {
		user := "Keyhaven development build (throwaway key, do not trust) <development@keyhaven.invalid>"
		// Builds are dated by their sources. A signature must not be older than its key.
		if _, err := p.run(ctx, nil, "--faked-system-time", "20200101T000000!", "--quick-generate-key", user, "rsa3072", "sign", "never"); err != nil {
			return err
		}
		if secret, err = p.run(ctx, nil, "--armor", "--export-secret-keys"); err != nil {
			return err
		}
		public, err = p.run(ctx, nil, "--armor", "--export")
		return err
	})
	return secret, public, err
}

// withOpenPGP calls f with the keys that sign in dir: openpgp-secret.asc, and during a change of keys openpgp-secret-*.asc.
func withOpenPGP(ctx context.Context, dir string, f func(*openPGP) error) error {
	paths, err := filepath.Glob(filepath.Join(dir, "openpgp-secret-*.asc"))
	if err != nil {
		return err
	}
	first := filepath.Join(dir, openPGPSecret)
	if _, err := os.Stat(first); err != nil {
		return fmt.Errorf("the OpenPGP key that signs: %w", err)
	}
	return withHome(ctx, func(p *openPGP) error {
		if path, err := filepath.Abs(filepath.Join(dir, openPGPPassword)); err != nil {
			return err
		} else if _, err := os.Stat(path); err == nil {
			p.password = path
		}
		for _, path := range append([]string{first}, paths...) {
			armored, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if _, err := p.run(ctx, armored, "--import"); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		list, err := p.run(ctx, nil, "--with-colons", "--list-secret-keys")
		if err != nil {
			return err
		}
		p.keys = fingerprints(string(list))
		if len(p.keys) == 0 {
			return fmt.Errorf("%s holds no secret key", first)
		}
		return f(p)
	})
}

// fingerprints are those of the primary keys in a listing with colons.
func fingerprints(list string) []string {
	var out []string
	primary := false
	for line := range strings.Lines(list) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		switch {
		case fields[0] == "sec" || fields[0] == "ssb":
			primary = fields[0] == "sec"
		case fields[0] == "fpr" && primary && len(fields) > 9:
			out = append(out, fields[9])
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// withHome gives f a GnuPG home that is gone afterwards, together with the agent that GnuPG starts for it.
func withHome(ctx context.Context, f func(*openPGP) error) error {
	home, err := os.MkdirTemp("", "kh-gpg") // short: the path of the agent's socket must fit
	if err != nil {
		return err
	}
	defer os.RemoveAll(home)
	p := &openPGP{home: home}
	defer func() {
		stop := exec.CommandContext(context.WithoutCancel(ctx), "gpgconf", "--homedir", home, "--kill", "all")
		stop.Run() //nolint:errcheck // an agent without its home ends by itself
	}()
	return f(p)
}

// run runs gpg with input, and returns what it prints.
func (p *openPGP) run(ctx context.Context, input []byte, args ...string) ([]byte, error) {
	all := []string{"--homedir", p.home, "--batch", "--no-tty", "--quiet", "--pinentry-mode", "loopback"}
	if p.password != "" {
		all = append(all, "--passphrase-file", p.password)
	} else {
		all = append(all, "--passphrase", "") // there is none
	}
	cmd := exec.CommandContext(ctx, "gpg", append(all, args...)...)
	cmd.Stdin = bytes.NewReader(input)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("gpg: %w: %s", err, strings.TrimSpace(said.String()))
	}
	return out.Bytes(), nil
}

// sign signs with each key, as if now were at: the same bytes twice.
func (p *openPGP) sign(ctx context.Context, at time.Time, message []byte, kind ...string) ([]byte, error) {
	args := []string{"--faked-system-time", strconv.FormatInt(at.Unix(), 10) + "!", "--ignore-time-conflict", "--ignore-valid-from", "--digest-algo", "SHA512"}
	for _, k := range p.keys {
		args = append(args, "--local-user", k)
	}
	return p.run(ctx, message, append(args, kind...)...)
}

func openPGPCommand() *cobra.Command {
	var dir, output string
	var clear, binary bool
	cmd := &cobra.Command{
		Use:   "openpgp FILE",
		Short: "Sign a file by the OpenPGP keys: a detached armored signature in FILE.asc, unless the flags say otherwise",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if clear && binary {
				return cli.UsageError("--clear and --binary exclude one another")
			}
			message, err := os.ReadFile(args[0])
			if err != nil {
				return err
			}
			at, err := epoch(cmd.Context())
			if err != nil {
				return err
			}
			kind := []string{"--armor", "--detach-sign"}
			switch {
			case clear:
				kind = []string{"--clear-sign"}
			case binary:
				kind = []string{"--detach-sign"}
			}
			if output == "" {
				output = args[0] + ".asc"
			}
			return withOpenPGP(cmd.Context(), secrets(dir), func(p *openPGP) error {
				signed, err := p.sign(cmd.Context(), at, message, kind...)
				if err != nil {
					return err
				}
				return os.WriteFile(output, signed, 0o644)
			})
		},
	}
	cmd.Flags().StringVar(&dir, "keys", defaultKeys, "directory of the keys, where RELEASE_KEYS names none")
	cmd.Flags().StringVar(&output, "output", "", "where the signature goes; FILE.asc by default")
	cmd.Flags().BoolVar(&clear, "clear", false, "write the text with its signature around it (InRelease)")
	cmd.Flags().BoolVar(&binary, "binary", false, "write the detached signature without armor")
	return cmd
}
