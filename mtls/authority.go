package mtls

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Files of an authority's directory.
const (
	authorityCertFile = "ca.crt"
	authorityKeyFile  = "ca.key"
)

const (
	rootLifetime = 10 * 365 * 24 * time.Hour
	// backdate is how far a certificate's start lies before its issue, for peers whose clocks are behind.
	backdate = 5 * time.Minute

	defaultConnectorLifetime = 24 * time.Hour
	defaultServiceLifetime   = 30 * 24 * time.Hour
	maxLifetime              = 398 * 24 * time.Hour
)

// ErrAuthorityExists says that a directory already holds an authority, or part of one.
var ErrAuthorityExists = errors.New("mtls: authority exists")

// An Authority issues certificates for the identities of one trust domain. Its root is constrained to that domain
// (RFC 5280, section 4.2.1.10), signs leaves only, and is valid for ten years. Safe for concurrent use.
type Authority struct {
	dir         string
	root        *x509.Certificate
	key         *ecdsa.PrivateKey
	trustDomain string
}

// InitAuthority makes a new authority for a trust domain in dir, which is made with mode 0700 if it is missing: the
// root in ca.crt, its P-256 key in ca.key with mode 0600, and an empty revoked.json. It never overwrites a file: if dir
// holds one of them it returns ErrAuthorityExists.
func InitAuthority(dir, trustDomain string) (*Authority, error) {
	if err := checkTrustDomain(trustDomain); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("mtls: make authority directory: %w", err)
	}
	for _, name := range []string{authorityKeyFile, authorityCertFile, revocationsFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return nil, fmt.Errorf("%w: %s is there already; open it, or choose another directory", ErrAuthorityExists, filepath.Join(dir, name))
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("mtls: init authority: %w", err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("mtls: make authority key: %w", err)
	}
	der, err := makeRoot(key, trustDomain, time.Now())
	if err != nil {
		return nil, err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	// The certificate comes last: with it the authority is complete.
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{
		{revocationsFile, emptyRevocations, 0o644},
		{authorityKeyFile, keyPEM, 0o600},
		{authorityCertFile, encodeCerts([][]byte{der}), 0o644},
	} {
		if err := createFile(filepath.Join(dir, f.name), f.data, f.mode); err != nil {
			if errors.Is(err, fs.ErrExist) {
				err = fmt.Errorf("%w: %w", ErrAuthorityExists, err)
			}
			return nil, fmt.Errorf("mtls: init authority: %w", err)
		}
	}
	return OpenAuthority(dir)
}

func makeRoot(key *ecdsa.PrivateKey, trustDomain string, now time.Time) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Keyhaven"}, CommonName: rootCommonName(trustDomain)},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(rootLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
		// No identity outside the trust domain verifies under this root, whoever uses the key.
		PermittedDNSDomainsCritical: true,
		PermittedURIDomains:         []string{trustDomain},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("mtls: make root certificate: %w", err)
	}
	return der, nil
}

func rootCommonName(trustDomain string) string {
	name := trustDomain + " root"
	if len(name) > maxNameLen {
		name = name[:maxNameLen]
	}
	return name
}

// OpenAuthority opens the authority that InitAuthority made in dir. It refuses a ca.key that group or others may read.
func OpenAuthority(dir string) (*Authority, error) {
	certPath, keyPath := filepath.Join(dir, authorityCertFile), filepath.Join(dir, authorityKeyFile)
	certPEM, err := readFile(certPath)
	if err != nil {
		return nil, fmt.Errorf("mtls: open authority: %w", err)
	}
	certs, err := parseCerts(certPEM)
	if err != nil {
		return nil, fmt.Errorf("mtls: open authority: %s: %w", certPath, err)
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("mtls: open authority: %s holds %d certificates, want the root alone", certPath, len(certs))
	}
	keyPEM, err := readSecretFile(keyPath)
	if err != nil {
		return nil, fmt.Errorf("mtls: open authority: %w", err)
	}
	block, _ := pem.Decode(keyPEM)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("mtls: open authority: %s holds no PEM block PRIVATE KEY", keyPath)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("mtls: open authority: %s: %w", keyPath, err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("mtls: open authority: %s is not an ECDSA P-256 key", keyPath)
	}
	a := &Authority{dir: dir, root: certs[0], key: key}
	if err := a.checkRoot(); err != nil {
		return nil, fmt.Errorf("mtls: open authority: %s: %w", certPath, err)
	}
	return a, nil
}

func (a *Authority) checkRoot() error {
	root := a.root
	if !samePublicKey(root.PublicKey, a.key.Public()) {
		return errors.New("certificate does not fit ca.key; restore the two from one backup")
	}
	if !root.IsCA || root.CheckSignatureFrom(root) != nil {
		return errors.New("certificate is not a self-signed authority")
	}
	if now := time.Now(); now.After(root.NotAfter) {
		return fmt.Errorf("root expired on %s; make a new authority", root.NotAfter.Format(time.RFC3339))
	}
	uris, err := uriNames(root)
	if err != nil {
		return err
	}
	if len(uris) != 1 || len(uris[0]) <= len(identityScheme) || uris[0][:len(identityScheme)] != identityScheme {
		return errors.New("root names no trust domain")
	}
	td := uris[0][len(identityScheme):]
	if err := checkTrustDomain(td); err != nil {
		return err
	}
	if !slices.Equal(root.PermittedURIDomains, []string{td}) {
		return fmt.Errorf("root is not constrained to its trust domain %q", td)
	}
	a.trustDomain = td
	return nil
}

