package tunnel

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

const (
	// datagramQueue is how many datagrams wait to be sent, and datagramWait how long: once one has waited longer, new ones
	// are dropped until others wait less. quic-go itself holds 32 more and then blocks.
	datagramQueue = 1024
	datagramWait  = 100 * time.Millisecond
	// maxQUICDatagram is more than any UDP path carries.
	maxQUICDatagram = 16 << 10
)

var (
	datagramBuffers = sync.Pool{New: func() any { return new([]byte) }}
	tooLarge        [maxQUICDatagram]byte
)

// quicDatagrams is the queue of datagrams before quic-go's own. It starts with the first datagram.
type quicDatagrams struct {
	lost64  atomic.Uint64
	largest atomic.Int64 // what quic-go said last
	askedAt atomic.Int64 // when, in Unix nanoseconds
	slow    atomic.Bool  // datagrams wait for too long

	mu    sync.Mutex // guards the fields below
	queue chan queuedDatagram
	over  bool
	wg    sync.WaitGroup
}

// queuedDatagram is a datagram, and when it came, in Unix nanoseconds.
type queuedDatagram struct {
	b  *[]byte
	at int64
}

func (c *quicCarrier) sendDatagram(b []byte) error {
	if len(b) > c.maxDatagram() {
		return errDatagramTooLarge
	}
	queue, err := c.startDatagrams()
	if err != nil {
		return err
	}
	if c.slow.Load() {
		c.lost64.Add(1)
		return errDatagramDropped
	}
	p := datagramBuffers.Get().(*[]byte)
	*p = append((*p)[:0], b...)
	select {
	case queue <- queuedDatagram{p, time.Now().UnixNano()}:
		return nil
	default:
		datagramBuffers.Put(p)
		c.lost64.Add(1)
		return errDatagramDropped
	}
}

func (c *quicCarrier) startDatagrams() (chan queuedDatagram, error) {
	d := &c.quicDatagrams
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.over {
		return nil, c.err()
	}
	if d.queue == nil {
		d.queue = make(chan queuedDatagram, datagramQueue)
		d.wg.Go(func() { c.sendDatagrams(d.queue) })
	}
	return d.queue, nil
}

func (c *quicCarrier) sendDatagrams(queue chan queuedDatagram) {
	for {
		select {
		case d := <-queue:
			if err := c.conn.SendDatagram(*d.b); err != nil { // too large for a path that has become narrower, or the end
				c.lost64.Add(1)
				c.askedAt.Store(0)
			}
			datagramBuffers.Put(d.b)
			c.slow.Store(len(queue) > 0 && time.Now().UnixNano()-d.at > int64(datagramWait))
		case <-c.done():
			return
		}
	}
}

// wait waits for the queue's goroutine, once the connection is closed.
func (d *quicDatagrams) wait() {
	d.mu.Lock()
	d.over = true
	d.mu.Unlock()
	d.wg.Wait()
}

func (c *quicCarrier) receiveDatagram(ctx context.Context) ([]byte, error) {
	b, err := c.conn.ReceiveDatagram(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, sessionErrorOf(err)
	}
	return b, nil
}

// maxDatagram asks quic-go, which answers only when a datagram is too large, every second. The peer's will to take any is in
// the answer too.
func (c *quicCarrier) maxDatagram() int {
	now := time.Now().UnixNano()
	if now-c.askedAt.Load() < int64(time.Second) {
		return int(c.largest.Load())
	}
	n := int64(0)
	var large *quic.DatagramTooLargeError
	if errors.As(c.conn.SendDatagram(tooLarge[:]), &large) {
		n = large.MaxDatagramPayloadSize
	}
	c.largest.Store(n)
	c.askedAt.Store(now)
	return int(n)
}

func (c *quicCarrier) dropped() uint64 { return c.lost64.Load() }
