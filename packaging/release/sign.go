package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"aead.dev/minisign"
	"github.com/spf13/cobra"
)

// sumsName is the list of checksums of a directory, in the form that sha256sum --check reads.
const sumsName = "SHA256SUMS"

func signCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "sign FILE...",
		Short: "Write FILE.minisig, a signature that minisign verifies",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := minisignKey(secrets(dir))
			if err != nil {
				return err
			}
			for _, path := range args {
				if err := signFile(cmd.Context(), key, path); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "keys", defaultKeys, "directory of the keys, where RELEASE_KEYS names none")
	return cmd
}

// signFile signs the file's hash. The comment that is signed as well names file and time of the build, so that a signature
// does not pass for another file's.
func signFile(ctx context.Context, key minisign.PrivateKey, path string) error {
	at, err := epoch(ctx)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r := minisign.NewReader(f)
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	trusted := fmt.Sprintf("timestamp:%d\tfile:%s\thashed", at.Unix(), filepath.Base(path))
	return os.WriteFile(path+".minisig", append(r.SignWithComments(key, trusted, "signature from Keyhaven's release key"), '\n'), 0o644)
}

func sumsCommand() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "sums DIR",
		Short: "Write SHA256SUMS of the files in a directory, and its signature",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := minisignKey(secrets(dir))
			if err != nil {
				return err
			}
			path := filepath.Join(args[0], sumsName)
			text, err := sums(args[0])
			if err != nil {
				return err
			}
			if err := os.WriteFile(path, text, 0o644); err != nil {
				return err
			}
			return signFile(cmd.Context(), key, path)
		},
	}
	cmd.Flags().StringVar(&dir, "keys", defaultKeys, "directory of the keys, where RELEASE_KEYS names none")
	return cmd
}

// sums lists the regular files of a directory, not of those below it, without the list itself.
func sums(dir string) ([]byte, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, e := range entries {
		if !e.Type().IsRegular() || strings.HasPrefix(e.Name(), sumsName) {
			continue
		}
		sum, err := fileSum(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&out, "%s  %s\n", sum, e.Name())
	}
	if out.Len() == 0 {
		return nil, fmt.Errorf("%s has no files", dir)
	}
	return out.Bytes(), nil
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}
