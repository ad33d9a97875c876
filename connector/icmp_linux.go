package connector

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/keyhaven/keyhaven/tunnel"
)

// echoRemedy is what to do about errEchoForbidden.
const echoRemedy = `permit them with: sysctl -w net.ipv4.ping_group_range="0 2147483647" (and the same line in /etc/sysctl.d/ to keep it)`

// pingSocket is one of Linux's ping sockets, for which no privilege is needed where the sysctl permits them. The kernel
// gives each socket an identifier of its own and hands it the answers to that.
type pingSocket struct {
	file *os.File
	raw  syscall.RawConn
	to   netip.Addr
	fam  icmpFamily
	sent sentTimes

	ttl int // that is set
	buf []byte
}

func openEcho(to netip.Addr) (echoSocket, error) {
	domain, proto := unix.AF_INET6, unix.IPPROTO_ICMPV6
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: to.As16()}
	options := [][2]int{{unix.IPV6_RECVERR, 1}, {unix.IPV6_RECVHOPLIMIT, 1}}
	level := unix.IPPROTO_IPV6
	if to.Is4() {
		domain, proto, level = unix.AF_INET, unix.IPPROTO_ICMP, unix.IPPROTO_IP
		sa = &unix.SockaddrInet4{Addr: to.As4()}
		options = [][2]int{{unix.IP_RECVERR, 1}, {unix.IP_RECVTTL, 1}}
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err == unix.EACCES || err == unix.EPERM {
		return nil, errEchoForbidden
	}
	if err != nil {
		return nil, fmt.Errorf("open a ping socket: %w", os.NewSyscallError("socket", err))
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, level, o[0], o[1]); err != nil {
			unix.Close(fd) //nolint:errcheck // nothing to lose
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	if err := unix.Connect(fd, sa); err != nil {
		unix.Close(fd) //nolint:errcheck // nothing to lose
		return nil, os.NewSyscallError("connect", err)
	}
	s := &pingSocket{file: os.NewFile(uintptr(fd), "icmp"), to: to, fam: icmpOf(to)}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		s.file.Close() //nolint:errcheck // nothing to lose
		return nil, err
	}
	return s, nil
}

func (s *pingSocket) close() error { return s.file.Close() }

// send implements echoSocket.
func (s *pingSocket) send(r tunnel.EchoRequest) error {
	s.buf = s.fam.appendEcho(s.buf[:0], 0, r.Seq, r.Payload)
	var failed error
	err := s.raw.Write(func(fd uintptr) bool {
		if failed = s.setTTL(int(fd), int(r.TTL)); failed != nil {
			return true
		}
		// An error that an earlier request brought about is reported once, in place of sending.
		for range 3 {
			s.sent.note(r.Seq)
			if failed = unix.Send(int(fd), s.buf, 0); failed == nil || failed == unix.EAGAIN {
				break
			}
		}
		return failed != unix.EAGAIN
	})
	if err != nil {
		return err
	}
	return unreachableOf(failed)
}

// unreachableOf makes what the kernel says at once an answer for the flow.
func unreachableOf(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EMSGSIZE):
		return &tunnel.UnreachableError{Code: tunnel.UnreachableTooBig}
	case errors.Is(err, unix.ENETUNREACH):
		return &tunnel.UnreachableError{Code: tunnel.UnreachableNet}
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return &tunnel.UnreachableError{Code: tunnel.UnreachableProhibited}
	}
	return err
}

// setTTL sets the hop limit of the next request; zero is the default.
func (s *pingSocket) setTTL(fd, ttl int) error {
	if ttl == s.ttl {
		return nil
	}
	level, option, value := unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, ttl
	if s.to.Is4() {
		level, option = unix.IPPROTO_IP, unix.IP_TTL
	}
	if ttl == 0 {
		value = -1 // the kernel's default, for both
	}
	if err := unix.SetsockoptInt(fd, level, option, value); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	s.ttl = ttl
	return nil
}

var echoBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// receive implements echoSocket.
func (s *pingSocket) receive() (tunnel.EchoReply, error) {
	var reply tunnel.EchoReply
	var failed error
	err := s.raw.Read(func(fd uintptr) bool {
		buf := echoBuffers.Get().(*[64 << 10]byte)
		defer echoBuffers.Put(buf)
		for {
			var ok bool
			reply, ok, failed = s.read(int(fd), buf[:])
			switch {
			case failed == unix.EAGAIN:
				return false
			case failed != nil && isPending(failed):
				continue // what it reports is in the error queue
			case ok || failed != nil:
				return true
			}
		}
	})
	if err == nil {
		err = failed
	}
	return reply, err
}

