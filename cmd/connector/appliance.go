package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func applianceCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "appliance",
		Short: "Look after a device that runs the Keyhaven image",
	}
	cmd.AddCommand(applianceCheckCommand())
	cmd.AddCommand(applianceUpdateCommands()...)
	cmd.AddCommand(applianceOnLinux()...)
	return cmd
}

func applianceCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Say what is wrong with a keyhaven.yaml",
		Long: `Check reads the file as the device would, keyhaven.yaml or the user-data or network-config of the Raspberry Pi Imager, and says
what is wrong with it and in which line. It works on any computer and changes nothing. The exit code is 3 if something is wrong.
A join token that is still to be put in is no mistake, and is told.`,
		Example: "  keyhaven-connector appliance check /media/me/KEYHAVEN/keyhaven.yaml",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cli.UsageError("name one file, the keyhaven.yaml that is to be looked at")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := readConfig(args[0])
			if err != nil {
				return err
			}
			c, err := appliance.Parse(args[0], b)
			if err != nil {
				return cli.ConfigError(err)
			}
			said := "good"
			if base := filepath.Base(args[0]); c.Token == "" && base != appliance.UserData && base != appliance.NetworkConfig {
				said = "good, but without a join token: a device that never had one waits until it is in the file"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", args[0], said)
			return err
		},
	}
}

// readConfig reads a file for [appliance.Parse].
func readConfig(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, cli.ConfigError(err)
	}
	b, err := io.ReadAll(io.LimitReader(f, appliance.MaxConfig+1))
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, cli.ConfigError(err)
	}
	return b, nil
}
