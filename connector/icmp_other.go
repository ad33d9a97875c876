//go:build !linux && !darwin && !windows

package connector

import "net/netip"

// echoRemedy is what to do about errEchoForbidden.
const echoRemedy = "run the connector on Linux, macOS or Windows for pings"

func openEcho(netip.Addr) (echoSocket, error) { return nil, errEchoForbidden }
