package tunnel

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// looseMux is a mux without a peer, whose frames a test feeds by hand.
func looseMux(tb testing.TB, dialled bool) *mux {
	a, b := net.Pipe()
	tb.Cleanup(func() { a.Close(); b.Close() })
	cork := &corkConn{Conn: a}
	return newMux(tls.Client(cork, &tls.Config{}), cork, dialled, Limits{SessionWindow: 1, FlowWindow: 1}.withDefaults(1), 4)
}

func muxFrame(t muxType, stream uint64, p ...byte) []byte {
	return append(appendMuxHeader(nil, muxHeader{t, len(p), stream}), p...)
}

// TestMuxFrames feeds an edge's mux with good frames and with bad ones, which must end it.
func TestMuxFrames(t *testing.T) {
	join := func(b ...[]byte) []byte { return bytes.Join(b, nil) }
	open := muxFrame(muxOpen, 1, 'x')
	big := make([]byte, maxMuxData)
	var flood, all []byte
	for range initialFlowWindow/maxMuxData + 1 {
		flood = append(flood, muxFrame(muxData, 1, big...)...)
	}
	for id := uint64(1); id <= 9; id += 2 {
		all = append(all, muxFrame(muxOpen, id)...)
		for range 16 {
			all = append(all, muxFrame(muxData, id, big...)...)
		}
	}
	for name, tt := range map[string]struct {
		send []byte
		want error // io.EOF: all was good
	}{
		"nothing":                 {nil, io.EOF},
		"a stream":                {join(open, muxFrame(muxData, 1, 'y'), muxFrame(muxFin, 1)), io.EOF},
		"reset":                   {join(open, muxFrame(muxReset, 1, 0x20)), io.EOF},
		"window of an ended one":  {join(open, muxFrame(muxStop, 1, 0x22), muxFrame(muxFin, 1), muxFrame(muxWindow, 1, 0, 0, 1, 0)), io.EOF},
		"skippable":               {muxFrame(0x80, 7, 1, 2, 3), io.EOF},
		"datagram":                {muxFrame(muxDatagram, 0, big...), io.EOF},
		"ping":                    {muxFrame(muxPing, 0, 1, 2, 3, 4, 5, 6, 7, 8), io.EOF},
		"strange pong":            {muxFrame(muxPong, 0, 1, 2, 3, 4, 5, 6, 7, 8), io.EOF},
		"close":                   {muxFrame(muxClose, 0, byte(CloseRevoked)), &SessionError{Reason: CloseRevoked, Remote: true}},
		"unknown":                 {muxFrame(0x7f, 0), errMalformed},
		"header cut short":        {open[:5], io.ErrUnexpectedEOF},
		"data cut short":          {open[:8], io.ErrUnexpectedEOF},
		"even stream":             {muxFrame(muxOpen, 2), errMalformed},
		"stream left out":         {muxFrame(muxOpen, 3), errMalformed},
		"begun twice":             {join(open, open), errMalformed},
		"stream 0":                {muxFrame(muxOpen, 0), errMalformed},
		"data for nobody":         {muxFrame(muxData, 1, 'x'), errMalformed},
		"data after the end":      {join(open, muxFrame(muxFin, 1), muxFrame(muxData, 1, 'x')), errMalformed},
		"two ends":                {join(open, muxFrame(muxFin, 1), muxFrame(muxFin, 1)), errMalformed},
		"reset after the end":     {join(open, muxFrame(muxFin, 1), muxFrame(muxReset, 1, 0)), errMalformed},
		"stop for nobody":         {muxFrame(muxStop, 1, 0), errMalformed},
		"stop for an unsent one":  {muxFrame(muxStop, 2, 0), errMalformed},
		"window for nobody":       {muxFrame(muxWindow, 5, 0, 0, 0, 1), errMalformed},
		"window without end":      {bytes.Repeat(muxFrame(muxWindow, 0, 0xff, 0xff, 0xff, 0xff), 300), errMalformed},
		"too many streams":        {join(open, muxFrame(muxOpen, 3), muxFrame(muxOpen, 5), muxFrame(muxOpen, 7), muxFrame(muxOpen, 9)), errMalformed},
		"beyond a stream's":       {join(muxFrame(muxOpen, 1), flood), errMalformed},
		"beyond the session's":    {all, errMalformed},
		"fin with a payload":      {join(open, muxFrame(muxFin, 1, 0)), errMalformed},
		"reset without a code":    {join(open, muxFrame(muxReset, 1)), errMalformed},
		"data above the limit":    {join(open, muxFrame(muxData, 1, append(big, 0)...)), errMalformed},
		"datagram with a stream":  {muxFrame(muxDatagram, 1, 'x'), errMalformed},
		"close without a reason":  {muxFrame(muxClose, 0), errMalformed},
		"short ping":              {muxFrame(muxPing, 0, 1), errMalformed},
		"limits that are no word": {muxFrame(muxLimits, 0, 1), errMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			m := looseMux(t, false)
			err := m.readFrames(bufio.NewReaderSize(bytes.NewReader(tt.send), muxReadBuffer))
			if !errors.Is(err, tt.want) {
				t.Errorf("readFrames: %v, want %v", err, tt.want)
			}
		})
	}
}

