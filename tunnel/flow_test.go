package tunnel

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/vnet"
)

func checkEcho(tb testing.TB, c Conn, text string) {
	tb.Helper()
	go c.Write([]byte(text))
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		tb.Fatalf("echo: %d bytes, %v; want the %d sent", len(got), err, len(text))
	}
}

func flowOf(k FlowKind, v vnet.ID, host string, port uint16, visitor string, deadline time.Duration) Flow {
	return Flow{Kind: k, VNet: v, Host: host, Port: port, Visitor: netip.MustParseAddrPort(visitor), Deadline: deadline}
}

func TestFlowMetadata(t *testing.T) { overBoth(t, testFlowMetadata) }

func testFlowMetadata(t *testing.T, via Carrier) {
	got := make(chan Flow, 1)
	addrs := make(chan [2]string, 1)
	_, _, s := pairOver(t, via, func(_ context.Context, in *Incoming) {
		got <- in.Flow()
		c, _ := in.Accept()
		addrs <- [2]string{c.LocalAddr().String(), c.RemoteAddr().String()}
		c.Close()
	})
	for _, tt := range []struct {
		name string
		flow Flow
		want Flow
	}{
		{"all", flowOf(KindTCP, "v1", "10.1.2.3", 443, "192.0.2.1:4711", 3*time.Second),
			flowOf(KindTCP, "v1", "10.1.2.3", 443, "192.0.2.1:4711", 3*time.Second)},
		{"canonical", flowOf(0, "default", "WWW.Keyhaven.Test.", 1, "[::ffff:192.0.2.1]:1", time.Microsecond),
			flowOf(KindTCP, "default", "www.keyhaven.test", 1, "192.0.2.1:1", time.Millisecond)},
		{"ipv6", flowOf(0, "default", "2001:DB8:0:0::1", 1, "[2001:db8::2]:1", time.Second),
			flowOf(KindTCP, "default", "2001:db8::1", 1, "[2001:db8::2]:1", time.Second)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := open(t, s, tt.flow)
			defer c.Close()
			if got := <-got; got != tt.want {
				t.Errorf("Flow() = %+v, want %+v", got, tt.want)
			}
			dest := flowAddr{tt.want.Host, tt.want.Port}.String()
			if got, want := <-addrs, [2]string{dest, tt.want.Visitor.String()}; got != want {
				t.Errorf("connector's addresses = %v, want %v", got, want)
			}
			if got := c.RemoteAddr().String(); got != dest {
				t.Errorf("edge's RemoteAddr() = %s, want %s", got, dest)
			}
		})
	}
	for _, bad := range []Flow{
		{VNet: "v", Host: "a"}, {VNet: "v", Port: 1}, {Host: "a", Port: 1}, {Kind: KindIngress, VNet: "v", Host: "a", Port: 1, Service: "http"},
		{VNet: "v", Host: "a b", Port: 1}, {VNet: "v", Host: "fe80::1%eth0", Port: 1}, {VNet: "v v", Host: "a", Port: 1},
	} {
		if _, err := s.Open(context.Background(), bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("Open(%+v): %v, want ErrMalformed", bad, err)
		}
	}
	if n := s.Flows(); n != 0 {
		eventually(t, "no flow counted", func() bool { return s.Flows() == 0 })
	}
}

func TestDeadlineFromContext(t *testing.T) { overBoth(t, testDeadlineFromContext) }

