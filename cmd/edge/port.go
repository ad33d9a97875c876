package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newPort() *cobra.Command {
	cmd := &cobra.Command{Use: "port", Short: "Public TCP and UDP ports that lead to private services"}
	cmd.AddCommand(portAdd(), portSet(), portList(), portInfo(),
		complete(deleting("port", func(ctx context.Context, c *admin.Client, name string) error { return c.DeletePort(ctx, name) }), portNames))
	return cmd
}

// portFlags adds the flags of a port, and returns how to lay those that are given over p.
func portFlags(cmd *cobra.Command) func(p *spec.PortConfig) error {
	var given spec.PortConfig
	var file, to string
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "file with the whole port, YAML or JSON; - is standard input")
	f.StringVar(&given.Protocol, "protocol", "tcp", "tcp or udp")
	f.StringVar(&given.Listen, "listen", "", "public host:port, such as :2222")
	f.StringVar(&to, "to", "", "HOST:PORT of the service")
	f.StringVar(&given.VNet, "vnet", "", "virtual network of --to (default the default network)")
	f.StringVar(&given.Pool, "pool", "", "pool, in place of --to")
	f.StringVar(&given.Tunnel, "tunnel", "", "tunnel whose ingress has the service, in place of --to")
	f.StringVar(&given.Service, "service", "", "with --tunnel: host name of the ingress rule")
	f.StringSliceVar(&given.Allow, "allow", nil, "prefixes of visitors who may connect, such as 192.0.2.0/24; without any nobody may")
	f.StringVar(&given.ProxyProtocol, "proxy-protocol", "", "tell the service the visitor's address: v1 or v2")
	f.TextVar(&given.IdleTimeout, "idle-timeout", spec.Duration(0), "end what carries nothing for this `duration`, such as 10m")
	f.IntVar(&given.MaxConnections, "max-connections", 0, "most connections or sessions at a time")
	completeFlag(cmd, "protocol", words("tcp", "udp"))
	completeFlag(cmd, "vnet", vnetNames)
	completeFlag(cmd, "pool", poolNames)
	completeFlag(cmd, "tunnel", tunnelNames)
	return func(p *spec.PortConfig) error {
		if file != "" {
			whole := spec.PortConfig{}
			if err := readConfig(cmd, file, &whole); err != nil {
				return err
			}
			if whole.Name != "" && whole.Name != p.Name {
				return cli.UsageError("%s is about the port %q, not %q", file, whole.Name, p.Name)
			}
			whole.Name = p.Name
			*p = whole
		}
		if p.Protocol == "" {
			p.Protocol = given.Protocol
		}
		if f.Changed("to") || f.Changed("pool") || f.Changed("tunnel") { // another target takes the place of the whole one
			p.VNet, p.Host, p.Port, p.Pool, p.Tunnel, p.Service = "", "", 0, "", "", ""
		}
		if f.Changed("to") {
			var err error
			if p.Host, p.Port, err = parseHostPort(to); err != nil {
				return cli.UsageError("--to: %w", err)
			}
		}
		overlay(cmd, "protocol", &p.Protocol, given.Protocol)
		overlay(cmd, "listen", &p.Listen, given.Listen)
		overlay(cmd, "vnet", &p.VNet, given.VNet)
		overlay(cmd, "pool", &p.Pool, given.Pool)
		overlay(cmd, "tunnel", &p.Tunnel, given.Tunnel)
		overlay(cmd, "service", &p.Service, given.Service)
		overlay(cmd, "allow", &p.Allow, given.Allow)
		overlay(cmd, "proxy-protocol", &p.ProxyProtocol, given.ProxyProtocol)
		overlay(cmd, "idle-timeout", &p.IdleTimeout, given.IdleTimeout)
		overlay(cmd, "max-connections", &p.MaxConnections, given.MaxConnections)
		return nil
	}
}

func parseHostPort(s string) (string, uint16, error) {
	host, port, err := net.SplitHostPort(s)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || host == "" || n == 0 {
		return "", 0, fmt.Errorf("%q is not HOST:PORT", s)
	}
	return host, uint16(n), nil
}

func portAdd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Open a public port on every edge",
		Example: "  keyhaven-edge port add ssh --listen :2222 --vnet red --to 10.0.0.9:22 --allow 192.0.2.0/24,2001:db8::/32\n" +
			"  keyhaven-edge port add game --protocol udp --listen :27015 --pool game --allow 0.0.0.0/0,::/0",
		Args: cobra.ExactArgs(1),
	}
	lay := portFlags(cmd)
	return doing(complete(cmd, words()), func(ctx context.Context, c *admin.Client, args []string) (control.Port, error) {
		p := spec.PortConfig{Name: args[0]}
		if err := lay(&p); err != nil {
			return control.Port{}, err
		}
		return c.CreatePort(ctx, p)
	}, func(p control.Port, _ []string) string {
		return fmt.Sprintf("port %q added: %s %s leads to %s%s", p.Config.Name, p.Config.Protocol, p.Config.Listen, portTarget(p.Config),
			ifTrue(len(p.Config.Allow) == 0, "; nobody may connect until --allow names visitors"))
	})
}

func portSet() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "set NAME",
		Short:   "Change a public port: what is not given stays",
		Example: "  keyhaven-edge port set ssh --allow 192.0.2.0/24",
		Args:    cobra.ExactArgs(1),
	}
	lay := portFlags(cmd)
	return doing(complete(cmd, portNames), func(ctx context.Context, c *admin.Client, args []string) (control.Port, error) {
		old, err := c.Port(ctx, args[0])
		if err != nil {
			return old, err
		}
		if err := lay(&old.Config); err != nil {
			return old, err
		}
		return c.SetPort(ctx, old.Config, old.Revision)
	}, func(p control.Port, _ []string) string { return fmt.Sprintf("port %q changed", p.Config.Name) })
}

func portList() *cobra.Command {
	return showing(&cobra.Command{Use: "list", Short: "List the public ports"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.Port, error) { return c.Ports(ctx) },
		func(w io.Writer, list []control.Port) { portTable(w, list...) })
}

func portInfo() *cobra.Command {
	return complete(showing(&cobra.Command{Use: "info NAME", Short: "Show a public port", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, c *admin.Client, args []string) (control.Port, error) {
			return c.Port(ctx, args[0])
		},
		func(w io.Writer, p control.Port) { portTable(w, p) }), portNames)
}

func portTable(w io.Writer, list ...control.Port) {
	row(w, "NAME", "PROTOCOL", "LISTEN", "LEADS TO", "ALLOW", "PROXY", "IDLE", "MAX", "REVISION", "UPDATED")
	for _, p := range list {
		c := p.Config
		idle := ""
		if c.IdleTimeout != 0 {
			idle = c.IdleTimeout.String()
		}
		row(w, c.Name, c.Protocol, c.Listen, portTarget(c), strings.Join(c.Allow, " "), c.ProxyProtocol, idle, bound(c.MaxConnections), p.Revision, when(p.Updated))
	}
}

func portTarget(p spec.PortConfig) string {
	switch {
	case p.Pool != "":
		return "pool " + p.Pool
	case p.Tunnel != "":
		return "tunnel " + p.Tunnel + " " + p.Service
	}
	return ifTrue(p.VNet != "", p.VNet+"/") + net.JoinHostPort(p.Host, strconv.Itoa(int(p.Port)))
}
