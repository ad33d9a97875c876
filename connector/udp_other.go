//go:build !unix

package connector

import "net"

// A packetReader reads a socket's packets.
type packetReader struct {
	conn *net.UDPConn
	buf  []byte
}

func newPacketReader(c *net.UDPConn) (*packetReader, error) {
	return &packetReader{c, make([]byte, 64<<10)}, nil
}

// read waits for packets and hands them to sink until there is an error, of either.
func (r *packetReader) read(sink func([]byte) error) error {
	for {
		n, err := r.conn.Read(r.buf)
		if err != nil {
			return err
		}
		if err := sink(r.buf[:n]); err != nil {
			return err
		}
	}
}