func testDeadlineFromContext(t *testing.T, via Carrier) {
	got := make(chan time.Duration, 1)
	_, _, s := pairOver(t, via, func(_ context.Context, in *Incoming) {
		got <- in.Flow().Deadline
		in.Reject(ResultDenied)
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := s.Open(ctx, testFlow); !errors.Is(err, ErrDenied) {
		t.Errorf("Open: %v, want ErrDenied", err)
	}
	if d := <-got; d <= 50*time.Second || d > time.Minute {
		t.Errorf("the connector was told %v, want just below a minute", d)
	}
}

func TestResults(t *testing.T) { overBoth(t, testResults) }

func testResults(t *testing.T, via Carrier) {
	next := make(chan Result, 1)
	_, c, s := pairOver(t, via, func(_ context.Context, in *Incoming) {
		if r := <-next; r != ResultOK {
			if err := in.Reject(r); err != nil {
				t.Errorf("Reject(%v): %v", r, err)
			}
			if _, err := in.Accept(); err == nil {
				t.Error("Accept after Reject succeeded")
			}
		}
	})
	for r, want := range map[Result]error{
		ResultRefused: ErrRefused, ResultTimedOut: ErrTimedOut, ResultDenied: ErrDenied, ResultNoRoute: ErrNoRoute,
		ResultNameNotFound: ErrNameNotFound, ResultDraining: ErrDraining, ResultLimit: ErrLimit, ResultInternal: ErrInternal,
		ResultUnsupported: ErrUnsupported, ResultMalformed: ErrMalformed, 0x70: &FlowError{Result: 0x70},
		ResultOK: ErrInternal, // the handler returns without an answer
	} {
		next <- r
		_, err := s.Open(context.Background(), testFlow)
		if !errors.Is(err, want) {
			t.Errorf("%v: Open: %v, want %v", r, err, want)
		}
		if fe, ok := errors.AsType[*FlowError](err); !ok || !fe.Remote {
			t.Errorf("%v: Open: %v, want a remote *FlowError", r, err)
		}
	}
	eventually(t, "no flows", func() bool { return s.Flows() == 0 && c.Flows() == 0 })
}

// TestHalfClose: each direction ends by itself, in both orders.
func TestHalfClose(t *testing.T) { overBoth(t, testHalfClose) }

func testHalfClose(t *testing.T, via Carrier) {
	big := make([]byte, 1<<20)
	rand.Read(big)
	t.Run("opener first", func(t *testing.T) {
		_, _, s := pairOver(t, via, accept(func(c Conn) {
			sum := sha256.New()
			io.Copy(sum, c) // until the end of the request
			c.Write(sum.Sum(nil))
			c.CloseWrite()
		}))
		c := open(t, s, testFlow)
		if _, err := c.Write(big); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write after CloseWrite: %v, want net.ErrClosed", err)
		}
		got, err := io.ReadAll(c)
		if want := sha256.Sum256(big); err != nil || !bytes.Equal(got, want[:]) {
			t.Errorf("answer %x, %v; want %x", got, err, want)
		}
		c.Close()
	})
	t.Run("connector first", func(t *testing.T) {
		got := make(chan []byte, 1)
		_, _, s := pairOver(t, via, accept(func(c Conn) {
			c.Write([]byte("hello"))
			c.CloseWrite()
			b, err := io.ReadAll(c)
			if err != nil {
				t.Errorf("connector reads: %v", err)
			}
			got <- b
		}))
		c := open(t, s, testFlow)
		if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
			t.Errorf("read %q, %v", b, err)
		}
		if _, err := c.Write(big); err != nil {
			t.Error(err)
		}
		c.Close() // must deliver what was written
		if !bytes.Equal(<-got, big) {
			t.Error("the connector did not get what was written before Close")
		}
	})
}

// TestTruncationShows: whatever cuts a flow in its middle, the reader gets an error and never io.EOF.
func TestTruncationShows(t *testing.T) { overBoth(t, testTruncationShows) }

