package main

import (
	"crypto/x509"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/keyhaven/keyhaven/mtls"
)

// revocations is an authority's list of revoked identities, which another process changes. It is read again when the file has changed.
type revocations struct {
	list *mtls.Revocations
	path string

	mu   sync.Mutex // guards seen
	seen fs.FileInfo
}

func openRevocations(dir string) (*revocations, error) {
	r := &revocations{path: filepath.Join(dir, "revoked.json")}
	var err error
	if r.seen, err = os.Stat(r.path); err != nil {
		return nil, err
	}
	r.list, err = mtls.OpenRevocations(dir)
	return r, err
}

// accept returns an error if identity or certificate are revoked, or if nobody can tell.
func (r *revocations) accept(id mtls.Identity, leaf *x509.Certificate) error {
	if r == nil {
		return nil
	}
	if err := r.refresh(); err != nil {
		return err
	}
	return r.list.AcceptCert(id, leaf)
}

func (r *revocations) refresh() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	now, err := os.Stat(r.path)
	if err != nil {
		return err
	}
	// The file is replaced, never written over, so that a change gives it another inode.
	if os.SameFile(now, r.seen) && now.ModTime().Equal(r.seen.ModTime()) && now.Size() == r.seen.Size() {
		return nil
	}
	if err := r.list.Reload(); err != nil {
		return err
	}
	r.seen = now
	return nil
}

// revokedID reports whether the identity of that text is revoked, or not readable as one, or nobody can tell.
func (r *revocations) revokedID(text string) bool {
	if r == nil {
		return false
	}
	if err := r.refresh(); err != nil {
		return true
	}
	id, err := mtls.ParseIdentity(text)
	return err != nil || r.list.Accept(id) != nil
}
