package mtls

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// Files of an identity's directory, as WriteIdentity writes and OpenDir reads them.
const (
	CertFileName  = "cert.pem"
	KeyFileName   = "key.pem"
	RootsFileName = "ca.pem"
)

var (
	// ErrExpired says that the program's own certificate has run out.
	ErrExpired = errors.New("mtls: certificate has expired")
	// ErrNotYetValid says that the program's own certificate lies in the future, most often because the clock is wrong.
	ErrNotYetValid = errors.New("mtls: certificate is not yet valid")
)

// SourceConfig names the files of an identity, all PEM. They must be three different files.
type SourceConfig struct {
	CertFile  string // the chain, leaf first
	KeyFile   string // the leaf's private key; refused if group or others may read it
	RootsFile string // the authorities by which peers are verified, and under which the chain itself must verify
	// Logger gets renewals and their failures. If nil, nothing is logged.
	Logger *slog.Logger
}

// DirConfig returns the SourceConfig of an identity's directory.
func DirConfig(dir string) SourceConfig {
	return SourceConfig{
		CertFile:  filepath.Join(dir, CertFileName),
		KeyFile:   filepath.Join(dir, KeyFileName),
		RootsFile: filepath.Join(dir, RootsFileName),
	}
}

// A Source is a program's identity: certificate, key and roots, loaded from files, replaced as one by Reload and Renew.
// Safe for concurrent use.
type Source struct {
	files   SourceConfig
	log     *slog.Logger
	renewal sync.Mutex // held during a renewal; taken before mu
	mu      sync.Mutex // held while files are read or written, so that replacements do not cross
	current atomic.Pointer[snapshot]
}

// snapshot is what a Source holds at one time. It is never changed.
type snapshot struct {
	loaded
	replaced chan struct{} // closed when a later snapshot takes its place
}

// OpenSource loads an identity. The key must fit the certificate, the certificate must carry exactly one identity and
// verify under the roots. A certificate that has expired, or is not valid yet, does load, because clocks are wrong at
// times and an expired certificate can still be replaced: ask Check.
func OpenSource(c SourceConfig) (*Source, error) {
	log := c.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Source{files: c, log: log}
	l, err := load(c)
	if err != nil {
		return nil, fmt.Errorf("mtls: open identity: %w", err)
	}
	s.current.Store(&snapshot{loaded: l, replaced: make(chan struct{})})
	if err := s.Check(); err != nil {
		log.Warn("certificate is out of its time", "peer", l.identity.String(), "err", err)
	}
	return s, nil
}

// OpenDir opens the identity that WriteIdentity wrote to dir.
func OpenDir(dir string, log *slog.Logger) (*Source, error) {
	c := DirConfig(dir)
	c.Logger = log
	return OpenSource(c)
}

// Reload reads the files again. On an error the Source keeps what it had. The identity may change.
func (s *Source) Reload() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, err := load(s.files)
	if err != nil {
		return fmt.Errorf("mtls: reload identity: %w", err)
	}
	s.replaceLocked(l)
	return nil
}

func (s *Source) replaceLocked(l loaded) {
	old := s.current.Swap(&snapshot{loaded: l, replaced: make(chan struct{})})
	close(old.replaced)
}

// Identity returns the program's own identity.
func (s *Source) Identity() Identity { return s.current.Load().identity }

// Leaf returns the program's own certificate, which the caller must not change.
func (s *Source) Leaf() *x509.Certificate { return s.current.Load().cert.Leaf }

// NotAfter returns when the program's own certificate runs out.
func (s *Source) NotAfter() time.Time { return s.Leaf().NotAfter }

// RootsPEM returns the roots as PEM text.
func (s *Source) RootsPEM() []byte { return bytes.Clone(s.current.Load().rootsPEM) }

