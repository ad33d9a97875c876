package tunnel

import (
	"errors"
	"fmt"
	"net"
	"time"
)

// MaxPacket is the longest packet that a flow carries: the longest UDP payload over IPv4.
const MaxPacket = 65507

// ErrPacketTooLong says that a packet has more than MaxPacket bytes.
var ErrPacketTooLong = errors.New("tunnel: the packet is longer than a flow carries")

// A PacketConn is an open flow of packets. Packets may be lost, doubled and reordered, but not changed or joined; an empty
// one is a packet like any other. Its methods may be called concurrently. Those of this package are [Drainer]s, [Ender]s and
// [Squeezer]s.
type PacketConn interface {
	// ReadPacket waits for the next packet and copies it to p; what is longer than p is cut off. The error is an
	// *UnreachableError if the peer reports that a packet was refused, after which the flow goes on; io.EOF if the peer
	// has closed the flow; os.ErrDeadlineExceeded; net.ErrClosed after Close; and a *FlowError if the flow was cut.
	ReadPacket(p []byte) (n int, err error)
	// WritePacket sends p and does not wait for the network: where there is no room, p is dropped and counted. p may be
	// used again when it has returned. The error is ErrPacketTooLong, or says that the flow has ended.
	WritePacket(p []byte) error
	// SetReadDeadline bounds ReadPacket. The zero value: no bound.
	SetReadDeadline(time.Time) error
	// LocalAddr and RemoteAddr are as those of a [Conn].
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
	// Unreachable tells the peer that what it sent was refused on the way; code is one of RFC 792, destination
	// unreachable, whatever the address family.
	Unreachable(code byte)
	// Close ends the flow. Calls after the first do nothing.
	Close() error
}

// An Ender is a flow that knows when it has ended, even if nobody reads.
type Ender interface {
	// Ended is closed when the flow has ended, on either side's wish or with its session.
	Ended() <-chan struct{}
	// Err says why: io.EOF if the peer closed the flow. It is nil before the end.
	Err() error
}

// A Squeezer is a flow of packets that knows when its session has too little room for it.
type Squeezer interface {
	// NoRoom holds a value after a sixteenth and more of the flow's latest packets of one direction were dropped because
	// the connection below the session took no more. Only the side that opened the flow learns it, for both directions.
	NoRoom() <-chan struct{}
}

// A PacketReceiver is a flow of packets that hands packets over without a copy and without a buffer that waits for them.
// The flows of this package are.
type PacketReceiver interface {
	// ReceivePacket waits for the next packet, which is the caller's. Errors are as those of ReadPacket.
	ReceivePacket() ([]byte, error)
}

// ReceivePacket waits for c's next packet, which is the caller's. Errors are as those of ReadPacket.
func ReceivePacket(c PacketConn) ([]byte, error) {
	if r, ok := c.(PacketReceiver); ok {
		return r.ReceivePacket()
	}
	b := make([]byte, MaxPacket)
	n, err := c.ReadPacket(b)
	return b[:n], err
}

// Codes of destination unreachable. See RFC 792 and RFC 1812, section 5.2.7.1.
const (
	UnreachableNet        byte = 0
	UnreachableHost       byte = 1
	UnreachablePort       byte = 3
	UnreachableTooBig     byte = 4
	UnreachableProhibited byte = 13
)

// An UnreachableError says that the destination, or a router on the way, refused a packet that was sent before.
type UnreachableError struct{ Code byte }

// Error implements error.
func (e *UnreachableError) Error() string {
	switch e.Code {
	case UnreachableNet:
		return "tunnel: network unreachable"
	case UnreachableHost:
		return "tunnel: host unreachable"
	case UnreachablePort:
		return "tunnel: port unreachable"
	case UnreachableTooBig:
		return "tunnel: the packet is too big for the way to the host"
	case UnreachableProhibited:
		return "tunnel: communication prohibited"
	}
	return fmt.Sprintf("tunnel: destination unreachable, code %d", e.Code)
}
