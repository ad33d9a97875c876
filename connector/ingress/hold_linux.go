package ingress

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// littleSegment is what one segment of a paced connection carries, in bytes. A sender on the same host would take 64 KiB, and
// holds a number of segments that were not taken yet.
const littleSegment = 1460

// holdLittle makes both ends of a connection to a service hold little that was sent and not read yet, so that a stream of
// pictures which is slowed down shows what is, not what was. It is done before the connection is made.
func holdLittle(raw syscall.RawConn, window int) {
	raw.Control(func(fd uintptr) { //nolint:errcheck // it works without, with more delay
		unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, window)          //nolint:errcheck // as above
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, littleSegment) //nolint:errcheck // as above
	})
}
