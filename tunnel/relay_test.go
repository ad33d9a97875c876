package tunnel

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// relay passes UDP packets between one client and a server, to which it has a connected socket.
type relay struct {
	front *net.UDPConn
	back  *net.UDPConn

	client atomic.Pointer[net.UDPAddr]
}

func newRelay(tb testing.TB, server string) *relay {
	tb.Helper()
	front, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		tb.Fatal(err)
	}
	back, err := net.Dial("udp4", server)
	if err != nil {
		tb.Fatal(err)
	}
	r := &relay{front: front, back: back.(*net.UDPConn)}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := front.ReadFromUDP(buf)
			if err != nil {
				return
			}
			r.client.Store(from)
			r.back.Write(buf[:n])
		}
	})
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, err := r.back.Read(buf)
			if err != nil {
				if ne, ok := err.(net.Error); ok && ne.Timeout() {
					continue
				}
				return
			}
			if to := r.client.Load(); to != nil {
				front.WriteToUDP(buf[:n], to)
			}
		}
	})
	tb.Cleanup(func() {
		front.Close()
		back.Close()
		wg.Wait()
	})
	return r
}

func (r *relay) addr() string { return r.front.LocalAddr().String() }
