package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// ownName is the contender that the ratios are about: ours with its defaults.
const ownName = "ours, auto"

// startOwn runs an edge and a connector with their defaults but for the carrier, and publishes the site's ports.
func (b *bench) startOwn(ctx context.Context, c *contender, public, private *testnet.Namespace, carrier string) error {
	file := func(name string) string { return filepath.Join(c.dir, name) }
	ap := netip.MustParseAddrPort(c.tcp)
	listen := netip.AddrPortFrom(c.link.public, ap.Port()+1).String()
	run := func(ns *testnet.Namespace, prog string, args ...string) error {
		cmd := ns.Command(ctx, filepath.Join(b.bin, prog), args...)
		cmd.Env = append(os.Environ(), "KEYHAVEN_EDGE_SOCKET="+file("edge.sock"))
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", prog, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	edge := func(args ...string) error { return run(public, "keyhaven-edge", args...) }
	configs := map[string]any{
		"edge.yaml": obj{
			"state": obj{"file": file("state.db")}, "admin": obj{"socket": file("edge.sock")},
			"identity": obj{"ca_dir": file("ca"), "dir": file("edge")},
			"tunnel":   obj{"listen": listen, "advertise": []string{listen}},
			"visitors": obj{"listen": obj{"tls": []string{netip.AddrPortFrom(ap.Addr(), ap.Port()+2).String()}}}, // must be; nobody visits
		},
		"connector.yaml": obj{
			"identity": obj{"dir": file("connector")}, "edges": []string{listen}, "transport": obj{"carrier": carrier},
			"allow": []obj{{"to": "127.0.0.1/32", "ports": []int{9000}}},
		},
	}
	for name, cfg := range configs {
		text, err := yaml.Marshal(cfg)
		if err != nil {
			return err
		}
		if err := os.WriteFile(file(name), text, 0o600); err != nil {
			return err
		}
	}
	if err := edge("ca", "init", "--ca-dir", file("ca"), "--trust-domain", "bench.keyhaven.test"); err != nil {
		return err
	}
	if err := edge("ca", "issue", "edge", "edge1", "--ca-dir", file("ca"), "--out", file("edge")); err != nil {
		return err
	}
	start := func(ns *testnet.Namespace, prog, config string) error {
		return c.spawn(ns.Command(ctx, filepath.Join(b.bin, prog), "run", "--config", file(config)))
	}
	if err := start(public, "keyhaven-edge", "edge.yaml"); err != nil {
		return err
	}
	if err := c.until(ctx, func() error { return edge("status") }); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"tunnel", "create", "site"},
		{"route", "add", "127.0.0.1/32", "--tunnel", "site"},
		{"tunnel", "token", "create", "site", "--out", file("token")},
	} {
		if err := edge(args...); err != nil {
			return err
		}
	}
	if err := run(private, "keyhaven-connector", "join", "--token-file", file("token"), "--dir", file("connector"), "--name", "site"); err != nil {
		return err
	}
	if err := start(private, "keyhaven-connector", "connector.yaml"); err != nil {
		return err
	}
	for _, protocol := range []string{"tcp", "udp"} {
		if err := edge("port", "add", protocol, "--protocol", protocol, "--listen", c.tcp, "--to", "127.0.0.1:9000", "--allow", "127.0.0.0/8"); err != nil {
			return err
		}
	}
	return nil
}
