package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newPool() *cobra.Command {
	cmd := &cobra.Command{Use: "pool", Short: "Pools: servers that share requests and connections"}
	cmd.AddCommand(poolCreate(), poolSet(), poolList(), poolInfo(), poolEndpoint(),
		complete(deleting("pool", func(ctx context.Context, c *admin.Client, name string) error { return c.DeletePool(ctx, name) }), poolNames))
	return cmd
}

// poolFlags adds the flags of a pool, and returns how to lay those that are given over p.
func poolFlags(cmd *cobra.Command) func(p *spec.PoolConfig) error {
	var given spec.PoolConfig
	var monitor spec.Monitor
	var endpoints []string
	var affinity, file string
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "file with the whole pool, YAML or JSON; - is standard input")
	f.StringArrayVar(&endpoints, "endpoint", nil, "[VNET/]HOST:PORT[,name=NAME][,weight=0…1][,connector=NAME]; may be repeated")
	f.StringVar(&given.Steering, "steering", "", "random, round_robin, hash, least_requests or least_connections")
	f.IntVar(&given.Minimum, "minimum", 0, "healthy endpoints that make the pool healthy")
	f.StringVar(&given.Next, "next", "", "pool that takes over while this one is not healthy")
	f.StringSliceVar(&given.Members, "member", nil, "other pools, in order, in place of endpoints")
	f.StringVar(&given.PoolSteering, "pool-steering", "", "how a member is chosen: failover, random, latency or least_requests")
	f.StringVar(&given.ProxyProtocol, "proxy-protocol", "", "tell endpoints the visitor's address: v1 or v2")
	f.StringVar(&affinity, "affinity", "", "keep visitors at one endpoint: none, cookie, ip_cookie or header:NAME")
	f.StringVar(&monitor.Type, "monitor", "", "probe the endpoints: http, https, tcp, icmp, or none")
	f.StringVar(&monitor.Path, "monitor-path", "", "path of http probes")
	f.StringVar(&monitor.Expect, "monitor-expect", "", "status codes of a good answer, such as 200-399")
	f.TextVar(&monitor.Interval, "monitor-interval", spec.Duration(0), "`duration` between two probes, such as 10s")
	completeFlag(cmd, "steering", words(spec.SteerRandom, spec.SteerRoundRobin, spec.SteerHash, spec.SteerLeastRequests, spec.SteerLeastConnections))
	completeFlag(cmd, "pool-steering", words(spec.SteerFailover, spec.SteerRandom, spec.SteerLatency, spec.SteerLeastRequests))
	completeFlag(cmd, "monitor", words(spec.MonitorHTTP, spec.MonitorHTTPS, spec.MonitorTCP, spec.MonitorICMP, "none"))
	completeFlag(cmd, "next", poolNames)
	completeFlag(cmd, "member", poolNames)
	return func(p *spec.PoolConfig) error {
		if file != "" {
			whole := spec.PoolConfig{}
			if err := readConfig(cmd, file, &whole); err != nil {
				return err
			}
			if whole.Name != "" && whole.Name != p.Name {
				return cli.UsageError("%s is about the pool %q, not %q", file, whole.Name, p.Name)
			}
			whole.Name = p.Name
			*p = whole
		}
		overlay(cmd, "steering", &p.Steering, given.Steering)
		overlay(cmd, "minimum", &p.Minimum, given.Minimum)
		overlay(cmd, "next", &p.Next, given.Next)
		overlay(cmd, "member", &p.Members, given.Members)
		overlay(cmd, "pool-steering", &p.PoolSteering, given.PoolSteering)
		overlay(cmd, "proxy-protocol", &p.ProxyProtocol, given.ProxyProtocol)
		overlayMonitor(cmd, p, monitor)
		if f.Changed("affinity") {
			kind, name, _ := strings.Cut(affinity, ":")
			p.Affinity = &spec.Affinity{Type: kind, Name: name}
		}
		if f.Changed("endpoint") {
			p.Endpoints = nil
		}
		for _, text := range endpoints {
			e, err := parseEndpoint(text)
			if err != nil {
				return err
			}
			p.Endpoints = append(p.Endpoints, e)
		}
		return nil
	}
}

// overlay puts v in place where its flag is given.
func overlay[T any](cmd *cobra.Command, flag string, to *T, v T) {
	if cmd.Flags().Changed(flag) {
		*to = v
	}
}

