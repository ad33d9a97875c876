//go:build unix

package tunnel

import (
	"net"
	"syscall"
)

// socketBuffers returns the sizes of a socket's buffers in bytes.
func socketBuffers(udp *net.UDPConn) (receive, send int, ok bool) {
	raw, err := udp.SyscallConn()
	if err != nil {
		return 0, 0, false
	}
	var rerr, serr error
	err = raw.Control(func(fd uintptr) {
		receive, rerr = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF)
		send, serr = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF)
	})
	return receive, send, err == nil && rerr == nil && serr == nil
}