// TrustDomain returns the trust domain whose identities the authority names.
func (a *Authority) TrustDomain() string { return a.trustDomain }

// Root returns the root certificate, which the caller must not change.
func (a *Authority) Root() *x509.Certificate { return a.root }

// RootPEM returns the root certificate as PEM text.
func (a *Authority) RootPEM() []byte { return encodeCerts([][]byte{a.root.Raw}) }

// Pin returns the SHA-256 of the root's SubjectPublicKeyInfo, by which a join token names the authority.
func (a *Authority) Pin() [32]byte { return spkiPin(a.root) }

// Revocations opens the authority's list of revoked certificates and identities.
func (a *Authority) Revocations() (*Revocations, error) { return OpenRevocations(a.dir) }

// IssueRequest describes a certificate.
type IssueRequest struct {
	// Identity is what the certificate names; it must lie in the authority's trust domain.
	Identity Identity
	// Public is the key: ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 4096 bits.
	Public crypto.PublicKey
	// Lifetime is how long the certificate is valid from now on. If zero, 24 hours for a connector and 30 days for
	// others; at most 398 days. It is cut where the root ends.
	Lifetime time.Duration
	// DNSNames and IPs are further names, for clients that verify a host name instead of the identity.
	DNSNames []string
	IPs      []net.IP
}

// Issue issues a certificate and returns the chain in DER, leaf first, root last. Edges may use it as server and
// client, connectors as client, key servers as server.
func (a *Authority) Issue(r IssueRequest) ([][]byte, error) {
	if err := r.Identity.Validate(); err != nil {
		return nil, fmt.Errorf("mtls: issue: %w", err)
	}
	if r.Identity.TrustDomain != a.trustDomain {
		return nil, fmt.Errorf("mtls: issue: %s lies outside the authority's trust domain %q", r.Identity, a.trustDomain)
	}
	if err := checkPublicKey(r.Public); err != nil {
		return nil, fmt.Errorf("mtls: issue %s: %w", r.Identity, err)
	}
	lifetime, err := lifetimeFor(r.Identity.Kind, r.Lifetime)
	if err != nil {
		return nil, fmt.Errorf("mtls: issue %s: %w", r.Identity, err)
	}
	now := time.Now()
	notAfter := now.Add(lifetime)
	if notAfter.After(a.root.NotAfter) {
		notAfter = a.root.NotAfter
	}
	if !notAfter.After(now) {
		return nil, fmt.Errorf("mtls: issue %s: the root expired on %s; make a new authority", r.Identity, a.root.NotAfter.Format(time.RFC3339))
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: r.Identity.Name},
		NotBefore:             now.Add(-backdate),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           usagesOf(r.Identity.Kind),
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{r.Identity.url()},
		DNSNames:              r.DNSNames,
		IPAddresses:           r.IPs,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, r.Public, a.key)
	if err != nil {
		return nil, fmt.Errorf("mtls: issue %s: %w", r.Identity, err)
	}
	return [][]byte{der, slices.Clone(a.root.Raw)}, nil
}

// IssueCSR issues a certificate for the key of a PKCS#10 request, whose signature it checks. Names and extensions in
// the request are ignored: id alone decides. A lifetime of zero is the default of Issue.
func (a *Authority) IssueCSR(csrDER []byte, id Identity, lifetime time.Duration) ([][]byte, error) {
	pub, err := parseCSR(csrDER)
	if err != nil {
		return nil, err
	}
	return a.Issue(IssueRequest{Identity: id, Public: pub, Lifetime: lifetime})
}

func lifetimeFor(kind Kind, asked time.Duration) (time.Duration, error) {
	switch {
	case asked < 0 || asked > maxLifetime:
		return 0, fmt.Errorf("lifetime %s is not between 0 and %s", asked, maxLifetime)
	case asked > 0:
		return asked, nil
	case kind == KindConnector:
		return defaultConnectorLifetime, nil
	default:
		return defaultServiceLifetime, nil
	}
}

func usagesOf(kind Kind) []x509.ExtKeyUsage {
	switch kind {
	case KindEdge:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	case KindConnector, KindOperator:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	default:
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
}

// newSerial returns a random positive number of 128 bits. See RFC 5280, section 4.1.2.2.
func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, fmt.Errorf("mtls: make serial number: %w", err)
	}
	n := new(big.Int).SetBytes(b)
	if n.Sign() == 0 {
		return nil, errors.New("mtls: make serial number: random source returned zeros")
	}
	return n, nil
}