// TestMuxWindows: bytes that nobody reads stay within the windows, and a stream that is given up returns what it held.
func TestMuxWindows(t *testing.T) {
	m := looseMux(t, false)
	feed := func(b ...[]byte) {
		t.Helper()
		if err := m.readFrames(bufio.NewReaderSize(bytes.NewReader(bytes.Join(b, nil)), muxReadBuffer)); err != io.EOF {
			t.Fatalf("readFrames: %v", err)
		}
	}
	part := make([]byte, 16<<10-muxHeaderLen)
	feed(muxFrame(muxOpen, 1, part...), muxFrame(muxData, 1, part...), muxFrame(muxData, 1, 'x'))
	if got, want := m.granted.Load(), int64(initialSessionWindow-2*len(part)-1); got != want {
		t.Errorf("the peer may send %d, want %d", got, want)
	}
	s, err := m.acceptStream(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	s.abortRead(ResultClosed)
	feed(muxFrame(muxData, 1, part...))
	if got, want := m.unread.Load(), int64(3*len(part)+1); got != want {
		t.Errorf("%d bytes counted as taken, want %d", got, want)
	}
	s.abortWrite(ResultClosed)
	if len(m.streams) != 1 {
		t.Error("forgotten before the peer's end")
	}
	feed(muxFrame(muxReset, 1, byte(ResultClosed)))
	if len(m.streams) != 0 || m.accepted != 0 {
		t.Errorf("%d streams, %d counted, after both ends", len(m.streams), m.accepted)
	}
}

// TestMuxFailsUnsentStreams: a stream that was opened and has sent nothing has no number yet, and ends with the carrier as
// any other does, for who uses it later and for who waits in it.
func TestMuxFailsUnsentStreams(t *testing.T) {
	m := looseMux(t, true)
	m.maxOpen = 2
	idle, err := m.openStream()
	if err != nil {
		t.Fatal(err)
	}
	waits, err := m.openStream()
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := waits.Read(make([]byte, 1))
		read <- err
	}()
	m.fail(errMalformed, CloseProtocol, false)
	if _, err := idle.Write([]byte("x")); !errors.Is(err, errMalformed) {
		t.Errorf("Write: %v, want %v", err, errMalformed)
	}
	idle.closeWrite()
	idle.abortRead(ResultClosed)
	if err := <-read; !errors.Is(err, errMalformed) {
		t.Errorf("Read: %v, want %v", err, errMalformed)
	}
}

// FuzzMux plays a peer that has a certificate, against either side's decoder of the TCP carrier's frames.
func FuzzMux(f *testing.F) {
	f.Add(bytes.Join([][]byte{muxFrame(muxLimits, 0, 0, 0, 1, 0), muxFrame(muxOpen, 1, []byte("hello")...), muxFrame(muxData, 1, 'x'), muxFrame(muxFin, 1)}, nil))
	f.Add(bytes.Join([][]byte{muxFrame(muxOpen, 1), muxFrame(muxStop, 1, 0x22), muxFrame(muxReset, 1, 0x20), muxFrame(muxWindow, 0, 0, 1, 0, 0)}, nil))
	f.Add(bytes.Join([][]byte{muxFrame(muxDatagram, 0, 1, 2), muxFrame(muxPing, 0, 1, 2, 3, 4, 5, 6, 7, 8), muxFrame(muxClose, 0, 1)}, nil))
	f.Add(muxFrame(0x90, 3, 1, 2, 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= muxHeaderLen {
			if h, err := parseMuxHeader(b); err == nil && !bytes.Equal(appendMuxHeader(nil, h), b[:muxHeaderLen]) {
				t.Fatalf("header %+v was read from %x", h, b[:muxHeaderLen])
			}
		}
		m := looseMux(t, false)
		if err := m.readFrames(bufio.NewReaderSize(bytes.NewReader(b), muxReadBuffer)); err == nil {
			t.Fatal("no error at the end of the bytes")
		}
		held := 0
		for _, s := range m.streams {
			for c := s.head; c != nil; c = c.next {
				held += len(c.b)
			}
		}
		if held > 2*initialSessionWindow+m.maxIncoming*leastChunk {
			t.Fatalf("%d bytes held", held)
		}
		if len(m.streams) > m.maxIncoming || m.accepted != len(m.streams) {
			t.Fatalf("%d streams, %d counted", len(m.streams), m.accepted)
		}
	})
}

