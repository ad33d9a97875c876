//go:build unix

package main

import (
	"fmt"
	"net"
	"os"
	"runtime"

	"github.com/keyhaven/keyhaven/internal/takeover"
	"github.com/keyhaven/keyhaven/internal/unixsock"
)

func listenControl(p *takeover.Process, path string) (net.Listener, error) {
	ln, err := p.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	return unixsock.Limit(ln, controlConns), nil
}

func ownUID() uint32 { return uint32(os.Geteuid()) }

// mayCall refuses callers other than root and the user uid. Where the kernel does not name the caller, the socket's mode
// alone keeps others out.
func mayCall(conn net.Conn, uid uint32) error {
	if runtime.GOOS != "linux" {
		return nil
	}
	caller, err := unixsock.PeerUID(conn)
	if err != nil {
		return err
	}
	if caller != 0 && caller != uid {
		return fmt.Errorf("user %d may not ask this connector; use root, or the user that it runs as", caller)
	}
	return nil
}
