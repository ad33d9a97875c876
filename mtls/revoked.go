package mtls

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const revocationsFile = "revoked.json"

var emptyRevocations = []byte("{\n  \"revoked\": []\n}\n")

// ErrRevoked says that a peer's certificate, or its identity, is revoked.
var ErrRevoked = errors.New("mtls: revoked")

// A Revocation takes back one certificate, by serial number, or all certificates of one identity. Exactly one of the two
// is set.
type Revocation struct {
	Serial   string    `json:"serial,omitempty"` // lower-case hexadecimal, see SerialOf
	Identity Identity  `json:"identity,omitzero"`
	Reason   string    `json:"reason,omitempty"`
	At       time.Time `json:"at"`
	// NotAfter is when a revoked certificate would have run out; the entry is dropped later than that. Zero keeps it.
	NotAfter time.Time `json:"not_after,omitzero"`
}

// Revocations is the list of revoked certificates and identities in an authority's directory. Changes are written at
// once and safe against other processes; what another process changed is seen after Reload. Safe for concurrent use.
type Revocations struct {
	path    string
	mu      sync.Mutex // held while the file is read or written
	current atomic.Pointer[revokedSet]
}

type revokedSet struct {
	list       []Revocation
	serials    map[string]struct{}
	identities map[Identity]struct{}
}

// SerialOf returns a certificate's serial number in the form in which it is listed: lower-case hexadecimal.
func SerialOf(cert *x509.Certificate) string { return cert.SerialNumber.Text(16) }

// OpenRevocations reads revoked.json in an authority's directory. A missing file is an error: InitAuthority made one, and
// without it nobody could tell what is revoked.
func OpenRevocations(dir string) (*Revocations, error) {
	r := &Revocations{path: filepath.Join(dir, revocationsFile)}
	if err := r.Reload(); err != nil {
		return nil, err
	}
	return r, nil
}

// Reload reads the file again. On an error the list stays as it was.
func (r *Revocations) Reload() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	set, err := readRevocations(r.path)
	if err != nil {
		return err
	}
	r.current.Store(set)
	return nil
}

// Accept returns ErrRevoked if the identity is revoked.
func (r *Revocations) Accept(id Identity) error {
	if _, ok := r.current.Load().identities[id]; ok {
		return fmt.Errorf("%w: %s", ErrRevoked, id)
	}
	return nil
}

// AcceptCert returns ErrRevoked if the identity or the certificate is revoked. It fits ServerOptions.AcceptCert.
func (r *Revocations) AcceptCert(id Identity, leaf *x509.Certificate) error {
	if err := r.Accept(id); err != nil {
		return err
	}
	if _, ok := r.current.Load().serials[SerialOf(leaf)]; ok {
		return fmt.Errorf("%w: certificate %s of %s", ErrRevoked, SerialOf(leaf), id)
	}
	return nil
}

// List returns the revocations, oldest first.
func (r *Revocations) List() []Revocation { return slices.Clone(r.current.Load().list) }

// RevokeCert revokes one certificate. Revoking it again changes nothing.
func (r *Revocations) RevokeCert(leaf *x509.Certificate, reason string) error {
	return r.RevokeSerial(SerialOf(leaf), reason, leaf.NotAfter)
}

// RevokeSerial is RevokeCert for a certificate that is not at hand; notAfter may be zero if it is not known.
func (r *Revocations) RevokeSerial(serial, reason string, notAfter time.Time) error {
	return r.add(Revocation{Serial: serial, Reason: reason, At: time.Now().UTC(), NotAfter: notAfter.UTC()})
}

// RevokeIdentity revokes all certificates of an identity, those to come too, until Reinstate.
func (r *Revocations) RevokeIdentity(id Identity, reason string) error {
	return r.add(Revocation{Identity: id, Reason: reason, At: time.Now().UTC()})
}

