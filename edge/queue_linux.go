package edge

import (
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxQueue is how many connections are taken from a queue at the end.
const maxQueue = 4096

// queued returns the connections that wait in the listener's queue now. Closing the listener would reset them, though their
// visitors have been told that they are connected.
func queued(ln net.Listener) (conns []net.Conn) {
	s, ok := ln.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return nil
	}
	var files []*os.File
	raw.Control(func(fd uintptr) { //nolint:errcheck // a closed listener has no queue
		for len(files) < maxQueue {
			c, _, err := unix.Accept4(int(fd), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			if err == unix.EINTR || err == unix.ECONNABORTED {
				continue
			}
			if err != nil { // the queue is empty
				return
			}
			files = append(files, os.NewFile(uintptr(c), "visitor"))
		}
	})
	for _, f := range files {
		if c, err := net.FileConn(f); err == nil {
			conns = append(conns, c)
		}
		_ = f.Close()
	}
	return conns
}
