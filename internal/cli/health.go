package cli

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// healthTimeout bounds what health asks; /readyz answers within 5 s.
const healthTimeout = 8 * time.Second

// Health returns the command health, which asks the running program how it is and ends with [ExitOK] or [ExitRuntime]. The
// configuration names the listener for health and metrics, which listener reads; where it names none, ask asks another way. The
// configuration's secrets are not needed.
func Health(defaultConfig string, listener func(config string) (addr string, err error), ask func(cmd *cobra.Command, live bool) error) *cobra.Command {
	var path string
	var live bool
	cmd := &cobra.Command{
		Use:   "health",
		Short: "Ask the running program whether it does its work: exit code 0 if so, else 1",
		RunE: func(cmd *cobra.Command, _ []string) error {
			addr, err := listener(path)
			if err != nil {
				return ConfigError(err)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), healthTimeout)
			defer cancel()
			cmd.SetContext(ctx)
			if addr == "" {
				err = ask(cmd, live)
			} else {
				err = probe(ctx, addr, live)
			}
			if err == nil {
				fmt.Fprintln(cmd.OutOrStdout(), "ok")
			}
			return err
		},
	}
	cmd.Flags().StringVarP(&path, "config", "c", defaultConfig, "configuration of the running program")
	cmd.Flags().BoolVar(&live, "live", false, "ask only whether it answers: for those who would restart it, which helps nothing while others are away")
	return cmd
}

// probe asks the listener for health and metrics.
func probe(ctx context.Context, addr string, live bool) error {
	path := "/readyz"
	if live {
		path = "/healthz"
	}
	transport := &http.Transport{DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+onThisHost(addr)+path, nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("nobody answers where the configuration's ops.listen says: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s", strings.TrimSpace(string(b)))
	}
	return nil
}

// onThisHost is where to dial a listener: loopback, if it listens on all addresses.
func onThisHost(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	switch ip, err := netip.ParseAddr(host); {
	case host == "", err == nil && ip.IsUnspecified() && ip.Is4():
		host = "127.0.0.1"
	case err == nil && ip.IsUnspecified():
		host = "::1"
	}
	return net.JoinHostPort(host, port)
}
