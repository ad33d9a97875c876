// Package cli gives the three programs one shape on the command line: the same logging flags, exit codes and way
// to say an error.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes, the same for every program. Scripts may rely on them.
const (
	ExitOK      = 0
	ExitRuntime = 1 // the work failed
	ExitUsage   = 2 // the command line is wrong
	ExitConfig  = 3 // a configuration, or a file that it names, is wrong
)

type exitError struct {
	code  int
	err   error
	quiet bool // the output has said it
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// UsageError makes an error that ends the program with [ExitUsage].
func UsageError(format string, args ...any) error {
	return &exitError{code: ExitUsage, err: fmt.Errorf(format, args...)}
}

// ConfigError marks err as a fault of the configuration, so that the program ends with [ExitConfig]. Nil stays nil.
func ConfigError(err error) error {
	if err == nil {
		return nil
	}
	return &exitError{code: ExitConfig, err: err}
}

// Quiet makes an error that ends the program with [ExitRuntime] and is not printed, because the command's output has said it.
func Quiet(err error) error {
	return &exitError{code: ExitRuntime, err: err, quiet: true}
}

// ExitCode returns the code that err ends a program with.
func ExitCode(err error) int {
	if err == nil {
		return ExitOK
	}
	if e, ok := errors.AsType[*exitError](err); ok {
		return e.code
	}
	return ExitRuntime
}

// New returns the root command of a program, with the flags that all programs share.
func New(use, short string) *cobra.Command {
	root := &cobra.Command{
		Use:           use,
		Short:         short,
		Version:       Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
	}
	root.PersistentFlags().String("log-level", "info", "least severe level that is logged: debug, info, warn or error")
	root.PersistentFlags().String("log-format", "text", "format of the log on standard error: text or json")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return UsageError("%w", err) })
	return root
}

// Execute runs root, prints its error, if any, to stderr, and returns the exit code.
func Execute(ctx context.Context, root *cobra.Command, stderr io.Writer) int {
	markUsage(root)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return ExitOK
	}
	// cobra reports an unknown command as a plain error, before any of ours runs.
	if cmd == root && strings.HasPrefix(err.Error(), "unknown command") {
		err = UsageError("%w", err)
	}
	if e, ok := errors.AsType[*exitError](err); ok && e.quiet {
		return e.code
	}
	fmt.Fprintf(stderr, "%s: %v\n", root.Name(), err)
	if ExitCode(err) == ExitUsage {
		fmt.Fprintf(stderr, "Run '%s --help' for usage.\n", cmd.CommandPath())
	}
	return ExitCode(err)
}

// markUsage makes wrong arguments and missing flags of every command usage errors.
func markUsage(cmd *cobra.Command) {
	if cmd.Args == nil && !cmd.HasSubCommands() {
		cmd.Args = cobra.NoArgs
	}
	if args := cmd.Args; args != nil {
		cmd.Args = func(c *cobra.Command, a []string) error {
			if err := args(c, a); err != nil {
				return UsageError("%w", err)
			}
			if err := c.ValidateRequiredFlags(); err != nil {
				return UsageError("%w", err)
			}
			return nil
		}
	}
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(c *cobra.Command, a []string) error {
			if len(a) > 0 {
				return UsageError("unknown command %q for %q", a[0], c.CommandPath())
			}
			return c.Help()
		}
	}
	for _, sub := range cmd.Commands() {
		markUsage(sub)
	}
}

// Logger returns the logger that the flags of cmd ask for. It writes to the command's standard error.
func Logger(cmd *cobra.Command) (*slog.Logger, error) {
	level, format := "info", "text"
	if f := cmd.Flag("log-level"); f != nil {
		level = f.Value.String()
	}
	if f := cmd.Flag("log-format"); f != nil {
		format = f.Value.String()
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, UsageError("--log-level %q: use debug, info, warn or error", level)
	}
	o := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), o)), nil
	}
	return nil, UsageError("--log-format %q: use text or json", format)
}

// SignalContext returns a context that SIGINT or SIGTERM cancels. A second signal ends the process at once, for an
// operator who will not wait for a drain.
func SignalContext() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-ch:
		case <-ctx.Done():
			return
		}
		// From here on the default action applies: the next signal kills.
		signal.Stop(ch)
		cancel()
	}()
	return ctx, func() {
		signal.Stop(ch)
		cancel()
		<-done
	}
}

// Hangups returns a channel that receives a value for each SIGHUP until ctx ends. Signals that arrive while one is
// pending are merged.
func Hangups(ctx context.Context) <-chan os.Signal {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGHUP)
	context.AfterFunc(ctx, func() { signal.Stop(ch) })
	return ch
}

// release is set by the linker: -ldflags "-X github.com/keyhaven/keyhaven/internal/cli.release=1.2.3".
var release string

// Version describes the build: release or revision, Go version and platform.
func Version() string {
	v := release
	if v == "" {
		v = "devel"
		if info, ok := debug.ReadBuildInfo(); ok {
			for _, s := range info.Settings {
				if s.Key == "vcs.revision" && len(s.Value) >= 12 {
					v += "-" + s.Value[:12]
				}
			}
		}
	}
	return fmt.Sprintf("%s (%s %s/%s)", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
