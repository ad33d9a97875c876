package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

// client returns a client of the edge that --socket or the environment names.
func client(cmd *cobra.Command) *admin.Client {
	path, _ := cmd.Flags().GetString("socket") // a flag of the root
	if path == "" {
		path = os.Getenv(envPrefix + "_SOCKET")
	}
	if path == "" {
		path = defaultSocket
	}
	return admin.NewClient(path)
}

// asked runs f with a client and gives its error the exit code that it deserves.
func asked(cmd *cobra.Command, f func(*admin.Client) error) error {
	c := client(cmd)
	defer c.Close()
	err := f(c)
	if errors.Is(err, control.ErrInvalid) {
		return cli.UsageError("%w", err)
	}
	return err
}

// withOutput adds --output to a command that shows something.
func withOutput(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringP("output", "o", "table", "table, json or yaml")
	inner := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch o := cmd.Flag("output").Value.String(); o {
		case "table", "json", "yaml":
			return inner(cmd, args)
		default:
			return cli.UsageError("--output %q: use table, json or yaml", o)
		}
	}
	return cmd
}

// show prints v as --output says; table prints it for people.
func show(cmd *cobra.Command, v any, table func(w io.Writer)) error {
	out := cmd.OutOrStdout()
	switch cmd.Flag("output").Value.String() {
	case "json":
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(out, "%s\n", b)
		return err
	case "yaml":
		b, err := toYAML(v)
		if err != nil {
			return err
		}
		_, err = out.Write(b)
		return err
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	table(w)
	return w.Flush()
}

// toYAML encodes v with the names and the order that it has in JSON, of which YAML is a superset.
func toYAML(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return nil, err
	}
	blockStyle(&n)
	return yaml.Marshal(&n)
}

func blockStyle(n *yaml.Node) {
	if n.Kind != yaml.ScalarNode {
		n.Style = 0
	} else if n.Tag == "!!str" {
		n.Style = 0
		n.SetString(n.Value)
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// row prints the cells of a line of a table.
func row(w io.Writer, cells ...any) {
	parts := make([]string, len(cells))
	for i, c := range cells {
		if parts[i] = strings.TrimSpace(fmt.Sprint(c)); parts[i] == "" {
			parts[i] = "-"
		}
	}
	fmt.Fprintln(w, strings.Join(parts, "\t"))
}

// when prints a time, or nothing for the zero time.
func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

func mark(b bool) string {
	if b {
		return "yes"
	}
	return ""
}
