package freeport

import (
	"io"
	"net"
	"strconv"
)

// claim takes the name that stands for the port in the network namespace; it is given back when the process ends.
func claim(port int) (io.Closer, error) {
	return net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: "@keyhaven-port-" + strconv.Itoa(port)})
}
