package unixsock

import (
	"errors"
	"fmt"
	"net"
	"syscall"
)

// PeerUID returns the user who made the connection, as the kernel noted it at connect. See unix(7), SO_PEERCRED. With an
// error the user is none.
func PeerUID(conn net.Conn) (uint32, error) {
	const nobody = ^uint32(0)
	if s, ok := conn.(*slotConn); ok {
		conn = s.Conn
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return nobody, errors.New("not a Unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nobody, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *syscall.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return nobody, fmt.Errorf("peer credentials: %w", err)
	}
	if credErr != nil {
		return nobody, fmt.Errorf("peer credentials: %w", credErr)
	}
	return cred.Uid, nil
}
