package connector

import (
	"golang.org/x/sys/windows"

	"github.com/keyhaven/keyhaven/tunnel"
)

// Windows has numbers of its own for what sockets report.
func init() {
	errnoResults[windows.WSAECONNREFUSED] = tunnel.ResultRefused
	errnoResults[windows.WSAECONNRESET] = tunnel.ResultRefused
	errnoResults[windows.WSAETIMEDOUT] = tunnel.ResultTimedOut
	errnoResults[windows.WSAEHOSTUNREACH] = tunnel.ResultNoRoute
	errnoResults[windows.WSAENETUNREACH] = tunnel.ResultNoRoute
	errnoResults[windows.WSAEADDRNOTAVAIL] = tunnel.ResultNoRoute
	errnoResults[windows.WSAEACCES] = tunnel.ResultDenied
	errnoResults[windows.WSAENOBUFS] = tunnel.ResultLimit
}
