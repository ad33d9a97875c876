package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

var errChecks = errors.New("the installation does not do what it should")

func report(what string, err error) {
	if err != nil {
		fmt.Printf("FAILED  %s: %v\n", what, err)
		return
	}
	fmt.Printf("ok      %s\n", what)
}

// check looks at the running installation from outside. Each check prints one line.
func (d *demo) check(ctx context.Context) error {
	failed := 0
	for _, c := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"the keys were made inside the token and cannot leave it", d.keysStay},
		{"curl, TLS 1.3, ECDSA P-256 key in the token", d.fetches(ecHost, "--tlsv1.3", "ecdsa_secp256r1_sha256")},
		{"curl, TLS 1.2, ECDSA P-256 key in the token", d.fetches(ecHost, "--tls-max 1.2", "ecdsa_secp256r1_sha256")},
		{"curl, TLS 1.3, RSA-2048 key in the token", d.fetches(rsaHost, "--tlsv1.3", "rsa_pss_rsae_sha256")},
		{"curl, TLS 1.2, RSA-2048 key in the token", d.fetches(rsaHost, "--tls-max 1.2", "rsa_pss_rsae_sha256")},
		{"a returning visitor costs no signature", d.resumes},
		{"an unknown host name is refused, without a certificate", d.unknownName},
		{"the private network cannot be reached without the tunnel", d.outOfReach},
		{"a worker process killed with kill -9 costs no visitor anything", d.workersKilled},
		{"the audit log is whole, and shows where a copy was altered", d.auditHolds},
		{"a killed key server fails new visitors fast, and heals", d.keyServerAway},
		{"a connector killed with kill -9 costs no visitor anything", d.connectorKilled},
		{"an edge killed with kill -9 turns no visitor away", d.edgeKilled},
		{"with both connectors killed visitors get an answer, and it heals", d.connectorsAway},
	} {
		err := c.do(ctx)
		if errors.Is(err, errNotProved) {
			fmt.Printf("--      %s: not proved without root\n", c.what)
			continue
		}
		report(c.what, err)
		if err != nil {
			failed++
		}
	}
	if failed == 0 {
		return nil
	}
	fmt.Println("\nWhat the programs said:")
	d.lab.WriteLogs(os.Stdout)
	return fmt.Errorf("%w: %d checks failed", errChecks, failed)
}

// listedKey is a key as "key list --output json" shows it.
type listedKey struct {
	Label            string `json:"label"`
	Extractable      bool   `json:"extractable"`
	NeverExtractable bool   `json:"never_extractable"`
	Local            bool   `json:"local"`
}

func (d *demo) keysStay(ctx context.Context) error {
	out, err := d.lab.Tool(ctx, "keyhaven-keyserver", "key", "list", "--output", "json", "--uri", d.lab.Token.URI())
	if err != nil {
		return err
	}
	var keys []listedKey
	if err := json.Unmarshal([]byte(out), &keys); err != nil {
		return err
	}
	for _, host := range []string{ecHost, rsaHost} {
		i := slices.IndexFunc(keys, func(k listedKey) bool { return k.Label == host })
		if i < 0 {
			return fmt.Errorf("key list does not show %s:\n%s", host, out)
		}
		if k := keys[i]; k.Extractable || !k.NeverExtractable || !k.Local {
			return fmt.Errorf("%s is extractable, or was, or was made elsewhere:\n%s", host, out)
		}
	}
	return nil
}

