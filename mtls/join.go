package mtls

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	tokenPrefix = "khj1_"
	// maxTokenLen bounds a token's text in bytes.
	maxTokenLen   = 4096
	maxTokenEdges = 8
	maxEdgeLen    = 255

	tokenIDLen  = 8
	secretLen   = 32
	tokenSumLen = 4
)

const redacted = "[redacted]"

var (
	// ErrTokenUnknown says that no join token has this id and secret.
	ErrTokenUnknown = errors.New("mtls: join token is unknown")
	// ErrTokenUsed says that the join token has enrolled a connector already.
	ErrTokenUsed = errors.New("mtls: join token is used; make a new one")
	// ErrTokenExpired says that the join token's time is over.
	ErrTokenExpired = errors.New("mtls: join token has expired; make a new one")
	// ErrTokenMalformed says that a text is not a join token.
	ErrTokenMalformed = errors.New("mtls: malformed join token")
)

// Secret holds secret bytes that no formatting, logging or encoding shows; only Reveal does. The zero value is empty.
type Secret struct {
	// Package fmt cannot call methods on unexported fields and reflects over them instead; it follows one pointer at most,
	// so behind two it finds an address.
	b **[secretLen]byte
}

func newSecret(b [secretLen]byte) Secret {
	p := &b
	return Secret{&p}
}

// Reveal returns a copy of the bytes, nil for the zero value.
func (s Secret) Reveal() []byte {
	if s.b == nil {
		return nil
	}
	return bytes.Clone((*s.b)[:])
}

// Equal compares in constant time.
func (s Secret) Equal(o Secret) bool {
	return s.b != nil && o.b != nil && subtle.ConstantTimeCompare((*s.b)[:], (*o.b)[:]) == 1
}

// Format implements fmt.Formatter for every verb.
func (s Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, redacted) }

// String returns no more than that there is a secret, and so do GoString, LogValue and MarshalText.
func (s Secret) String() string { return redacted }

// GoString is String.
func (s Secret) GoString() string { return redacted }

// LogValue is String.
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText is String.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// TokenHash is the SHA-256 of a join token's secret. Its text form is hexadecimal.
type TokenHash [sha256.Size]byte

// String returns the hash in hexadecimal.
func (h TokenHash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText returns the hash in hexadecimal.
func (h TokenHash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText parses what MarshalText wrote.
func (h *TokenHash) UnmarshalText(b []byte) error {
	if len(b) != hex.EncodedLen(len(h)) {
		return fmt.Errorf("mtls: token hash has %d bytes, want %d", len(b), hex.EncodedLen(len(h)))
	}
	_, err := hex.Decode(h[:], b)
	return err
}

// A JoinToken lets a connector enrol once: it proves the right to join and pins the authority of the edges that the
// connector will meet. All formatting redacts it; Reveal gives the text to hand over.
type JoinToken struct {
	ID     string   // 16 lower-case hexadecimal digits; not secret
	Secret Secret   // 32 random bytes
	Pin    [32]byte // SHA-256 of the root's SubjectPublicKeyInfo
	Edges  []string // host:port, 1 to 8 of them
}

// NewJoinToken makes a token with a fresh id and secret for the edges at the given addresses.
func NewJoinToken(pin [32]byte, edges []string) (JoinToken, error) {
	if err := checkEdges(edges); err != nil {
		return JoinToken{}, fmt.Errorf("mtls: make join token: %w", err)
	}
	var id [tokenIDLen]byte
	var secret [secretLen]byte
	if _, err := rand.Read(id[:]); err != nil {
		return JoinToken{}, fmt.Errorf("mtls: make join token: %w", err)
	}
	if _, err := rand.Read(secret[:]); err != nil {
		return JoinToken{}, fmt.Errorf("mtls: make join token: %w", err)
	}
	return JoinToken{ID: hex.EncodeToString(id[:]), Secret: newSecret(secret), Pin: pin, Edges: slices.Clone(edges)}, nil
}

// Reveal returns the token's text: "khj1_" and, in unpadded base64url, id (8 bytes), secret (32), pin (32), number of
// edges (1), for each edge its length (1) and address, and the first 4 bytes of the SHA-256 of all that. A token that
// was not made by NewJoinToken or ParseJoinToken gives "".
func (t JoinToken) Reveal() string {
	id, err := hex.DecodeString(t.ID)
	if err != nil || len(id) != tokenIDLen || t.Secret.b == nil || checkEdges(t.Edges) != nil {
		return ""
	}
	b := append([]byte{}, id...)
	b = append(b, t.Secret.Reveal()...)
	b = append(b, t.Pin[:]...)
	b = append(b, byte(len(t.Edges)))
	for _, e := range t.Edges {
		b = append(b, byte(len(e)))
		b = append(b, e...)
	}
	sum := sha256.Sum256(b)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:tokenSumLen]...))
}

