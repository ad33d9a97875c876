package main

import (
	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/conf"
)

// newHealth asks the listener for health, or whether the administration's socket answers.
func newHealth() *cobra.Command {
	var socket string
	return cli.Health(defaultConfig, func(config string) (string, error) {
		cfg := defaults()
		_, err := conf.Load(cfg, conf.Options{Path: config, EnvPrefix: envPrefix, EnvOthers: []string{envPrefix + "_SOCKET", envPrefix + "_SERVER", envPrefix + "_OPERATOR"}})
		socket = cfg.Admin.Socket
		return cfg.Ops.Listen, err
	}, func(cmd *cobra.Command, _ bool) error {
		_, err := admin.NewClient(socket).Status(cmd.Context())
		return err
	})
}
