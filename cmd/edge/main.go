// Command keyhaven-edge is the public side of Keyhaven: it serves visitors with keys that stay behind a key server,
// takes the tunnels that connectors dial, and is administered over a Unix socket or HTTPS with mutual TLS.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

func main() {
	ctx, stop := cli.SignalContext()
	code := cli.Execute(ctx, newRoot(), os.Stderr)
	stop()
	os.Exit(code)
}

func newRoot() *cobra.Command {
	root := cli.New("keyhaven-edge", "Serve HTTPS with keys that stay in an HSM, through tunnels that only dial out")
	whereFlags(root)
	root.AddCommand(newRun(), newCheck(), newCA(), newKeyIdentity(), newVNet(), newTunnel(), newConnector(), newRoute(),
		newPool(), newPort(), newZone(), newFleet(), newFlow(), newEdge(), newStatus(), newHealth(), newState(), newPing(), newTraceroute())
	return root
}
