package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

// defaultPercent and defaultMaxFailures are what a rollout begins with if nothing is said: a small part, and little harm.
const defaultPercent, defaultMaxFailures = 5, 2

func newFleet() *cobra.Command {
	cmd := &cobra.Command{Use: "fleet", Short: "Devices that update themselves, and rollouts of versions to them"}
	cmd.AddCommand(fleetList(), fleetShow(), newRollout())
	return cmd
}

func fleetList() *cobra.Command {
	var tunnel string
	cmd := showing(&cobra.Command{Use: "list", Short: "List the devices, with what runs on them and what they are to do"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.DeviceView, error) {
			return c.Devices(ctx, tunnel)
		},
		func(w io.Writer, list []control.DeviceView) {
			row(w, "DEVICE", "TUNNEL", "CONTACT", "VERSION", "STATE", "TARGET", "IS TO", "REPORTED", "BOARD")
			for _, d := range list {
				row(w, d.Name, d.TunnelName, d.Contact, d.Report.Version, ifTrue(d.Problem == "", d.Report.State)+ifTrue(d.Problem != "", "unreadable"), d.Report.Target, isTo(d.Directive), when(d.Reported), d.Report.Board)
			}
		})
	cmd.Flags().StringVar(&tunnel, "tunnel", "", "only those of this tunnel")
	completeFlag(cmd, "tunnel", tunnelNames)
	return cmd
}

// isTo says what a device is to do.
func isTo(d fleet.Directive) string {
	switch d.Policy {
	case fleet.Update:
		return "run " + d.Version
	case fleet.Hold:
		return "stay"
	}
	return "decide itself"
}

func fleetShow() *cobra.Command {
	return complete(showing(&cobra.Command{Use: "show DEVICE", Short: "Show a device, named as its connector is", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, c *admin.Client, args []string) (control.DeviceView, error) {
			return c.Device(ctx, args[0])
		}, deviceTable), deviceNames)
}

func deviceTable(w io.Writer, d control.DeviceView) {
	r := d.Report
	row(w, "device", d.Name)
	row(w, "tunnel", d.TunnelName)
	row(w, "contact", d.Contact)
	row(w, "reported", when(d.Reported)+ifTrue(d.Edge != "", " to edge "+d.Edge))
	row(w, "problem", d.Problem)
	row(w, "product", strings.TrimSpace(r.Product+" "+r.Arch))
	row(w, "board", r.Board)
	row(w, "version", r.Version+ifTrue(r.Trial, " (on trial)"))
	row(w, "previous", r.Previous)
	row(w, "update", strings.TrimSpace(r.State+" "+r.Target)+ifTrue(!r.Since.IsZero(), " since "+when(r.Since)))
	row(w, "error", r.Error)
	if d.Failed != nil {
		row(w, "gave up", d.Failed.Version+" at "+when(d.Failed.At))
	}
	row(w, "source asked", when(r.Checked))
	row(w, "camera", r.Camera)
	row(w, "is to", isTo(d.Directive)+ifTrue(d.Directive.Rollout != "", ", by rollout "+d.Directive.Rollout))
}

func newRollout() *cobra.Command {
	cmd := &cobra.Command{Use: "rollout", Short: "Rollouts: a version for a part of the devices, which grows as you say"}
	cmd.AddCommand(rolloutCreate(), rolloutList(), rolloutShow(), rolloutSet(),
		rolloutPause("pause", "Keep all devices of a rollout at what they run", true),
		rolloutPause("resume", "Let a rollout go on; failures of before count no more", false),
		complete(deleting("rollout", func(ctx context.Context, c *admin.Client, name string) error { return c.DeleteRollout(ctx, name) }), rolloutNames))
	return cmd
}

func rolloutCreate() *cobra.Command {
	var s control.RolloutSpec
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Begin a rollout of a version",
		Long: `Create has a part of the devices update to a version; the others stay as they are until the rollout is set to a higher
percentage or deleted. Who is in at one percentage is in at every higher one. A rollout pauses by itself when more devices
give the update up than --max-failures says. The edge tells devices the version and no more: they take the update from their own
source, and only if it is signed with a key that their image has. Where several rollouts are about a device, the newest that has
it in decides.`,
		Example: "  keyhaven-edge fleet rollout create spring --version 0.6.0 --percent 5\n" +
			"  keyhaven-edge fleet rollout create cams --version 0.6.0 --tunnel north --tunnel south --max-failures 0",
		Args: cobra.ExactArgs(1),
	}
	f := cmd.Flags()
	f.StringVar(&s.Version, "version", "", "version that the devices are to run (required)")
	f.IntVar(&s.Percent, "percent", defaultPercent, "how many of the devices, 0 to 100")
	f.StringArrayVar(&s.Tunnels, "tunnel", nil, "only the devices of this tunnel, name or id; may be repeated (default all devices)")
	f.StringVar(&s.Channel, "channel", "", "channel of the devices' update source (default each device's own)")
	f.IntVar(&s.MaxFailures, "max-failures", defaultMaxFailures, "devices that may give the update up before the rollout is paused")
	if err := cmd.MarkFlagRequired("version"); err != nil {
		panic(err) // a flag that the command does not have
	}
	completeFlag(cmd, "tunnel", tunnelNames)
	return doing(complete(cmd, words()), func(ctx context.Context, c *admin.Client, args []string) (control.RolloutView, error) {
		s.Name = args[0]
		return c.CreateRollout(ctx, s)
	}, func(r control.RolloutView, _ []string) string {
		return fmt.Sprintf("rollout %q of version %s begun: %d of %d devices are to update", r.Config.Name, r.Config.Version, r.Progress.In, r.Progress.Selected)
	})
}

