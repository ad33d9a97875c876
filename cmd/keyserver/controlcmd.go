package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

// maxReply bounds the answer of a server, in bytes.
const maxReply = 64 << 20

func controlFlag(cmd *cobra.Command) {
	cmd.Flags().String("control", "", "control socket of the running server, in place of the configuration's control")
}

// controlPath is the socket that the command line or the configuration names. Nothing else of the configuration needs to be right.
func controlPath(cmd *cobra.Command) (string, error) {
	if path := cmd.Flag("control").Value.String(); path != "" {
		return path, nil
	}
	name := cmd.Flag("config").Value.String()
	cfg, file, err := read(loadOptions{path: name})
	switch {
	case file == nil || cfg.Control == "" && err != nil:
		return "", cli.ConfigError(fmt.Errorf("%w (--control names the socket without a configuration)", err))
	case cfg.Control == "":
		return "", cli.ConfigError(fmt.Errorf("%s names no control socket; add control: /run/keyhaven-keyserver/control.sock and restart the server", name))
	}
	return cfg.Control, nil
}

// call asks the running server.
func call(cmd *cobra.Command, method, path string, in, out any) error {
	socket, err := controlPath(cmd)
	if err != nil {
		return err
	}
	return callAt(cmd.Context(), socket, method, path, in, out)
}

// callAt asks the server that has the socket.
func callAt(ctx context.Context, socket, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, controlTimeout+10*time.Second)
	defer cancel()
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives: true,
	}
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+controlHost+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return unreachable(socket, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return fmt.Errorf("read the answer of the server on %s: %w", socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		var e controlError
		if json.Unmarshal(b, &e) != nil || e.Error == "" {
			e.Error = "the server answered with status " + resp.Status
		}
		return errors.New(e.Error)
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("the server on %s answered what this version does not understand: %w", socket, err)
	}
	return nil
}

func unreachable(socket string, err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no server answers on %s; start it with 'keyhaven-keyserver run', or name its socket with --control: %w", socket, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("this user may not use %s; use root, or the user that the server runs as: %w", socket, err)
	}
	return fmt.Errorf("ask the server on %s: %w", socket, err)
}

// online adds what commands have that ask a running server.
func online(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringP("config", "c", defaultConfig, "configuration whose control socket is used")
	controlFlag(cmd)
	return cli.WithOutput(cmd)
}

func newStatus() *cobra.Command {
	return online(&cobra.Command{
		Use:   "status",
		Short: "Show how the running server is: homes, workers, keys, audit",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var st status
			if err := call(cmd, http.MethodGet, "/v1/status", nil, &st); err != nil {
				return err
			}
			return cli.Show(cmd, st, st.table)
		},
	})
}

func newToken() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Tokens of the running server: list, try again"}
	list := online(&cobra.Command{
		Use:   "list",
		Short: "List the homes of keys with their worker processes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var st status
			if err := call(cmd, http.MethodGet, "/v1/status", nil, &st); err != nil {
				return err
			}
			return cli.Show(cmd, st.Homes, st.homesTable)
		},
	})
	retry := online(&cobra.Command{
		Use:   "retry NAME",
		Short: "Open a token again, after its PIN or module was put right; the PIN is tried once",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var st status
			if err := call(cmd, http.MethodPost, "/v1/tokens/retry", retryRequest{args[0]}, &st); err != nil {
				return err
			}
			return cli.Show(cmd, st.Homes, st.homesTable)
		},
	})
	cmd.AddCommand(list, retry)
	return cmd
}

