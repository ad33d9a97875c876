package keyless

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// readBuffer is what a connection's read buffer starts with: two full TLS records, about 30 packets. It grows to one
// packet of the largest size if a peer sends such a packet, and then stays so.
const readBuffer = 32 << 10

// errStopped is what a frameReader returns after stop.
var errStopped = errors.New("keyless: reading was stopped")

// A frameReader cuts a connection's bytes into packets. It belongs to one goroutine, except for stop. A zero time-out
// means none.
type frameReader struct {
	conn   net.Conn
	idle   time.Duration // from the end of a packet to the first byte of the next
	header time.Duration // from the first byte of a header to its last
	body   time.Duration // from the header to the end of the body

	buf     []byte
	r, w    int
	stopped atomic.Bool
}

func newFrameReader(conn net.Conn) *frameReader {
	return &frameReader{conn: conn, buf: make([]byte, readBuffer)}
}

// next returns the next packet. body is valid until the following call. io.EOF means that the stream ended between two
// packets; an error that matches os.ErrDeadlineExceeded between two packets loses nothing, so next may be called again.
func (f *frameReader) next() (h Header, body []byte, err error) {
	if f.r == f.w {
		f.r, f.w = 0, 0
		if err := f.fill(1, f.idle); err != nil {
			return Header{}, nil, err
		}
	}
	if err := f.fill(HeaderSize, f.header); err != nil {
		return Header{}, nil, fmt.Errorf("keyless: read header: %w", midPacket(err))
	}
	h, err = ParseHeader(f.buf[f.r:f.w])
	if err != nil {
		return Header{}, nil, err
	}
	size := HeaderSize + int(h.Length)
	if err := f.fill(size, f.body); err != nil {
		return Header{}, nil, fmt.Errorf("keyless: read body of %d bytes: %w", h.Length, midPacket(err))
	}
	body = f.buf[f.r+HeaderSize : f.r+size : f.r+size]
	f.r += size
	return h, body, nil
}

// midPacket keeps callers from taking an end or a deadline inside a packet for a harmless one.
func midPacket(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errSlowPeer
	}
	return err
}

var errSlowPeer = errors.New("peer did not finish its packet in time")

// fill reads until n unread bytes are in the buffer. The deadline is set only if the connection has to be read.
func (f *frameReader) fill(n int, timeout time.Duration) error {
	if f.w-f.r >= n {
		return nil
	}
	if f.r+n > len(f.buf) {
		dst := f.buf
		if n > len(dst) {
			dst = make([]byte, HeaderSize+MaxBody)
		}
		f.w = copy(dst, f.buf[f.r:f.w])
		f.buf, f.r = dst, 0
	}
	var deadline time.Time
	if timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	if err := f.conn.SetReadDeadline(deadline); err != nil {
		return err
	}
	if f.stopped.Load() {
		return errStopped
	}
	for f.w-f.r < n {
		m, err := f.conn.Read(f.buf[f.w:])
		f.w += m
		if err != nil && f.w-f.r < n {
			if f.stopped.Load() {
				return errStopped
			}
			return err
		}
	}
	return nil
}

// stop makes next, and one that waits now, return errStopped. The flag is set before the deadline and next looks at it
// after it has set its own, so one of the two always takes effect. Packets already in the buffer are still returned.
func (f *frameReader) stop() {
	f.stopped.Store(true)
	f.conn.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // a connection that refuses is dead and ends next by itself
}

// Bounds of a batchWriter.
const (
	// serverPending is how many bytes of replies may wait for the writer, about 250 packets. A client's bound follows from
	// its MaxInFlight.
	serverPending = 256 << 10
	// keepBuffer is the largest buffer that is kept for the next batch.
	keepBuffer = 512 << 10
)

// errFull says that as many bytes wait as may.
var errFull = errors.New("keyless: write queue is full")

// A batchWriter sends packets of many goroutines with few writes: whatever was added while one write ran leaves with
// the next. One goroutine runs run; add is safe for concurrent use.
type batchWriter struct {
	conn    net.Conn
	timeout time.Duration // for one batch
	limit   int           // bytes that may wait
	wake    chan struct{} // capacity 1

	mu     sync.Mutex // guards the rest
	space  sync.Cond
	buf    []byte // what waits
	spare  []byte // the other buffer, while it is not being written
	added  uint64 // packets ever added
	handed uint64 // packets ever handed to conn.Write
	closed bool   // no more packets; run ends when buf is empty
	err    error  // run has failed or was killed
}

func newBatchWriter(conn net.Conn, timeout time.Duration, limit int) *batchWriter {
	w := &batchWriter{conn: conn, timeout: timeout, limit: limit, wake: make(chan struct{}, 1)}
	w.space.L = &w.mu
	return w
}

// add queues one packet and returns its number, counted from 1. When limit bytes wait, it waits too if wait is
// set, and fails with errFull if not.
func (w *batchWriter) add(p *Packet, wait bool) (uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.buf) >= w.limit && w.err == nil {
		if !wait {
			return 0, errFull
		}
		w.space.Wait()
	}
	if w.err != nil {
		return 0, w.err
	}
	if w.closed {
		return 0, net.ErrClosed
	}
	first := len(w.buf) == 0
	buf, err := p.Append(w.buf)
	if err != nil {
		return 0, err
	}
	w.buf = buf
	w.added++
	if first {
		w.notify()
	}
	return w.added, nil
}

// wasHanded reports whether a byte of packet n may have left.
func (w *batchWriter) wasHanded(n uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return n <= w.handed
}

// close lets run end once everything added is written. fail lets it end at once.
func (w *batchWriter) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.notify()
}

func (w *batchWriter) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.space.Broadcast()
	w.notify()
}

func (w *batchWriter) notify() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run writes until close or fail, and returns what ended it, nil after close.
func (w *batchWriter) run() error {
	for range w.wake {
		runtime.Gosched() // who is about to add a packet comes first, so that it leaves with this batch
		for {
			batch, err := w.take()
			if err == errDrained {
				return nil
			}
			if err != nil {
				return err
			}
			if batch == nil {
				break // until the next wake
			}
			if err := w.write(batch); err != nil {
				w.fail(err)
				return err
			}
		}
	}
	return nil
}

var errDrained = errors.New("keyless: writer is drained")

// take swaps the buffers. nil without an error means that there is nothing to write yet.
func (w *batchWriter) take() ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.err != nil:
		return nil, w.err
	case len(w.buf) > 0:
		batch := w.buf
		w.buf, w.spare = w.spare[:0], nil
		w.handed = w.added
		w.space.Broadcast()
		return batch, nil
	case w.closed:
		return nil, errDrained
	}
	return nil, nil
}

func (w *batchWriter) write(batch []byte) error {
	if err := w.conn.SetWriteDeadline(time.Now().Add(w.timeout)); err != nil {
		return err
	}
	_, err := w.conn.Write(batch)
	if cap(batch) <= keepBuffer {
		w.mu.Lock()
		w.spare = batch
		w.mu.Unlock()
	}
	return err
}
