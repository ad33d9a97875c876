package tunnel

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// relay passes UDP packets between one client and a server, to which it has a connected socket, each way with a delay.
type relay struct {
	tb      testing.TB
	server  string
	delay   time.Duration
	front   *net.UDPConn
	back    atomic.Pointer[net.UDPConn]
	client  atomic.Pointer[net.UDPAddr]
	retry   atomic.Bool  // the server sent a Retry packet, see RFC 9000, section 17.2.5
	largest atomic.Int64 // larger packets are lost; 0: none
	lost    atomic.Int64 // packets lost for their size
	wg      sync.WaitGroup
}

// relayQueue is how many packets wait for their time in each direction; more are lost.
const relayQueue = 20000

type delayed struct {
	due time.Time
	b   []byte
}

func newRelay(tb testing.TB, server string, delay time.Duration) *relay {
	tb.Helper()
	front := listenSilent(tb)
	newTransport(front).Close() // has the socket's buffers enlarged as far as may be
	r := &relay{tb: tb, server: server, delay: delay, front: front}
	tb.Cleanup(func() {
		front.Close()
		r.back.Load().Close()
		r.wg.Wait()
	})
	r.rebind()
	r.pass(func(b []byte) (int, error) {
		n, from, err := front.ReadFromUDP(b)
		if err == nil {
			r.client.Store(from)
		}
		return n, err
	}, func(b []byte) { r.back.Load().Write(b) })
	return r
}

// rebind gives the client another address, as a NAT does that forgot the flow: the old one takes no packets any more.
func (r *relay) rebind() {
	r.tb.Helper()
	conn, err := net.Dial("udp4", r.server)
	if err != nil {
		r.tb.Fatal(err)
	}
	back := conn.(*net.UDPConn)
	newTransport(back).Close()
	if old := r.back.Swap(back); old != nil {
		old.Close()
	}
	r.pass(back.Read, func(b []byte) {
		if b[0]&0xf0 == 0xf0 {
			r.retry.Store(true)
		}
		if to := r.client.Load(); to != nil {
			r.front.WriteToUDP(b, to)
		}
	})
}

func (r *relay) pass(read func([]byte) (int, error), write func([]byte)) {
	queue := make(chan delayed, relayQueue)
	r.wg.Go(func() {
		defer close(queue)
		buf := make([]byte, 2048)
		for {
			n, err := read(buf)
			if err != nil {
				if errors.Is(err, syscall.ECONNREFUSED) {
					continue // an ICMP message; the server is away
				}
				return
			}
			if most := r.largest.Load(); most > 0 && int64(n) > most {
				r.lost.Add(1)
				continue
			}
			select {
			case queue <- delayed{time.Now().Add(r.delay), append([]byte(nil), buf[:n]...)}:
			default:
			}
		}
	})
	r.wg.Go(func() {
		for p := range queue {
			time.Sleep(time.Until(p.due))
			write(p.b)
		}
	})
}

func (r *relay) addr() string { return r.front.LocalAddr().String() }
