// Command release does what a release of Keyhaven needs beside the compiler: the version, the keys, signatures,
// checksums and bills of materials. It runs from the source tree: go run ./packaging/release.
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

func main() {
	ctx, stop := cli.SignalContext()
	code := cli.Execute(ctx, root(), os.Stderr)
	stop()
	os.Exit(code)
}

// defaultKeys is where development builds keep their keys.
const defaultKeys = "dist/keys"

func root() *cobra.Command {
	cmd := cli.New("release", "Version, keys, signatures, checksums and bills of materials of a build")
	cmd.AddCommand(versionCommand(), epochCommand(), keyCommand(), signCommand(), openPGPCommand(), sumsCommand(), sbomCommand())
	return cmd
}

func versionCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of the source tree, or VERSION where that is set",
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := version(cmd.Context())
			if err != nil {
				return err
			}
			if v, err = render(v, format); err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), v)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&format, "format", "semver", "semver, or as a package writes it: deb or rpm")
	return cmd
}

func epochCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "epoch",
		Short: "Print the time of the newest commit in seconds, or SOURCE_DATE_EPOCH where that is set",
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := epoch(cmd.Context())
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), t.Unix())
			}
			return err
		},
	}
}

// version is what VERSION says, else what the history does.
func version(ctx context.Context) (string, error) {
	if v := os.Getenv("VERSION"); v != "" {
		return v, checkVersion(v)
	}
	return gitVersion(ctx, ".")
}

// epoch is the time that stands for now in everything that is built.
func epoch(ctx context.Context) (time.Time, error) {
	if v := os.Getenv("SOURCE_DATE_EPOCH"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			return time.Time{}, cli.UsageError("SOURCE_DATE_EPOCH %q: want seconds since 1970", v)
		}
		return time.Unix(n, 0).UTC(), nil
	}
	return gitEpoch(ctx, ".")
}
