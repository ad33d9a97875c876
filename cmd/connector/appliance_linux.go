package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
)

// applianceOnLinux are commands that work on a device alone.
func applianceOnLinux() []*cobra.Command { return []*cobra.Command{applianceRunCommand()} }

func applianceRunCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Set the device up by its keyhaven.yaml and keep it running",
		Long: `Run is what the unit keyhaven-appliance.service starts, as root: it reads keyhaven.yaml from the card, sets network, time, SSH and
services up by it, enrols the connector, and says how it is in keyhaven-status.txt on the card, on the screen and with the LED.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := cli.Logger(cmd)
			if err != nil {
				return err
			}
			agent := &appliance.Agent{Join: joinKept, Reload: cli.Hangups(cmd.Context()), Version: cli.Version(), Log: log}
			return agent.Run(cmd.Context())
		},
	}
}

// joinKept is join with a key that is kept over attempts, for [appliance.JoinFunc].
func joinKept(ctx context.Context, token mtls.JoinToken, keyFile, dir, name string) error {
	key, csr, err := mtls.KeptKeyCSR(keyFile)
	if err != nil {
		return err
	}
	_, _, err = joinTo(ctx, token, key, csr, dir, name, byDefault)
	return err
}