func overlayMonitor(cmd *cobra.Command, p *spec.PoolConfig, given spec.Monitor) {
	if cmd.Flags().Changed("monitor") {
		if given.Type == "none" {
			p.Monitor = nil
			return
		}
		if p.Monitor == nil || p.Monitor.Type != given.Type {
			p.Monitor = &spec.Monitor{Type: given.Type}
		}
	}
	m := p.Monitor
	if m == nil {
		m = &spec.Monitor{}
	}
	overlay(cmd, "monitor-path", &m.Path, given.Path)
	overlay(cmd, "monitor-expect", &m.Expect, given.Expect)
	overlay(cmd, "monitor-interval", &m.Interval, given.Interval)
	for _, flag := range []string{"monitor-path", "monitor-expect", "monitor-interval"} {
		if cmd.Flags().Changed(flag) {
			p.Monitor = m // without a type it is refused, by name
		}
	}
}

// parseEndpoint reads "[VNET/]HOST:PORT[,KEY=VALUE…]".
func parseEndpoint(text string) (spec.Endpoint, error) {
	var e spec.Endpoint
	place, options, _ := strings.Cut(text, ",")
	if vnet, rest, ok := strings.Cut(place, "/"); ok {
		e.VNet, place = vnet, rest
	}
	var err error
	if e.Host, e.Port, err = parseHostPort(place); err != nil {
		return e, cli.UsageError("--endpoint %q: %w", text, err)
	}
	for option := range strings.SplitSeq(options, ",") {
		if option == "" {
			continue
		}
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "name":
			e.Name = value
		case "connector":
			e.Connector = value
		case "host_header":
			e.HostHeader = value
		case "weight":
			w, err := parseWeight(value)
			if err != nil {
				return e, cli.UsageError("--endpoint %q: %w", text, err)
			}
			e.Weight = &w
		default:
			return e, cli.UsageError("--endpoint %q: %q is none of name=, weight=, connector= and host_header=", text, option)
		}
	}
	return e, nil
}

func parseWeight(s string) (float64, error) {
	w, err := strconv.ParseFloat(s, 64)
	if err != nil || !(w >= 0 && w <= 1) {
		return 0, fmt.Errorf("%q is no weight; use 0 to 1", s)
	}
	return w, nil
}

func poolCreate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Create a pool",
		Example: "  keyhaven-edge pool create web --endpoint 10.0.0.5:8080 --endpoint red/10.0.0.5:8080,weight=0.5 --monitor http --monitor-path /healthz\n" +
			"  keyhaven-edge pool create all --member web --member backup --pool-steering failover\n" +
			"  keyhaven-edge pool create web --file web.yaml",
		Args: cobra.ExactArgs(1),
	}
	lay := poolFlags(cmd)
	return doing(complete(cmd, words()), func(ctx context.Context, c *admin.Client, args []string) (control.Pool, error) {
		p := spec.PoolConfig{Name: args[0]}
		if err := lay(&p); err != nil {
			return control.Pool{}, err
		}
		return c.CreatePool(ctx, p)
	}, func(p control.Pool, _ []string) string { return fmt.Sprintf("pool %q created", p.Config.Name) })
}

func poolSet() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Change a pool: what is not given stays",
		Long: "Change a pool: what is not given stays. With --file, the file takes the place of all that was there; with --endpoint,\n" +
			"those given take the place of all endpoints. A change that somebody else makes meanwhile is not overwritten.",
		Example: "  keyhaven-edge pool set web --steering least_requests --minimum 2\n  keyhaven-edge pool set web --file web.yaml",
		Args:    cobra.ExactArgs(1),
	}
	lay := poolFlags(cmd)
	return doing(complete(cmd, poolNames), func(ctx context.Context, c *admin.Client, args []string) (control.Pool, error) {
		old, err := c.Pool(ctx, args[0])
		if err != nil {
			return old, err
		}
		if err := lay(&old.Config); err != nil {
			return old, err
		}
		return c.SetPool(ctx, old.Config, old.Revision)
	}, func(p control.Pool, _ []string) string { return fmt.Sprintf("pool %q changed", p.Config.Name) })
}

func poolList() *cobra.Command {
	return showing(&cobra.Command{Use: "list", Short: "List the pools"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.Pool, error) { return c.Pools(ctx) },
		func(w io.Writer, list []control.Pool) { poolTable(w, list...) })
}

func poolTable(w io.Writer, list ...control.Pool) {
	row(w, "NAME", "ENDPOINTS", "MEMBERS", "STEERING", "MONITOR", "MINIMUM", "NEXT", "REVISION", "UPDATED")
	for _, p := range list {
		c, steering, monitor := p.Config, p.Config.Steering, ""
		if len(c.Members) > 0 {
			steering = c.PoolSteering
		}
		if c.Monitor != nil {
			monitor = c.Monitor.Type
		}
		row(w, c.Name, len(c.Endpoints), strings.Join(c.Members, " "), steering, monitor, bound(c.Minimum), c.Next, p.Revision, when(p.Updated))
	}
}

