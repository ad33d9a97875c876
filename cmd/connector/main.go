// Command keyhaven-connector runs beside the origins. It dials the edges, so that nothing has to be opened towards the
// private side, and reaches for them what its allow-list permits.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

func main() {
	ctx, stop := cli.SignalContext()
	code := cli.Execute(ctx, root(), os.Stderr)
	stop()
	os.Exit(code)
}

func root() *cobra.Command {
	cmd := cli.New("keyhaven-connector", "Reach private origins for the edges of a Keyhaven installation")
	cmd.AddCommand(joinCommand(), runCommand(), checkCommand(), statusCommand(), healthCommand(), diagCommand(), ingressCommand(), applianceCommand(), imageCommand())
	return cmd
}
