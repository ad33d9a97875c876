package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// maxUnreadRefused bounds what is read of a peer whose handshake failed, so that it sees the alert.
const maxUnreadRefused = 64 << 10

// portTries is how often a port that UDP got from the kernel is looked for that TCP has free too.
const portTries = 16

// listenSockets opens the UDP socket, and the TCP socket unless there shall be none. Where the port is 0 and TCPAddr says
// nothing else, both get the same.
func listenSockets(cfg ListenConfig) (*net.UDPConn, *net.TCPListener, error) {
	addr, err := net.ResolveUDPAddr("udp", cfg.Addr)
	if err != nil {
		return nil, nil, err
	}
	for try := 1; ; try++ {
		udp, err := net.ListenUDP("udp", addr)
		if err != nil {
			return nil, nil, err
		}
		tcp, err := listenTCP(cfg, addr, udp)
		if err == nil {
			return udp, tcp, nil
		}
		udp.Close() //nolint:errcheck // nothing was received
		if addr.Port != 0 || cfg.TCPAddr != "" || try == portTries {
			return nil, nil, err
		}
	}
}

func listenTCP(cfg ListenConfig, addr *net.UDPAddr, udp *net.UDPConn) (*net.TCPListener, error) {
	switch cfg.TCPAddr {
	case "-":
		return nil, nil
	case "":
		cfg.TCPAddr = (&net.TCPAddr{IP: addr.IP, Zone: addr.Zone, Port: udp.LocalAddr().(*net.UDPAddr).Port}).String()
	}
	listen := cfg.ListenTCP
	if listen == nil {
		listen = net.Listen
	}
	ln, err := listen("tcp", cfg.TCPAddr)
	if err != nil {
		return nil, err
	}
	return ln.(*net.TCPListener), nil
}

// TCPAddr is the address that the listener has for TLS over TCP, nil if there is none.
func (l *Listener) TCPAddr() net.Addr {
	if l.tcp == nil {
		return nil
	}
	return l.tcp.Addr()
}

// serveTCP accepts connections until the socket is closed.
func (l *Listener) serveTCP(ctx context.Context, wg *sync.WaitGroup) {
	var delay time.Duration
	for {
		conn, err := l.tcp.AcceptTCP()
		if err == nil {
			delay = 0
			p := l.newPending()
			if p == nil {
				l.warn(conn.RemoteAddr(), "connection refused", ErrBusy)
				conn.Close() //nolint:errcheck // nothing was said
				continue
			}
			wg.Go(func() { l.serveTCPConn(ctx, conn, p) })
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if delay = min(max(2*delay, 5*time.Millisecond), time.Second); ctx.Err() == nil {
			l.log.Warn("TCP connection not accepted", "err", err) // too few descriptors, most likely
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
		}
	}
}

func (l *Listener) serveTCPConn(ctx context.Context, raw *net.TCPConn, p *pendingConn) {
	defer p.end()
	tuneTCP(raw)
	raw.SetKeepAliveConfig(net.KeepAliveConfig{}) //nolint:errcheck // the idle timeout does it
	cork := &corkConn{Conn: raw}
	conn := tls.Server(cork, l.tls)
	setup, cancel := context.WithTimeout(context.WithValue(ctx, pendingKey{}, p), l.cfg.Limits.SetupTimeout)
	err := conn.HandshakeContext(setup)
	cancel()
	if err != nil {
		l.warn(raw.RemoteAddr(), "handshake failed", fmt.Errorf("TCP: %w", err))
		hangUp(ctx, raw)
		return
	}
	cork.corked = true
	streams := 1
	if conn.ConnectionState().NegotiatedProtocol == PeerALPN {
		streams += maxPeerFlows
	}
	m := newMux(conn, cork, false, l.cfg.Limits, streams)
	m.start()
	l.serveConn(ctx, m, p)
}

// hangUp closes a connection whose peer may not have read yet why. In TLS 1.3 the peer writes on before it learns that
// its certificate is refused; closing over what it wrote would reset the connection, and the alert could be lost.
func hangUp(ctx context.Context, raw *net.TCPConn) {
	stop := context.AfterFunc(ctx, func() { raw.Close() }) //nolint:errcheck // see below
	defer stop()
	raw.SetDeadline(time.Now().Add(muxLinger))  //nolint:errcheck // it is closed, then
	raw.CloseWrite()                            //nolint:errcheck // the peer has gone, then
	io.CopyN(io.Discard, raw, maxUnreadRefused) //nolint:errcheck // ends at the latest with the deadline
	raw.Close()                                 //nolint:errcheck // nothing is left to lose
}
