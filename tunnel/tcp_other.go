//go:build !linux

package tunnel

import (
	"net"
	"syscall"
)

// tuneTCP leaves the connection as it is: what makes a difference is Linux's.
func tuneTCP(*net.TCPConn) {}

// limitSegments does nothing: the system sees when large segments are lost.
func limitSegments(_, _ string, _ syscall.RawConn) error { return nil }
