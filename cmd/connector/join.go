package main

import (
	"bufio"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// maxToken bounds the text of a join token, in bytes.
	maxToken = 8 << 10
	// joinTimeout bounds the attempt at one edge.
	joinTimeout = 15 * time.Second
)

// byDefault is how join gets to an edge unless flags say otherwise.
var byDefault = transportConfig{Carrier: connector.CarrierAuto}

func joinCommand() *cobra.Command {
	var tokenFile, dir, name string
	way := byDefault
	cmd := &cobra.Command{
		Use:   "join --token-file FILE --dir DIR",
		Short: "Enrol this connector with a join token",
		Long: `Join makes a key, which never leaves this host, and has an edge named in the join token certify it. The token is
used up by that. It is read from a file, from standard input (--token-file -), or from a prompt on a terminal; it is not
taken as an argument, since other users of this host could read it there.

It goes over QUIC, or over TCP where UDP does not pass; --proxy names an HTTP proxy for TCP. These flags hold for joining alone:
say the same under transport in the configuration.`,
		Example: `  keyhaven-connector join --token-file site1.token --dir /var/lib/keyhaven-connector
  keyhaven-connector join --token-file site1.token --dir /var/lib/keyhaven-connector --proxy http://proxy.example.com:3128`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 { // not quoted back: it may be the token
				return cli.UsageError("join takes no argument; give the token with --token-file, where others cannot read it")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return cli.UsageError("--dir is missing: name the directory for the identity")
			}
			if err := way.checkFlags(); err != nil {
				return err
			}
			return join(cmd, tokenFile, dir, name, way)
		},
	}
	cmd.Flags().StringVar(&tokenFile, "token-file", "", `file with the join token, readable by its owner only; "-" is standard input`)
	cmd.Flags().StringVar(&dir, "dir", "", "directory for key and certificate; made if it is missing")
	cmd.Flags().StringVar(&name, "name", "", "name to propose for this connector (default: chosen by the edge)")
	cmd.Flags().StringVar(&way.Carrier, "carrier", way.Carrier, "what to join over: auto, quic or tcp")
	cmd.Flags().StringVar(&way.Proxy.URL, "proxy", "", "HTTP proxy for TCP, http://host:port or https://host:port")
	cmd.Flags().StringVar(&way.Proxy.User, "proxy-user", "", "user at the proxy")
	cmd.Flags().StringVar(&way.Proxy.PasswordFile, "proxy-password-file", "", "file with the password at the proxy, readable by its owner only")
	return cmd
}

// checkFlags is check for flags.
func (t *transportConfig) checkFlags() (err error) {
	names := map[string]string{"transport.carrier": "--carrier", "transport.proxy.url": "--proxy", "transport.proxy": "--proxy-user, --proxy-password-file"}
	t.check(func(key, format string, args ...any) {
		err = errors.Join(err, fmt.Errorf("%s: "+format, append([]any{names[key]}, args...)...))
	})
	if err != nil {
		return cli.UsageError("%v", err)
	}
	_, err = t.Proxy.password("--proxy-password-file")
	return err
}

func join(cmd *cobra.Command, tokenFile, dir, name string, way transportConfig) error {
	if err := prepare(dir); err != nil { // before the token is used up
		return err
	}
	text, err := readToken(cmd, tokenFile)
	if err != nil {
		return err
	}
	token, err := mtls.ParseJoinToken(strings.TrimSpace(text))
	if err != nil {
		return cli.ConfigError(fmt.Errorf("join token: %w; copy it whole, from khj1_ on", err))
	}
	key, csr, err := mtls.NewKeyCSR()
	if err != nil {
		return err
	}
	reply, edges, err := joinTo(cmd.Context(), token, key, csr, dir, name, way)
	if err != nil {
		return err
	}
	next := "keyhaven-connector run"
	if way != byDefault {
		next = "write the carrier and proxy under transport in the configuration too, then " + next
	}
	fmt.Fprintf(cmd.OutOrStdout(), "joined as %s, tunnel %s, edges %s\nidentity in %s; next: %s\n",
		reply.Identity, reply.Tunnel, strings.Join(edges, " "), dir, next)
	return nil
}

// joinTo has the token's edges certify the key, and writes the identity to dir with the list of edges.
func joinTo(ctx context.Context, token mtls.JoinToken, key crypto.Signer, csr []byte, dir, name string, way transportConfig) (tunnel.JoinReply, []string, error) {
	reply, err := enrol(ctx, token, csr, name, way)
	if err != nil {
		return reply, nil, err
	}
	if err := mtls.WriteIdentity(dir, key, reply.Chain, reply.Roots); err != nil {
		return reply, nil, fmt.Errorf("the edge enrolled %s and the token is used up, but: %w", reply.Identity, err)
	}
	edges := reply.Edges
	if len(edges) == 0 {
		edges = token.Edges
	}
	b, err := json.MarshalIndent(joined{Identity: reply.Identity.String(), Tunnel: reply.Tunnel, Edges: edges}, "", "  ")
	if err != nil {
		return reply, nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, joinedFile), append(b, '\n'), 0o600); err != nil {
		return reply, nil, fmt.Errorf("joined, but: %w; list the edges %v in the configuration", err, edges)
	}
	return reply, edges, nil
}