func rolloutList() *cobra.Command {
	return showing(&cobra.Command{Use: "list", Short: "List the rollouts and how far they are, the newest first"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.RolloutView, error) {
			return c.Rollouts(ctx)
		},
		func(w io.Writer, list []control.RolloutView) {
			row(w, "ROLLOUT", "VERSION", "CHANNEL", "PERCENT", "STATUS", "DEVICES", "IN", "UPDATED", "UPDATING", "FAILED", "WAITING", "CREATED")
			for _, r := range list {
				p := r.Progress
				row(w, r.Config.Name, r.Config.Version, r.Config.Channel, r.Config.Percent, r.Status, p.Selected, p.In, p.Updated, p.Updating, p.Failed, p.Waiting, when(r.Created))
			}
		})
}

func rolloutShow() *cobra.Command {
	return complete(showing(&cobra.Command{Use: "show NAME", Short: "Show a rollout, how far it is, and what was done with it", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, c *admin.Client, args []string) (control.RolloutView, error) {
			return c.Rollout(ctx, args[0])
		}, rolloutTable), rolloutNames)
}

func rolloutTable(w io.Writer, r control.RolloutView) {
	p := r.Progress
	tunnels := "all"
	if len(r.TunnelNames) > 0 {
		tunnels = strings.Join(r.TunnelNames, ", ")
	}
	row(w, "rollout", r.Config.Name)
	row(w, "version", r.Config.Version)
	row(w, "channel", r.Config.Channel)
	row(w, "tunnels", tunnels)
	row(w, "status", r.Status+ifTrue(r.Config.Reason != "", ": "+r.Config.Reason))
	row(w, "percent", r.Config.Percent)
	row(w, "failures", fmt.Sprintf("%d, %d may", p.Failed, r.Config.MaxFailures))
	row(w, "devices", fmt.Sprintf("%d of %d: %d updated, %d updating, %d failed, %d waiting", p.In, p.Selected, p.Updated, p.Updating, p.Failed, p.Waiting))
	for _, e := range r.Config.Events {
		row(w, when(e.At), e.What)
	}
}

func rolloutSet() *cobra.Command {
	var percent, failures int
	cmd := &cobra.Command{Use: "set NAME", Short: "Change how many devices a rollout has in, or how many may fail", Args: cobra.ExactArgs(1),
		Example: "  keyhaven-edge fleet rollout set spring --percent 50"}
	cmd.Flags().IntVar(&percent, "percent", 0, "how many of the devices, 0 to 100; devices that have updated stay updated")
	cmd.Flags().IntVar(&failures, "max-failures", 0, "devices that may give the update up before the rollout is paused")
	return complete(doing(cmd, func(ctx context.Context, c *admin.Client, args []string) (control.RolloutView, error) {
		var change control.RolloutChange
		if cmd.Flags().Changed("percent") {
			change.Percent = &percent
		}
		if cmd.Flags().Changed("max-failures") {
			change.MaxFailures = &failures
		}
		if change == (control.RolloutChange{}) {
			return control.RolloutView{}, cli.UsageError("give --percent or --max-failures")
		}
		return c.SetRollout(ctx, args[0], change, 0)
	}, sayRollout), rolloutNames)
}

func rolloutPause(word, short string, paused bool) *cobra.Command {
	return complete(doing(&cobra.Command{Use: word + " NAME", Short: short, Args: cobra.ExactArgs(1)},
		func(ctx context.Context, c *admin.Client, args []string) (control.RolloutView, error) {
			return c.SetRollout(ctx, args[0], control.RolloutChange{Paused: &paused}, 0)
		}, sayRollout), rolloutNames)
}

func sayRollout(r control.RolloutView, _ []string) string {
	return fmt.Sprintf("rollout %q is %s at %d %%: %d of %d devices are in", r.Config.Name, r.Status, r.Config.Percent, r.Progress.In, r.Progress.Selected)
}