func testTruncationShows(t *testing.T, via Carrier) {
	t.Parallel()
	for name, tt := range map[string]struct {
		serve func(Conn)
		want  error
	}{
		"reset":           {func(c Conn) { c.(*flowConn).Reset(ResultReset) }, ErrReset},
		"handler returns": {nil, ErrReset},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, s := pairOver(t, via, func(_ context.Context, in *Incoming) {
				c, err := in.Accept()
				if err != nil {
					t.Error(err)
				}
				c.Write([]byte("part"))
				c.Read(make([]byte, 1)) // a reset may overtake what was sent before it
				if tt.serve != nil {
					tt.serve(c)
				}
			})
			c := open(t, s, testFlow)
			defer c.Close()
			c.Write([]byte("x"))
			_, err := io.ReadAll(c)
			if !errors.Is(err, tt.want) {
				t.Errorf("ReadAll: %v, want %v", err, tt.want)
			}
			eventually(t, "writes fail", func() bool {
				_, err := c.Write([]byte("x"))
				return errors.Is(err, tt.want)
			})
		})
	}
	t.Run("opener resets", func(t *testing.T) {
		got := make(chan error, 1)
		_, _, s := pairOver(t, via, accept(func(c Conn) {
			_, err := io.ReadAll(c)
			got <- err
		}))
		c := open(t, s, testFlow)
		c.Write([]byte("part"))
		c.(*flowConn).Reset(ResultReset)
		if err := <-got; !errors.Is(err, ErrReset) {
			t.Errorf("connector reads: %v, want ErrReset", err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read after Reset: %v, want net.ErrClosed", err)
		}
	})
	t.Run("closed during a write", func(t *testing.T) {
		got := make(chan error, 1)
		stuck := make(chan struct{})
		_, _, s := pairOver(t, via, accept(func(c Conn) {
			<-stuck
			_, err := io.ReadAll(c)
			got <- err
		}))
		c := open(t, s, testFlow)
		wrote := make(chan error, 1)
		go func() {
			_, err := c.Write(make([]byte, 16<<20))
			wrote <- err
		}()
		time.Sleep(100 * time.Millisecond) // the window fills
		c.Close()
		if err := <-wrote; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write: %v, want net.ErrClosed", err)
		}
		close(stuck)
		if err := <-got; !errors.Is(err, ErrClosed) {
			t.Errorf("connector reads: %v, want ErrClosed", err)
		}
	})
}

func TestOpenCancelled(t *testing.T) { overBoth(t, testOpenCancelled) }

func testOpenCancelled(t *testing.T, via Carrier) {
	cancelled := make(chan struct{})
	_, c, s := pairOver(t, via, func(ctx context.Context, in *Incoming) {
		select {
		case <-in.Cancelled():
			close(cancelled)
		case <-ctx.Done():
		}
		in.Reject(ResultTimedOut)
	})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err := s.Open(ctx, testFlow)
	if !errors.Is(err, ErrTimedOut) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Open: %v, want ErrTimedOut, context.DeadlineExceeded", err)
	}
	select {
	case <-cancelled:
	case <-time.After(patience):
		t.Error("the connector was not told")
	}
	eventually(t, "no flows", func() bool { return s.Flows() == 0 && c.Flows() == 0 })
	ctx2, cancel2 := context.WithCancel(context.Background())
	cancel2()
	if _, err := s.Open(ctx2, testFlow); !errors.Is(err, ErrCancelled) || !errors.Is(err, context.Canceled) {
		t.Errorf("Open: %v, want ErrCancelled, context.Canceled", err)
	}
}

func TestDeadlines(t *testing.T) { overBoth(t, testDeadlines) }

func testDeadlines(t *testing.T, via Carrier) {
	_, _, s := pairOver(t, via, func(ctx context.Context, in *Incoming) {
		in.Accept()
		<-ctx.Done()
	})
	c := open(t, s, testFlow)
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	_, err := c.Read(make([]byte, 1))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read: %v, want os.ErrDeadlineExceeded", err)
	}
	if ne, ok := errors.AsType[net.Error](err); !ok || !ne.Timeout() {
		t.Errorf("Read: %v, want a time-out", err)
	}
	n := 0
	for wait := 50 * time.Millisecond; n == 0 && err != nil && wait < patience; wait *= 4 { // a busy machine may send nothing for a while
		c.SetWriteDeadline(time.Now().Add(wait))
		if n, err = c.Write(make([]byte, 8<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Write: %v, want os.ErrDeadlineExceeded", err)
		}
	}
	if n == 0 {
		t.Error("nothing was written")
	}
}

func TestFlowLimit(t *testing.T) { overBoth(t, testFlowLimit) }

func testFlowLimit(t *testing.T, via Carrier) {
	for _, side := range []string{"edge", "connector"} {
		t.Run(side, func(t *testing.T) {
			_, c, s := pairOver(t, via, accept(echo), func(lc *ListenConfig, dc *DialConfig) {
				if side == "edge" {
					lc.Limits.MaxFlows = 2
				} else {
					dc.Limits.MaxFlows = 2
				}
			})
			a, b := open(t, s, testFlow), open(t, s, testFlow)
			for range 3 {
				_, err := s.Open(context.Background(), testFlow)
				if !errors.Is(err, ErrLimit) {
					t.Errorf("Open: %v, want ErrLimit", err)
				}
				if fe, ok := errors.AsType[*FlowError](err); !ok || !fe.Retriable() {
					t.Errorf("Open: %v, want it retriable", err)
				}
			}
			a.Close()
			eventually(t, "room again", func() bool {
				d, err := s.Open(context.Background(), testFlow)
				if err != nil {
					return false
				}
				d.Close()
				return true
			})
			b.Close()
			eventually(t, "no flows", func() bool { return s.Flows() == 0 && c.Flows() == 0 })
		})
	}
}

