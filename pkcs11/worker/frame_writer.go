package worker

import (
	"io"
	"runtime"
	"sync"
)

// frameWriter collects frames, which run writes: what has come together at once.
type frameWriter struct {
	mu     sync.Mutex // guards what follows
	buf    []byte
	spare  []byte
	closed bool

	wake chan struct{} // tells run
}

func newFrameWriter() *frameWriter { return &frameWriter{wake: make(chan struct{}, 1)} }

// maxQueued is how much of what may be lost, log records, waits to be written at most.
const maxQueued = 1 << 20

// send queues a frame. It does not wait.
func (w *frameWriter) send(typ frameType, id uint32, parts ...[]byte) {
	w.mu.Lock()
	w.buf = appendFrame(w.buf, typ, id, parts...)
	w.mu.Unlock()
	w.flush()
}

// spareable is send for what is left out when too much waits.
func (w *frameWriter) spareable(typ frameType, body []byte) {
	w.mu.Lock()
	if len(w.buf) < maxQueued {
		w.buf = appendFrame(w.buf, typ, 0, body)
	}
	w.mu.Unlock()
	w.flush()
}

// flush has what is queued written soon.
func (w *frameWriter) flush() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// close makes run return after it has written what is queued.
func (w *frameWriter) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.flush()
}

// waiting is how much is queued, in bytes.
func (w *frameWriter) waiting() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.buf)
}

// run writes until close is called or a write fails.
func (w *frameWriter) run(to io.Writer) error {
	for range w.wake {
		// Those who are about to send are let through first: one write is cheaper than several. With one session or a few, a sender that
		// writes itself would be cheaper still, but with more it is not.
		runtime.Gosched()
		for {
			out, closed := w.take()
			if len(out) == 0 {
				if closed {
					return nil
				}
				break
			}
			if _, err := to.Write(out); err != nil {
				return err
			}
			w.putBack(out)
		}
	}
	return nil
}

// take returns what is queued.
func (w *frameWriter) take() (out []byte, closed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.buf) > 0 {
		out, w.buf, w.spare = w.buf, w.spare[:0], nil
	}
	return out, w.closed
}

// putBack keeps a buffer for what is queued next.
func (w *frameWriter) putBack(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if cap(b) <= maxFrame {
		w.spare = b[:0]
	}
}
