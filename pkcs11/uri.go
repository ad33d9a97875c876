package pkcs11

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxURI bounds the text of a URI, in bytes.
const maxURI = 4096

// URI is a PKCS#11 URI, see RFC 7512. The zero value of a field means that the attribute is absent: an attribute
// that is there must not be empty.
type URI struct {
	// Attributes of the path.
	Token, Manufacturer, Serial, Model                      string
	LibraryManufacturer, LibraryDescription, LibraryVersion string
	SlotManufacturer, SlotDescription, SlotID               string // SlotID is a decimal number
	Object, Type                                            string
	ID                                                      []byte

	// Attributes of the query. pin-value is there too, but has no way out.
	PINSource, ModuleName, ModulePath string

	pinValue PIN
}

// attribute describes one attribute of a URI: where its decoded value goes and what it may be.
type attribute struct {
	name  string
	max   int // bytes, after decoding
	value func(*URI) *string
	check func(string) error // nil: printable text
}

// pathAttributes are the attributes of RFC 7512 section 2.3 before the "?", in the order in which String writes them. The
// limits are the sizes of the fields in CK_TOKEN_INFO, CK_SLOT_INFO and CK_INFO.
var pathAttributes = []attribute{
	{"token", 32, func(u *URI) *string { return &u.Token }, nil},
	{"manufacturer", 32, func(u *URI) *string { return &u.Manufacturer }, nil},
	{"serial", 16, func(u *URI) *string { return &u.Serial }, nil},
	{"model", 16, func(u *URI) *string { return &u.Model }, nil},
	{"library-manufacturer", 32, func(u *URI) *string { return &u.LibraryManufacturer }, nil},
	{"library-description", 32, func(u *URI) *string { return &u.LibraryDescription }, nil},
	{"library-version", 16, func(u *URI) *string { return &u.LibraryVersion }, checkVersion},
	{"slot-manufacturer", 32, func(u *URI) *string { return &u.SlotManufacturer }, nil},
	{"slot-description", 64, func(u *URI) *string { return &u.SlotDescription }, nil},
	{"slot-id", 20, func(u *URI) *string { return &u.SlotID }, checkSlotID},
	{"object", 255, func(u *URI) *string { return &u.Object }, nil},
	{"type", 16, func(u *URI) *string { return &u.Type }, checkType},
}

// queryAttributes are those after the "?". pin-value is handled apart.
var queryAttributes = []attribute{
	{"pin-source", 1024, func(u *URI) *string { return &u.PINSource }, checkPINSource},
	{"module-name", 64, func(u *URI) *string { return &u.ModuleName }, checkModuleName},
	{"module-path", 1024, func(u *URI) *string { return &u.ModulePath }, checkModulePath},
}

const maxID = 255 // bytes of CKA_ID

// ParseURI parses a PKCS#11 URI strictly: characters outside RFC 7512's grammar, unknown attributes (vendor attributes
// included), duplicates, empty values and pin-value beside pin-source are errors. Errors never quote values of the query.
func ParseURI(s string) (URI, error) {
	u, err := parseURI(s)
	if err != nil {
		return URI{}, named(fmt.Errorf("URI: %w", err))
	}
	return u, nil
}

func parseURI(s string) (URI, error) {
	var u URI
	if len(s) > maxURI {
		return u, fmt.Errorf("longer than %d bytes", maxURI)
	}
	const scheme = "pkcs11:"
	if len(s) < len(scheme) || !strings.EqualFold(s[:len(scheme)], scheme) {
		return u, errors.New(`does not begin with "pkcs11:"`)
	}
	path, query, hasQuery := strings.Cut(s[len(scheme):], "?")
	if path != "" {
		for i, part := range strings.Split(path, ";") {
			if err := u.setPath(part); err != nil {
				return u, fmt.Errorf("path attribute %d: %w", i+1, err)
			}
		}
	}
	if hasQuery {
		for i, part := range strings.Split(query, "&") {
			if err := u.setQuery(part); err != nil {
				return u, fmt.Errorf("query attribute %d: %w", i+1, err)
			}
		}
	}
	if !u.pinValue.IsZero() && u.PINSource != "" {
		return u, errors.New("pin-value and pin-source exclude each other; keep pin-source")
	}
	if u.ModuleName != "" && u.ModulePath != "" {
		return u, errors.New("module-name and module-path exclude each other")
	}
	return u, nil
}

func (u *URI) setPath(part string) error {
	name, raw, ok := strings.Cut(part, "=")
	if !ok {
		return errors.New(`no "=" in it`)
	}
	if name == "id" {
		if u.ID != nil {
			return errors.New("id is given twice")
		}
		v, err := decode(raw, pathChars, maxID)
		if err != nil {
			return fmt.Errorf("id %w", err)
		}
		u.ID = []byte(v)
		return nil
	}
	for i := range pathAttributes {
		if a := &pathAttributes[i]; a.name == name {
			return a.set(u, raw, pathChars)
		}
	}
	return fmt.Errorf("unknown attribute %.40q", name)
}

func (u *URI) setQuery(part string) error {
	name, raw, ok := strings.Cut(part, "=")
	if !ok {
		return errors.New(`no "=" in it`)
	}
	if name == "pin-value" {
		if !u.pinValue.IsZero() {
			return errors.New("pin-value is given twice")
		}
		v, err := decode(raw, queryChars, maxPINFile)
		if err != nil {
			return fmt.Errorf("pin-value %w", err)
		}
		if strings.ContainsRune(v, 0) {
			return errors.New("pin-value holds a zero byte")
		}
		u.pinValue = NewPIN(v)
		return nil
	}
	for i := range queryAttributes {
		if a := &queryAttributes[i]; a.name == name {
			return a.set(u, raw, queryChars)
		}
	}
	// The name is not quoted: it may be the rest of a PIN with an "&" in it.
	return errors.New("unknown attribute; pin-source, module-name and module-path are known")
}

