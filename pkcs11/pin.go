package pkcs11

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

// redacted is what a PIN shows of itself.
const redacted = "[redacted]"

// maxPINFile bounds a PIN file, in bytes. Tokens take PINs of at most 255 bytes.
const maxPINFile = 1024

// PIN is a secret that does not print: not by fmt, not in logs, not in JSON or YAML. The zero value is no PIN at all.
type PIN struct {
	// reveal yields the secret. It is a function because fmt prints the unexported fields of a struct that holds a PIN
	// without asking the PIN; a function prints as an address.
	reveal func() string
}

// NewPIN makes a PIN of secret.
func NewPIN(secret string) PIN { return PIN{func() string { return secret }} }

// IsZero reports whether there is no PIN.
func (p PIN) IsZero() bool { return p.reveal == nil }

func (p PIN) value() string {
	if p.reveal == nil {
		return ""
	}
	return p.reveal()
}

// WriteTo writes the secret.
func (p PIN) WriteTo(w io.Writer) (int64, error) {
	n, err := io.WriteString(w, p.value())
	return int64(n), err
}

// Redact takes the secret out of a text.
func (p PIN) Redact(text string) string {
	if p.value() == "" {
		return text
	}
	return strings.ReplaceAll(text, p.value(), redacted)
}

// String returns a fixed text.
func (p PIN) String() string { return redacted }

// GoString returns a fixed text.
func (p PIN) GoString() string { return redacted }

// Format writes a fixed text whatever the verb.
func (p PIN) Format(s fmt.State, _ rune) { io.WriteString(s, redacted) }

// LogValue returns a fixed text.
func (p PIN) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns a fixed text.
func (p PIN) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// ReadPINFile reads a PIN from a file or an inherited descriptor (/dev/fd/3) and takes one line end off. It refuses a file that group or others may access, one
// that is neither a regular file nor a pipe, an empty one, and more than one line.
func ReadPINFile(path string) (PIN, error) {
	pin, err := readPINFile(path)
	return pin, named(err)
}

func readPINFile(path string) (PIN, error) {
	if !filepath.IsAbs(path) {
		return PIN{}, fmt.Errorf("PIN file %q: give an absolute path", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return PIN{}, pinFileError(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return PIN{}, fmt.Errorf("PIN file: %w", err)
	}
	if err := checkPINFile(path, info); err != nil {
		return PIN{}, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPINFile+1))
	if err != nil {
		return PIN{}, fmt.Errorf("read PIN file: %w", err)
	}
	pin, err := trimPIN(b)
	if err != nil {
		return PIN{}, fmt.Errorf("PIN file %q %w", path, err)
	}
	return NewPIN(pin), nil
}

// checkPINFile refuses what cannot hold a PIN, or shows it to others.
func checkPINFile(path string, info fs.FileInfo) error {
	mode := info.Mode()
	if !mode.IsRegular() && mode.Type() != fs.ModeNamedPipe {
		return fmt.Errorf("PIN file %q is neither a regular file nor a pipe", path)
	}
	if mode.Perm()&0o077 != 0 {
		return fmt.Errorf("PIN file %q has mode %04o: group and others must have no access; chmod 600", path, mode.Perm())
	}
	return nil
}

// pinFileError says what to do about a file that cannot be opened.
func pinFileError(err error) error {
	return fmt.Errorf("open PIN file: %w: write the PIN to a file of mode 600, or correct the path", err)
}

func trimPIN(b []byte) (string, error) {
	if len(b) > maxPINFile {
		return "", fmt.Errorf("is longer than %d bytes", maxPINFile)
	}
	b = bytes.TrimSuffix(b, []byte("\n"))
	b = bytes.TrimSuffix(b, []byte("\r"))
	switch {
	case len(b) == 0:
		return "", errors.New("is empty")
	case bytes.ContainsAny(b, "\r\n\x00"):
		return "", errors.New("holds more than one line, or a zero byte")
	}
	return string(b), nil
}
