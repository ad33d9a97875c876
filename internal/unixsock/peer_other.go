//go:build !linux

package unixsock

import (
	"errors"
	"net"
)

// PeerUID refuses every caller where the kernel's word on who it is cannot be had.
func PeerUID(net.Conn) (uint32, error) {
	return ^uint32(0), errors.New("peer credentials are known on Linux only")
}

// PeerPID knows no caller there.
func PeerPID(net.Conn) (int, error) {
	return 0, errors.New("the peer's process cannot be had on this system")
}
