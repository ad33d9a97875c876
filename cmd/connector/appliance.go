package main

import (
	"errors"
	"fmt"
	"io"
	"os"

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
what is wrong with it and in which line. It works on any computer and changes nothing. The exit code is 3 if something is wrong.`,
		Example: "  keyhaven-connector appliance check /media/me/KEYHAVEN/keyhaven.yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := readConfig(args[0])
			if err != nil {
				return err
			}
			if _, err := appliance.Parse(args[0], b); err != nil {
				return cli.ConfigError(err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: good\n", args[0])
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
