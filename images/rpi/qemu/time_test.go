//go:build image

package qemu

import (
	"encoding/binary"
	"net"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// timeYAML names the test's time server, in place of public ones, which cannot be reached here.
const timeYAML = "ntp: [10.0.2.2]\n"

// timeServer answers SNTP requests with the host's time. See RFC 5905, figure 8.
func timeServer(t *testing.T, ns *testnet.Namespace) {
	t.Helper()
	var c net.PacketConn
	must(t, ns.Do(func() (err error) {
		c, err = net.ListenPacket("udp", "127.0.0.1:123")
		return err
	}))
	done := make(chan struct{})
	t.Cleanup(func() { c.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 512)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 48 {
				continue
			}
			now := time.Now()
			stamp := uint64(now.Unix()+2208988800)<<32 | uint64(now.Nanosecond())<<32/1e9
			out := make([]byte, 48)
			out[0], out[1], out[2], out[3] = 4<<3|4, 2, b[2], 0xec // version 4, server, stratum 2
			copy(out[12:], []byte{127, 0, 0, 1})
			binary.BigEndian.PutUint64(out[16:], stamp)
			copy(out[24:32], b[40:48]) // their transmit time
			binary.BigEndian.PutUint64(out[32:], stamp)
			binary.BigEndian.PutUint64(out[40:], stamp)
			c.WriteTo(out, from)
		}
	}()
}
