package tunnel

import (
	"log/slog"
	"net"
	"os"
	"sync"

	"github.com/quic-go/quic-go"
)

// udpBufferSize is the socket buffer that quic-go asks for; the kernel may give less.
const udpBufferSize = 7 << 20

var (
	muteOnce   sync.Once
	reportOnce sync.Once
)

// newTransport makes a QUIC transport. The library would print to the standard logger if the socket buffers are small;
// reportBuffers says it better.
func newTransport(udp *net.UDPConn) *quic.Transport {
	muteOnce.Do(func() { os.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "1") }) //nolint:errcheck // the name is valid
	return &quic.Transport{Conn: udp}
}

// reportBuffers logs, once in a process, if the kernel gave smaller socket buffers than wanted.
func reportBuffers(udp *net.UDPConn, log *slog.Logger) {
	receive, send, ok := socketBuffers(udp)
	if !ok || receive >= udpBufferSize && send >= udpBufferSize {
		return
	}
	reportOnce.Do(func() {
		log.Warn("UDP socket buffers are small, transfers will be slower: run sysctl -w net.core.rmem_max=7500000 net.core.wmem_max=7500000",
			"receive", receive, "send", send, "want", udpBufferSize)
	})
}
