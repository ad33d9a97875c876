package tunnel

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// tuneTCP asks for BBR where the kernel has it, since it loses little speed to lost packets, and for a short backlog of what
// is not sent yet. Go's sockets have TCP_NODELAY already.
func tuneTCP(conn *net.TCPConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) { //nolint:errcheck // the connection works without
		unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr")         //nolint:errcheck // not every kernel has it
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxTCPBacklog) //nolint:errcheck // not every kernel has it
	})
}

// smallSegment is TCP's maximum segment size on paths that lose large packets.
const smallSegment = 1000

// limitSegments is a net.Dialer's Control that has both sides send small segments: the peer learns of the size when the
// connection is made (RFC 9293, section 3.7.1). Linux by itself would send large ones for ever.
func limitSegments(_, _ string, c syscall.RawConn) error {
	var err error
	failed := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, smallSegment)
	})
	if failed != nil {
		return failed
	}
	return err
}
