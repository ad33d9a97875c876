package transit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// maxSecretFile bounds a file of a secret, in bytes. Service account tokens are a few kilobytes at most.
const maxSecretFile = 16 << 10

// checkFile refuses a file that cannot hold what a login needs, or that shows a secret to others.
func checkFile(path string, secret bool) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("file %q: give an absolute path", path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return checkMode(path, info, secret)
}

func checkMode(path string, info fs.FileInfo, secret bool) error {
	mode := info.Mode()
	if !mode.IsRegular() && mode.Type() != fs.ModeNamedPipe {
		return fmt.Errorf("file %q is neither a regular file nor a pipe", path)
	}
	shown := mode.Perm() & 0o077
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid == 0 && st.Gid == 0 {
		// Credentials that systemd hands to a service are root's, of mode 0440, and readable by the service through an ACL.
		shown &^= 0o040
	}
	if secret && shown != 0 {
		return fmt.Errorf("file %q has mode %04o: group and others must have no access; chmod 600", path, mode.Perm())
	}
	return nil
}

// readFile returns the one line that a file holds. Errors never quote it.
func readFile(path string, secret bool) (string, error) {
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("file %q: give an absolute path", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if err := checkMode(path, info, secret); err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err != nil {
		return "", err
	}
	line, err := oneLine(b)
	if err != nil {
		return "", fmt.Errorf("file %q %w", path, err)
	}
	return line, nil
}

func oneLine(b []byte) (string, error) {
	if len(b) > maxSecretFile {
		return "", fmt.Errorf("is longer than %d bytes", maxSecretFile)
	}
	b = bytes.TrimSuffix(b, []byte("\n"))
	b = bytes.TrimSuffix(b, []byte("\r"))
	if len(b) == 0 {
		return "", errors.New("is empty")
	}
	for _, c := range b {
		if c <= ' ' || c >= 0x7f {
			return "", errors.New("holds more than one line, or characters that no token has")
		}
	}
	return string(b), nil
}

// secrets knows what must never appear in a text that came from a server.
type secrets []string

// scrub returns text from a server for use in an error: without known secrets, printable, and short.
func (s secrets) scrub(text string) string {
	for _, secret := range s {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "[redacted]")
		}
	}
	const most = 300
	text = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r == 0x7f:
			return -1
		}
		return r
	}, text)
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}