// Reinstate takes back RevokeIdentity. Certificates of the identity that have not run out count again, so give the
// program a new name if its key may have been taken.
func (r *Revocations) Reinstate(id Identity) error {
	return r.change(func(list []Revocation) []Revocation {
		return slices.DeleteFunc(list, func(e Revocation) bool { return e.Identity == id })
	})
}

func (r *Revocations) add(e Revocation) error {
	if err := e.check(); err != nil {
		return fmt.Errorf("mtls: revoke: %w", err)
	}
	return r.change(func(list []Revocation) []Revocation {
		if slices.ContainsFunc(list, func(o Revocation) bool { return o.Serial == e.Serial && o.Identity == e.Identity }) {
			return list
		}
		return append(list, e)
	})
}

// change rewrites the file under a lock that other processes honour.
func (r *Revocations) change(edit func([]Revocation) []Revocation) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	lock, err := os.OpenFile(r.path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("mtls: revoke: %w", err)
	}
	defer lock.Close() // which unlocks
	if err := lockFile(lock); err != nil {
		return fmt.Errorf("mtls: revoke: lock %s: %w", lock.Name(), err)
	}
	set, err := readRevocations(r.path)
	if err != nil {
		return err
	}
	now := time.Now()
	list := slices.DeleteFunc(edit(slices.Clone(set.list)), func(e Revocation) bool {
		return !e.NotAfter.IsZero() && now.After(e.NotAfter.Add(24*time.Hour))
	})
	data, err := encodeRevocations(list)
	if err != nil {
		return fmt.Errorf("mtls: revoke: %w", err)
	}
	if err := replaceFile(r.path, data, 0o644); err != nil {
		return fmt.Errorf("mtls: revoke: %w", err)
	}
	r.current.Store(newRevokedSet(list))
	return nil
}

type revocationsDoc struct {
	Revoked []Revocation `json:"revoked"`
}

func encodeRevocations(list []Revocation) ([]byte, error) {
	if list == nil {
		list = []Revocation{}
	}
	data, err := json.MarshalIndent(revocationsDoc{list}, "", "  ")
	if err == nil && len(data) >= maxFileLen {
		err = fmt.Errorf("the list is larger than %d bytes; revoke identities instead of serials", maxFileLen)
	}
	return append(data, '\n'), err
}

func decodeRevocations(data []byte) (*revokedSet, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var doc revocationsDoc
	if err := dec.Decode(&doc); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("text after the end of the list")
	}
	if doc.Revoked == nil {
		return nil, errors.New(`the list "revoked" is missing`)
	}
	for i, e := range doc.Revoked {
		if err := e.check(); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
	}
	return newRevokedSet(doc.Revoked), nil
}

func readRevocations(path string) (*revokedSet, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("mtls: read revocations: %w", err)
	}
	set, err := decodeRevocations(data)
	if err != nil {
		return nil, fmt.Errorf("mtls: read revocations: %s: %w", path, err)
	}
	return set, nil
}

func newRevokedSet(list []Revocation) *revokedSet {
	set := &revokedSet{list: list, serials: map[string]struct{}{}, identities: map[Identity]struct{}{}}
	slices.SortStableFunc(set.list, func(a, b Revocation) int { return a.At.Compare(b.At) })
	for _, e := range list {
		if e.Serial != "" {
			set.serials[e.Serial] = struct{}{}
		} else {
			set.identities[e.Identity] = struct{}{}
		}
	}
	return set
}

func (e Revocation) check() error {
	if (e.Serial == "") == e.Identity.IsZero() {
		return errors.New("exactly one of serial and identity must be set")
	}
	if e.Serial == "" {
		return e.Identity.Validate()
	}
	if strings.Trim(e.Serial, "0123456789abcdef") != "" || e.Serial[0] == '0' || len(e.Serial) > 40 {
		return fmt.Errorf("serial %s is not lower-case hexadecimal without leading zeros", quoteShort(e.Serial))
	}
	return nil
}
