package connector

import (
	"encoding/binary"
	"net/netip"

	"github.com/keyhaven/keyhaven/tunnel"
)

// Offsets in the headers that routers quote. See RFC 791, section 3.1, and RFC 8200, section 3.
const (
	ipv4MinHeader = 20
	ipv6Header    = 40
	protoICMP     = 1
	protoICMPv6   = 58
)

// quotedEcho reads the echo request that an ICMP error message b quotes, and where it was to go; ok is false if b is
// none that is about an echo request.
func (f icmpFamily) quotedEcho(b []byte) (t tunnel.EchoType, code byte, to netip.Addr, id, seq uint16, ok bool) {
	if len(b) < echoHeaderLen {
		return
	}
	if t, code, ok = f.report(b[0], b[1]); !ok {
		return
	}
	ok = false
	q := b[echoHeaderLen:]
	if f == icmp4 {
		if len(q) < ipv4MinHeader || q[0]>>4 != 4 || q[9] != protoICMP {
			return
		}
		n := int(q[0]&15) * 4
		if n < ipv4MinHeader || len(q) < n {
			return
		}
		to, q = netip.AddrFrom4([4]byte(q[16:20])), q[n:]
	} else {
		if len(q) < ipv6Header || q[0]>>4 != 6 || q[6] != protoICMPv6 {
			return
		}
		to, q = netip.AddrFrom16([16]byte(q[24:40])), q[ipv6Header:]
	}
	id, seq, _, ok = parseEcho(q, f.request)
	return
}

// An echoStatus is one of the IP_STATUS values of Windows' echo calls.
type echoStatus uint32

// The values that say more than failure. See the documentation of ICMP_ECHO_REPLY.
const (
	statusSuccess      echoStatus = 0
	statusNetUnreach   echoStatus = 11002
	statusHostUnreach  echoStatus = 11003
	statusProtoUnreach echoStatus = 11004
	statusPortUnreach  echoStatus = 11005
	statusTooBig       echoStatus = 11009
	statusTimedOut     echoStatus = 11010
	statusBadRoute     echoStatus = 11012
	statusTTLTransit   echoStatus = 11013
	statusTTLReassem   echoStatus = 11014
)

// answer says what the status means; ok is false if nobody answered.
func (s echoStatus) answer() (t tunnel.EchoType, code byte, ok bool) {
	switch s {
	case statusSuccess:
		return tunnel.EchoReplied, 0, true
	case statusNetUnreach, statusBadRoute:
		return tunnel.EchoUnreachable, tunnel.UnreachableNet, true
	case statusHostUnreach:
		return tunnel.EchoUnreachable, tunnel.UnreachableHost, true
	case statusProtoUnreach:
		return tunnel.EchoUnreachable, 2, true
	case statusPortUnreach:
		return tunnel.EchoUnreachable, tunnel.UnreachablePort, true
	case statusTooBig:
		return tunnel.EchoUnreachable, tunnel.UnreachableTooBig, true
	case statusTTLTransit:
		return tunnel.EchoTimeExceeded, 0, true
	case statusTTLReassem:
		return tunnel.EchoTimeExceeded, 1, true
	}
	return 0, 0, false
}

// An echoBuffer is what Windows' echo calls write: a reply and, elsewhere in the buffer, its payload.
type echoBuffer struct {
	b       []byte
	base    uint64 // b's address
	pointer int    // the size of a pointer, 4 or 8
}

// reply4 reads an ICMP_ECHO_REPLY:
//
//	0      address (4 bytes)
//	4      status (u32), in the host's order as all that follows
//	8      round trip (u32, milliseconds)
//	12     length n of the payload (u16), 2 bytes of nothing
//	16     where the payload is (pointer)
//	+      TTL (u8)
func (e echoBuffer) reply4() (r tunnel.EchoReply, ok bool) {
	if len(e.b) < 16+e.pointer+1 {
		return r, false
	}
	r.From = netip.AddrFrom4([4]byte(e.b[:4]))
	if r.Type, r.Code, ok = echoStatus(binary.LittleEndian.Uint32(e.b[4:])).answer(); !ok {
		return r, false
	}
	at := uint64(binary.LittleEndian.Uint32(e.b[16:]))
	if e.pointer == 8 {
		at = binary.LittleEndian.Uint64(e.b[16:])
	}
	r.TTL = e.b[16+e.pointer]
	n := uint64(binary.LittleEndian.Uint16(e.b[12:]))
	if r.Type != tunnel.EchoReplied || n == 0 {
		return r, true
	}
	at -= e.base // of an address below base: far too large
	if at > uint64(len(e.b)) || n > uint64(len(e.b))-at {
		return r, false
	}
	r.Payload = append([]byte(nil), e.b[at:at+n]...)
	return r, true
}

// reply6Len is the size of an ICMPV6_ECHO_REPLY.
const reply6Len = 36

// reply6 reads an ICMPV6_ECHO_REPLY, which the payload of n bytes follows:
//
//	0      port (u16), flow (u32), address (16 bytes), scope (u32), 2 bytes of nothing
//	28     status (u32)
//	32     round trip (u32, milliseconds)
func (e echoBuffer) reply6(n int) (r tunnel.EchoReply, ok bool) {
	if len(e.b) < reply6Len {
		return r, false
	}
	r.From = netip.AddrFrom16([16]byte(e.b[6:22]))
	if r.Type, r.Code, ok = echoStatus(binary.LittleEndian.Uint32(e.b[28:])).answer(); !ok {
		return r, false
	}
	if r.Type == tunnel.EchoReplied {
		r.Payload = append([]byte(nil), e.b[reply6Len:min(len(e.b), reply6Len+n)]...)
	}
	return r, true
}
