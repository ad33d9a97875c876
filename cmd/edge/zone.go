package main

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func newZone() *cobra.Command {
	cmd := &cobra.Command{Use: "zone", Short: "Zones: host names with a certificate and the origins that answer for them"}
	cmd.AddCommand(zoneAdd(), zoneSet(), zoneList(), zoneInfo(),
		complete(deleting("zone", func(ctx context.Context, c *admin.Client, name string) error { return c.DeleteZone(ctx, name) }), zoneNames))
	return cmd
}

// zoneFlags adds the flags of a zone, and returns how to lay those that are given over z.
func zoneFlags(cmd *cobra.Command) func(z *zone.Config) error {
	var given zone.Config
	var origin zone.Origin
	var file, certificate string
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "file with the whole zone, YAML or JSON; - is standard input")
	f.StringSliceVar(&given.Hosts, "hostname", nil, "host names, exact or *.NAME")
	f.StringVar(&certificate, "certificate", "", "PEM file with the certificate chain, leaf first; its contents go to all edges")
	f.StringVar(&given.KeyServer, "key-server", "", "key server group of the edges' configuration that holds the key")
	f.StringVar(&origin.URL, "origin", "", "http://host:port or https://host:port that answers for every path")
	f.StringVar(&origin.VNet, "vnet", "", "virtual network of --origin (default the default network)")
	f.StringVar(&origin.Pool, "pool", "", "pool, in place of --origin")
	f.StringVar(&origin.Tunnel, "tunnel", "", "tunnel whose ingress answers, in place of --origin")
	f.Uint64Var(&given.KeyEpoch, "key-epoch", 0, "raise it to make earlier session tickets worthless")
	completeFlag(cmd, "vnet", vnetNames)
	completeFlag(cmd, "pool", poolNames)
	completeFlag(cmd, "tunnel", tunnelNames)
	return func(z *zone.Config) error {
		if file != "" {
			whole := zone.Config{}
			if err := readConfig(cmd, file, &whole); err != nil {
				return err
			}
			if whole.Name != "" && whole.Name != z.Name {
				return cli.UsageError("%s is about the zone %q, not %q", file, whole.Name, z.Name)
			}
			whole.Name = z.Name
			*z = whole
		}
		if certificate == "" {
			certificate, z.Certificate = z.Certificate, "" // of the file: read here, since the edges do not have it
		}
		if certificate != "" {
			chain, err := readChain(cmd, certificate)
			if err != nil {
				return err
			}
			z.CertificatePEM = chain
		}
		for i := range z.Origins { // likewise
			if t := &z.Origins[i].TLS; t.CA != "" {
				roots, err := readChain(cmd, t.CA)
				if err != nil {
					return err
				}
				t.CA, t.CAPEM = "", roots
			}
		}
		overlay(cmd, "hostname", &z.Hosts, given.Hosts)
		overlay(cmd, "key-server", &z.KeyServer, given.KeyServer)
		overlay(cmd, "key-epoch", &z.KeyEpoch, given.KeyEpoch)
		if f.Changed("origin") || f.Changed("pool") || f.Changed("tunnel") {
			z.Origins = []zone.Origin{origin}
		}
		return nil
	}
}

// readChain reads a file of certificates. One with anything else in it, such as a private key, is not sent anywhere.
func readChain(cmd *cobra.Command, path string) (string, error) {
	b, err := readFile(cmd, path)
	if err != nil {
		return "", cli.ConfigError(err)
	}
	var chain strings.Builder
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return "", cli.ConfigError(fmt.Errorf("%s holds a %q beside certificates; private keys stay with the key server: give a file with the chain alone", path, block.Type))
		}
		if err := pem.Encode(&chain, &pem.Block{Type: block.Type, Bytes: block.Bytes}); err != nil {
			return "", err
		}
	}
	if chain.Len() == 0 {
		return "", cli.ConfigError(fmt.Errorf("%s holds no certificate in PEM", path))
	}
	return chain.String(), nil
}

func zoneAdd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Add a zone to every edge",
		Example: "  keyhaven-edge zone add www --hostname www.example.com --certificate www.pem --key-server hsm --pool web\n" +
			"  keyhaven-edge zone add www --file www.yaml",
		Args: cobra.ExactArgs(1),
	}
	lay := zoneFlags(cmd)
	return doing(complete(cmd, words()), func(ctx context.Context, c *admin.Client, args []string) (control.Zone, error) {
		z := zone.Config{Name: args[0]}
		if err := lay(&z); err != nil {
			return control.Zone{}, err
		}
		return c.CreateZone(ctx, z)
	}, func(z control.Zone, _ []string) string {
		return fmt.Sprintf("zone %q added for %s", z.Config.Name, strings.Join(z.Config.Hosts, ", "))
	})
}

func zoneSet() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "set NAME",
		Short:   "Change a zone: what is not given stays",
		Example: "  keyhaven-edge zone set www --certificate renewed.pem",
		Args:    cobra.ExactArgs(1),
	}
	lay := zoneFlags(cmd)
	return doing(complete(cmd, zoneNames), func(ctx context.Context, c *admin.Client, args []string) (control.Zone, error) {
		old, err := c.Zone(ctx, args[0])
		if err != nil {
			return old, err
		}
		if err := lay(&old.Config); err != nil {
			return old, err
		}
		return c.SetZone(ctx, old.Config, old.Revision)
	}, func(z control.Zone, _ []string) string { return fmt.Sprintf("zone %q changed", z.Config.Name) })
}

func zoneList() *cobra.Command {
	return showing(&cobra.Command{Use: "list", Short: "List the zones of the store; those of configuration files are not among them"},
		func(ctx context.Context, c *admin.Client, _ []string) ([]control.Zone, error) { return c.Zones(ctx) },
		func(w io.Writer, list []control.Zone) { zoneTable(w, list...) })
}

func zoneInfo() *cobra.Command {
	return complete(showing(&cobra.Command{Use: "info NAME", Short: "Show a zone of the store with its origins", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, c *admin.Client, args []string) (control.Zone, error) {
			return c.Zone(ctx, args[0])
		},
		func(w io.Writer, z control.Zone) {
			zoneTable(w, z)
			fmt.Fprintln(w)
			row(w, "PATH", "LEADS TO", "VNET")
			for _, o := range z.Config.Origins {
				row(w, ifTrue(o.Path == "", "/")+o.Path, originTarget(o), o.VNet)
			}
		}), zoneNames)
}

func originTarget(o zone.Origin) string {
	switch {
	case o.Pool != "":
		return "pool " + o.Pool
	case o.Tunnel != "":
		return "tunnel " + o.Tunnel
	}
	return o.URL
}

func zoneTable(w io.Writer, list ...control.Zone) {
	row(w, "NAME", "HOSTS", "KEY SERVER", "ORIGINS", "REVISION", "UPDATED")
	for _, z := range list {
		row(w, z.Config.Name, strings.Join(z.Config.Hosts, " "), z.Config.KeyServer, len(z.Config.Origins), z.Revision, when(z.Updated))
	}
}