// fetch runs curl as a visitor does.
func (d *demo) fetch(ctx context.Context, host string, args ...string) (string, error) {
	_, port, err := net.SplitHostPort(d.visitors)
	if err != nil {
		return "", err
	}
	args = append([]string{"-sS", "-m", "10", "--cacert", d.lab.Roots(), "--resolve", host + ":" + port + ":127.0.0.1"}, args...)
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, "curl", append(args, "https://"+host+":"+port+"/")...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("curl: %w: %s", err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// fetches returns a check that the origin's page comes, at the price of one signature of the given scheme.
func (d *demo) fetches(host, version, scheme string) func(context.Context) error {
	return func(ctx context.Context) error {
		before := d.sigs.of(host)
		out, err := d.fetch(ctx, host, strings.Fields(version)...)
		if err != nil {
			return err
		}
		if !strings.Contains(out, "Hello from the private origin") {
			return fmt.Errorf("the page is %q", out)
		}
		return d.signed(ctx, host, before, scheme)
	}
}

// signed waits for the key server's record of a signature; it comes by way of the log.
func (d *demo) signed(ctx context.Context, host string, before int, scheme string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return lab.Eventually(ctx, func(context.Context) error {
		if n := d.sigs.of(host) - before; n != 1 {
			return fmt.Errorf("the key server recorded %d signatures for %s, not 1", n, host)
		}
		d.sigs.mu.Lock()
		defer d.sigs.mu.Unlock()
		if last := d.sigs.seen[len(d.sigs.seen)-1]; scheme != "" && last.Scheme != scheme {
			return fmt.Errorf("the record names the scheme %s, not %s", last.Scheme, scheme)
		}
		return nil
	})
}

func (d *demo) sClient(ctx context.Context, host string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "openssl", append([]string{"s_client", "-connect", d.visitors, "-servername", host, "-CAfile", d.lab.Roots(), "-verify_return_error"}, args...)...)
	cmd.Stdin = strings.NewReader("GET / HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (d *demo) resumes(ctx context.Context) error {
	file := d.lab.Path("session.pem")
	for _, version := range []string{"-tls1_3", "-tls1_2"} {
		before := d.sigs.of(ecHost)
		if out, err := d.sClient(ctx, ecHost, version, "-ign_eof", "-sess_out", file); err != nil {
			return fmt.Errorf("openssl s_client %s: %w\n%s", version, err, out)
		}
		if err := d.signed(ctx, ecHost, before, ""); err != nil {
			return err
		}
		out, err := d.sClient(ctx, ecHost, version, "-ign_eof", "-sess_in", file)
		if err != nil || !strings.Contains(out, "Reused, ") {
			return fmt.Errorf("openssl s_client %s did not resume (%v):\n%s", version, err, out)
		}
		// A record of a second signature would have come before this full handshake's.
		before = d.sigs.of(ecHost)
		if _, err := d.fetch(ctx, ecHost); err != nil {
			return err
		}
		if err := d.signed(ctx, ecHost, before, ""); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) unknownName(ctx context.Context) error {
	out, err := d.sClient(ctx, "other.keyhaven.test")
	if err == nil || !strings.Contains(out, "unrecognized name") || !strings.Contains(out, "no peer certificate available") {
		return fmt.Errorf("openssl s_client says (%v):\n%s", err, out)
	}
	return nil
}

var errNotProved = errors.New("not proved")

func (d *demo) outOfReach(ctx context.Context) error {
	if d.net == nil {
		return errNotProved
	}
	inner, _ := linkAddrs()
	// Even a route to the private network does not help: that is what the site's rules are for.
	dst := "10.20.0.0/24"
	if out, err := exec.CommandContext(ctx, "ip", "route", "add", dst, "via", inner.Addr().String()).CombinedOutput(); err != nil {
		return fmt.Errorf("ip route add: %w: %s", err, out)
	}
	defer exec.Command("ip", "route", "del", dst, "via", inner.Addr().String()).Run()
	for _, addr := range []string{keyServerAddr, originAddr} {
		c, err := net.DialTimeout("tcp", addr, 2*time.Second)
		if err == nil {
			c.Close()
			return fmt.Errorf("%s answers", addr)
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("%s is reached, and refuses", addr)
		}
		// The same address does answer inside.
		if err := d.site.Command(ctx, "curl", "-s", "-o", "/dev/null", "-m", "2", "telnet://"+addr).Run(); err != nil {
			if e, ok := errors.AsType[*exec.ExitError](err); !ok || e.ExitCode() == 7 {
				return fmt.Errorf("%s does not answer inside the site either: %w", addr, err)
			}
		}
	}
	return nil
}

func (d *demo) keyServerAway(ctx context.Context) error {
	if err := d.lab.KeyServer.Kill(); err != nil {
		return err
	}
	start := time.Now()
	if _, err := d.fetch(ctx, ecHost); err == nil {
		return errors.New("a full handshake went through without a key server")
	} else if strings.Contains(err.Error(), "timed out") {
		return fmt.Errorf("the visitor was left waiting for %v: %w", time.Since(start).Round(time.Millisecond), err)
	}
	if err := d.lab.KeyServer.Start(); err != nil {
		return err
	}
	return d.heals(ctx)
}

func (d *demo) connectorsAway(ctx context.Context) error {
	connectors := d.lab.Sites[0].Connectors
	for _, c := range connectors {
		if err := c.Proc.Kill(); err != nil {
			return err
		}
	}
	if out, err := d.fetch(ctx, ecHost, "-f"); err == nil {
		return fmt.Errorf("a page came without a tunnel: %q", out)
	}
	for _, c := range connectors {
		if err := c.Proc.Start(); err != nil {
			return err
		}
	}
	return d.heals(ctx)
}

func (d *demo) heals(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 40*time.Second)
	defer cancel()
	return lab.Eventually(ctx, func(ctx context.Context) error {
		_, err := d.fetch(ctx, ecHost, "-f")
		return err
	})
}
