package mtls

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func newToken(t testing.TB, edges ...string) JoinToken {
	t.Helper()
	if len(edges) == 0 {
		edges = []string{"edge.keyhaven.test:7844"}
	}
	tok, err := NewJoinToken(sha256.Sum256([]byte("root")), edges)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestJoinToken(t *testing.T) {
	most := make([]string, maxTokenEdges)
	for i := range most {
		most[i] = fmt.Sprintf("%s%d:65535", strings.Repeat("e", maxEdgeLen-7), i)
	}
	for _, edges := range [][]string{
		{"edge.keyhaven.test:7844"}, {"192.0.2.1:1", "[2001:db8::1]:7844", "e:65535"}, most,
	} {
		want := newToken(t, edges...)
		text := want.Reveal()
		if !strings.HasPrefix(text, "khj1_") || len(text) > maxTokenLen {
			t.Errorf("token is %d bytes: %.10s", len(text), text)
		}
		got, err := ParseJoinToken(text)
		if err != nil {
			t.Fatal(err)
		}
		if got.ID != want.ID || !got.Secret.Equal(want.Secret) || got.Pin != want.Pin || !slices.Equal(got.Edges, want.Edges) {
			t.Errorf("token changed on its way: %v", got)
		}
		if got.Hash() != sha256.Sum256(want.Secret.Reveal()) {
			t.Error("hash is not the SHA-256 of the secret")
		}
	}
	one, two := newToken(t), newToken(t)
	if one.ID == two.ID || one.Secret.Equal(two.Secret) {
		t.Error("two tokens are alike")
	}
	if (Secret{}).Equal(Secret{}) || (Secret{}).Reveal() != nil || (JoinToken{}).Reveal() != "" || (JoinToken{}).Hash() != (TokenHash{}) {
		t.Error("the zero token is of use")
	}
}

func TestNewJoinTokenRefuses(t *testing.T) {
	for _, edges := range [][]string{
		nil, {""}, {"edge"}, {":7844"}, {"edge:"}, {"edge:0"}, {"edge:65536"}, {"edge:07844"}, {"edge:+1"}, {"edge:https"},
		{"2001:db8::1:7844"}, {"ed ge:1"}, {"edge:1\n"}, {"édge:1"}, {"e:1", "e:1"}, {strings.Repeat("e", maxEdgeLen) + ":1"},
		make([]string, maxTokenEdges+1),
	} {
		if tok, err := NewJoinToken([32]byte{}, edges); err == nil {
			t.Errorf("edges %q: got %v", edges, tok)
		}
	}
}

// retoken changes the bytes of a token and gives it a good checksum again.
func retoken(t testing.TB, tok JoinToken, change func([]byte) []byte) string {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(tok.Reveal(), tokenPrefix))
	if err != nil {
		t.Fatal(err)
	}
	b = change(b[:len(b)-tokenSumLen])
	sum := sha256.Sum256(b)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:tokenSumLen]...))
}

func TestParseJoinTokenRefuses(t *testing.T) {
	tok := newToken(t)
	text := tok.Reveal()
	const count = tokenIDLen + secretLen + 32
	for name, s := range map[string]string{
		"empty":            "",
		"prefix alone":     tokenPrefix,
		"other version":    "khj2_" + text[5:],
		"no prefix":        text[5:],
		"space before":     " " + text,
		"newline after":    text + "\n",
		"newline inside":   text[:20] + "\n" + text[20:],
		"padding":          text + "=",
		"standard base64":  text[:30] + "+" + text[31:],
		"cut off":          text[:len(text)-4],
		"cut off early":    text[:40],
		"one more":         text + "AAAA",
		"damaged":          text[:30] + string(text[30]^3) + text[31:],
		"too long":         text + strings.Repeat("A", maxTokenLen),
		"no edges":         retoken(t, tok, func(b []byte) []byte { b[count] = 0; return b[:count+1] }),
		"edges missing":    retoken(t, tok, func(b []byte) []byte { b[count] = 2; return b }),
		"edges left over":  retoken(t, tok, func(b []byte) []byte { b[count] = 0; return b }),
		"edge cut off":     retoken(t, tok, func(b []byte) []byte { return b[:len(b)-1] }),
		"edge of nonsense": retoken(t, tok, func(b []byte) []byte { b[len(b)-1] = ' '; return b }),
	} {
		got, err := ParseJoinToken(s)
		if !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("%s: got %v, %v, want ErrTokenMalformed", name, got, err)
			continue
		}
		if len(s) > 40 && strings.Contains(err.Error(), s[20:30]) {
			t.Errorf("%s: the error quotes the token: %v", name, err)
		}
	}
}

