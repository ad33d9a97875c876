//go:build unix

package tunnel

import (
	"bytes"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
)

func TestSmallBuffersReported(t *testing.T) {
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	udp.SetReadBuffer(64 << 10)
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	reportOnce = sync.Once{}
	for range 2 {
		reportBuffers(udp, log)
	}
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "net.core.rmem_max") {
		t.Errorf("log = %q, want one line with the remedy", got)
	}
}