// A poolPage is a pool and how the edge sees it.
type poolPage struct {
	control.Pool
	Health *balance.PoolHealth `json:"health"` // null: this edge does not serve it
}

func poolInfo() *cobra.Command {
	return complete(showing(&cobra.Command{Use: "info NAME", Short: "Show a pool with its endpoints, and how this edge sees them", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, c *admin.Client, args []string) (poolPage, error) {
			p, err := c.Pool(ctx, args[0])
			if err != nil {
				return poolPage{}, err
			}
			page := poolPage{Pool: p}
			if h, err := c.PoolHealth(ctx, args[0]); err == nil && len(h) == 1 {
				page.Health = &h[0]
			}
			return page, nil
		}, func(w io.Writer, p poolPage) {
			poolTable(w, p.Pool)
			fmt.Fprintln(w)
			if p.Health == nil {
				fmt.Fprintln(w, "this edge does not serve the pool; 'status' shows faults")
				return
			}
			healthTable(w, *p.Health)
		}), poolNames)
}

func healthTable(w io.Writer, pools ...balance.PoolHealth) {
	row(w, "POOL", "HEALTHY", "ENDPOINT", "ADDRESS", "VNET", "STATE", "WEIGHT", "DRAIN", "REQUESTS", "CONNECTIONS", "RTT", "SINCE", "REASON")
	for _, p := range pools {
		healthy := map[bool]string{true: "yes", false: "no"}[p.Healthy]
		if len(p.Endpoints) == 0 {
			row(w, p.Name, healthy, strings.Join(p.Members, " "), "", "", "", "", "", "", "", "", "", "")
		}
		for _, e := range p.Endpoints {
			rtt := ""
			if e.RTT != 0 {
				rtt = e.RTT.String()
			}
			row(w, p.Name, healthy, e.Name, e.Addr, e.VNet, e.State, e.Weight, mark(e.Drain), e.Requests, e.Connections, rtt, when(e.Since), e.Reason)
		}
	}
}

func poolEndpoint() *cobra.Command {
	cmd := &cobra.Command{Use: "endpoint", Short: "Endpoints of a pool: enable, disable, drain, weigh"}
	cmd.AddCommand(
		endpointCommand("enable", "Let an endpoint take visitors, new ones too", 2, func([]string) (control.EndpointChange, error) {
			return control.EndpointChange{Disabled: new(false), Drain: new(false)}, nil
		}),
		endpointCommand("disable", "Take an endpoint out at once; what is in flight ends in peace", 2, func([]string) (control.EndpointChange, error) {
			return control.EndpointChange{Disabled: new(true)}, nil
		}),
		endpointCommand("drain", "Send an endpoint no new visitors, only those whom affinity keeps there", 2, func([]string) (control.EndpointChange, error) {
			return control.EndpointChange{Drain: new(true)}, nil
		}),
		endpointCommand("weight", "Set the share of an endpoint, 0 to 1", 3, func(args []string) (control.EndpointChange, error) {
			w, err := parseWeight(args[2])
			if err != nil {
				return control.EndpointChange{}, cli.UsageError("%w", err)
			}
			return control.EndpointChange{Weight: &w}, nil
		}),
	)
	return cmd
}

func endpointCommand(verb, short string, args int, change func(args []string) (control.EndpointChange, error)) *cobra.Command {
	cmd := &cobra.Command{
		Use:     verb + " POOL ENDPOINT" + ifTrue(args == 3, " WEIGHT"),
		Short:   short,
		Long:    short + ". It holds on every edge within a second.",
		Example: "  keyhaven-edge pool endpoint " + verb + " web 10.0.0.5:8080" + ifTrue(args == 3, " 0.5"),
		Args:    cobra.ExactArgs(args),
	}
	return doing(complete(cmd, poolNames, endpointNames), func(ctx context.Context, c *admin.Client, args []string) (control.Pool, error) {
		in, err := change(args)
		if err != nil {
			return control.Pool{}, err
		}
		return c.SetEndpoint(ctx, args[0], args[1], in)
	}, func(_ control.Pool, args []string) string {
		return fmt.Sprintf("endpoint %s of pool %q: %s", args[1], args[0], strings.Join(append([]string{verb}, args[2:]...), " "))
	})
}
