package main

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func statusCommand() *cobra.Command {
	return cli.WithOutput(online(&cobra.Command{
		Use:   "status",
		Short: "Show how the running connector is: sessions, carriers, flows",
		Long: `Status asks the running connector over its control socket and shows its sessions with their carriers and round-trip times,
since when it has had a session at all, its flows with their limits, and the version of the remote configuration. The exit
code is 1 if no session is up.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			socket, err := controlPath(cmd)
			if err != nil {
				return err
			}
			b, err := ask(cmd.Context(), socket, pathStatus)
			if err != nil {
				return err
			}
			var st connector.Status
			if err := json.Unmarshal(b, &st); err != nil {
				return fmt.Errorf("the connector on %s answered what this version does not understand: %w", socket, err)
			}
			if err := cli.Show(cmd, st, func(w io.Writer) { statusTable(w, st) }); err != nil {
				return err
			}
			if st.Up.IsZero() {
				return cli.Quiet(fmt.Errorf("no session is up"))
			}
			return nil
		},
	}))
}

func statusTable(w io.Writer, st connector.Status) {
	up := "down"
	if !st.Up.IsZero() {
		up = "up for " + time.Since(st.Up).Round(time.Second).String()
	}
	fmt.Fprintf(w, "identity\t%s\nsessions\t%s\nflows\t%d of %d\n", st.Identity, up, st.Flows, st.MaxFlows)
	for _, v := range st.VNets {
		fmt.Fprintf(w, "flows in %s\t%d of %d\n", v.VNet, v.Flows, v.Limit)
	}
	if st.ConfigVersion > 0 {
		fmt.Fprintf(w, "remote configuration\tversion %d\n", st.ConfigVersion)
	}
	if st.Device != nil {
		fmt.Fprintf(w, "device\t%s\n", deviceLine(*st.Device))
	}
	fmt.Fprintf(w, "\nEDGE\tINDEX\tROLE\tSTATE\tFOR\tCARRIER\tRTT\tFLOWS\tREMOTE\n")
	for _, s := range st.Sessions {
		remote, rtt, since := "-", "-", "-"
		if s.Remote.IsValid() {
			remote, rtt = s.Remote.String(), s.RTT.Round(10*time.Microsecond).String()
		}
		if !s.Since.IsZero() {
			since = time.Since(s.Since).Round(time.Second).String()
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", s.Edge, s.Index, s.Role, s.State, since, orDash(s.Carrier), rtt, s.Flows, remote)
	}
	for _, s := range st.Sessions {
		if s.Error != "" {
			fmt.Fprintf(w, "\n%s, session %d: %s\n", s.Edge, s.Index, s.Error)
			if s.Remedy != "" {
				fmt.Fprintf(w, "remedy: %s\n", s.Remedy)
			}
		}
	}
}

// deviceLine says in one line how the device is, and what the edge wants of it.
func deviceLine(d connector.DeviceStatus) string {
	r := d.Report
	line := r.Product + " " + r.Version + ", " + r.State
	if r.Target != "" {
		line += " " + r.Target
	}
	if r.Error != "" {
		line += " (" + r.Error + ")"
	}
	line += ", reported " + time.Since(d.Reported).Round(time.Second).String() + " ago"
	switch d.Directive.Policy {
	case fleet.Update:
		line += "; the edge wants " + d.Directive.Version
	case fleet.Hold:
		line += "; the edge wants it to stay as it is"
	}
	return line
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
