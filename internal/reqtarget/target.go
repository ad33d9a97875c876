package reqtarget

import (
	"errors"
	"net/http"
	"net/url"
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
