package tunnel

import (
	"net"

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
