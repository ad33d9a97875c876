package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance"
	updates "github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/fatimage"
	"github.com/keyhaven/keyhaven/appliance/slot"
	"github.com/keyhaven/keyhaven/appliance/update"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// applianceOnLinux are commands that work on a device alone.
func applianceOnLinux() []*cobra.Command {
	return []*cobra.Command{applianceRunCommand(), applianceStatusCommand(), applianceConfigureCommand()}
}

func applianceRunCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Set the device up by its keyhaven.yaml and keep it running",
		Long: `Run is what the unit keyhaven-appliance.service starts, as root: it reads keyhaven.yaml from the card, sets network, time, SSH and
services up by it, enrols the connector, and says how it is in keyhaven-status.txt on the card, on the screen and with the LED.
On SIGHUP (systemctl reload keyhaven-appliance) it reads the card again.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := cli.Logger(cmd)
			if err != nil {
				return err
			}
			agent := &appliance.Agent{Join: joinKept, Updates: agentUpdates("/", log), Reload: cli.Hangups(cmd.Context()), Version: cli.Version(), Log: log}
			return agent.Run(cmd.Context())
		},
	}
}

// joinKept is join with a key that is kept over attempts, for [appliance.JoinFunc].
func joinKept(ctx context.Context, token mtls.JoinToken, keyFile, dir, name string, via *tunnel.ProxyConfig) error {
	key, csr, err := mtls.KeptKeyCSR(keyFile)
	if err != nil {
		return err
	}
	way := byDefault
	if via != nil {
		way.Proxy = proxyConfig{URL: via.URL, User: via.User, PasswordFile: via.PasswordFile}
	}
	_, _, err = joinTo(ctx, token, key, csr, dir, name, way)
	return err
}

// agentUpdates makes the agent's engine for updates.
func agentUpdates(root string, log *slog.Logger) func(appliance.UpdateHooks) (appliance.Updater, error) {
	return func(h appliance.UpdateHooks) (appliance.Updater, error) {
		slots, err := slot.Open(slot.Config{Root: root, Log: log})
		if err != nil {
			return nil, err
		}
		keys, err := updates.LoadKeys(filepath.Join(root, updateKeys))
		if err != nil {
			return nil, err
		}
		e, err := update.New(update.Config{
			Slots: slots, Keys: keys, Dir: filepath.Join(root, updateDir),
			Source: h.Settings.Source, Channel: h.Settings.Channel, Schedule: h.Settings.Schedule, Location: h.Location,
			Proxy:     h.Proxy,
			Automatic: h.Settings.Automatic == nil || *h.Settings.Automatic,
			Healthy:   h.Healthy, Directive: h.Directive, Stop: h.Stop, Changed: h.Changed, Log: log,
		})
		if err != nil {
			return nil, err // not a nil engine in an interface
		}
		return e, nil
	}
}

func applianceStatusCommand() *cobra.Command {
	var root string
	cmd := cli.WithOutput(&cobra.Command{
		Use:   "status",
		Short: "Show how the device is",
		Long: `Status shows what the device says of itself: whether it is connected, what is wrong and what to do, its addresses, what it
publishes, and how updates stand. The exit code is 1 if it is not connected.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := os.ReadFile(filepath.Join(root, appliance.StatusPath))
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return fmt.Errorf("this is no running appliance: %w; run this command on a device that was started from a Keyhaven image", err)
			case err != nil:
				return err
			}
			var st appliance.Status
			if err := json.Unmarshal(b, &st); err != nil {
				return fmt.Errorf("%s: %w", appliance.StatusPath, err)
			}
			if err := cli.Show(cmd, st, func(w io.Writer) { fmt.Fprintln(w, strings.Join(st.Lines(100), "\n")) }); err != nil {
				return err
			}
			if st.State != appliance.StateHealthy {
				return cli.Quiet(fmt.Errorf("the device is not connected: %s", st.State))
			}
			return nil
		},
	})
	rootFlag(cmd, &root)
	return cmd
}

func applianceConfigureCommand() *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:   "configure FILE",
		Short: "Give the device a new keyhaven.yaml",
		Long: `Configure checks the file, writes it to the card as keyhaven.yaml, and has it read at once. "-" is standard input. A file with
mistakes is refused, and nothing changes; the exit code is then 3.`,
		Example: "  ssh root@petcam.local keyhaven-connector appliance configure - < keyhaven.yaml",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := configFrom(cmd, args[0])
			if err != nil {
				return err
			}
			if _, err := appliance.Parse(fatimage.ConfigName, b); err != nil {
				return cli.ConfigError(err)
			}
			if err := appliance.WriteCard(root, b); err != nil {
				return err
			}
			if root != "/" {
				return nil
			}
			out, err := exec.CommandContext(cmd.Context(), "systemctl", "reload", "keyhaven-appliance.service").CombinedOutput()
			if err != nil {
				return fmt.Errorf("the file is on the card and counts from the next start; reading it now failed: %w: %s", err, out)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "the file is on the card and in force; keyhaven-connector appliance status shows what becomes of it")
			return err
		},
	}
	rootFlag(cmd, &root)
	return cmd
}

// configFrom reads a keyhaven.yaml from a file or standard input.
func configFrom(cmd *cobra.Command, path string) ([]byte, error) {
	if path != "-" {
		return readConfig(path)
	}
	return io.ReadAll(io.LimitReader(cmd.InOrStdin(), appliance.MaxConfig+1))
}
