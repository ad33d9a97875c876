package vnet

import (
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/net/idna"
)

// maxHostInput bounds a host name before it is mapped to ASCII, in bytes. An internationalised name of 253 octets in
// ASCII form is shorter than this in any encoding people write.
const maxHostInput = 1024

// ParsePrefix reads a prefix such as "10.0.0.0/8", or an address, which stands for itself alone, and returns it in
// canonical form. Errors wrap [ErrInvalid] and suggest what to write instead.
func ParsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("vnet: %w prefix %q: write an address or a prefix such as 10.0.0.0/8", ErrInvalid, s)
		}
		if a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("vnet: %w prefix %q: an address with a zone means something on one host only; write it without %q",
				ErrInvalid, s, "%"+a.Zone())
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	if strings.Contains(s, "%") {
		return netip.Prefix{}, fmt.Errorf("vnet: %w prefix %q: a prefix has no zone", ErrInvalid, s)
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("vnet: %w prefix %q: write an address or a prefix such as 10.0.0.0/8", ErrInvalid, s)
	}
	return CanonicalPrefix(p)
}

// CanonicalPrefix returns p, with an IPv4-mapped IPv6 prefix as the IPv4 prefix it means. A prefix with bits set
// beyond its length is refused with the masked one as a suggestion. Errors wrap [ErrInvalid].
func CanonicalPrefix(p netip.Prefix) (netip.Prefix, error) {
	if !p.IsValid() {
		return netip.Prefix{}, fmt.Errorf("vnet: %w prefix: no address or a length out of range", ErrInvalid)
	}
	m := p.Masked()
	if a := m.Addr(); a.Is4In6() && m.Bits() >= 96 {
		m = netip.PrefixFrom(a.Unmap(), m.Bits()-96)
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("vnet: %w prefix %s: it has bits set beyond its length; write %s", ErrInvalid, p, m)
	}
	return m, nil
}

// profile maps host names to lower-case ASCII as a resolver does (UTS 46, non-transitional). It lets through some
// ASCII that no host name has; checkHost refuses that afterwards.
var profile = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.Transitional(false), idna.StrictDomainName(false), idna.CheckHyphens(false))

// CanonicalHost returns a host name, or "*." and a host name, in the one form that is stored and compared: lower case,
// internationalised labels in ASCII (RFC 5891), no final dot. Names that a resolver may take for an address are
// refused, as are the empty name and anything that is no host name. Underscores are allowed, since private names have
// them. The result is its own canonical form. Errors wrap [ErrInvalid].
func CanonicalHost(s string) (string, error) {
	if len(s) > maxHostInput {
		return "", fmt.Errorf("vnet: %w host name: it is longer than %d bytes", ErrInvalid, maxHostInput)
	}
	full := s
	s = strings.TrimSuffix(s, ".")
	wild := strings.HasPrefix(s, "*.")
	if wild {
		s = s[2:]
	}
	ascii := s
	if !plain(s) {
		var err error
		if ascii, err = profile.ToASCII(s); err != nil {
			return "", fmt.Errorf("vnet: %w host name %q: %w", ErrInvalid, full, err)
		}
	}
	if why := checkHost(ascii); why != "" {
		return "", fmt.Errorf("vnet: %w host name %q: %s", ErrInvalid, full, why)
	}
	if wild {
		if len(ascii)+2 > maxHost {
			return "", fmt.Errorf("vnet: %w host name %q: it is longer than %d octets", ErrInvalid, full, maxHost)
		}
		return "*." + ascii, nil
	}
	return ascii, nil
}

// plain reports whether s is lower-case ASCII without internationalised labels, so that mapping would not change it.
func plain(s string) bool {
	for i := range len(s) {
		if !hostByte(s[i]) && s[i] != '.' {
			return false
		}
	}
	return !strings.Contains(s, "xn--")
}

// canonical reports whether s is in the form of [CanonicalHost], and does not begin with "*.". Of names with hyphens in a
// row, among them internationalised ones, it says no, and CanonicalHost knows.
func canonical(s string) bool {
	if len(s) > maxHost {
		return false
	}
	before, label := byte('.'), 0 // the byte before, and where its label begins
	for i := range len(s) {
		c := s[i]
		switch {
		case !hostBytes[c] || c == '-' && (before == '.' || before == '-'):
			return false
		case c != '.':
		case before == '.' || before == '-' || i-label > maxLabel:
			return false
		default:
			label = i + 1
		}
		before = c
	}
	return before != '.' && before != '-' && len(s)-label <= maxLabel && !numeric(s[label:])
}

// hostBytes are what canonical names consist of.
var hostBytes = func() (is [256]bool) {
	for c := range is {
		is[c] = hostByte(byte(c)) || c == '.'
	}
	return is
}()

func hostByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_'
}

// maxHost and maxLabel are the limits of RFC 1035, section 2.3.4, in octets, without the final dot.
const (
	maxHost  = 253
	maxLabel = 63
)

// checkHost returns what is wrong with a name in ASCII form, or "".
func checkHost(s string) string {
	if s == "" {
		return "it is empty"
	}
	if len(s) > maxHost {
		return fmt.Sprintf("it is longer than %d octets", maxHost)
	}
	last := ""
	for label := range strings.SplitSeq(s, ".") {
		if label == "" {
			return "it has an empty label"
		}
		if len(label) > maxLabel {
			return fmt.Sprintf("a label is longer than %d octets", maxLabel)
		}
		if label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Sprintf("label %q begins or ends with a hyphen", label)
		}
		for i := range len(label) {
			if !hostByte(label[i]) {
				return fmt.Sprintf("label %q holds a character that no host name has", label)
			}
		}
		last = label
	}
	if numeric(last) {
		return "it ends in a number, so it may be read as an address; write addresses as prefixes"
	}
	return ""
}

// numeric reports whether a name that ends in this label may be read as an IPv4 address in decimal, octal or
// hexadecimal form.
func numeric(label string) bool {
	digits, base16 := strings.CutPrefix(label, "0x")
	for i := range len(digits) {
		c := digits[i]
		if !(c >= '0' && c <= '9' || base16 && c >= 'a' && c <= 'f') {
			return false
		}
	}
	return true
}
