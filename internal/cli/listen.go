package cli

import (
	"errors"
	"fmt"
	"syscall"
)

// ListenError adds to the error of a listener what to do about it. Nil stays nil.
func ListenError(err error) error {
	switch {
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%w: ports below 1024 take a right that this user lacks; with systemd write AmbientCapabilities=CAP_NET_BIND_SERVICE, "+
			"else run setcap cap_net_bind_service=+ep on the program, or choose another port", err)
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%w: another program, or another process of this one, has the port; stop it (ss -lntup as root shows it), or choose another port", err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%w: this host does not have the address; correct it, or leave the host out to listen on all addresses", err)
	}
	return err
}