func newReload() *cobra.Command {
	return online(&cobra.Command{
		Use:   "reload",
		Short: "Have the running server read its configuration again, and show what it found",
		Long: `Reload does what SIGHUP does, and waits for it. A configuration that is wrong is refused as a whole (exit code 3). A home that does
not work, such as a token whose PIN is wrong, is shown (exit code 1) while everything else of the new configuration is in place.
What matches nothing, such as a rule for a key that no home holds, is a warning.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var r reloadReport
			if err := call(cmd, http.MethodPost, "/v1/reload", struct{}{}, &r); err != nil {
				return err
			}
			if err := cli.Show(cmd, r, r.table); err != nil {
				return err
			}
			switch {
			case !r.Taken:
				return cli.ConfigError(errors.New("the new configuration was refused; the old one goes on"))
			case len(r.Faults) > 0:
				return cli.Quiet(errors.New("not everything works"))
			}
			return nil
		},
	})
}

func (r reloadReport) table(w io.Writer) {
	word := "taken"
	if !r.Taken {
		word = "refused"
	}
	fmt.Fprintf(w, "configuration %s in %v\n", word, r.Took.Round(time.Millisecond))
	for _, line := range append(r.Errors, r.Faults...) {
		fmt.Fprintln(w, line)
	}
	for _, line := range r.Warnings {
		fmt.Fprintln(w, "warning:", line)
	}
}

func (s status) table(w io.Writer) {
	ready := "ready"
	if !s.Ready {
		ready = "not ready"
	}
	fmt.Fprintf(w, "%s\t%s\tup %v\t%s\n", s.Identity, ready, time.Since(s.Started).Round(time.Second), s.Version)
	for _, line := range s.Reasons {
		fmt.Fprintf(w, "\tfails: %s\n", line)
	}
	for _, line := range s.Degraded {
		fmt.Fprintf(w, "\tdegraded: %s\n", line)
	}
	fmt.Fprintf(w, "policy\t%d rules for %d clients\n", s.Policy.Rules, s.Policy.Clients)
	if a := s.Audit; a != nil {
		fmt.Fprintf(w, "audit\t%s in %s, %d records, %d lost, up to line %d, checkpoint of line %d\t%s\n", a.Mode, a.Dir, a.Records, a.Lost, a.Last, a.Covered,
			strings.Trim(a.Error+" "+a.CheckpointErr, " "))
	}
	if r := s.Reload; r != nil {
		fmt.Fprintf(w, "reload\t%s, taken: %s, faults: %d\n", r.At.UTC().Format(time.RFC3339), yesNo(r.Taken), len(r.Faults))
	}
	fmt.Fprintln(w)
	s.homesTable(w)
	fmt.Fprintln(w, "\nKEY\tTYPE\tLABELS\tHOME\tSIGNS\tPROBED\tERROR")
	for _, k := range s.Keys {
		for _, h := range k.Homes {
			at := "not yet"
			if !h.At.IsZero() {
				at = time.Since(h.At).Round(time.Second).String() + " ago"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", k.SKI, k.Type, strings.Join(k.Labels, " "), h.Home, yesNo(h.OK), at, h.Error)
		}
	}
}

func (s status) homesTable(w io.Writer) {
	fmt.Fprintln(w, "HOME\tKIND\tSTATE\tKEYS\tBREAKER\tIN FLIGHT\tWAITING\tWORKERS\tRESTARTS\tERROR")
	for _, h := range s.Homes {
		breaker, inFlight, waiting := "-", 0, 0
		if h.Lane != nil {
			breaker, inFlight, waiting = h.Lane.Breaker, h.Lane.InFlight, h.Lane.Waiting
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%d\t%d\t%d\t%d\t%s\n", h.Name, h.Kind, h.State, h.Keys, breaker, inFlight, waiting, len(h.Workers), h.Restarts, h.Error)
		for _, fault := range h.Faults {
			fmt.Fprintf(w, "  a key\t\tnot served\t\t\t\t\t\t\t%s\n", fault)
		}
		for _, p := range h.Workers {
			fmt.Fprintf(w, "  pid %d\tworker\t%s\t\t\t%d\t\t\t%d\t%s\n", p.PID, p.State, p.InFlight, p.Restarts, p.LastError)
		}
	}
}
