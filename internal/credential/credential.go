// Package credential finds files that hold secrets: those that a configuration names, and those that the service manager hands
// over, which a configuration names as credential:NAME. See LoadCredential= in systemd.exec(5).
package credential

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

// Prefix stands before the name of a credential.
const Prefix = "credential:"

// Named returns the name of the credential that a configured path is, or "" if it is the path of a file.
func Named(path string) (name string, err error) {
	name, ok := strings.CutPrefix(path, Prefix)
	if !ok {
		return "", nil
	}
	if name == "" || strings.ContainsRune(name, filepath.Separator) || strings.HasPrefix(name, ".") {
		return "", errors.New("what follows credential: is no name of a credential; write that of LoadCredential=NAME:PATH in the systemd unit")
	}
	return name, nil
}

// File returns the file to read for a configured secret. A file must be its owner's alone. That of a credential lies where not
// every user may enter the directory, so that its mode, which an access control list may widen for the service's user, is of no
// concern.
func File(path string) (string, error) {
	name, err := Named(path)
	if err != nil {
		return "", err
	}
	if name != "" {
		return Path(name)
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.Mode().Perm()&0o077 != 0 && runtime.GOOS != "windows" { // whose access lists no mode shows
		return "", fmt.Errorf("%s has mode %04o: others may read it; run chmod 600 %s", path, info.Mode().Perm(), path)
	}
	return path, nil
}

// Path is where the service manager has put a credential for this service.
func Path(name string) (string, error) {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("the credential %s is wanted, and there are none ($CREDENTIALS_DIRECTORY is not set): add LoadCredential=%s:PATH to the systemd unit, or name a file", name, name)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return "", fmt.Errorf("credentials: %w", err)
	}
	if info.Mode().Perm()&0o007 != 0 {
		return "", fmt.Errorf("credentials: %s has mode %04o: others must have no access", dir, info.Mode().Perm())
	}
	path := filepath.Join(dir, name)
	if info, err = os.Stat(path); err != nil {
		return "", fmt.Errorf("credential: %w: add LoadCredential=%s:PATH to the systemd unit", err, name)
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("credential %s is no regular file", path)
	}
	return path, nil
}
