package proxyproto

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/pires/go-proxyproto"
)

// Header returns the header that says that src came to dst. The version is "v1" or "v2"; network is "tcp" or "udp", of which
// v1 knows TCP alone. IPv4 addresses beside IPv6 ones are written in their mapped form.
func Header(version, network string, src, dst netip.AddrPort) ([]byte, error) {
	var v byte
	switch version {
	case "v1":
		v = 1
	case "v2":
		v = 2
	default:
		return nil, fmt.Errorf("proxyproto: there is no version %q", version)
	}
	src, dst = plain(src), plain(dst)
	var from, to net.Addr
	switch {
	case network == "tcp":
		from, to = net.TCPAddrFromAddrPort(src), net.TCPAddrFromAddrPort(dst)
	case network == "udp" && v == 2:
		from, to = net.UDPAddrFromAddrPort(src), net.UDPAddrFromAddrPort(dst)
	default:
		return nil, fmt.Errorf("proxyproto: version %s has no %s", version, network)
	}
	h := proxyproto.HeaderProxyFromAddrs(v, from, to)
	b, err := h.Format()
	if err != nil {
		return nil, fmt.Errorf("proxyproto: %w", err)
	}
	return b, nil
}

func plain(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
