package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
)

const (
	// tcpDialTimeout bounds the making of a TCP connection, the way through a proxy included.
	tcpDialTimeout = 5 * time.Second
	// tlsTimeout bounds the TLS handshake. An edge gives up only later, so that it is this side that sees the silence.
	tlsTimeout = 4 * time.Second
	// maxTCPBacklog bounds what the kernel may hold unsent, so that what is urgent has a short way.
	maxTCPBacklog = 128 << 10
)

// dialTCP makes a TLS connection to the edge, through the proxy if there is one.
func (d *dialer) dialTCP(ctx context.Context) (carrier, func(), error) {
	conn, err := d.dialTLS(ctx)
	if err != nil {
		return nil, nil, err
	}
	streams := 0 // a peer edge opens none
	if d.Handle != nil {
		streams = d.Limits.MaxFlows + spareStreams
	}
	m := newMux(conn, conn.NetConn().(*corkConn), true, d.Limits, streams)
	m.start()
	return m, func() {}, nil
}

func (d *dialer) dialTLS(ctx context.Context) (*tls.Conn, error) {
	raw, err := d.dialThrough(ctx)
	if err != nil {
		return nil, err
	}
	if tcp, ok := raw.(*net.TCPConn); ok {
		tuneTCP(tcp)
	}
	cork := &corkConn{Conn: raw}
	conn := tls.Client(cork, d.tls)
	ctx, cancel := context.WithTimeout(ctx, tlsTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close() //nolint:errcheck // nothing is left to lose
		if errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			return nil, fmt.Errorf("TLS handshake: %w", ErrStalled)
		}
		if alertFrom(err) {
			return nil, fmt.Errorf("tunnel: %w (%w)", ErrCertificate, err)
		}
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	cork.corked = true
	return conn, nil
}

func (d *dialer) dialThrough(ctx context.Context) (net.Conn, error) {
	dialer := net.Dialer{Timeout: tcpDialTimeout, KeepAlive: -1}
	if d.LocalAddr.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(d.LocalAddr, 0))
	}
	if d.SmallSegments {
		dialer.Control = limitSegments
	}
	if d.Proxy != nil {
		p, err := d.Proxy()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrProxy, err)
		}
		if p != nil {
			return p.dial(ctx, &dialer, d.Addr)
		}
	}
	conn, err := dialer.DialContext(ctx, "tcp", d.Addr)
	switch {
	case err == nil:
		return conn, nil
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("nothing listens there; is the edge up, and does it take TCP? (%w)", err)
	case isTimeout(err):
		return nil, fmt.Errorf("%w (%w)", ErrNoAnswer, err)
	}
	return nil, err
}

func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return errors.Is(err, os.ErrDeadlineExceeded) || ok && ne.Timeout()
}
