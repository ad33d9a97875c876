package ingress

import (
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	littleWindow  = 64 << 10 // bytes that a paced connection receives ahead
	littleSegment = 1460     // bytes; a sender on this host holds a number of segments, which are 64 KiB without it
)

// holdLittle makes both ends of a connection to a service hold little that was sent and not read yet, so that a stream of
// pictures which is slowed down shows what is, not what was. It is done before the connection is made.
func holdLittle(raw syscall.RawConn) {
	raw.Control(func(fd uintptr) { //nolint:errcheck // it works without, with more delay
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, littleWindow/2)  //nolint:errcheck // as above
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, littleSegment) //nolint:errcheck // as above
	})
}
