package zone

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/net/idna"
)

// maxName is the longest host name in text form without the final dot (RFC 1035, section 2.3.4).
const maxName = 253

var (
	errNameEmpty  = errors.New("empty host name")
	errNameLong   = errors.New("host name longer than 253 bytes")
	errNameLabel  = errors.New("host name with an empty label, or one longer than 63 bytes")
	errNameByte   = errors.New("host name with a byte that is not a letter, digit, hyphen or underscore")
	errNameIP     = errors.New("an IP address is not a host name")
	errHostSyntax = errors.New("not a host name with an optional port")
)

// Canonical returns the one form of a host name that the edge compares: lower case, without a final dot, in ASCII. Names
// from the wire must be ASCII already (internationalised ones as A-labels, RFC 5890). Anything else is an error, and so is
// an IP address. It allocates nothing for a name that is canonical already.
func Canonical(name string) (string, error) {
	name = strings.TrimSuffix(name, ".")
	if name == "" {
		return "", errNameEmpty
	}
	if len(name) > maxName {
		return "", errNameLong
	}
	label, upper := 0, false
	for i := range len(name) {
		switch c := name[i]; {
		case c == '.':
			if label == 0 {
				return "", errNameLabel
			}
			label = 0
			continue
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
		case 'A' <= c && c <= 'Z':
			upper = true
		default:
			return "", errNameByte
		}
		if label++; label > 63 {
			return "", errNameLabel
		}
	}
	if label == 0 {
		return "", errNameLabel
	}
	if c := name[len(name)-1]; '0' <= c && c <= '9' {
		if _, err := netip.ParseAddr(name); err == nil {
			return "", errNameIP
		}
	}
	if upper {
		name = strings.ToLower(name)
	}
	return name, nil
}

// CanonicalHost is [Canonical] for a Host header or an :authority: a name and an optional port. IPv6 literals are refused,
// as they can select no zone.
func CanonicalHost(hostport string) (string, error) {
	host := hostport
	if i := strings.LastIndexByte(hostport, ':'); i >= 0 {
		h, port, err := net.SplitHostPort(hostport)
		if err != nil {
			return "", errHostSyntax
		}
		if _, err := strconv.ParseUint(port, 10, 16); err != nil && port != "" {
			return "", errHostSyntax
		}
		host = h
	}
	return Canonical(host)
}

// Pattern returns the canonical form of a host in a configuration: a name, or "*." and a name of two labels or more, which
// stands for exactly one label in front of it. Internationalised names become A-labels.
func Pattern(host string) (string, error) {
	name, wildcard := strings.CutPrefix(host, "*.")
	ascii, err := idna.Lookup.ToASCII(strings.TrimSuffix(name, "."))
	if err != nil && !isASCII(name) {
		return "", fmt.Errorf("host %q: %w", host, err)
	}
	if err != nil { // names with an underscore are in use, and not IDNA's concern
		ascii = name
	}
	if ascii, err = Canonical(ascii); err != nil {
		return "", fmt.Errorf("host %q: %w", host, err)
	}
	if !wildcard {
		return ascii, nil
	}
	if !strings.Contains(ascii, ".") {
		return "", fmt.Errorf("host %q: a wildcard must stand in front of two labels or more, such as *.example.com", host)
	}
	return "*." + ascii, nil
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// wildcardOf returns the pattern whose wildcard would cover name: "www.example.com" gives "*.example.com".
func wildcardOf(name string) (string, bool) {
	i := strings.IndexByte(name, '.')
	if i < 0 {
		return "", false
	}
	return "*" + name[i:], true
}