// prepare makes sure that an identity can be written to dir and that none is there.
func prepare(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return cli.ConfigError(fmt.Errorf("--dir: %w", err))
	}
	for _, f := range []string{"key.pem", "cert.pem", joinedFile} {
		switch _, err := os.Lstat(filepath.Join(dir, f)); {
		case err == nil:
			return cli.ConfigError(fmt.Errorf("--dir %s: holds %s already; name another directory, or move that identity away", dir, f))
		case !errors.Is(err, fs.ErrNotExist):
			return cli.ConfigError(fmt.Errorf("--dir: %w", err))
		}
	}
	probe, err := os.CreateTemp(dir, ".join-")
	if err != nil {
		return cli.ConfigError(fmt.Errorf("--dir: cannot write there: %w", err))
	}
	return errors.Join(probe.Close(), os.Remove(probe.Name()))
}

// readToken reads the token's text from where the flag says.
func readToken(cmd *cobra.Command, path string) (string, error) {
	var r io.Reader
	switch path {
	case "":
		return promptToken(cmd.Context(), cmd.ErrOrStderr())
	case "-":
		r = cmd.InOrStdin()
	default:
		f, err := os.Open(path)
		if err != nil {
			return "", cli.ConfigError(fmt.Errorf("--token-file: %w", err))
		}
		defer f.Close()
		if info, err := f.Stat(); err != nil {
			return "", cli.ConfigError(fmt.Errorf("--token-file: %w", err))
		} else if info.Mode().IsRegular() && info.Mode()&0o077 != 0 && runtime.GOOS != "windows" {
			return "", cli.ConfigError(fmt.Errorf("--token-file %s: others may read it; run chmod 600 %s", path, path))
		}
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, maxToken+1))
	if err != nil {
		return "", cli.ConfigError(fmt.Errorf("--token-file: %w", err))
	}
	if len(b) > maxToken {
		return "", cli.ConfigError(fmt.Errorf("--token-file: longer than %d bytes; is this the right file?", maxToken))
	}
	return string(b), nil
}

// promptToken asks on the controlling terminal, without echo.
func promptToken(ctx context.Context, w io.Writer) (string, error) {
	restore, err := noEcho(os.Stdin)
	if err != nil {
		return "", cli.UsageError("--token-file is missing and standard input is no terminal: name a file, or - for standard input")
	}
	defer fmt.Fprintln(w)
	defer restore()
	fmt.Fprint(w, "Join token: ")
	type answer struct {
		line string
		err  error
	}
	answers := make(chan answer, 1)
	go func() { // a read from a terminal cannot be interrupted: after a signal it goes with the process
		line, err := bufio.NewReader(io.LimitReader(os.Stdin, maxToken)).ReadString('\n')
		answers <- answer{line, err}
	}()
	select {
	case a := <-answers:
		if a.err != nil && a.line == "" {
			return "", fmt.Errorf("read join token: %w", a.err)
		}
		return a.line, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// enrol tries the token's edges in order. An edge's refusal is final; an edge that does not answer is not.
func enrol(ctx context.Context, token mtls.JoinToken, csr []byte, name string, way transportConfig) (tunnel.JoinReply, error) {
	via := tunnel.DialConfig{Proxy: way.Proxy.dialer()}
	if way.Carrier != connector.CarrierAuto {
		via.Carrier = tunnel.Carrier(way.Carrier)
	}
	var errs []error
	for _, edge := range token.Edges {
		tryCtx, cancel := context.WithTimeout(ctx, joinTimeout)
		via.Addr = edge
		reply, err := tunnel.JoinWith(tryCtx, via, token, csr, name)
		cancel()
		if err == nil {
			return reply, nil
		}
		err = fmt.Errorf("edge %s: %w%s", edge, err, advice(err))
		if r, ok := errors.AsType[*tunnel.RefusedError](err); ok && !r.Retriable() || ctx.Err() != nil {
			return tunnel.JoinReply{}, err
		}
		errs = append(errs, err)
	}
	return tunnel.JoinReply{}, errors.Join(errs...)
}

// advice returns the remedy for a failed join where the error does not say it.
func advice(err error) string {
	switch {
	case errors.Is(err, tunnel.ErrTokenUsed), errors.Is(err, tunnel.ErrTokenExpired), errors.Is(err, tunnel.ErrTokenUnknown):
		return " (make one with keyhaven-edge tunnel token create)"
	case errors.Is(err, tunnel.ErrNoAnswer), errors.Is(err, context.DeadlineExceeded):
		return " (the token is not used up; where this host gets out through a proxy alone, name it with --proxy)"
	}
	return ""
}