func (a *attribute) set(u *URI, raw, chars string) error {
	field := a.value(u)
	if *field != "" {
		return fmt.Errorf("%s is given twice", a.name)
	}
	v, err := decode(raw, chars, a.max)
	if err != nil {
		return fmt.Errorf("%s %w", a.name, err)
	}
	if !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl) {
		return fmt.Errorf("%s is not printable UTF-8 text", a.name)
	}
	if a.check != nil {
		if err := a.check(v); err != nil {
			return fmt.Errorf("%s %w", a.name, err)
		}
	}
	*field = v
	return nil
}

// Characters that may stand for themselves, RFC 7512 section 2.3, beside letters and digits.
const (
	bothChars  = "-._~:[]@!$'()*+,="
	pathChars  = bothChars + "&"
	queryChars = bothChars + "/?|"
)

func plain(c byte, chars string) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte(chars, c) >= 0
}

// decode takes percent-encoding off. Its errors tell positions, never content.
func decode(raw, chars string, limit int) (string, error) {
	var b strings.Builder
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case c == '%':
			if i+2 >= len(raw) {
				return "", fmt.Errorf("has a broken percent-encoding at byte %d", i)
			}
			n, err := strconv.ParseUint(raw[i+1:i+3], 16, 8)
			if err != nil {
				return "", fmt.Errorf("has a broken percent-encoding at byte %d", i)
			}
			b.WriteByte(byte(n))
			i += 2
		case plain(c, chars):
			b.WriteByte(c)
		default:
			return "", fmt.Errorf("has a character at byte %d that must be percent-encoded", i)
		}
	}
	if b.Len() == 0 {
		return "", errors.New("is empty")
	}
	if b.Len() > limit {
		return "", fmt.Errorf("is longer than %d bytes", limit)
	}
	return b.String(), nil
}

func checkVersion(v string) error {
	major, minor, dotted := strings.Cut(v, ".")
	if _, err := strconv.ParseUint(major, 10, 8); err != nil {
		return errors.New("is not a version")
	}
	if _, err := strconv.ParseUint(minor, 10, 8); dotted && err != nil {
		return errors.New("is not a version")
	}
	return nil
}

func checkSlotID(v string) error {
	if n, err := strconv.ParseUint(v, 10, strconv.IntSize); err != nil || strconv.FormatUint(n, 10) != v {
		return errors.New("is not a decimal number")
	}
	return nil
}

func checkType(v string) error {
	switch v {
	case "public", "private", "cert", "secret-key", "data":
		return nil
	}
	return errors.New("is none of public, private, cert, secret-key, data")
}

func checkPINSource(v string) error {
	if strings.HasPrefix(v, "|") {
		return errors.New("names a command; only files are read")
	}
	_, err := pinPath(v)
	return err
}

func checkModuleName(v string) error {
	if strings.ContainsAny(v, `/\`) || strings.HasPrefix(v, ".") {
		return errors.New("is a path; use module-path")
	}
	return nil
}

func checkModulePath(v string) error {
	if !filepath.IsAbs(v) || filepath.Clean(v) != v {
		return errors.New("is not a clean absolute path of a file")
	}
	return nil
}

// pinPath turns a pin-source, a path or a file: URI (RFC 8089), into a path.
func pinPath(source string) (string, error) {
	path := source
	if len(source) >= 5 && strings.EqualFold(source[:5], "file:") {
		u, err := url.Parse(source)
		if err != nil || u.Opaque != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
			return "", errors.New("is not a plain file: URI")
		}
		if u.Host != "" && u.Host != "localhost" {
			return "", errors.New("is a file: URI of another host")
		}
		path = u.Path
	}
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return "", errors.New("is not an absolute path or file: URI")
	}
	return path, nil
}

// pin reads the PIN that the URI leads to.
func (u *URI) pin() (PIN, error) {
	if !u.pinValue.IsZero() {
		return u.pinValue, nil
	}
	path, err := u.pinFile()
	if err != nil {
		return PIN{}, err
	}
	return readPINFile(path)
}

// pinFile returns the path that pin-source names.
func (u *URI) pinFile() (string, error) {
	if u.PINSource == "" {
		return "", errors.New("no PIN: give pin-source=/path/of/a/file in the URI")
	}
	path, err := pinPath(u.PINSource)
	if err != nil {
		return "", fmt.Errorf("pin-source %w", err)
	}
	return path, nil
}

// String returns the URI in one canonical form: attributes in a fixed order, only what must be percent-encoded encoded. A
// pin-value is left out.
func (u URI) String() string {
	var path, query []string
	for _, a := range pathAttributes {
		if v := *a.value(&u); v != "" {
			path = append(path, a.name+"="+encode(v, pathChars))
		}
	}
	if len(u.ID) > 0 {
		var b strings.Builder
		for _, c := range u.ID {
			fmt.Fprintf(&b, "%%%02X", c)
		}
		path = append(path, "id="+b.String())
	}
	for _, a := range queryAttributes {
		if v := *a.value(&u); v != "" {
			query = append(query, a.name+"="+encode(v, queryChars))
		}
	}
	s := "pkcs11:" + strings.Join(path, ";")
	if len(query) > 0 {
		s += "?" + strings.Join(query, "&")
	}
	return s
}

// GoString returns the same as String.
func (u URI) GoString() string { return u.String() }

func encode(v, chars string) string {
	var b strings.Builder
	for i := range len(v) {
		if c := v[i]; plain(c, chars) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
