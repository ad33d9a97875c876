//go:build !unix

package main

import (
	"errors"
	"net"

	"github.com/keyhaven/keyhaven/internal/takeover"
)

// listenControl refuses: a socket that only its owner may use cannot be made here.
func listenControl(*takeover.Process, string) (net.Listener, error) {
	return nil, errors.New("the control socket needs a Unix system; remove control from the configuration")
}

func ownUID() uint32 { return 0 }

func mayCall(net.Conn, uint32) error { return errors.New("there is no control socket on this system") }
