package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/state"
)

const (
	// importOps and importBytes bound one transaction of an import: etcd's limits are 128 operations and 1.5 MiB.
	importOps   = 100
	importBytes = 512 << 10
)

func newState() *cobra.Command {
	cmd := &cobra.Command{Use: "state", Short: "The state: where routes, connectors and ticket keys are kept"}
	cmd.AddCommand(newStateImport())
	return cmd
}

func newStateImport() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Copy the state of a file, as one edge keeps it, into the etcd cluster of the configuration",
		Long: `Import copies the virtual networks, tunnels, connectors, routes, records, join tokens and ticket keys of a state file, the
state.file of an edge that is stopped, into the cluster under state.etcd, so that one edge can become several and no connector
has to be enrolled anew. The cluster must hold nothing of an installation yet: import before the first edge starts on it. The
file is left as it is. An import that was broken off is finished by another one.`,
		Example: "  keyhaven-edge state import /var/lib/keyhaven/edge.db",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			log, err := cli.Logger(cmd)
			if err != nil {
				return err
			}
			cfg, _, err := load(path)
			if err != nil {
				return cli.ConfigError(err)
			}
			if !cfg.State.shared() {
				return cli.ConfigError(fmt.Errorf("%s names no cluster; write state.etcd in place of state.file first", path))
			}
			if _, err := os.Stat(args[0]); err != nil { // else an empty one would be made
				return cli.ConfigError(fmt.Errorf("the state file: %w", err))
			}
			from, err := state.OpenBolt(args[0])
			if errors.Is(err, state.ErrInUse) {
				return fmt.Errorf("%w; stop the edge that has it open", err)
			}
			if err != nil {
				return err
			}
			cfg.State.Etcd.Cache = "" // the cluster itself is asked
			to, err := cfg.State.open(log)
			if err != nil {
				return errors.Join(err, from.Close())
			}
			n, err := importState(cmd.Context(), from, to)
			if err := errors.Join(err, to.Close(), from.Close()); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%d entries of %s are in the cluster; the edge can be started on it\n", n, args[0])
			return nil
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfig, "configuration file")
	return cmd
}

// importState copies all entries, and returns how many to has of them. What to holds already must be equal.
func importState(ctx context.Context, from, to state.Store) (int, error) {
	entries, _, err := from.List(ctx, "")
	if err != nil {
		return 0, err
	}
	there, _, err := to.List(ctx, "")
	if err != nil {
		return 0, err
	}
	held := map[string][]byte{}
	for _, e := range there {
		held[e.Key] = e.Value
	}
	var missing []state.Entry
	for _, e := range entries {
		value, ok := held[e.Key]
		if !ok {
			missing = append(missing, e)
		} else if bytes.Equal(value, e.Value) {
			delete(held, e.Key)
		}
	}
	if len(held) > 0 {
		return 0, fmt.Errorf("the cluster holds an installation already, %d entries of which are not those of the file; "+
			"name another state.etcd.prefix, or an empty cluster", len(held))
	}
	for len(missing) > 0 {
		n, size := 0, 0
		var conds []state.Cond
		var ops []state.Op
		for ; n < min(len(missing), importOps) && (n == 0 || size+len(missing[n].Value) <= importBytes); n++ {
			size += len(missing[n].Value)
			conds = append(conds, state.Absent(missing[n].Key))
			ops = append(ops, state.Put(missing[n].Key, missing[n].Value))
		}
		if _, err := to.Txn(ctx, conds, ops); err != nil {
			return 0, fmt.Errorf("the import is not complete; repeat it: %w", err)
		}
		missing = missing[n:]
	}
	return len(entries), nil
}
