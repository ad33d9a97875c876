// Command keyhaven-keyserver signs TLS handshakes for edges with private keys that stay in PKCS#11 tokens.
//
// It runs beside the token, on a network that nobody reaches from outside. Edges ask it over mutual TLS; its
// configuration says which edge may use which key for what.
package main

import (
	"context"
	"log/slog"
	"os"
	_ "time/tzdata" // windows of rules name time zones, and not every host has their files

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/takeover"
	"github.com/keyhaven/keyhaven/pkcs11/worker"
	"github.com/keyhaven/keyhaven/signer"
)

const (
	envPrefix     = "KEYHAVEN_KEYSERVER"
	defaultConfig = "/etc/keyhaven/keyserver.yaml"
)

// workerCommand is what the program is run as, by itself, to load a module. It takes no flags and no configuration.
const workerCommand = "worker"

func main() {
	if len(os.Args) == 2 && os.Args[1] == workerCommand {
		os.Exit(worker.Main(context.Background()))
	}
	ctx, stop := cli.SignalContext()
	code := cli.Execute(ctx, newRoot(), os.Stderr)
	stop()
	os.Exit(code)
}

func newRoot() *cobra.Command {
	root := cli.New("keyhaven-keyserver", "Sign TLS handshakes with keys that stay in a token")
	root.AddCommand(newRun(), newCheck(), newStatus(), newHealth(), newReload(), newToken(), newPolicy(), newAudit(), newCA(), newClient(), newKey())
	return root
}

// configFlags adds the flags that name a configuration and overlay it.
func configFlags(cmd *cobra.Command) {
	cmd.Flags().StringP("config", "c", defaultConfig, "configuration file (YAML)")
	cmd.Flags().String("listen", "", "address to serve clients on, in place of the configuration's listen")
	cmd.Flags().String("ops", "", "loopback address for /healthz, /readyz and /metrics, in place of the configuration's ops.listen")
}

func newRun() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Serve clients until SIGTERM; SIGHUP reloads keys, policy and certificates",
		Long: `Run serves until SIGINT or SIGTERM, and then finishes the operations in flight. SIGHUP reads the configuration, keys, policy and
certificates again. SIGUSR2 starts the program anew, from where it was started and with the same arguments: once the new process
has opened every home of keys, this one finishes the operations in flight and hands over. Clients wait meanwhile. If the new
process cannot open all, such as where the HSM has no sessions left, this one goes on.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := cli.Logger(cmd)
			if err != nil {
				return err
			}
			return run(cmd.Context(), optionsOf(cmd), logger)
		},
	}
	configFlags(cmd)
	return cmd
}

func newCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Say file, line and key of whatever is wrong with a configuration",
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := cli.Logger(cmd)
			if err != nil {
				return err
			}
			online, err := cmd.Flags().GetBool("online")
			if err != nil {
				return err
			}
			return check(cmd.Context(), optionsOf(cmd), online, logger, cmd.OutOrStdout())
		},
	}
	configFlags(cmd)
	cmd.Flags().Bool("online", false, "also open the tokens, which tries each PIN once, and look for the keys that are named")
	return cmd
}

// run serves until ctx ends, or another process takes over.
func run(ctx context.Context, o loadOptions, logger *slog.Logger) error {
	self, err := takeover.Begin() // before a signal can come that it is to take
	if err != nil {
		return err
	}
	if err := protect(); err != nil {
		return err
	}
	o.quotas = new(signer.Quotas)
	p, err := load(o, logger)
	if err != nil {
		return cli.ConfigError(err)
	}
	s, err := newServer(ctx, p, o, logger)
	if err != nil {
		return err
	}
	s.self = self
	return s.run(ctx)
}
