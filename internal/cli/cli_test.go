package cli

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func program(run func(*cobra.Command, []string) error) *cobra.Command {
	root := New("prog", "a program")
	group := &cobra.Command{Use: "group", Short: "a group"}
	leaf := &cobra.Command{Use: "leaf", Short: "a leaf", RunE: run}
	leaf.Flags().String("need", "", "a flag")
	leaf.MarkFlagRequired("need")
	group.AddCommand(leaf)
	root.AddCommand(group)
	root.SetOut(new(bytes.Buffer))
	return root
}

func TestExecute(t *testing.T) {
	fail := errors.New("broken")
	tests := []struct {
		name string
		args []string
		err  error
		code int
		want string
	}{
		{"fine", []string{"group", "leaf", "--need=x"}, nil, ExitOK, ""},
		{"run time", []string{"group", "leaf", "--need=x"}, fail, ExitRuntime, "prog: broken\n"},
		{"configuration", []string{"group", "leaf", "--need=x"}, ConfigError(fail), ExitConfig, "prog: broken\n"},
		{"usage", []string{"group", "leaf", "--need=x"}, UsageError("no"), ExitUsage, "Run 'prog group leaf --help'"},
		{"unknown flag", []string{"group", "leaf", "--other"}, nil, ExitUsage, "unknown flag"},
		{"missing flag", []string{"group", "leaf"}, nil, ExitUsage, "need"},
		{"argument", []string{"group", "leaf", "--need=x", "y"}, nil, ExitUsage, "y"},
		{"unknown command", []string{"other"}, nil, ExitUsage, "other"},
		{"unknown subcommand", []string{"group", "other"}, nil, ExitUsage, "other"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := program(func(*cobra.Command, []string) error { return tt.err })
			root.SetArgs(tt.args)
			var stderr bytes.Buffer
			if code := Execute(context.Background(), root, &stderr); code != tt.code {
				t.Errorf("got code %d, want %d: %s", code, tt.code, stderr.String())
			}
			if !strings.Contains(stderr.String(), tt.want) {
				t.Errorf("got %q, want it to contain %q", stderr.String(), tt.want)
			}
		})
	}
}

// An error that the output has said is not said again.
func TestQuiet(t *testing.T) {
	root := program(func(*cobra.Command, []string) error { return Quiet(errors.New("refused")) })
	root.SetArgs([]string{"group", "leaf", "--need=x"})
	var stderr bytes.Buffer
	if code := Execute(context.Background(), root, &stderr); code != ExitRuntime || stderr.Len() > 0 {
		t.Errorf("got code %d and %q, want %d and nothing", code, stderr.String(), ExitRuntime)
	}
}

func TestLogger(t *testing.T) {
	for _, tt := range []struct {
		args []string
		ok   bool
	}{{nil, true}, {[]string{"--log-level=debug", "--log-format=json"}, true}, {[]string{"--log-level=loud"}, false}, {[]string{"--log-format=xml"}, false}} {
		root := program(func(cmd *cobra.Command, _ []string) error { _, err := Logger(cmd); return err })
		root.SetArgs(append([]string{"group", "leaf", "--need=x"}, tt.args...))
		var stderr bytes.Buffer
		if got := Execute(context.Background(), root, &stderr) == ExitOK; got != tt.ok {
			t.Errorf("%v: got ok %v, want %v: %s", tt.args, got, tt.ok, stderr.String())
		}
	}
}
