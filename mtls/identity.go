package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// Kind is the role that an identity plays.
type Kind string

// The kinds of program, and of people, that hold an identity.
const (
	KindEdge      Kind = "edge"
	KindConnector Kind = "connector"
	KindKeyServer Kind = "keyserver"
	KindOperator  Kind = "operator" // a person who administers edges; never opens tunnels, never signs
)

// Limits on the parts of an identity, in bytes.
const (
	maxTrustDomainLen = 253
	maxLabelLen       = 63
	maxNameLen        = 64 // also the limit of a common name (RFC 5280, appendix A.1)
)

const identityScheme = "spiffe://"

var (
	// ErrNoIdentity says that a certificate does not carry exactly one URI SAN with a well-formed identity.
	ErrNoIdentity = errors.New("mtls: no identity")
	// ErrRefused says that a peer has a good certificate but is not one that this side admits.
	ErrRefused = errors.New("mtls: peer refused")
)

// Identity names one program, or one operator, of an installation. Its text form is
//
//	spiffe://<trust-domain>/<kind>/<name>
//
// and every identity has exactly one spelling: the trust domain is made of lower-case DNS labels of which the last is
// not all digits, the name of 1 to 64 bytes a–z, 0–9, '-', '_' and '.', starting with a letter or digit. The zero value
// is no identity. Identities are comparable.
type Identity struct {
	TrustDomain string
	Kind        Kind
	Name        string
}

// String returns the identity's URI, and "" for the zero value.
func (id Identity) String() string {
	if id == (Identity{}) {
		return ""
	}
	return identityScheme + id.TrustDomain + "/" + string(id.Kind) + "/" + id.Name
}

// IsZero reports whether id is no identity at all.
func (id Identity) IsZero() bool { return id == Identity{} }

// Validate returns an error that names the part of id that is malformed.
func (id Identity) Validate() error {
	if err := checkTrustDomain(id.TrustDomain); err != nil {
		return err
	}
	switch id.Kind {
	case KindEdge, KindConnector, KindKeyServer, KindOperator:
	default:
		return fmt.Errorf("mtls: identity kind %q is not one of edge, connector, keyserver, operator", string(id.Kind))
	}
	return checkName(id.Name)
}

// MarshalText returns the identity's URI; an identity that is not well formed is an error.
func (id Identity) MarshalText() ([]byte, error) {
	if id.IsZero() {
		return nil, nil
	}
	if err := id.Validate(); err != nil {
		return nil, err
	}
	return []byte(id.String()), nil
}

// UnmarshalText parses what MarshalText wrote.
func (id *Identity) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*id = Identity{}
		return nil
	}
	parsed, err := ParseIdentity(string(b))
	if err != nil {
		return err
	}
	*id = parsed
	return nil
}

func (id Identity) url() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: id.TrustDomain, Path: "/" + string(id.Kind) + "/" + id.Name}
}

// ParseIdentity parses an identity's URI. It accepts only the canonical spelling: no other scheme or case, no port, no
// user, no query, no fragment, no percent-encoding, no further path segment.
func ParseIdentity(s string) (Identity, error) {
	rest, ok := strings.CutPrefix(s, identityScheme)
	if !ok {
		return Identity{}, fmt.Errorf("mtls: identity %s does not start with %q", quoteShort(s), identityScheme)
	}
	parts := strings.SplitN(rest, "/", 4)
	if len(parts) != 3 {
		return Identity{}, fmt.Errorf("mtls: identity %s is not of the form spiffe://trust-domain/kind/name", quoteShort(s))
	}
	id := Identity{TrustDomain: parts[0], Kind: Kind(parts[1]), Name: parts[2]}
	if err := id.Validate(); err != nil {
		return Identity{}, err
	}
	return id, nil
}

// IdentityOf returns the identity in a parsed certificate. The certificate must have exactly one URI SAN, in the
// canonical spelling; anything else is ErrNoIdentity. It does not verify the certificate.
func IdentityOf(cert *x509.Certificate) (Identity, error) {
	if cert == nil {
		return Identity{}, fmt.Errorf("%w: no certificate", ErrNoIdentity)
	}
	// The bytes are read from the extension itself: cert.URIs has been through net/url, which folds several spellings
	// into one.
	uris, err := uriNames(cert)
	if err != nil {
		return Identity{}, fmt.Errorf("%w: %w", ErrNoIdentity, err)
	}
	if len(uris) != 1 {
		return Identity{}, fmt.Errorf("%w: certificate has %d URI names, want exactly one", ErrNoIdentity, len(uris))
	}
	id, err := ParseIdentity(uris[0])
	if err != nil {
		return Identity{}, fmt.Errorf("%w: %w", ErrNoIdentity, err)
	}
	return id, nil
}

