package transit

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/vault/api"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// keyData is what keys/NAME says of a key.
type keyData struct {
	Type          string                     `json:"type"`
	Exportable    *bool                      `json:"exportable"`
	Backup        *bool                      `json:"allow_plaintext_backup"`
	Derived       bool                       `json:"derived"`
	Imported      bool                       `json:"imported_key"`
	SoftDeleted   bool                       `json:"soft_deleted"`
	Latest        int                        `json:"latest_version"`
	MinDecryption int                        `json:"min_decryption_version"`
	MinEncryption int                        `json:"min_encryption_version"`
	MinAvailable  int                        `json:"min_available_version"`
	Keys          map[string]json.RawMessage `json:"keys"`
}

// decodeKey reads the answer of keys/NAME.
func decodeKey(body []byte) (*keyData, error) {
	var a struct {
		Data *keyData `json:"data"`
	}
	if err := json.Unmarshal(body, &a); err != nil || a.Data == nil || a.Data.Type == "" || a.Data.Latest < 1 {
		return nil, errors.New("not a Transit key")
	}
	return a.Data, nil
}

// Keys reads each key of the configuration from the engine and returns those that can be served. What is wrong with the others is in
// [Backend.Faults]; operators find it in the log too. That the server does not answer is an error of Keys itself, signer.ErrUnavailable or
// signer.ErrThrottled, and keys of an earlier call stay as good as they were.
func (b *Backend) Keys(ctx context.Context) ([]signer.Key, error) {
	read := map[string]*keyData{}
	failed := map[string]error{}
	for _, c := range b.cfg.Keys {
		if read[c.Name] != nil || failed[c.Name] != nil {
			continue
		}
		d, err := b.read(ctx, c.Name)
		switch {
		case err == nil:
			read[c.Name] = d
		case errors.Is(err, ErrPermission), errors.Is(err, signer.ErrNotFound):
			failed[c.Name] = err
		default:
			return nil, err
		}
	}
	var keys []signer.Key
	var faults []error
	seen := map[keyVersion]bool{}
	for _, c := range b.cfg.Keys {
		err := failed[c.Name]
		if err == nil {
			var k *key
			if k, err = b.admit(c, read[c.Name]); err == nil {
				// The latest version may be named by its number as well.
				if id := (keyVersion{c.Name, k.version}); !seen[id] {
					seen[id] = true
					keys = append(keys, k)
				}
				continue
			}
		}
		err = fmt.Errorf("%w: %w", ErrKey, err)
		faults = append(faults, err)
		b.cfg.Logger.Warn("transit key not served", "home", b.name, "key", c.Name, "version", c.Version, "err", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, errClosed
	}
	b.faults = faults
	return keys, nil
}

type keyVersion struct {
	name    string
	version int
}

// read asks the engine for a key.
func (b *Backend) read(ctx context.Context, name string) (*keyData, error) {
	path := b.cfg.Mount + "/keys/" + name
	a, err := b.ask(ctx, fmt.Sprintf("read key %q", name), b.policyFor(name),
		func(ctx context.Context, l *api.Logical) (*api.Response, error) {
			return l.ReadRawWithContext(ctx, path)
		})
	if err != nil {
		return nil, err
	}
	d, err := decodeKey(a.body)
	if err != nil {
		return nil, unavailable("read key %q at %s: wrong answer: %w", name, b.name, err)
	}
	return d, nil
}

// admit makes a key of what the engine says, or says why it must not be served.
func (b *Backend) admit(c KeyConfig, d *keyData) (*key, error) {
	what := fmt.Sprintf("key %q at %s", c.Name, b.name)
	want := typeOf[d.Type]
	switch {
	case want == "":
		return nil, fmt.Errorf("%s is of type %.40q, which makes no signatures for TLS: name a key of type %s", what, d.Type, strings.Join(typeNames(), ", "))
	case d.Derived:
		return nil, fmt.Errorf("%s is a derived key, which has no public key of its own: make one without derived=true", what)
	case d.Exportable == nil || d.Backup == nil:
		return nil, fmt.Errorf("%s: the engine does not say whether the key can leave it", what)
	case *d.Exportable:
		return nil, fmt.Errorf("%s is exportable: whoever may read %s/export can take it away, for good; make a new key without exportable=true", what, b.cfg.Mount)
	case *d.Backup:
		return nil, fmt.Errorf("%s allows plain text backups, by which it can be taken away: make a new key without allow_plaintext_backup=true", what)
	case d.SoftDeleted:
		return nil, fmt.Errorf("%s is deleted softly: restore it, or name another", what)
	}
	version, err := d.version(c.Version)
	if err != nil {
		return nil, fmt.Errorf("%s %w", what, err)
	}
	pub, err := d.public(version)
	if err != nil {
		return nil, fmt.Errorf("%s version %d: %w", what, version, err)
	}
	if got := signer.TypeOf(pub); got != want {
		return nil, fmt.Errorf("%s version %d is of type %s and has a public key of type %.40q", what, version, d.Type, got)
	}
	ski, err := keyless.SKIOf(pub)
	if err != nil {
		return nil, fmt.Errorf("%s version %d: %w", what, version, err)
	}
	return newKey(b, c.Name, version, pub, signer.KeyInfo{
		SKI: ski, Label: c.Name, Home: b.name, Type: want, NeverExtractable: !d.Imported, Local: !d.Imported,
		Certificate: d.certificate(version, pub),
	}), nil
}

func typeNames() []string {
	var names []string
	for n := range typeOf {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// version returns the version to serve if the engine still has it and signs with it.
func (d *keyData) version(asked int) (int, error) {
	v := asked
	if v == 0 {
		v = d.Latest
	}
	least := max(d.MinDecryption, d.MinEncryption, d.MinAvailable, 1)
	_, there := d.Keys[strconv.Itoa(v)]
	switch {
	case v > d.Latest:
		return 0, fmt.Errorf("has no version %d: its latest is %d", v, d.Latest)
	case v < least:
		return 0, fmt.Errorf("does not sign with version %d: min_decryption_version, min_encryption_version or trimming leave %d to %d", v, least, d.Latest)
	case !there:
		return 0, fmt.Errorf("has no version %d any more: name one of %d to %d", v, least, d.Latest)
	}
	return v, nil
}

// public returns the public key of a version.
func (d *keyData) public(version int) (crypto.PublicKey, error) {
	var v struct {
		Public string `json:"public_key"`
	}
	if err := json.Unmarshal(d.Keys[strconv.Itoa(version)], &v); err != nil || v.Public == "" {
		return nil, errors.New("the engine shows no public key")
	}
	if d.Type == "ed25519" {
		raw, err := base64.StdEncoding.Strict().DecodeString(v.Public)
		if err != nil || len(raw) != ed25519.PublicKeySize {
			return nil, errors.New("the public key is not one of Ed25519")
		}
		return ed25519.PublicKey(raw), nil
	}
	block, rest := pem.Decode([]byte(v.Public))
	if block == nil || block.Type != "PUBLIC KEY" || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, errors.New("the public key is not in PEM")
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the public key cannot be read: %w", err)
	}
	return pub, nil
}

// certificate returns the leaf of the certificate chain that an operator stored with a version (Vault 1.15 and later), or nil.
func (d *keyData) certificate(version int, pub crypto.PublicKey) *x509.Certificate {
	var v struct {
		Chain string `json:"certificate_chain"`
	}
	if err := json.Unmarshal(d.Keys[strconv.Itoa(version)], &v); err != nil {
		return nil
	}
	block, _ := pem.Decode([]byte(v.Chain))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	if eq, ok := pub.(interface{ Equal(crypto.PublicKey) bool }); !ok || !eq.Equal(cert.PublicKey) {
		return nil
	}
	return cert
}
