package reqtarget

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

var (
	errForm = errors.New("request target is not a path")
	errByte = errors.New("request target holds a byte that may not stand in one")
)

// A Target is a request's path and query as they came, byte for byte.
type Target struct {
	Path     string // begins with "/"
	Query    string
	HasQuery bool // so that "/?" stays "/?"
}

// Of takes the target from the request line or :path. An absolute form (RFC 9112, section 3.2.2) loses its scheme
// and authority, which net/http has moved to Host.
func Of(r *http.Request) (Target, error) {
	raw := r.RequestURI
	if !strings.HasPrefix(raw, "/") {
		rest, ok := strings.CutPrefix(raw, "https://")
		if !ok || r.ProtoMajor != 1 {
			return Target{}, errForm
		}
		i := strings.IndexAny(rest, "/?")
		switch {
		case i < 0:
			raw = "/"
		case rest[i] == '?':
			raw = "/" + rest[i:]
		default:
			raw = rest[i:]
		}
	}
	for i := range len(raw) {
		// A fragment never crosses the wire; an origin that cuts there would see another path than we do.
		if c := raw[i]; c <= ' ' || c == 0x7f || c == '#' {
			return Target{}, errByte
		}
	}
	var t Target
	t.Path, t.Query, t.HasQuery = strings.Cut(raw, "?")
	return t, nil
}

// Ambiguous reports whether an origin could read another path out of t than the prefix match did: dot segments, plain or
// encoded or behind a path parameter, and anything that some servers take for a slash.
func (t Target) Ambiguous() bool {
	p := strings.ToLower(t.Path)
	if strings.Contains(p, "%2f") || strings.Contains(p, "%5c") || strings.Contains(p, "\\") || strings.Contains(p, "//") {
		return true
	}
	p = strings.ReplaceAll(p, "%2e", ".")
	p = strings.ReplaceAll(p, "%3b", ";")
	for seg := range strings.SplitSeq(p[1:], "/") {
		if name, _, _ := strings.Cut(seg, ";"); name == "." || name == ".." {
			return true
		}
	}
	return false
}

// Readings returns the paths other than t's own that an origin may read out of it: without escapes that nothing needs, which
// change no path (RFC 3986, section 6.2.2.2), and without the parameters of segments (section 3.3). Where the path decides
// something, all of them have to decide the same.
func (t Target) Readings() (list []string) {
	if !strings.ContainsAny(t.Path, "%;") {
		return nil
	}
	plain := unescapeUnreserved(t.Path)
	for _, p := range []string{plain, withoutParameters(plain)} {
		if p != t.Path && !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	return list
}

// unescapeUnreserved decodes the escapes of unreserved characters (RFC 3986, section 2.3).
func unescapeUnreserved(path string) string {
	if !strings.Contains(path, "%") {
		return path
	}
	out := make([]byte, 0, len(path))
	for len(path) > 0 {
		if len(path) >= 3 && path[0] == '%' {
			if c, err := strconv.ParseUint(path[1:3], 16, 8); err == nil && unreserved(byte(c)) {
				out, path = append(out, byte(c)), path[3:]
				continue
			}
		}
		out, path = append(out, path[0]), path[1:]
	}
	return string(out)
}

func unreserved(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}

// withoutParameters cuts each segment of path at its first semicolon, escaped or not.
func withoutParameters(path string) string {
	segments := strings.Split(path, "/")
	for i, s := range segments {
		if at := strings.Index(strings.ToLower(s), "%3b"); at >= 0 {
			s = s[:at]
		}
		segments[i], _, _ = strings.Cut(s, ";")
	}
	return strings.Join(segments, "/")
}

// URL returns a URL that net/http writes as exactly these bytes, for an origin at host.
func (t Target) URL(scheme, host string) (*url.URL, error) {
	u := &url.URL{Scheme: scheme, Host: host, RawQuery: t.Query, ForceQuery: t.HasQuery}
	if !strings.HasPrefix(t.Path, "//") {
		u.Opaque = t.Path
		return u, nil
	}
	// An opaque part with two slashes would be written in absolute form, with the path's first segment as the host.
	path, err := url.PathUnescape(t.Path)
	if err != nil {
		return nil, errByte
	}
	u.Path, u.RawPath = path, t.Path
	if u.EscapedPath() != t.Path {
		return nil, errByte
	}
	return u, nil
}
