package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
)

// WithOutput adds --output to a command that shows something with [Show].
func WithOutput(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringP("output", "o", "table", "table, json or yaml")
	inner := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch o := cmd.Flag("output").Value.String(); o {
		case "table", "json", "yaml":
			return inner(cmd, args)
		default:
			return UsageError("--output %q: use table, json or yaml", o)
		}
	}
	return cmd
}

// Show prints v to the command's standard output in the form that --output says. The table, for people, is printed by
// table; columns are separated by tabs.
func Show(cmd *cobra.Command, v any, table func(w io.Writer)) error {
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

// toYAML encodes v with the names and the order that it has in JSON, which YAML contains.
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

// blockStyle takes away the braces and quotes that the nodes bring from JSON, but for the quotes that YAML needs.
func blockStyle(n *yaml.Node) {
	n.Style = 0
	if n.Kind == yaml.ScalarNode && n.Tag == "!!str" {
		n.SetString(n.Value)
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}
