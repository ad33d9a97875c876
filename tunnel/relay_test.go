package tunnel

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// relay passes UDP packets between one client and a server, to which it has a connected socket, each way with a delay.
type relay struct {
	front  *net.UDPConn
	back   *net.UDPConn
	client atomic.Pointer[net.UDPAddr]
	retry  atomic.Bool // the server sent a Retry packet, see RFC 9000, section 17.2.5
}

// relayQueue is how many packets wait for their time in each direction; more are lost.
const relayQueue = 20000

type delayed struct {
	due time.Time
	b   []byte
}

func newRelay(tb testing.TB, server string, delay time.Duration) *relay {
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
	for _, c := range []*net.UDPConn{r.front, r.back} {
		newTransport(c).Close() // has the socket's buffers enlarged as far as may be
	}
	var wg sync.WaitGroup
	pass := func(read func([]byte) (int, error), write func([]byte)) {
		queue := make(chan delayed, relayQueue)
		wg.Go(func() {
			defer close(queue)
			buf := make([]byte, 2048)
			for {
				n, err := read(buf)
				if err != nil {
					return
				}
				select {
				case queue <- delayed{time.Now().Add(delay), append([]byte(nil), buf[:n]...)}:
				default:
				}
			}
		})
		wg.Go(func() {
			for p := range queue {
				time.Sleep(time.Until(p.due))
				write(p.b)
			}
		})
	}
	pass(func(b []byte) (int, error) {
		n, from, err := r.front.ReadFromUDP(b)
		if err == nil {
			r.client.Store(from)
		}
		return n, err
	}, func(b []byte) { r.back.Write(b) })
	pass(r.back.Read, func(b []byte) {
		if b[0]&0xf0 == 0xf0 {
			r.retry.Store(true)
		}
		if to := r.client.Load(); to != nil {
			r.front.WriteToUDP(b, to)
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
