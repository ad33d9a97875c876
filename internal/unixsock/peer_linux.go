package unixsock

import (
	"errors"
	"fmt"
	"net"
	"syscall"
)

// PeerUID returns the user who made the connection, as the kernel noted it at connect. With an error the user is none.
func PeerUID(conn net.Conn) (uint32, error) {
	cred, err := credentials(conn)
	if err != nil {
		return ^uint32(0), err
	}
	return cred.Uid, nil
}

// PeerPID returns the process that made the connection, as the kernel noted it at connect. It may have ended since.
func PeerPID(conn net.Conn) (int, error) {
	cred, err := credentials(conn)
	if err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// credentials asks for SO_PEERCRED, see unix(7).
func credentials(conn net.Conn) (*syscall.Ucred, error) {
	if s, ok := conn.(*slotConn); ok {
		conn = s.Conn
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.New("not a Unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *syscall.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return nil, fmt.Errorf("peer credentials: %w", err)
	}
	if credErr != nil {
		return nil, fmt.Errorf("peer credentials: %w", credErr)
	}
	return cred, nil
}
