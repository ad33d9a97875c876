//go:build !linux

package edge

import "net"

// limitBacklog is for Linux alone.
func limitBacklog(net.Conn) {}
