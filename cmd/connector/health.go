package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/conf"
)

// healthCommand asks the listener for health, or the control socket.
func healthCommand() *cobra.Command {
	var socket string
	return cli.Health(defaultConfig, func(config string) (string, error) {
		c := defaults()
		if _, err := conf.Load(c, conf.Options{Path: config, EnvPrefix: "KEYHAVEN_CONNECTOR"}); err != nil {
			return "", err
		}
		if socket = c.Control; socket == "" && c.Ops.Listen == "" {
			return "", fmt.Errorf("%s names neither ops.listen nor control, so that nobody can be asked: add one and restart the connector", config)
		}
		return c.Ops.Listen, nil
	}, func(cmd *cobra.Command, live bool) error {
		b, err := ask(cmd.Context(), socket, pathStatus)
		if err != nil || live {
			return err
		}
		var st connector.Status
		if err := json.Unmarshal(b, &st); err != nil {
			return fmt.Errorf("the connector on %s answered what this version does not understand: %w", socket, err)
		}
		for _, s := range st.Sessions {
			if s.Role == connector.RoleMain && s.State == connector.StateConnected {
				return nil
			}
		}
		return errors.New("not ready: no session to an edge")
	})
}
