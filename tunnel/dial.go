package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/mtls"

	"github.com/quic-go/quic-go"
)

// Dial connects to an edge and registers. The error is ErrNoAnswer (wrapped) if nothing answers, a *RefusedError if the
// edge does not admit the connector, and says otherwise what failed, for each carrier that was tried. The caller must call
// Run, or Close.
func Dial(ctx context.Context, cfg DialConfig) (*ClientSession, error) {
	if cfg.Identity == nil || cfg.Handle == nil {
		return nil, errors.New("tunnel: dial: DialConfig needs Identity and Handle")
	}
	cfg, err := cfg.withDefaults(defaultSessionWindow)
	if err != nil {
		return nil, fmt.Errorf("tunnel: dial %s: %w", cfg.Addr, err)
	}
	var c *ClientSession
	d := dialer{DialConfig: cfg, tls: cfg.tlsConfig(ALPN), register: func(ctx context.Context, car carrier) (err error) {
		c, err = newClientSession(ctx, car, cfg)
		return err
	}}
	shut, err := d.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("tunnel: dial %s: %w", cfg.Addr, err)
	}
	c.shut = sync.OnceFunc(shut)
	return c, nil
}

// withDefaults checks c and fills in what is zero.
func (c DialConfig) withDefaults(window int) (DialConfig, error) {
	setDefault(&c.Registration.Connections, defaultConnections)
	c.Registration.Minor = protocolMinor
	if c.minor0 {
		c.Registration.Minor = 0
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&c.RaceDelay, defaultRaceDelay)
	c.Limits = c.Limits.withDefaults(window)
	return c, c.Registration.check()
}

// defaultRaceDelay is QUIC's head start before TCP.
const defaultRaceDelay = 300 * time.Millisecond

func (c DialConfig) tlsConfig(alpn string) *tls.Config {
	return c.Identity.ClientConfig(mtls.ClientOptions{ALPN: []string{alpn}, Expect: mtls.AcceptKinds(mtls.KindEdge)})
}

// dialQUIC makes a QUIC connection to the first address that answers.
func (d *dialer) dialQUIC(ctx context.Context) (carrier, func(), error) {
	conf := connectorQUICConfig(d.Limits)
	conf.DisablePathMTUDiscovery = d.SmallPackets
	conf.EnableDatagrams = !d.minor0
	if d.Handle == nil {
		conf.MaxIncomingStreams = -1
	}
	conn, shut, err := dialQUIC(ctx, d.Addr, d.LocalAddr, d.tls, conf, d.Logger)
	if err != nil {
		return nil, nil, err
	}
	return newQUICCarrier(conn), shut, nil
}

// dialQUIC tries the addresses of addr in order. shut frees the socket; the connection must be closed before.
func dialQUIC(ctx context.Context, addr string, local netip.Addr, tlsConf *tls.Config, conf *quic.Config, log *slog.Logger) (_ *quic.Conn, shut func(), err error) {
	addrs, err := resolve(ctx, addr)
	if err != nil {
		return nil, nil, err
	}
	var errs []error
	for _, a := range addrs {
		conn, shut, err := dialOne(ctx, a, local, tlsConf, conf, log)
		if err == nil {
			return conn, shut, nil
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		errs = append(errs, fmt.Errorf("%s: %w", a, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, nil, errors.Join(errs...)
}

func resolve(ctx context.Context, addr string) ([]netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "udp", service)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	addrs := make([]netip.AddrPort, 0, len(ips))
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), uint16(port)))
	}
	return addrs, nil
}

func dialOne(ctx context.Context, to netip.AddrPort, local netip.Addr, tlsConf *tls.Config, conf *quic.Config, log *slog.Logger) (*quic.Conn, func(), error) {
	network := "udp6"
	if to.Addr().Is4() {
		network = "udp4"
	}
	var laddr *net.UDPAddr
	if local.IsValid() {
		laddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	udp, err := net.ListenUDP(network, laddr)
	if err != nil {
		return nil, nil, err
	}
	tr := newTransport(udp)
	shut := func() {
		tr.Close()  //nolint:errcheck // nothing is left to lose
		udp.Close() //nolint:errcheck // nothing is left to lose
	}
	conn, err := tr.Dial(ctx, net.UDPAddrFromAddrPort(to), tlsConf, conf)
	if err != nil {
		shut()
		return nil, nil, dialErrorOf(err)
	}
	reportBuffers(udp, log)
	return conn, shut, nil
}

// dialErrorOf is sessionErrorOf for a connection that never was.
func dialErrorOf(err error) error {
	var idle *quic.IdleTimeoutError
	if errors.As(err, &idle) {
		return ErrNoAnswer
	}
	mapped := sessionErrorOf(err)
	if se, ok := errors.AsType[*SessionError](mapped); ok && se.Err != nil {
		return se.Err
	}
	return mapped
}