// Check returns ErrExpired or ErrNotYetValid if peers will refuse the certificate now.
func (s *Source) Check() error {
	leaf, now := s.Leaf(), time.Now()
	switch {
	case now.After(leaf.NotAfter):
		return fmt.Errorf("%w: %s ended on %s; enrol again, or have it issued again", ErrExpired, s.Identity(), leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("%w: %s starts on %s; check the clock", ErrNotYetValid, s.Identity(), leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

// Renew makes a new key, has issue answer a request for it with a chain in DER (leaf first), checks the answer, writes
// key and certificate and puts them in place. The new certificate must name the same identity and verify under the same
// roots. If Reload brings in another certificate meanwhile, that one stays and the answer is dropped. On an error the
// Source keeps what it had.
func (s *Source) Renew(ctx context.Context, issue func(ctx context.Context, csrDER []byte) ([][]byte, error)) error {
	s.renewal.Lock()
	defer s.renewal.Unlock()
	old := s.current.Load()
	key, csr, err := NewKeyCSR()
	if err != nil {
		return err
	}
	chain, err := issue(ctx, csr)
	if err == nil {
		err = s.install(old, key, chain)
	}
	if err != nil {
		return fmt.Errorf("mtls: renew %s: %w", old.identity, err)
	}
	return nil
}

// install puts a renewed certificate in the place of old's.
func (s *Source) install(old *snapshot, key crypto.Signer, chain [][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.current.Load()
	if !now.cert.Leaf.Equal(old.cert.Leaf) {
		return errors.New("another certificate was loaded meanwhile")
	}
	l, err := s.checkRenewed(now, key, chain)
	if err != nil {
		return err
	}
	if err := writeFiles(s.files, l.keyPEM, l.certPEM, nil); err != nil {
		return err
	}
	l.keyPEM, l.certPEM = nil, nil
	s.replaceLocked(l)
	s.log.Info("certificate renewed", "peer", l.identity.String(), "not_after", l.cert.Leaf.NotAfter)
	return nil
}

func (s *Source) checkRenewed(old *snapshot, key crypto.Signer, chain [][]byte) (loaded, error) {
	keyPEM, err := encodeKey(key)
	if err != nil {
		return loaded{}, err
	}
	certPEM := encodeCerts(chain)
	l, err := assemble(SourceConfig{CertFile: "the answer", KeyFile: "the new key", RootsFile: "the roots"}, certPEM, keyPEM, old.rootsPEM)
	if err != nil {
		return loaded{}, err
	}
	if l.identity != old.identity {
		return loaded{}, fmt.Errorf("the answer names %s", l.identity)
	}
	if now := time.Now(); now.Before(l.cert.Leaf.NotBefore) || now.After(l.cert.Leaf.NotAfter) {
		return loaded{}, errors.New("the answer is not valid now; check the clock")
	}
	l.keyPEM, l.certPEM = keyPEM, certPEM
	return l, nil
}

// WriteIdentity writes an identity to dir, which is made with mode 0700 if it is missing: key.pem with mode 0600,
// cert.pem with the chain, ca.pem with the roots given as PEM text. The parts must fit each other. An identity already
// there is replaced as a whole: after a crash at any point OpenDir finds the old one or the new one.
func WriteIdentity(dir string, key crypto.Signer, chain [][]byte, roots []byte) error {
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	certPEM := encodeCerts(chain)
	if _, err := assemble(SourceConfig{CertFile: "the chain", KeyFile: "the key", RootsFile: "the roots"}, certPEM, keyPEM, roots); err != nil {
		return fmt.Errorf("mtls: write identity: %w", err)
	}
	if err := makeDir(dir); err != nil {
		return fmt.Errorf("mtls: write identity: %w", err)
	}
	if err := writeFiles(DirConfig(dir), keyPEM, certPEM, roots); err != nil {
		return fmt.Errorf("mtls: write identity: %w", err)
	}
	return nil
}

// loaded is an identity whose parts fit each other.
type loaded struct {
	identity Identity
	cert     *tls.Certificate // Leaf is set
	roots    *x509.CertPool
	rootsPEM []byte

	keyPEM, certPEM []byte // only between making and writing a renewed identity
}

// assemble checks that the parts of an identity fit each other. The names in c are for its errors.
func assemble(c SourceConfig, certPEM, keyPEM, rootsPEM []byte) (loaded, error) {
	certs, err := parseCerts(certPEM)
	if err != nil {
		return loaded{}, fmt.Errorf("%s: %w", c.CertFile, err)
	}
	roots, err := parseCerts(rootsPEM)
	if err != nil {
		return loaded{}, fmt.Errorf("%s: %w", c.RootsFile, err)
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return loaded{}, fmt.Errorf("%s with %s: %w", c.CertFile, c.KeyFile, err)
	}
	id, err := IdentityOf(certs[0])
	if err != nil {
		return loaded{}, fmt.Errorf("%s: %w", c.CertFile, err)
	}
	pool := x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	cert.Leaf = certs[0]
	if err := verifyChain(certs, pool, timeWithin(certs[0]), x509.ExtKeyUsageAny); err != nil {
		return loaded{}, fmt.Errorf("%s does not verify under %s: %w", c.CertFile, c.RootsFile, err)
	}
	return loaded{identity: id, cert: &cert, roots: pool, rootsPEM: rootsPEM}, nil
}

// timeWithin returns now if the certificate is valid now, and else the end of its validity that is nearer.
func timeWithin(cert *x509.Certificate) time.Time {
	now := time.Now()
	switch {
	case now.Before(cert.NotBefore):
		return cert.NotBefore
	case now.After(cert.NotAfter):
		return cert.NotAfter
	}
	return now
}
