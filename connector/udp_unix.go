//go:build unix

package connector

import (
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// socketBuffers hold a packet each while it is on its way from a socket into the tunnel. A flow that waits holds none.
var socketBuffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// A packetReader reads a socket's packets.
type packetReader struct {
	raw  syscall.RawConn
	sink func([]byte) error
	err  error
	try  func(fd uintptr) bool
}

func newPacketReader(c *net.UDPConn) (*packetReader, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &packetReader{raw: raw}
	r.try = r.readOnce
	return r, nil
}

// read waits for packets and hands them to sink until there is an error, of either.
func (r *packetReader) read(sink func([]byte) error) error {
	r.sink = sink
	if err := r.raw.Read(r.try); err != nil {
		return err
	}
	return r.err
}

// readOnce reads all packets that are there. It reports false to wait for more.
func (r *packetReader) readOnce(fd uintptr) bool {
	buf := socketBuffers.Get().(*[64 << 10]byte)
	defer socketBuffers.Put(buf)
	for {
		n, err := unix.Read(int(fd), buf[:])
		switch {
		case err == unix.EAGAIN:
			return false
		case err == unix.EINTR:
		case err != nil:
			r.err = os.NewSyscallError("read", err)
			return true
		default:
			if r.err = r.sink(buf[:n]); r.err != nil {
				return true
			}
		}
	}
}
