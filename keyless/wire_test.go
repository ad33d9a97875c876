package keyless

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// pieces is a connection whose reads return at most step bytes.
type pieces struct {
	net.Conn
	rest []byte
	step int
}

func (p *pieces) SetReadDeadline(time.Time) error { return nil }

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.rest[:min(p.step, len(p.rest))])
	p.rest = p.rest[n:]
	return n, nil
}

// A packet of the largest size makes the buffer grow once, and small ones before and after it stay whole.
func TestFrameReaderLargePacket(t *testing.T) {
	var stream []byte
	sizes := []int{10, 60_000, 10, 40_000, 3}
	for i, n := range sizes {
		p := Packet{Major: 1, ID: uint32(i), Operation: Operation{Opcode: OpPing, Payload: bytes.Repeat([]byte{byte(i)}, n)}}
		stream = must(p.Append(stream))
	}
	r := newFrameReader(&pieces{rest: stream, step: 1 << 20})
	for i, n := range sizes {
		id, op := receive(t, r)
		if int(id) != i || len(op.Payload) != n || bytes.Count(op.Payload, []byte{byte(i)}) != n {
			t.Fatalf("packet %d: got id %d and %d bytes", i, id, len(op.Payload))
		}
	}
	if len(r.buf) != HeaderSize+MaxBody {
		t.Errorf("buffer of %d bytes, want %d", len(r.buf), HeaderSize+MaxBody)
	}
	if _, _, err := r.next(); err != io.EOF {
		t.Errorf("got %v, want io.EOF", err)
	}
}

// gate is a connection whose writes wait for a token and are counted.
type gate struct {
	net.Conn
	open chan struct{}

	mu     sync.Mutex
	writes [][]byte
}

func (g *gate) SetWriteDeadline(time.Time) error { return nil }

func (g *gate) Write(b []byte) (int, error) {
	<-g.open
	g.mu.Lock()
	defer g.mu.Unlock()
	g.writes = append(g.writes, bytes.Clone(b))
	return len(b), nil
}

// What is added while a write runs leaves with the next one; beyond its limit add refuses or waits.
func TestBatchWriter(t *testing.T) {
	g := &gate{open: make(chan struct{})}
	w := newBatchWriter(g, time.Second, serverPending)
	done := make(chan error, 1)
	go func() { done <- w.run() }()

	p := Packet{Major: 1, Operation: Operation{Opcode: OpPing}}
	if _, err := w.add(&p, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "first packet handed over", func() bool { return w.wasHanded(1) })
	n := uint64(1)
	for ; ; n++ {
		if _, err := w.add(&p, false); err != nil {
			wantErr(t, err, errFull)
			break
		}
	}
	if want := uint64(1 + serverPending/padTo); n != want {
		t.Errorf("%d packets fit, want %d", n, want)
	}
	if w.wasHanded(n) {
		t.Error("a waiting packet counts as handed over")
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := w.add(&p, true)
		waiting <- err
	}()
	close(g.open)
	if err := <-waiting; err != nil {
		t.Fatal(err)
	}
	w.close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := w.add(&p, true); !errors.Is(err, net.ErrClosed) {
		t.Errorf("add after close: got %v, want net.ErrClosed", err)
	}
	total := 0
	for _, b := range g.writes {
		total += len(b)
	}
	if want := int(n+1) * padTo; total != want {
		t.Errorf("%d bytes written, want %d", total, want)
	}
	if len(g.writes) > 3 {
		t.Errorf("%d writes for %d packets, want at most 3", len(g.writes), n+1)
	}
}