// TestMuxFair lets several flows send as much as they can beside one with small requests, each of which must get through.
func TestMuxFair(t *testing.T) {
	t.Parallel()
	var sent [4]atomic.Int64
	_, _, s := pairOver(t, CarrierTCP, func(_ context.Context, in *Incoming) {
		c, err := in.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		if in.Flow().Port == 80 {
			echo(c)
			return
		}
		b := make([]byte, 1<<20)
		for {
			n, err := c.Write(b)
			sent[in.Flow().Port-81].Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	for i := range sent {
		f := testFlow
		f.Port = uint16(81 + i)
		c := open(t, s, f)
		wg.Go(func() { io.Copy(io.Discard, c) })
		defer c.Close()
	}
	c := open(t, s, testFlow)
	defer c.Close()
	for range 200 {
		checkEcho(t, c, "small")
	}
	eventually(t, "all flows have moved", func() bool {
		for i := range sent {
			if sent[i].Load() < 4<<20 {
				return false
			}
		}
		return true
	})
}

// TestTCPSilence stops a connection's bytes without a word; both sides must notice by their idle timeouts.
func TestTCPSilence(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll, Limits: Limits{IdleTimeout: time.Second}})
	var mute atomic.Bool
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	pass := func(to, from net.Conn) {
		b := make([]byte, 4096)
		for {
			n, err := from.Read(b)
			if err != nil {
				return
			}
			if !mute.Load() {
				to.Write(b[:n])
			}
		}
	}
	wg.Go(func() {
		a, err := ln.Accept()
		if err != nil {
			return
		}
		defer a.Close()
		b, err := net.Dial("tcp", e.ln.TCPAddr().String())
		if err != nil {
			t.Error(err)
			return
		}
		defer b.Close()
		wg.Go(func() { pass(a, b); a.Close() })
		pass(b, a)
	})
	dc := dialOver(e, CarrierTCP, p.source(mtls.KindConnector, "c1", 0), accept(echo))
	dc.Addr = ln.Addr().String()
	dc.Limits = Limits{IdleTimeout: 2 * time.Second, KeepAlive: 200 * time.Millisecond}
	c := startConnector(t, dc)
	s := e.session()
	flow := open(t, s, testFlow)
	time.Sleep(1500 * time.Millisecond) // idle for longer than the timeout: pings must hold it
	checkEcho(t, flow, "kept alive")
	mute.Store(true)
	flow.Write([]byte("into the dark"))
	eventually(t, "the edge suspects", func() bool { return s.Suspect() || s.Err() != nil })
	if err := c.wait(t); !errors.Is(err, ErrPeerLost) {
		t.Errorf("Run: %v, want ErrPeerLost", err)
	}
	select {
	case <-s.Done():
	case <-time.After(patience):
		t.Fatal("the edge does not notice")
	}
	if err := s.Err(); !errors.Is(err, ErrPeerLost) {
		t.Errorf("Err() = %v, want ErrPeerLost", err)
	}
}

// TestTCPPending: connections that say nothing are bounded, and dropped after the set-up time.
func TestTCPPending(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll, MaxPending: 2, Limits: Limits{SetupTimeout: 500 * time.Millisecond}})
	dial := func() net.Conn {
		c, err := net.Dial("tcp", e.ln.TCPAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetReadDeadline(time.Now().Add(patience))
		return c
	}
	a, b := dial(), dial()
	eventually(t, "two pending", func() bool { return e.ln.pending.Load() == 2 })
	for name, c := range map[string]net.Conn{"a third": dial(), "the first": a, "the second": b} {
		if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Errorf("%s silent connection: %v, want its end", name, err)
		}
	}
	eventually(t, "none pending", func() bool { return e.ln.pending.Load() == 0 })
	startConnector(t, dialOver(e, CarrierTCP, p.source(mtls.KindConnector, "c1", 0), accept(echo)))
	e.session()
}

// TestTCPPortInUse: an edge whose TCP port is taken says so.
func TestTCPPortInUse(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	src := newPKI(t).source(mtls.KindEdge, "e1", 0)
	if _, err := Listen(ListenConfig{Identity: src, Addr: "127.0.0.1:0", TCPAddr: ln.Addr().String()}); err == nil {
		t.Error("Listen on a port in use succeeded")
	}
}