func TestThousandsOfFlows(t *testing.T) { overBoth(t, testThousandsOfFlows) }

func testThousandsOfFlows(t *testing.T, via Carrier) {
	const flows = 3000
	_, c, s := pairOver(t, via, accept(echo))
	conns := make([]Conn, flows)
	var wg sync.WaitGroup
	gate := make(chan struct{}, 200)
	for i := range conns {
		gate <- struct{}{}
		wg.Go(func() {
			defer func() { <-gate }()
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			conn, err := s.Open(ctx, testFlow)
			if err != nil {
				t.Errorf("Open %d: %v", i, err)
				return
			}
			conns[i] = conn
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	if got := s.Flows(); got != flows {
		t.Errorf("Flows() = %d, want %d", got, flows)
	}
	for i, conn := range conns {
		wg.Go(func() {
			text := fmt.Sprintf("flow %d", i)
			conn.Write([]byte(text))
			conn.CloseWrite()
			conn.SetDeadline(time.Now().Add(2 * patience))
			if got, err := io.ReadAll(conn); err != nil || string(got) != text {
				t.Errorf("flow %d: read %q, %v", i, got, err)
			}
			conn.Close()
		})
	}
	wg.Wait()
	eventually(t, "no flows", func() bool { return s.Flows() == 0 && c.Flows() == 0 })
}

// TestSlowReaders leaves many flows full and unread, at either side; another flow must not feel it.
func TestSlowReaders(t *testing.T) { overBoth(t, testSlowReaders) }

func testSlowReaders(t *testing.T, via Carrier) {
	t.Parallel()
	const slow = 64
	full := make(chan struct{}, slow)
	_, _, s := pairOver(t, via, func(ctx context.Context, in *Incoming) {
		c, err := in.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		if in.Flow().Port == 80 {
			echo(c)
			return
		}
		full <- struct{}{}
		c.Write(make([]byte, 2*initialFlowWindow)) // blocks until the flow is cut
	})
	conns := make([]Conn, slow)
	for i := range conns {
		f := testFlow
		f.Port = 81
		conns[i] = open(t, s, f)
		go conns[i].Write(make([]byte, 2*initialFlowWindow))
		<-full
	}
	time.Sleep(300 * time.Millisecond) // the windows fill
	c := open(t, s, testFlow)
	checkEcho(t, c, string(make([]byte, 1<<20)))
	c.Close()
	for _, c := range conns {
		c.Close()
	}
}

// TestAllocations compares a flow with the bare stream below it: what this package adds to the QUIC library's own
// allocations must be nothing.
func TestAllocations(t *testing.T) {
	runs := 2000
	if raceEnabled {
		t.Log("the race detector allocates; only the transfer is tested")
		runs = 100
	}
	_, _, s := pairOver(t, CarrierQUIC, accept(echo))
	c := open(t, s, testFlow)
	defer c.Close()
	c.SetDeadline(time.Time{})
	buf := make([]byte, 100)
	measure := func(rw io.ReadWriter) float64 {
		return testing.AllocsPerRun(runs, func() {
			rw.Write(buf)
			if _, err := io.ReadFull(rw, buf); err != nil {
				t.Fatal(err)
			}
		})
	}
	measure(c)
	ours, bare := measure(c), measure(c.(*flowConn).stream.(quicStream).Stream)
	t.Logf("%.0f allocations for a request and its reply of 100 B at both ends together, %.0f over the bare stream", ours, bare)
	if ours > bare+2 && !raceEnabled { // how packets fall makes a difference of one or two
		t.Errorf("%.0f allocations, the bare stream has %.0f", ours, bare)
	}
}
