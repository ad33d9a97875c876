package proxyproto

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

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

// Announce begins a connection over TCP with the header, within ctx. After an error the connection is of no use.
func Announce(ctx context.Context, conn net.Conn, version string, src, dst netip.AddrPort) error {
	b, err := Header(version, "tcp", src, dst)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetWriteDeadline(time.Unix(1, 0)) })
	_, err = conn.Write(b)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("proxyproto: announce the visitor: %w", err)
	}
	return nil
}

func plain(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
