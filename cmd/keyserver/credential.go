package main

import (
	"bytes"
	"fmt"
	"io"
	"net/url"
	"os"
	"regexp"

	"github.com/keyhaven/keyhaven/internal/credential"
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
	if name, err = url.PathUnescape(uri[m[4]:m[5]]); err == nil {
		name, err = credential.Named(credential.Prefix + name)
	}
	if err != nil {
		return uri, "", fmt.Errorf("pin-source: %w", err)
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

// readCredential reads a PIN from a credential and takes one line end off.
func readCredential(name string) (pkcs11.PIN, error) {
	path, err := credential.Path(name)
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