// PeerIdentity returns the identity in the peer's leaf certificate. The handshake must have been made with a
// configuration of this package, which is what verifies the certificate.
func PeerIdentity(cs tls.ConnectionState) (Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return Identity{}, fmt.Errorf("%w: peer sent no certificate", ErrNoIdentity)
	}
	return IdentityOf(cs.PeerCertificates[0])
}

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// uriNames returns the URI names of a certificate's subjectAltName extension as they stand there (RFC 5280, 4.2.1.6).
func uriNames(cert *x509.Certificate) ([]string, error) {
	const tagURI = 6
	var uris []string
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSubjectAltName) {
			continue
		}
		var seq asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &seq); err != nil || len(rest) != 0 || seq.Tag != asn1.TagSequence {
			return nil, errors.New("subject alternative names are malformed")
		}
		for rest := seq.Bytes; len(rest) > 0; {
			var name asn1.RawValue
			var err error
			if rest, err = asn1.Unmarshal(rest, &name); err != nil {
				return nil, errors.New("subject alternative names are malformed")
			}
			if name.Class == asn1.ClassContextSpecific && name.Tag == tagURI {
				uris = append(uris, string(name.Bytes))
			}
		}
	}
	return uris, nil
}

// AcceptKinds returns a check that admits the identities of the given kinds; with no kind it admits nobody.
func AcceptKinds(kinds ...Kind) func(Identity) error {
	kinds = slices.Clone(kinds)
	return func(id Identity) error {
		if slices.Contains(kinds, id.Kind) {
			return nil
		}
		return fmt.Errorf("%w: %s is not of an admitted kind", ErrRefused, id)
	}
}

// AcceptIdentities returns a check that admits exactly the given identities; with none it admits nobody.
func AcceptIdentities(ids ...Identity) func(Identity) error {
	ids = slices.Clone(ids)
	return func(id Identity) error {
		if slices.Contains(ids, id) {
			return nil
		}
		return fmt.Errorf("%w: %s is not on the list", ErrRefused, id)
	}
}

func checkTrustDomain(td string) error {
	if td == "" || len(td) > maxTrustDomainLen {
		return fmt.Errorf("mtls: trust domain %s is empty or longer than %d bytes", quoteShort(td), maxTrustDomainLen)
	}
	digitsOnly := false
	for label := range strings.SplitSeq(td, ".") {
		if label == "" || len(label) > maxLabelLen || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("mtls: trust domain %s has a malformed label", quoteShort(td))
		}
		digitsOnly = true
		for i := range len(label) {
			c := label[i]
			if !isLowerAlnum(c) && c != '-' {
				return fmt.Errorf("mtls: trust domain %s may hold only a-z, 0-9, '-' and '.'", quoteShort(td))
			}
			digitsOnly = digitsOnly && '0' <= c && c <= '9'
		}
	}
	if digitsOnly {
		return fmt.Errorf("mtls: trust domain %s looks like an address; use a domain name", quoteShort(td))
	}
	return nil
}

func checkName(name string) error {
	if name == "" || len(name) > maxNameLen {
		return fmt.Errorf("mtls: identity name %s is empty or longer than %d bytes", quoteShort(name), maxNameLen)
	}
	for i := range len(name) {
		c := name[i]
		if isLowerAlnum(c) || i > 0 && (c == '-' || c == '_' || c == '.') {
			continue
		}
		return fmt.Errorf("mtls: identity name %s may hold only a-z, 0-9 and, after the first, '-', '_' and '.'", quoteShort(name))
	}
	return nil
}

func isLowerAlnum(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }

// quoteShort quotes foreign text for an error message and bounds its length.
func quoteShort(s string) string {
	const limit = 80
	if len(s) > limit {
		return fmt.Sprintf("%q…", s[:limit])
	}
	return fmt.Sprintf("%q", s)
}
