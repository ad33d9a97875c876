package main

import (
	"bytes"
	"slices"
	"sync"
)

// logRingSize is how many bytes of the log are kept for a diagnosis.
const logRingSize = 128 << 10

// A logRing keeps the last whole lines of what is written to it, logRingSize bytes at most. The zero value is empty.
type logRing struct {
	mu  sync.Mutex // guards the field below
	buf []byte
}

// Write implements io.Writer; it never fails.
func (r *logRing) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.buf = append(r.buf, p...)
	if over := len(r.buf) - logRingSize; over > 0 {
		cut := r.buf[over:]
		if i := bytes.IndexByte(cut, '\n'); i >= 0 {
			cut = cut[i+1:]
		}
		r.buf = append(r.buf[:0], cut...)
	}
	return len(p), nil
}

// bytes returns what is kept.
func (r *logRing) bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.buf)
}
