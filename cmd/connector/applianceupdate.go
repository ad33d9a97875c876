package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance"
	updates "github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/slot"
	"github.com/keyhaven/keyhaven/appliance/update"
	"github.com/keyhaven/keyhaven/internal/cli"
)

// Where an appliance has what updates need.
const (
	updateKeys   = "/usr/share/keyhaven/update-keys" // public keys of the image
	updateDir    = "/data/update"
	updateConfig = "/data/config/keyhaven.yaml" // as it was accepted
)

// applianceUpdateCommands are the commands about updates.
func applianceUpdateCommands() []*cobra.Command {
	return []*cobra.Command{applianceUpdateCommand(), applianceRollbackCommand(), applianceBundleCommand()}
}

func applianceUpdateCommand() *cobra.Command {
	var file, source, channel, root string
	var force bool
	cmd := &cobra.Command{
		Use:   "update",
		Short: "Install a newer version of the system now",
		Long: `Update gets the newest version from the update source, or takes a bundle, writes it to the slot that does not run, and restarts
the device into it on trial. Once the tunnel was up for a minute the new version is kept; otherwise, and after any loss of
power until then, the one before comes back by itself. Neither schedule nor percentage is asked.`,
		Example: `  keyhaven-connector appliance update
  ssh root@petcam keyhaven-connector appliance update --bundle - < keyhaven-0.6.0-arm64.update`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file != "" && (source != "" || channel != "") {
				return cli.UsageError("--bundle is one way, --source and --channel are another: leave one out")
			}
			e, err := updateEngine(cmd, root, source, channel)
			if err != nil {
				return err
			}
			return atRestart(cmd, updateNow(cmd, e, file, force))
		},
	}
	cmd.Flags().StringVar(&file, "bundle", "", `file with the update; "-" is standard input (default: from the update source)`)
	cmd.Flags().BoolVar(&force, "force", false, "take versions that are not newer, or that were given up")
	cmd.Flags().StringVar(&source, "source", "", "address of the update source (default: that of keyhaven.yaml)")
	cmd.Flags().StringVar(&channel, "channel", "", "channel of the update source (default: that of keyhaven.yaml)")
	rootFlag(cmd, &root)
	return cmd
}

func applianceRollbackCommand() *cobra.Command {
	var root string
	var force bool
	cmd := &cobra.Command{
		Use:   "rollback",
		Short: "Return to the version before the last update",
		Long: `Rollback makes the other slot the default and restarts the device. The version that runs now is not installed again until there is a
newer one. While a version is on trial it is given up.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := updateEngine(cmd, root, "", "")
			if err != nil {
				return err
			}
			return atRestart(cmd, e.Rollback(cmd.Context(), force))
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "return to a version that was given up or never kept, too")
	rootFlag(cmd, &root)
	return cmd
}

// rootFlag lets tests work on a directory.
func rootFlag(cmd *cobra.Command, root *string) {
	cmd.Flags().StringVar(root, "root", "/", "directory in place of /")
	_ = cmd.Flags().MarkHidden("root") // it is there
}

func updateNow(cmd *cobra.Command, e *update.Engine, file string, force bool) error {
	switch file {
	case "":
		return e.Update(cmd.Context(), update.Request{Asked: true, Force: force})
	case "-":
		return e.Install(cmd.Context(), cmd.InOrStdin(), force)
	}
	f, err := os.Open(file)
	if err != nil {
		return cli.ConfigError(err)
	}
	defer f.Close()
	return e.Install(cmd.Context(), f, force)
}

// atRestart says that the machine restarts, which then ends this program.
func atRestart(cmd *cobra.Command, err error) error {
	switch {
	case errors.Is(err, update.ErrRestart):
		_, err = fmt.Fprintln(cmd.OutOrStdout(), "the device restarts")
	case errors.Is(err, update.ErrNothing):
		_, err = fmt.Fprintln(cmd.OutOrStdout(), err)
	}
	return err
}

// updateEngine is the engine of this device for one command. The agent's own watches the trial after the restart.
func updateEngine(cmd *cobra.Command, root, source, channel string) (*update.Engine, error) {
	log, err := cli.Logger(cmd)
	if err != nil {
		return nil, err
	}
	slots, err := slot.Open(slot.Config{Root: root, Log: log})
	if err != nil {
		return nil, err
	}
	keys, err := updates.LoadKeys(filepath.Join(root, updateKeys))
	if err != nil {
		return nil, err
	}
	c := update.Config{Slots: slots, Keys: keys, Dir: filepath.Join(root, updateDir), Source: source, Channel: channel, Log: log}
	if b, err := readConfig(filepath.Join(root, updateConfig)); err == nil {
		if own, err := appliance.Parse(updateConfig, b); err == nil {
			c.Source, c.Channel = cmp.Or(source, own.Update.Source), cmp.Or(channel, own.Update.Channel)
			c.Proxy = own.Proxy.Address()
		}
	}
	if root == "/" {
		c.Stop = func(ctx context.Context) {
			fmt.Fprintln(cmd.OutOrStdout(), "the device restarts")
			ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
			defer cancel()
			if out, err := exec.CommandContext(ctx, "systemctl", "stop", "keyhaven-connector.service").CombinedOutput(); err != nil {
				log.Warn("cannot stop the connector; its flows are cut", "err", err, "output", string(out))
			}
		}
	}
	var e *update.Engine
	last := ""
	c.Changed = func() {
		if e == nil {
			return
		}
		if text := e.Text(); text != last {
			last = text
			fmt.Fprintln(cmd.OutOrStdout(), text)
		}
	}
	e, err = update.New(c)
	return e, err
}
