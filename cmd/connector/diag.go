package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/mtls"
)

func diagCommand() *cobra.Command {
	var out string
	cmd := online(&cobra.Command{
		Use:   "diag --out FILE.tar.gz",
		Short: "Collect what is needed to find out what is wrong, without secrets",
		Long: `Diag writes a bundle of text files: versions, the configuration, the findings of check, this host's addresses, and of a
running connector, which it asks over its control socket, status, metrics, goroutines and the end of its log. Private keys,
passwords and tokens are left out. Addresses, host names and the allow-list are not: look through the files before you give
them away. What cannot be had is told in the bundle.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return cli.UsageError("--out is missing: name the file to write, such as keyhaven-diag.tar.gz")
			}
			return diag(cmd, out)
		},
	})
	cmd.Flags().StringVar(&out, "out", "", "file to write; it must not be there yet")
	return cmd
}

// A bundle is the files of a diagnosis by name. What is secret is taken out of all of them.
type bundle struct {
	files   []bundleFile
	secrets [][]byte
}

type bundleFile struct {
	name string
	body []byte
}

func (b *bundle) add(name string, body []byte, err error) {
	if err != nil {
		body = fmt.Appendf(nil, "not to be had: %v\n", err)
	}
	b.files = append(b.files, bundleFile{name, body})
}

func (b *bundle) addJSON(name string, v any) {
	body, err := json.MarshalIndent(v, "", "  ")
	b.add(name, append(body, '\n'), err)
}

func diag(cmd *cobra.Command, out string) error {
	var b bundle
	b.add("system.txt", system(), nil)
	s, err := load(cmd)
	if err != nil {
		b.add("config.json", nil, err)
	} else {
		b.configuration(cmd.Context(), s)
	}
	socket, err := controlPath(cmd)
	for _, part := range []struct{ name, path string }{
		{"status.json", pathStatus}, {"metrics.txt", pathMetrics}, {"goroutines.txt", pathGoroutines}, {"log.txt", pathLog},
	} {
		var body []byte
		partErr := err
		if partErr == nil {
			body, partErr = ask(cmd.Context(), socket, part.path)
		}
		b.add(part.name, body, partErr)
	}
	if err := b.write(out); err != nil {
		return fmt.Errorf("--out: %w", err)
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s has %d files; look through them before you give them away\n", out, len(b.files))
	return nil
}

// system describes program and host.
func system() []byte {
	var w bytes.Buffer
	fmt.Fprintf(&w, "version   %s\ntime      %s\ncpus      %d\nuser      %d\n", cli.Version(), time.Now().UTC().Format(time.RFC3339), runtime.NumCPU(), os.Getuid())
	for _, name := range []string{"/proc/sys/kernel/osrelease", "/etc/os-release", "/etc/resolv.conf"} {
		if text, err := os.ReadFile(name); err == nil && len(text) < 64<<10 {
			fmt.Fprintf(&w, "\n%s\n%s\n", name, bytes.TrimSpace(text))
		}
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		fmt.Fprintf(&w, "\ninterfaces: %v\n", err)
	}
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		fmt.Fprintf(&w, "\ninterface %s, MTU %d, %s: %v", i.Name, i.MTU, i.Flags, addrs)
		if err != nil {
			fmt.Fprintf(&w, " %v", err)
		}
	}
	w.WriteByte('\n')
	return w.Bytes()
}

// configuration adds what the configuration says, and what can be found out with it.
func (b *bundle) configuration(ctx context.Context, s *settings) {
	b.know(filepath.Join(s.Identity.Dir, mtls.KeyFileName))
	file, err := s.Transport.Proxy.password("transport.proxy.password_file")
	if err != nil {
		file = s.Transport.Proxy.PasswordFile // a secret too if its mode is wrong
	}
	b.know(file)
	values := map[string]any{}
	if err := mapstructure.Decode(s.config, &values); err != nil {
		b.add("config.json", nil, err)
	} else {
		b.addJSON("config.json", readable(values))
	}
	src, err := s.identity(nil)
	if err != nil {
		b.add("check.json", nil, err)
		return
	}
	b.addJSON("check.json", s.look(ctx, src, true))
}

// readable writes durations as the configuration does.
func readable(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			v[k] = readable(e)
		}
	case time.Duration:
		return v.String()
	}
	return v
}

// know remembers a file's content as a secret: each line of it that is long enough to be told from other text, and a short
// file's whole.
func (b *bundle) know(path string) {
	if path == "" {
		return
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return // what this user cannot read is not in the bundle either
	}
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) >= 4 && !bytes.HasPrefix(line, []byte("-----")) {
			b.secrets = append(b.secrets, line)
		}
	}
}

// What is a secret wherever it stands: keys in PEM, join tokens, and what a URL says of its user.
var (
	pemKey   = regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)`)
	joinText = regexp.MustCompile(`khj[0-9]+_[A-Za-z0-9_=-]+`)
	urlUser  = regexp.MustCompile(`://[^/@\s"']+@`)
)

const redacted = "[redacted]"

func (b *bundle) redact(text []byte) []byte {
	text = pemKey.ReplaceAll(text, []byte(redacted))
	text = joinText.ReplaceAll(text, []byte(redacted))
	text = urlUser.ReplaceAll(text, []byte("://"+redacted+"@"))
	for _, s := range b.secrets {
		text = bytes.ReplaceAll(text, s, []byte(redacted))
	}
	return text
}

// write makes the file, which must not be there, for its owner alone.
func (b *bundle) write(path string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	z := gzip.NewWriter(f)
	t := tar.NewWriter(z)
	dir := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(path), ".gz"), ".tar") + "/"
	now := time.Now()
	for _, file := range b.files {
		body := b.redact(file.body)
		if err := t.WriteHeader(&tar.Header{Name: dir + file.name, Mode: 0o600, Size: int64(len(body)), ModTime: now}); err != nil {
			return err
		}
		if _, err := t.Write(body); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}