// TestTokenSpareBits sets the bits of the last character that carry nothing.
func TestTokenSpareBits(t *testing.T) {
	const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	for _, edge := range []string{"e:1", "ee:1", "eee:1"} {
		text := newToken(t, edge).Reveal()
		if len(text[len(tokenPrefix):])%4 == 0 {
			continue // no spare bits
		}
		last := strings.IndexByte(digits, text[len(text)-1])
		if _, err := ParseJoinToken(text[:len(text)-1] + string(digits[last|1])); !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("edge %s: got %v, want ErrTokenMalformed", edge, err)
		}
	}
}

// FuzzParseJoinToken stands for whoever hands a connector a token.
func FuzzParseJoinToken(f *testing.F) {
	f.Add(newToken(f).Reveal())
	f.Add(newToken(f, "192.0.2.1:1", "[2001:db8::1]:7844").Reveal())
	f.Add(retoken(f, newToken(f), func(b []byte) []byte { return b[:len(b)-1] }))
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseJoinToken(s)
		if err != nil {
			return
		}
		if got := tok.Reveal(); got != s {
			t.Errorf("accepted a token that encodes otherwise: %d and %d bytes", len(s), len(got))
		}
	})
}

// FuzzTokenBody reaches behind the checksum, which random text does not pass.
func FuzzTokenBody(f *testing.F) {
	b, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(newToken(f).Reveal(), tokenPrefix))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b[:len(b)-tokenSumLen])
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body)
		s := tokenPrefix + base64.RawURLEncoding.EncodeToString(slices.Concat(body, sum[:tokenSumLen]))
		tok, err := ParseJoinToken(s)
		if err == nil && tok.Reveal() != s {
			t.Error("accepted a token that encodes otherwise")
		}
	})
}

// TestTokenDoesNotPrint sends a token through everything that prints, logs or encodes, and looks for its secret in all
// the forms that this could take.
func TestTokenDoesNotPrint(t *testing.T) {
	tok := newToken(t)
	secret := tok.Secret.Reveal()
	type holder struct {
		Token  JoinToken
		token  JoinToken
		secret Secret
		ptr    *JoinToken
		list   []Secret
		byName map[string]JoinToken
	}
	h := holder{tok, tok, tok.Secret, &tok, []Secret{tok.Secret}, map[string]JoinToken{"a": tok}}
	values := []any{tok, &tok, tok.Secret, &tok.Secret, []JoinToken{tok}, []Secret{tok.Secret}, map[string]JoinToken{"a": tok}, h, &h}
	var out bytes.Buffer
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%d", "%c", "%U", "%o", "%b", "%t", "%e", "%p", "%T"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		fmt.Fprintln(&out, v)
		if b, err := json.Marshal(v); err == nil {
			out.Write(b)
		} else {
			t.Errorf("json: %v", err)
		}
		slog.New(slog.NewTextHandler(&out, nil)).Info("x", "v", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "v", v, slog.Group("g", "v", v))
	}
	fmt.Fprintln(&out, fmt.Errorf("wrapped: %v", tok), errors.New(tok.String()))
	text := out.String()
	for name, form := range map[string]string{
		"raw":           string(secret),
		"hex":           hex.EncodeToString(secret)[:16],
		"HEX":           strings.ToUpper(hex.EncodeToString(secret)[:16]),
		"hex, spaced":   fmt.Sprintf("% x", secret[:8]),
		"numbers":       strings.Trim(fmt.Sprint(secret[:8]), "[]"),
		"Go numbers":    strings.TrimSuffix(strings.SplitN(fmt.Sprintf("%#v", secret[:8]), "{", 2)[1], "}"),
		"JSON numbers":  strings.Trim(strings.ReplaceAll(fmt.Sprint(secret[:8]), " ", ","), "[]"),
		"base64":        base64.StdEncoding.EncodeToString(secret)[:16],
		"base64url":     base64.RawURLEncoding.EncodeToString(secret)[:16],
		"token's text":  tok.Reveal()[20:40],
		"octal":         strings.Trim(fmt.Sprintf("%o", secret[:8]), "[]"),
		"binary":        strings.Trim(fmt.Sprintf("%b", secret[:8]), "[]"),
		"code points":   strings.Trim(fmt.Sprintf("%U", secret[:8]), "[]"),
		"quoted string": strings.Trim(fmt.Sprintf("%q", secret[:8]), `"`),
	} {
		if strings.Contains(text, form) {
			at := strings.Index(text, form)
			t.Errorf("the secret is printed (%s): …%.200q", name, text[max(0, at-150):])
		}
	}
	if !strings.Contains(text, redacted) || !strings.Contains(text, tok.ID) {
		t.Error("nothing was printed at all")
	}
	if !reflect.DeepEqual(tok, h.token) {
		t.Error("printing changed the token")
	}
}

