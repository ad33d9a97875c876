package main

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

// newHealth asks the listener for health, or the control socket.
func newHealth() *cobra.Command {
	var socket string
	return cli.Health(defaultConfig, func(config string) (string, error) {
		cfg, file, err := read(loadOptions{path: config})
		if file == nil {
			return "", err
		}
		if socket = cfg.Control; socket == "" && cfg.Ops.Listen == "" {
			return "", fmt.Errorf("%s names neither ops.listen nor control, so that nobody can be asked: add one and restart the server", config)
		}
		return cfg.Ops.Listen, nil // what else is wrong with the file is not the question
	}, func(cmd *cobra.Command, live bool) error {
		var st status
		if err := callAt(cmd.Context(), socket, http.MethodGet, "/v1/status", nil, &st); err != nil || live || st.Ready {
			return err
		}
		return fmt.Errorf("not ready: %s", strings.Join(st.Reasons, "; "))
	})
}
