//go:build !linux

package ingress

import "syscall"

// holdLittle is for Linux alone, where appliances are.
func holdLittle(syscall.RawConn, int) {}