// isPending reports whether a receive may fail with err because of an earlier request.
func isPending(err error) bool {
	switch err {
	case unix.EHOSTUNREACH, unix.ENETUNREACH, unix.ECONNREFUSED, unix.EMSGSIZE, unix.EPROTO, unix.EACCES, unix.EHOSTDOWN, unix.ENOPROTOOPT, unix.EOPNOTSUPP:
		return true
	}
	return false
}

// read takes one message, if there is one; ok is false if it is none for the flow.
func (s *pingSocket) read(fd int, buf []byte) (r tunnel.EchoReply, ok bool, err error) {
	var oob [512]byte
	n, oobn, _, _, err := unix.Recvmsg(fd, buf, oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if err == nil {
		r, ok = s.routerAnswer(buf[:n], oob[:oobn])
		return r, ok, nil
	}
	if err != unix.EAGAIN {
		return r, false, err
	}
	n, oobn, _, from, err := unix.Recvmsg(fd, buf, oob[:], unix.MSG_DONTWAIT)
	if err != nil {
		return r, false, err
	}
	r, ok = s.hostAnswer(buf[:n], oob[:oobn], from)
	return r, ok, nil
}

// hostAnswer reads an echo reply.
func (s *pingSocket) hostAnswer(b, oob []byte, from unix.Sockaddr) (tunnel.EchoReply, bool) {
	_, seq, payload, ok := parseEcho(b, s.fam.reply)
	addr := addrOf(from)
	if !ok || addr != s.to {
		return tunnel.EchoReply{}, false
	}
	rtt, known := s.sent.since(seq)
	if !known {
		return tunnel.EchoReply{}, false
	}
	r := tunnel.EchoReply{Seq: seq, Type: tunnel.EchoReplied, From: addr, HostRTT: rtt, Payload: slices.Clone(payload)}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return r, true
	}
	for _, m := range messages {
		is4 := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_TTL
		is6 := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_HOPLIMIT
		if (is4 || is6) && len(m.Data) >= 4 {
			r.TTL = uint8(binary.NativeEndian.Uint32(m.Data))
		}
	}
	return r, true
}

// routerAnswer reads an entry of the error queue: the request, and who refused it how.
func (s *pingSocket) routerAnswer(b, oob []byte) (tunnel.EchoReply, bool) {
	_, seq, _, ok := parseEcho(b, s.fam.request)
	if !ok {
		return tunnel.EchoReply{}, false
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return tunnel.EchoReply{}, false
	}
	for _, m := range messages {
		is4 := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR
		is6 := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
		if !is4 && !is6 {
			continue
		}
		if r, ok := s.parseExtendedError(m.Data); ok {
			r.Seq = seq
			r.HostRTT, _ = s.sent.since(seq)
			return r, true
		}
	}
	return tunnel.EchoReply{}, false
}

// parseExtendedError reads a struct sock_extended_err and the address that follows it. See ip(7).
func (s *pingSocket) parseExtendedError(b []byte) (tunnel.EchoReply, bool) {
	const size = 16
	if len(b) < size {
		return tunnel.EchoReply{}, false
	}
	r := tunnel.EchoReply{From: s.to}
	var ok bool
	switch origin, typ, code := b[4], b[5], b[6]; origin {
	case unix.SO_EE_ORIGIN_LOCAL:
		if syscall.Errno(binary.NativeEndian.Uint32(b)) != unix.EMSGSIZE {
			return r, false
		}
		r.Type, r.Code, ok = tunnel.EchoUnreachable, tunnel.UnreachableTooBig, true
		return r, ok
	case unix.SO_EE_ORIGIN_ICMP, unix.SO_EE_ORIGIN_ICMP6:
		r.Type, r.Code, ok = s.fam.report(typ, code)
	}
	// The offender, as a struct sockaddr.
	switch b := b[size:]; {
	case len(b) >= 8 && binary.NativeEndian.Uint16(b) == unix.AF_INET:
		r.From = netip.AddrFrom4([4]byte(b[4:8]))
	case len(b) >= 24 && binary.NativeEndian.Uint16(b) == unix.AF_INET6:
		r.From = netip.AddrFrom16([16]byte(b[8:24])).Unmap()
	}
	return r, ok
}

func addrOf(sa unix.Sockaddr) netip.Addr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(sa.Addr).Unmap()
	}
	return netip.Addr{}
}