func TestJoinRecord(t *testing.T) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	tok, other := newToken(t), newToken(t)
	secret := tok.Secret.Reveal()
	record := JoinRecord{ID: tok.ID, Hash: tok.Hash(), Tunnel: "berlin", Expires: now.Add(time.Hour)}
	used := record
	used.UsedAt, used.UsedBy = now.Add(-time.Minute), "spiffe://keyhaven.test/connector/c1"
	for _, c := range []struct {
		name   string
		record JoinRecord
		now    time.Time
		id     string
		secret []byte
		want   error
	}{
		{"good", record, now, tok.ID, secret, nil},
		{"last moment", record, now.Add(time.Hour - 1), tok.ID, secret, nil},
		{"expired", record, now.Add(time.Hour), tok.ID, secret, ErrTokenExpired},
		{"used", used, now, tok.ID, secret, ErrTokenUsed},
		{"used and expired", used, now.Add(2 * time.Hour), tok.ID, secret, ErrTokenUsed},
		{"other id", record, now, other.ID, secret, ErrTokenUnknown},
		{"other secret", record, now, tok.ID, other.Secret.Reveal(), ErrTokenUnknown},
		{"no secret", record, now, tok.ID, nil, ErrTokenUnknown},
		{"part of the secret", record, now, tok.ID, secret[:31], ErrTokenUnknown},
		{"the hash for the secret", record, now, tok.ID, record.Hash[:], ErrTokenUnknown},
		{"used, without the secret", used, now, tok.ID, other.Secret.Reveal(), ErrTokenUnknown},
		{"expired, without the secret", record, now.Add(2 * time.Hour), tok.ID, nil, ErrTokenUnknown},
		{"zero record", JoinRecord{}, now, "", nil, ErrTokenUnknown},
		{"record of nothing", JoinRecord{Hash: sha256.Sum256(nil), Expires: now.Add(time.Hour)}, now, "", nil, ErrTokenUnknown},
		{"record without an end", JoinRecord{ID: tok.ID, Hash: tok.Hash()}, now, tok.ID, secret, ErrTokenExpired},
	} {
		if err := c.record.Redeem(c.now, c.id, c.secret); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
	}
	data, err := json.Marshal(used)
	if err != nil {
		t.Fatal(err)
	}
	var got JoinRecord
	if err := json.Unmarshal(data, &got); err != nil || got != used {
		t.Errorf("record went through JSON as %s: %v, %v", data, got, err)
	}
	if !bytes.Contains(data, []byte(tok.Hash().String())) || bytes.Contains(data, []byte(hex.EncodeToString(secret))) {
		t.Errorf("record is written as %s", data)
	}
	var h TokenHash
	for _, s := range []string{"", "ab", strings.Repeat("g", 64), strings.Repeat("a", 66)} {
		if err := h.UnmarshalText([]byte(s)); err == nil {
			t.Errorf("hash %q was read", s)
		}
	}
}
