package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// spliced is a flow whose far end at the connector is spliced to a TCP connection; origin is that one's other end.
func spliced(t *testing.T) (flow Conn, origin *net.TCPConn, result <-chan error) {
	t.Helper()
	near, origin := tcpPair(t)
	near.SetWriteBuffer(1 << 20)
	errs := make(chan error, 1)
	_, _, s := pair(t, func(ctx context.Context, in *Incoming) {
		c, err := in.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		_, _, err = Splice(ctx, c, near)
		errs <- err
	})
	origin.SetDeadline(time.Now().Add(2 * patience))
	t.Cleanup(func() { origin.Close() })
	return open(t, s, testFlow), origin, errs
}

func TestSpliceHalfClose(t *testing.T) {
	flow, origin, result := spliced(t)
	request, reply := strings.Repeat("request", 50000), strings.Repeat("reply", 50000)
	go func() {
		io.WriteString(flow, request)
		flow.CloseWrite()
	}()
	if got, err := io.ReadAll(origin); err != nil || string(got) != request {
		t.Errorf("origin read %d bytes, %v; want %d", len(got), err, len(request))
	}
	go func() {
		io.WriteString(origin, reply)
		origin.CloseWrite()
	}()
	if got, err := io.ReadAll(flow); err != nil || string(got) != reply {
		t.Errorf("opener read %d bytes, %v; want %d", len(got), err, len(reply))
	}
	flow.Close()
	if err := <-result; err != nil {
		t.Errorf("Splice: %v, want nil", err)
	}
}

// TestSpliceOriginResets: a TCP reset in the middle of an answer must not look like its end.
func TestSpliceOriginResets(t *testing.T) {
	flow, origin, result := spliced(t)
	io.WriteString(origin, "half an answ")
	if _, err := io.ReadFull(flow, make([]byte, 12)); err != nil {
		t.Fatal(err)
	}
	origin.SetLinger(0)
	origin.Close()
	if _, err := io.ReadAll(flow); !errors.Is(err, ErrReset) {
		t.Errorf("opener reads: %v, want ErrReset", err)
	}
	if err := <-result; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Splice: %v, want ECONNRESET", err)
	}
}

// TestSpliceOpenerResets: and the other way.
func TestSpliceOpenerResets(t *testing.T) {
	flow, origin, result := spliced(t)
	io.WriteString(flow, "half a requ")
	if _, err := io.ReadFull(origin, make([]byte, 11)); err != nil {
		t.Fatal(err)
	}
	cut(flow)
	if _, err := io.ReadAll(origin); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("origin reads: %v, want ECONNRESET", err)
	}
	if err := <-result; !errors.Is(err, ErrReset) {
		t.Errorf("Splice: %v, want ErrReset", err)
	}
}

// TestSpliceStalledOrigin: an opener's reset ends the flow even if the origin takes no more bytes and sends none, so that
// nobody reads what the opener did.
func TestSpliceStalledOrigin(t *testing.T) {
	flow, origin, result := spliced(t)
	origin.SetReadBuffer(16 << 10)
	flow.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	if _, err := flow.Write(make([]byte, 32<<20)); !errors.Is(err, os.ErrDeadlineExceeded) { // all buffers are full
		t.Fatalf("Write: %v, want a timeout", err)
	}
	cut(flow)
	select {
	case err := <-result:
		if !errors.Is(err, ErrReset) {
			t.Errorf("Splice: %v, want ErrReset", err)
		}
	case <-time.After(patience):
		t.Error("Splice goes on with a flow that its opener has cut")
	}
}

// TestSpliceOpenerCloses: what was written before Close arrives whole, even if it is read late, and an idle origin does not
// hold the flow.
func TestSpliceOpenerCloses(t *testing.T) {
	flow, origin, result := spliced(t)
	origin.SetReadBuffer(16 << 10) // the rest waits at the connector's end
	request := strings.Repeat("quit", 75000)
	if _, err := io.WriteString(flow, request); err != nil {
		t.Fatal(err)
	}
	flow.Close()
	select {
	case err := <-result: // the origin has not closed
		if !errors.Is(err, ErrClosed) {
			t.Errorf("Splice: %v, want ErrClosed", err)
		}
	case <-time.After(patience):
		t.Error("Splice waits for an origin that nobody reads")
	}
	if got, err := io.ReadAll(origin); err != nil || string(got) != request {
		t.Errorf("origin read %d bytes, %v; want %d", len(got), err, len(request))
	}
}

func TestSpliceContext(t *testing.T) {
	near, origin := tcpPair(t)
	defer origin.Close()
	other, visitor := tcpPair(t)
	defer visitor.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		_, _, err := Splice(ctx, near, other)
		done <- err
	}()
	io.WriteString(origin, "x")
	if _, err := io.ReadFull(visitor, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Splice: %v, want context.Canceled", err)
	}
	if _, err := visitor.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("visitor reads: %v, want ECONNRESET", err)
	}
}

func TestSpliceSessionLost(t *testing.T) { overBoth(t, testSpliceSessionLost) }

func testSpliceSessionLost(t *testing.T, via Carrier) {
	near, origin := tcpPair(t)
	defer origin.Close()
	_, c, s := pairOver(t, via, func(ctx context.Context, in *Incoming) {
		flow, err := in.Accept()
		if err != nil {
			return
		}
		Splice(ctx, flow, near)
	})
	open(t, s, testFlow)
	s.Close(CloseRevoked)
	if _, err := origin.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("origin reads: %v, want ECONNRESET", err)
	}
	c.wait(t)
}