// ParseJoinToken parses what Reveal gave. A text has one spelling; anything else is ErrTokenMalformed, with an error
// that quotes nothing of it.
func ParseJoinToken(s string) (JoinToken, error) {
	bad := func(why string) (JoinToken, error) { return JoinToken{}, fmt.Errorf("%w: %s", ErrTokenMalformed, why) }
	if len(s) > maxTokenLen {
		return bad("it is too long")
	}
	text, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		return bad("it does not start with " + tokenPrefix)
	}
	if strings.ContainsAny(text, "\r\n") { // the decoder would skip these
		return bad("it has line breaks")
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil {
		return bad("it is not base64url; copy it again")
	}
	const fixed = tokenIDLen + secretLen + 32 + 1
	if len(b) < fixed+tokenSumLen {
		return bad("it is cut off; copy it again")
	}
	body, sum := b[:len(b)-tokenSumLen], b[len(b)-tokenSumLen:]
	if want := sha256.Sum256(body); subtle.ConstantTimeCompare(sum, want[:tokenSumLen]) != 1 {
		return bad("it is damaged; copy it again")
	}
	t := JoinToken{
		ID:     hex.EncodeToString(body[:tokenIDLen]),
		Secret: newSecret([secretLen]byte(body[tokenIDLen : tokenIDLen+secretLen])),
	}
	copy(t.Pin[:], body[tokenIDLen+secretLen:])
	count, rest := int(body[fixed-1]), body[fixed:]
	for range count {
		if len(rest) == 0 || len(rest) < 1+int(rest[0]) {
			return bad("its addresses are cut off")
		}
		t.Edges = append(t.Edges, string(rest[1:1+int(rest[0])]))
		rest = rest[1+int(rest[0]):]
	}
	if len(rest) != 0 {
		return bad("it has bytes left over")
	}
	if err := checkEdges(t.Edges); err != nil {
		return bad("its addresses are malformed")
	}
	return t, nil
}

// Hash returns the SHA-256 of the secret, which is all that an edge keeps of it.
func (t JoinToken) Hash() TokenHash {
	if t.Secret.b == nil {
		return TokenHash{}
	}
	return sha256.Sum256(t.Secret.Reveal())
}

// String returns the token's id and no more.
func (t JoinToken) String() string { return "join token " + t.ID + " " + redacted }

// Format implements fmt.Formatter for every verb.
func (t JoinToken) Format(f fmt.State, _ rune) { fmt.Fprint(f, t.String()) }

// GoString is String.
func (t JoinToken) GoString() string { return t.String() }

// LogValue is String.
func (t JoinToken) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText is String; it also keeps the token out of JSON.
func (t JoinToken) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// A JoinRecord is what an edge stores about a join token.
type JoinRecord struct {
	ID      string    `json:"id"`
	Hash    TokenHash `json:"hash"`
	Tunnel  string    `json:"tunnel"`
	Expires time.Time `json:"expires"`
	UsedAt  time.Time `json:"used_at,omitzero"`
	UsedBy  string    `json:"used_by,omitempty"`
	UsedKey string    `json:"used_key,omitempty"` // SHA-256 of the public key that it enrolled, in hexadecimal
}

// Redeem reports whether a token with this id and secret may enrol a connector now: nil, ErrTokenUnknown, ErrTokenUsed
// or ErrTokenExpired. Who lacks the secret learns nothing but ErrTokenUnknown, in constant time. It does not mark the
// record as used: the caller stores that, with a condition on the record's revision, before it issues a certificate.
func (r JoinRecord) Redeem(now time.Time, id string, secret []byte) error {
	sum := sha256.Sum256(secret)
	good := subtle.ConstantTimeCompare([]byte(id), []byte(r.ID)) & subtle.ConstantTimeCompare(sum[:], r.Hash[:])
	switch {
	case good != 1 || len(secret) != secretLen || r.ID == "":
		return ErrTokenUnknown
	case !r.UsedAt.IsZero():
		return ErrTokenUsed
	case !now.Before(r.Expires):
		return ErrTokenExpired
	}
	return nil
}

// checkEdges admits 1 to 8 different addresses host:port of printable ASCII.
func checkEdges(edges []string) error {
	if len(edges) == 0 || len(edges) > maxTokenEdges {
		return fmt.Errorf("%d edge addresses, want 1 to %d", len(edges), maxTokenEdges)
	}
	for i, e := range edges {
		if len(e) > maxEdgeLen || strings.ContainsFunc(e, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return fmt.Errorf("edge address %s is too long or has characters that no address has", quoteShort(e))
		}
		host, port, err := net.SplitHostPort(e)
		if err != nil || host == "" {
			return fmt.Errorf("edge address %s is not host:port", quoteShort(e))
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
			return fmt.Errorf("edge address %s has no port between 1 and 65535", quoteShort(e))
		}
		if slices.Contains(edges[:i], e) {
			return fmt.Errorf("edge address %s is named twice", quoteShort(e))
		}
	}
	return nil
}
