package connector

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/keyhaven/keyhaven/tunnel"
)

// echoRemedy is what to do about errEchoForbidden.
const echoRemedy = "permit ICMP sockets to the connector's user"

// dgramSocket is a socket of macOS for ICMP without privileges. It sees the answers to others too, so that it tells its own
// by identifier and address.
type dgramSocket struct {
	conn *icmp.PacketConn
	to   netip.Addr
	fam  icmpFamily
	id   uint16
	sent sentTimes

	ttl int // that is set
	out []byte
	in  []byte
}

func openEcho(to netip.Addr) (echoSocket, error) {
	network, any := "udp6", "::"
	if to.Is4() {
		network, any = "udp4", "0.0.0.0"
	}
	conn, err := icmp.ListenPacket(network, any)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return nil, errEchoForbidden
	}
	if err != nil {
		return nil, err
	}
	s := &dgramSocket{conn: conn, to: to, fam: icmpOf(to), id: uint16(rand.Uint32()), in: make([]byte, 64<<10)}
	if to.Is4() {
		err = conn.IPv4PacketConn().SetControlMessage(ipv4.FlagTTL, true)
	} else {
		err = conn.IPv6PacketConn().SetControlMessage(ipv6.FlagHopLimit, true)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return s, nil
}

func (s *dgramSocket) close() error { return s.conn.Close() }

// send implements echoSocket.
func (s *dgramSocket) send(r tunnel.EchoRequest) error {
	if err := s.setTTL(int(r.TTL)); err != nil {
		return err
	}
	s.out = s.fam.appendEcho(s.out[:0], s.id, r.Seq, r.Payload)
	s.sent.note(r.Seq)
	_, err := s.conn.WriteTo(s.out, &net.UDPAddr{IP: s.to.AsSlice()})
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return &tunnel.UnreachableError{Code: unreachableCode(err)}
	}
	return err
}

// setTTL sets the hop limit of the next request; zero is the default.
func (s *dgramSocket) setTTL(ttl int) error {
	if ttl == s.ttl {
		return nil
	}
	value := ttl
	if value == 0 {
		value = 64
	}
	s.ttl = ttl
	if s.to.Is4() {
		return s.conn.IPv4PacketConn().SetTTL(value)
	}
	return s.conn.IPv6PacketConn().SetHopLimit(value)
}

// receive implements echoSocket.
func (s *dgramSocket) receive() (tunnel.EchoReply, error) {
	for {
		n, ttl, from, err := s.read()
		if err != nil {
			return tunnel.EchoReply{}, err
		}
		if r, ok := s.answer(s.in[:n], from); ok {
			r.TTL = uint8(ttl)
			return r, nil
		}
	}
}

// answer reads a message and reports whether it answers one of ours.
func (s *dgramSocket) answer(b []byte, from netip.Addr) (tunnel.EchoReply, bool) {
	r := tunnel.EchoReply{From: from, Type: tunnel.EchoReplied}
	id, seq, payload, ok := parseEcho(b, s.fam.reply)
	if ok {
		r.Payload, ok = slices.Clone(payload), from == s.to
	} else {
		var to netip.Addr
		r.Type, r.Code, to, id, seq, ok = s.fam.quotedEcho(b)
		ok = ok && to == s.to
	}
	rtt, known := s.sent.since(seq)
	r.Seq, r.HostRTT = seq, rtt
	return r, ok && known && id == s.id
}

func (s *dgramSocket) read() (n, ttl int, from netip.Addr, err error) {
	var addr net.Addr
	if s.to.Is4() {
		var cm *ipv4.ControlMessage
		if n, cm, addr, err = s.conn.IPv4PacketConn().ReadFrom(s.in); cm != nil {
			ttl = cm.TTL
		}
	} else {
		var cm *ipv6.ControlMessage
		if n, cm, addr, err = s.conn.IPv6PacketConn().ReadFrom(s.in); cm != nil {
			ttl = cm.HopLimit
		}
	}
	if u, ok := addr.(*net.UDPAddr); ok {
		from = u.AddrPort().Addr().Unmap().WithZone("")
	}
	return n, ttl, from, err
}
