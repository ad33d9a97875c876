package control

import (
	"crypto/rand"
	"encoding/base32"
	"net/netip"
	"strings"

	"github.com/keyhaven/keyhaven/vnet"
)

// Bounds on what people enter.
const (
	maxName    = 63
	maxComment = 256
)

var idEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// newID returns a random identifier of 80 bits. The underscore keeps it apart from every name.
func newID(kind string) string {
	var b [10]byte
	rand.Read(b[:])
	return kind + "_" + idEncoding.EncodeToString(b[:])
}

// checkName accepts the names of networks and tunnels: what may stand in a DNS label, in lower case.
func checkName(what, name string) error {
	ok := name != "" && len(name) <= maxName && name[0] != '-' && name[len(name)-1] != '-'
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-'
	}
	if !ok {
		return refusal(CodeInvalid, "use up to 63 of a-z, 0-9 and '-', not beginning or ending with '-'",
			"%q is not a name for a %s", clip(name), what)
	}
	return nil
}

func checkComment(s string) error {
	if len(s) > maxComment || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == 0xfffd }) {
		return refusal(CodeInvalid, "use up to 256 bytes of UTF-8 on one line", "the comment is too long or not plain text")
	}
	return nil
}

// parsePrefix accepts a CIDR in canonical form, or an address, which stands for itself alone.
func parsePrefix(s string) (netip.Prefix, error) {
	p, err := vnet.ParsePrefix(s)
	if err != nil {
		return p, invalid(err)
	}
	return p, nil
}

// canonicalHost accepts a host name, or one behind "*.".
func canonicalHost(s string) (string, error) {
	h, err := vnet.CanonicalHost(s)
	if err != nil {
		return "", invalid(err)
	}
	return h, nil
}

// invalid makes a refusal of an error of vnet, which names its remedy itself.
func invalid(err error) error {
	return refusal(CodeInvalid, "", "%s", strings.TrimPrefix(err.Error(), "vnet: "))
}

// clip keeps foreign text in messages short.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// plain makes text that a connector sends of itself fit for a terminal and a log.
func plain(s string) string {
	return clip(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s))
}
