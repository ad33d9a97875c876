package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// credentialPIN matches a pin-source that is a credential of systemd instead of a file.
var credentialPIN = regexp.MustCompile(`([?&])pin-source=credential:([^&]*)(&|$)`)

// takeCredential takes a pin-source of the form credential:NAME out of a URI and returns the name, or "".
func takeCredential(uri string) (rest, name string, err error) {
	m := credentialPIN.FindStringSubmatchIndex(uri)
	if m == nil {
		return uri, "", nil
	}
	if name, err = url.PathUnescape(uri[m[4]:m[5]]); err != nil || name == "" || strings.ContainsRune(name, filepath.Separator) || strings.HasPrefix(name, ".") {
		return uri, "", errors.New("pin-source: what follows credential: is no name of a credential; write that of LoadCredential=NAME:PATH in the systemd unit")
	}
	// Between others an "&" stays, at either end none does.
	before, after := uri[:m[2]], uri[m[7]:]
	if after != "" {
		before += uri[m[2]:m[3]]
	}
	return before + after, name, nil
}

// maxCredential bounds the file of a PIN, in bytes.
const maxCredential = 1024

// credentialFile is where systemd puts a credential for this service. Not every user may enter the directory, so that the mode of the
// file, which an access control list may widen for the service's user, is of no concern.
func credentialFile(name string) (string, error) {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("pin-source names the credential %s, and there are none ($CREDENTIALS_DIRECTORY is not set): add LoadCredential=%s:PATH to the systemd unit, or name a file", name, name)
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

// readCredential reads a PIN from a credential and takes one line end off.
func readCredential(name string) (pkcs11.PIN, error) {
	path, err := credentialFile(name)
	if err != nil {
		return pkcs11.PIN{}, err
	}
	f, err := os.Open(path)
	if err != nil {
		return pkcs11.PIN{}, fmt.Errorf("credential: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxCredential+1))
	if err != nil {
		return pkcs11.PIN{}, fmt.Errorf("credential: %w", err)
	}
	b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	if len(b) == 0 || len(b) > maxCredential || bytes.ContainsAny(b, "\r\n\x00") {
		return pkcs11.PIN{}, fmt.Errorf("credential %s is not one line of 1 to %d bytes", path, maxCredential)
	}
	return pkcs11.NewPIN(string(b)), nil
}
