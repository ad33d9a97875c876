package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
)

// whereFlags adds the flags that say which edge is asked.
func whereFlags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.String("socket", "", "administration socket of the running edge (default $"+envPrefix+"_SOCKET, or "+defaultSocket+")")
	f.String("server", "", "ask the edge at https://host:port, its admin.listen, instead (default $"+envPrefix+"_SERVER)")
	f.String("identity", "", "with --server: directory of the operator's identity (default $"+envPrefix+"_OPERATOR)")
}

// client returns a client of the edge that the flags or the environment name.
func client(cmd *cobra.Command) (*admin.Client, error) {
	given := func(flag, env string) string {
		if v, _ := cmd.Flags().GetString(flag); v != "" { // a flag of the root
			return v
		}
		return os.Getenv(envPrefix + "_" + env)
	}
	socket, _ := cmd.Flags().GetString("socket")
	server := given("server", "SERVER")
	if server == "" || socket != "" {
		if cmd.Flags().Changed("server") {
			return nil, cli.UsageError("--socket and --server name two ways to the edge; give one")
		}
		if socket = given("socket", "SOCKET"); socket == "" {
			socket = defaultSocket
		}
		return admin.NewClient(socket), nil
	}
	dir := given("identity", "OPERATOR")
	if dir == "" {
		return nil, cli.UsageError("--server takes --identity DIR, with what 'ca issue operator' made")
	}
	id, err := mtls.OpenDir(dir, nil)
	if err != nil {
		return nil, cli.ConfigError(err)
	}
	c, err := admin.NewRemote(server, id)
	return c, cli.ConfigError(err)
}

// asked runs f with a client and gives its error the exit code that it deserves.
func asked(cmd *cobra.Command, f func(*admin.Client) error) error {
	c, err := client(cmd)
	if err != nil {
		return err
	}
	defer c.Close()
	err = f(c)
	if errors.Is(err, control.ErrInvalid) {
		return cli.UsageError("%w", err)
	}
	return err
}

// showing makes cmd show what ask returns, in a table or as the edge sent it.
func showing[T any](cmd *cobra.Command, ask func(ctx context.Context, c *admin.Client, args []string) (T, error), table func(w io.Writer, v T)) *cobra.Command {
	if cmd.Args == nil {
		cmd.Args = cobra.NoArgs
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return asked(cmd, func(c *admin.Client) error {
			v, err := ask(cmd.Context(), c, args)
			if err != nil {
				return err
			}
			return cli.Show(cmd, v, func(w io.Writer) { table(w, v) })
		})
	}
	return cli.WithOutput(cmd)
}

// doing makes cmd change something and say so in one line, or with --output show what do returns.
func doing[T any](cmd *cobra.Command, do func(ctx context.Context, c *admin.Client, args []string) (T, error), say func(v T, args []string) string) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return asked(cmd, func(c *admin.Client) error {
			v, err := do(cmd.Context(), c, args)
			if err != nil {
				return err
			}
			return cli.Show(cmd, v, func(w io.Writer) { fmt.Fprintln(w, say(v, args)) })
		})
	}
	return cli.WithOutput(cmd)
}

// deleting makes cmd delete what its argument names.
func deleting(what string, remove func(ctx context.Context, c *admin.Client, name string) error) *cobra.Command {
	return &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a " + what,
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return asked(cmd, func(c *admin.Client) error {
				if err := remove(cmd.Context(), c, args[0]); err != nil {
					return err
				}
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s %q deleted\n", what, args[0])
				return err
			})
		},
	}
}

// readConfig reads one pool, port or zone from a file, YAML or JSON with the names of the API; - is standard input.
func readConfig(cmd *cobra.Command, path string, dst any) error {
	b, err := readFile(cmd, path)
	if err != nil {
		return cli.ConfigError(err)
	}
	var doc any
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return cli.ConfigError(fmt.Errorf("%s: %w", path, err))
	}
	j, err := json.Marshal(doc)
	if err != nil {
		return cli.ConfigError(fmt.Errorf("%s: %w", path, err))
	}
	dec := json.NewDecoder(bytes.NewReader(j))
	dec.DisallowUnknownFields()
	if err := dec.Decode(dst); err != nil {
		return cli.ConfigError(fmt.Errorf("%s: %s", path, strings.TrimPrefix(err.Error(), "json: ")))
	}
	return nil
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

// bound prints a bound, of which zero is none.
func bound(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

func ifTrue(b bool, s string) string {
	if b {
		return s
	}
	return ""
}
