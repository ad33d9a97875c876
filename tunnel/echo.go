package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
)

// Bounds of echoes.
const (
	// MaxEchoPayload is the longest payload of an echo request whose answer a flow carries.
	MaxEchoPayload = MaxPacket - echoAnswerLen - 16
	// DefaultEchoTimeout is how long an echo is waited for if the request does not say.
	DefaultEchoTimeout = 2 * time.Second
	// MaxEchoTimeout is the longest that an echo is waited for.
	MaxEchoTimeout = 60 * time.Second
)

// An EchoRequest is one ping.
type EchoRequest struct {
	// Seq comes back in the reply. Within a flow, one request per number is under way; a newer one takes its place.
	Seq uint16
	// TTL is the hop limit. Zero: the connector's default, which is 64 on most hosts.
	TTL uint8
	// Payload comes back in the reply. At most MaxEchoPayload bytes.
	Payload []byte
	// Timeout is how long to wait for the reply. Zero: DefaultEchoTimeout; more than MaxEchoTimeout counts as that.
	Timeout time.Duration
}

// An EchoType says what answered an echo request.
type EchoType byte

// What may answer.
const (
	// EchoReplied: the destination.
	EchoReplied EchoType = 1
	// EchoUnreachable: somebody on the way that cannot pass it on; Code is of RFC 792, destination unreachable.
	EchoUnreachable EchoType = 2
	// EchoTimeExceeded: a router at which the TTL ran out.
	EchoTimeExceeded EchoType = 3
)

// String says what t means.
func (t EchoType) String() string {
	switch t {
	case EchoReplied:
		return "reply"
	case EchoUnreachable:
		return "unreachable"
	case EchoTimeExceeded:
		return "time exceeded"
	}
	return fmt.Sprintf("type 0x%02x", byte(t))
}

// An EchoReply answers an EchoRequest.
type EchoReply struct {
	// Seq is the request's.
	Seq uint16
	// From is who answered: the destination, or a router.
	From netip.Addr
	// Type and Code say what the answer is.
	Type EchoType
	Code byte
	// TTL is the hop limit with which the answer arrived at the connector. Zero: not known.
	TTL uint8
	// RTT is the time from the request to the answer as its sender saw it, the way through the tunnel included.
	RTT time.Duration
	// HostRTT is the same as the connector saw it.
	HostRTT time.Duration
	// Payload is what came back with a reply; empty with other types.
	Payload []byte
}

// Err is nil for a reply of the destination and says otherwise what happened.
func (r EchoReply) Err() error {
	if r.Type == EchoReplied {
		return nil
	}
	return fmt.Errorf("%s from %s", r.Type, r.From)
}

// The packets of an ICMP flow are
//
//	0      message (u8): 1 = request
//	1      TTL (u8), 0 = default
//	2..3   sequence number (u16)
//	4..7   how long to wait for the answer (u32, milliseconds)
//	8..    payload
//
// and
//
//	0      message (u8): 2 = answer
//	1      type (u8)
//	2      code (u8)
//	3      TTL on arrival (u8)
//	4..5   sequence number (u16)
//	6..9   round trip (u32, microseconds)
//	10     length n of the address (u8): 4 or 16
//	11..   address (n bytes), payload
//
// See SPEC.md, "Echo".
const (
	echoRequest    = 1
	echoAnswer     = 2
	echoRequestLen = 8
	echoAnswerLen  = 11
)

// AppendEchoRequest appends the packet that asks for r.
func AppendEchoRequest(dst []byte, r EchoRequest) []byte {
	timeout := r.Timeout
	if timeout <= 0 {
		timeout = DefaultEchoTimeout
	}
	timeout = max(min(timeout, MaxEchoTimeout).Round(time.Millisecond), time.Millisecond)
	dst = append(dst, echoRequest, r.TTL)
	dst = binary.BigEndian.AppendUint16(dst, r.Seq)
	dst = binary.BigEndian.AppendUint32(dst, uint32(timeout/time.Millisecond))
	return append(dst, r.Payload...)
}

