package edge

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLimitBacklog(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	must(t, err)
	defer c.Close()
	limitBacklog(c)
	raw, err := c.(*net.TCPConn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		if n, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT); err != nil || n != maxBacklog {
			t.Errorf("got %d, %v; want %d", n, err, maxBacklog)
		}
	}))
	a, b := net.Pipe()
	limitBacklog(a) // which has none
	a.Close()
	b.Close()
}
