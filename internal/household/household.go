// Package household says which addresses count as one visitor where something is limited for each of them.
package household

import "net/netip"

// ipv6Bits is what an IPv6 visitor has to itself: a site's single network. See RFC 6177.
const ipv6Bits = 64

// Of returns what stands for all addresses of a's visitor: an IPv4 address itself, in its own form, or the first address
// of an IPv6 /64. A zone does not count. The zero address stands for itself.
func Of(a netip.Addr) netip.Addr {
	if a = a.Unmap().WithZone(""); !a.Is6() {
		return a
	}
	p, _ := a.Prefix(ipv6Bits) // fails for no IPv6 address without a zone
	return p.Addr()
}
