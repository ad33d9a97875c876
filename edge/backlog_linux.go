package edge

import (
	"net"

	"golang.org/x/sys/unix"
)

// maxBacklog is what the system holds of a visitor's response that it has not sent yet, in bytes.
const maxBacklog = 256 << 10

// limitBacklog has little wait in a visitor's socket, beside what is on its way: a stream of pictures to a slow visitor stays
// close to the present, and slow visitors take less of the system's memory.
func limitBacklog(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) { //nolint:errcheck // the connection works without
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxBacklog) //nolint:errcheck // as above
	})
}