// ParseEchoRequest reads what AppendEchoRequest wrote. The payload is part of b.
func ParseEchoRequest(b []byte) (EchoRequest, error) {
	if len(b) < echoRequestLen || b[0] != echoRequest {
		return EchoRequest{}, malformed("echo request of %d bytes", len(b))
	}
	timeout := time.Duration(binary.BigEndian.Uint32(b[4:])) * time.Millisecond
	if timeout <= 0 || timeout > MaxEchoTimeout {
		return EchoRequest{}, malformed("echo request that waits %v", timeout)
	}
	return EchoRequest{TTL: b[1], Seq: binary.BigEndian.Uint16(b[2:]), Timeout: timeout, Payload: b[echoRequestLen:]}, nil
}

// AppendEchoReply appends the packet that answers with r, of which RTT does not travel.
func AppendEchoReply(dst []byte, r EchoReply) []byte {
	from := r.From.Unmap().WithZone("").AsSlice()
	us := min(max(r.HostRTT, 0)/time.Microsecond, 1<<32-1)
	dst = append(dst, echoAnswer, byte(r.Type), r.Code, r.TTL)
	dst = binary.BigEndian.AppendUint16(dst, r.Seq)
	dst = binary.BigEndian.AppendUint32(dst, uint32(us))
	dst = append(dst, byte(len(from)))
	dst = append(dst, from...)
	return append(dst, r.Payload...)
}

// ParseEchoReply reads what AppendEchoReply wrote. The payload is part of b.
func ParseEchoReply(b []byte) (EchoReply, error) {
	if len(b) < echoAnswerLen || b[0] != echoAnswer {
		return EchoReply{}, malformed("echo answer of %d bytes", len(b))
	}
	n := int(b[10])
	if n != 4 && n != 16 || len(b) < echoAnswerLen+n {
		return EchoReply{}, malformed("echo answer with an address of %d bytes", n)
	}
	from, _ := netip.AddrFromSlice(b[echoAnswerLen : echoAnswerLen+n])
	if from.Is4In6() {
		return EchoReply{}, malformed("echo answer from an IPv4-mapped address")
	}
	return EchoReply{
		Type: EchoType(b[1]), Code: b[2], TTL: b[3], Seq: binary.BigEndian.Uint16(b[4:]),
		HostRTT: time.Duration(binary.BigEndian.Uint32(b[6:])) * time.Microsecond,
		From:    from, Payload: b[echoAnswerLen+n:],
	}, nil
}

// ErrEchoTimeout says that nobody answered an echo request in time. It is a net.Error and a time-out.
var ErrEchoTimeout error = echoTimeout{}

type echoTimeout struct{}

func (echoTimeout) Error() string   { return "tunnel: no answer to the echo request in time" }
func (echoTimeout) Timeout() bool   { return true }
func (echoTimeout) Temporary() bool { return true }

// Echo sends r over an open ICMP flow and waits for the answer. The error is ErrEchoTimeout if none came within r.Timeout,
// the context's cause, or the flow's. One call at a time may use the flow.
func Echo(ctx context.Context, flow PacketConn, r EchoRequest) (EchoReply, error) {
	if len(r.Payload) > MaxEchoPayload {
		return EchoReply{}, ErrPacketTooLong
	}
	if r.Timeout <= 0 {
		r.Timeout = DefaultEchoTimeout
	}
	sent := time.Now()
	if err := flow.SetReadDeadline(sent.Add(min(r.Timeout, MaxEchoTimeout))); err != nil {
		return EchoReply{}, err
	}
	stop := context.AfterFunc(ctx, func() { flow.SetReadDeadline(time.Unix(1, 0)) }) //nolint:errcheck // the flow has ended, then
	defer stop()
	if err := flow.WritePacket(AppendEchoRequest(make([]byte, 0, echoRequestLen+len(r.Payload)), r)); err != nil {
		return EchoReply{}, err
	}
	for {
		b, err := ReceivePacket(flow)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return EchoReply{}, context.Cause(ctx)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return EchoReply{}, ErrEchoTimeout
		default:
			return EchoReply{}, err
		}
		if reply, err := ParseEchoReply(b); err == nil && reply.Seq == r.Seq {
			reply.RTT = time.Since(sent)
			return reply, nil
		}
	}
}
