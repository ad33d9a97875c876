package audit

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// maxString is the length above which a string is cut, in bytes.
const maxString = 1024

const ellipsis = "…"

func appendName(b []byte, name string) []byte {
	b = append(b, ',', '"')
	b = append(b, name...)
	return append(b, '"', ':')
}

// appendUint appends a number unless it is 0.
func appendUint(b []byte, name string, v uint64) []byte {
	if v == 0 {
		return b
	}
	return strconv.AppendUint(appendName(b, name), v, 10)
}

// appendHex appends bytes unless all are 0.
func appendHex(b []byte, name string, v []byte) []byte {
	for _, x := range v {
		if x != 0 {
			b = append(appendName(b, name), '"')
			b = hex.AppendEncode(b, v)
			return append(b, '"')
		}
	}
	return b
}

// appendString appends a string unless it is empty.
func appendString(b []byte, name, v string) []byte {
	if v == "" {
		return b
	}
	b = append(appendName(b, name), '"')
	b = appendEscaped(b, v)
	return append(b, '"')
}

func appendEscaped(b []byte, v string) []byte {
	v = clean(v)
	start := 0
	for i := 0; i < len(v); {
		c := v[i]
		if c >= ' ' && c <= '~' && c != '"' && c != '\\' {
			i++
			continue
		}
		b = append(b, v[start:i]...)
		if c == '"' || c == '\\' {
			b = append(b, '\\', c)
			i++
		} else {
			r, n := utf8.DecodeRuneInString(v[i:])
			if r > 0xffff {
				hi, lo := utf16.EncodeRune(r)
				b = appendUnicode(appendUnicode(b, hi), lo)
			} else {
				b = appendUnicode(b, r)
			}
			i += n
		}
		start = i
	}
	return append(b, v[start:]...)
}

// clean returns v as valid UTF-8 of at most maxString bytes.
func clean(v string) string {
	if len(v) > maxString+utf8.UTFMax {
		v = v[:maxString+utf8.UTFMax] // what is cut in two by this is cut off below
	}
	if !utf8.ValidString(v) {
		v = strings.ToValidUTF8(v, string(utf8.RuneError))
	}
	if len(v) <= maxString {
		return v
	}
	cut := maxString - len(ellipsis)
	for !utf8.RuneStart(v[cut]) {
		cut--
	}
	return v[:cut] + ellipsis
}

// printable returns v with escapes for what is not printable, so that a terminal shows it as it is. What is read may come from anybody.
func printable(v string) string {
	if strings.ContainsFunc(v, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }) {
		v = strings.Trim(strconv.Quote(v), `"`)
	}
	return v
}

func appendUnicode(b []byte, r rune) []byte {
	const digits = "0123456789abcdef"
	return append(b, '\\', 'u', digits[r>>12&15], digits[r>>8&15], digits[r>>4&15], digits[r&15])
}

// scanner goes over the members of a JSON object without nesting. It is laxer than the format where encoding again shows the
// difference.
type scanner struct {
	rest    []byte // begins with '{' and ends before '}'
	started bool
	name    string
	value   value
	err     error
}

var errSyntax = errors.New("not a line of an audit log")

// next goes to the next member. At the end it returns false and leaves err nil.
func (s *scanner) next() bool {
	switch {
	case s.err != nil:
		return false
	case s.started && len(s.rest) == 0:
		return false
	case len(s.rest) == 0 || !s.started && s.rest[0] != '{' || s.started && s.rest[0] != ',':
		s.err = errSyntax
		return false
	}
	s.started = true
	s.rest = s.rest[1:]
	if s.name, s.err = s.string(); s.err != nil {
		return false
	}
	if len(s.rest) < 2 || s.rest[0] != ':' {
		s.err = errSyntax
		return false
	}
	s.rest = s.rest[1:]
	switch c := s.rest[0]; {
	case c == '"':
		s.value.kind = '"'
		s.value.text, s.err = s.string()
	case c >= '0' && c <= '9':
		n := 1
		for n < len(s.rest) && s.rest[n] >= '0' && s.rest[n] <= '9' {
			n++
		}
		s.value = value{'0', string(s.rest[:n])}
		s.rest = s.rest[n:]
	case strings.HasPrefix(string(s.rest[:min(4, len(s.rest))]), "true"):
		s.value = value{'t', "true"}
		s.rest = s.rest[4:]
	default:
		s.err = errSyntax
	}
	return s.err == nil
}

// string takes a string off.
func (s *scanner) string() (string, error) {
	if len(s.rest) == 0 || s.rest[0] != '"' {
		return "", errSyntax
	}
	in := s.rest[1:]
	for i, c := range in {
		switch {
		case c == '"':
			s.rest = in[i+1:]
			return string(in[:i]), nil
		case c == '\\':
			return s.escaped(in, i)
		case c < ' ' || c > '~':
			return "", errSyntax
		}
	}
	return "", errSyntax
}

// escaped goes on with a string whose first escape is at in[i].
func (s *scanner) escaped(in []byte, i int) (string, error) {
	out := append(make([]byte, 0, len(in)), in[:i]...)
	for i < len(in) {
		c := in[i]
		switch {
		case c == '"':
			s.rest = in[i+1:]
			return string(out), nil
		case c < ' ' || c > '~':
			return "", errSyntax
		case c != '\\':
			out = append(out, c)
			i++
		case i+1 < len(in) && (in[i+1] == '"' || in[i+1] == '\\'):
			out = append(out, in[i+1])
			i += 2
		default:
			r, ok := unicodeEscape(in[i:])
			if !ok {
				return "", errSyntax
			}
			i += 6
			if utf16.IsSurrogate(r) {
				lo, ok := unicodeEscape(in[i:])
				if r = utf16.DecodeRune(r, lo); !ok || r == utf8.RuneError {
					return "", errSyntax
				}
				i += 6
			}
			out = utf8.AppendRune(out, r)
		}
	}
	return "", errSyntax
}

func unicodeEscape(in []byte) (rune, bool) {
	if len(in) < 6 || in[0] != '\\' || in[1] != 'u' {
		return 0, false
	}
	n, err := strconv.ParseUint(string(in[2:6]), 16, 16)
	return rune(n), err == nil
}

// value is a member's value: a string ('"'), a number ('0') or true ('t').
type value struct {
	kind byte
	text string
}

func (v *value) isText() error {
	if v.kind != '"' {
		return errors.New("not a string")
	}
	return nil
}

func (v *value) string(to *string) error {
	*to = v.text
	return v.isText()
}

func (v *value) uint(to *uint64) (err error) {
	if v.kind != '0' {
		return errors.New("not a number")
	}
	*to, err = strconv.ParseUint(v.text, 10, 64)
	return err
}

func (v *value) duration(to *time.Duration) error {
	var n uint64
	if err := v.uint(&n); err != nil {
		return err
	}
	if n > math.MaxInt64 {
		return errors.New("too long")
	}
	*to = time.Duration(n)
	return nil
}

func (v *value) hex(to []byte) error {
	if len(v.text) != hex.EncodedLen(len(to)) {
		return fmt.Errorf("not %d bytes in hex", len(to))
	}
	_, err := hex.Decode(to, []byte(v.text))
	return err
}

func (v *value) time(to *time.Time) (err error) {
	*to, err = time.Parse(timeLayout, v.text)
	return err
}

func (v *value) addr(to *netip.Addr) (err error) {
	*to, err = netip.ParseAddr(v.text)
	return err
}

func (v *value) addrPort(to *netip.AddrPort) (err error) {
	*to, err = netip.ParseAddrPort(v.text)
	return err
}
