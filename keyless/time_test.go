package keyless

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener whose connections are net.Pipes, so that a synctest bubble owns all time that passes.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

func (p *pipes) dial(ctx context.Context, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case p.conns <- server:
		return client, nil
	case <-p.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// prepare makes what costs real time outside of the bubble.
func prepare() { ca(); serverCert(); clientCert() }

// Each way to keep a server waiting ends after its own time.
func TestServerDeadlines(t *testing.T) {
	prepare()
	ping := must((&Packet{Major: 1, Operation: Operation{Opcode: OpPing}}).Append(nil))
	for _, tt := range []struct {
		name  string
		first []byte // sent after the handshake
		drip  bool   // then a byte each second
		want  time.Duration
	}{
		{"no handshake", nil, false, 5 * time.Second},
		{"nothing after the handshake", []byte{}, false, 60 * time.Second},
		{"idle after a request", ping, false, 60 * time.Second},
		{"half a header", []byte{1, 0, 0}, false, 6 * time.Second},
		{"a header, byte by byte", []byte{1}, true, 6 * time.Second},
		{"half a body", ping[:500], false, 9 * time.Second},
		{"a body, byte by byte", ping[:8], true, 9 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := newPipes()
				serveOn(t, &Server{Handler: echo, HeaderTimeout: 6 * time.Second, BodyTimeout: 9 * time.Second}, ln)
				raw := must(ln.dial(t.Context(), ""))
				start := time.Now()
				conn := net.Conn(raw)
				if tt.first != nil {
					tconn := tls.Client(raw, clientTLS(""))
					if err := tconn.Handshake(); err != nil {
						t.Fatal(err)
					}
					conn = tconn
					conn.Write(tt.first)
				}
				var drip sync.WaitGroup
				if tt.drip {
					drip.Go(func() {
						for {
							time.Sleep(time.Second)
							if _, err := conn.Write([]byte{0}); err != nil {
								return
							}
						}
					})
				}
				defer drip.Wait()
				defer raw.Close()
				io.Copy(io.Discard, conn)
				if got := time.Since(start); got != tt.want {
					t.Errorf("closed after %v, want %v", got, tt.want)
				}
			})
		})
	}
}

// Large requests in flight are bounded by their bytes: beyond that the connection is not read, and small ones wait too.
func TestServerBoundsLargeRequests(t *testing.T) {
	prepare()
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		var entered atomic.Int32
		release := make(chan struct{})
		serveOn(t, &Server{OpTimeout: time.Hour, Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) {
			entered.Add(1)
			<-release
			return nil, nil
		})}, ln)
		conn := tls.Client(must(ln.dial(t.Context(), "")), clientTLS(""))
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		const size, count = 60 << 10, 200
		packet := must((&Packet{Major: 1, Operation: Operation{Opcode: OpSeal, Extra: make([]byte, size)}}).Append(nil))
		var sender sync.WaitGroup
		sender.Go(func() {
			for range count {
				if _, err := conn.Write(packet); err != nil {
					t.Error(err)
				}
			}
		})
		synctest.Wait()
		if got := int(entered.Load()); got != maxLarge/size {
			t.Errorf("%d requests of %d bytes are in flight, want %d", got, size, maxLarge/size)
		}
		close(release)
		replies := must((&Packet{Major: 1, Operation: Operation{Opcode: OpResponse}}).Append(nil))
		if _, err := io.ReadFull(conn, make([]byte, count*len(replies))); err != nil {
			t.Errorf("not all were answered: %v", err)
		}
		sender.Wait()
		conn.NetConn().Close()
	})
}

// A connection that is kept busy ends with the certificate that let its peer in, and the peer comes back with a newer one.
func TestServerEndsExpiredPeers(t *testing.T) {
	prepare()
	key := p256Key()
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		serveOn(t, &Server{Handler: echo, TLS: serverTLS()}, ln)
		start := time.Now()
		old := ca().issueUntil(start.Add(time.Hour), key, "spiffe://test/edge/one", "")
		conn := tls.Client(must(ln.dial(t.Context(), "")), clientTLSWith(old))
		defer conn.NetConn().Close()
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		var busy sync.WaitGroup
		busy.Go(func() {
			ping := must((&Packet{Major: 1, Operation: Operation{Opcode: OpPing}}).Append(nil))
			for range 2 * 360 {
				if _, err := conn.Write(ping); err != nil {
					return
				}
				time.Sleep(10 * time.Second)
			}
		})
		io.Copy(io.Discard, conn)
		if got := time.Since(start); got < time.Hour || got > time.Hour+time.Second {
			t.Errorf("closed after %v, want an hour", got)
		}
		conn.NetConn().Close()
		busy.Wait()
	})
}

// An operation that takes longer than the idle time does not make its connection idle.
func TestServerIdleWhileBusy(t *testing.T) {
	prepare()
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		serveOn(t, &Server{IdleTimeout: 2 * time.Second, OpTimeout: time.Hour, Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) {
			time.Sleep(time.Minute)
			return nil, nil
		})}, ln)
		conn := tls.Client(must(ln.dial(t.Context(), "")), clientTLS(""))
		defer conn.Close()
		send(t, conn, 1, Operation{Opcode: OpSeal})
		if _, op := receive(t, newFrameReader(conn)); op.Opcode != OpResponse {
			t.Errorf("got %s, want a response", op.Opcode)
		}
	})
}

// The handler's context ends after OpTimeout, and at a drain after DrainTimeout.
func TestServerOperationTimes(t *testing.T) {
	prepare()
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		took := make(chan time.Duration, 1)
		stop := serveOn(t, &Server{OpTimeout: 20 * time.Second, DrainTimeout: 3 * time.Second, Handler: handlerFunc(func(ctx context.Context, _ *Request) ([]byte, error) {
			start := time.Now()
			<-ctx.Done()
			took <- time.Since(start)
			return nil, ctx.Err()
		})}, ln)
		conn := tls.Client(must(ln.dial(t.Context(), "")), clientTLS(""))
		defer conn.Close()
		r := newFrameReader(conn)
		send(t, conn, 1, Operation{Opcode: OpSeal})
		if _, op := receive(t, r); op.Opcode != OpError || op.Payload[0] != byte(CodeInternal) {
			t.Errorf("got %s %x, want error 8", op.Opcode, op.Payload)
		}
		if got := <-took; got != 20*time.Second {
			t.Errorf("operation ended after %v, want 20s", got)
		}
		send(t, conn, 2, Operation{Opcode: OpSeal})
		synctest.Wait()
		go stop()
		if _, op := receive(t, r); op.Opcode != OpError {
			t.Errorf("got %s, want an error", op.Opcode)
		}
		if got := <-took; got != 3*time.Second {
			t.Errorf("operation ended %v after the drain began, want 3s", got)
		}
		io.Copy(io.Discard, conn)
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// A peer that sends requests and reads no reply is cut off by the write deadline.
func TestServerPeerDoesNotRead(t *testing.T) {
	prepare()
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		s := &Server{Handler: echo, WriteTimeout: 4 * time.Second}
		stop := serveOn(t, s, ln)
		conn := tls.Client(must(ln.dial(t.Context(), "")), clientTLS(""))
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		for {
			p := Packet{Major: 1, Operation: Operation{Opcode: OpPing, Payload: make([]byte, 60_000)}}
			if _, err := conn.Write(must(p.Append(nil))); err != nil {
				break
			}
		}
		if got := time.Since(start); got != 4*time.Second {
			t.Errorf("cut off after %v, want 4s", got)
		}
		conn.NetConn().Close()
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// An unused connection lives on heartbeats, far beyond the server's idle time.
func TestClientHeartbeat(t *testing.T) {
	prepare()
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		stop := serveOn(t, &Server{Handler: echo, IdleTimeout: 30 * time.Second}, ln)
		c := startClient(t, ClientConfig{Servers: []string{"one"}, Dial: ln.dial})
		time.Sleep(time.Hour)
		if st := c.Stats().Servers[0]; st.Conns != 2 || st.Dials != 2 || st.Failures != 0 {
			t.Errorf("after an hour: %+v, want two connections that were never lost", st)
		}
		c.Close()
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// A server that falls silent without closing anything: requests end with their deadline, the connection is found dead
// by a ping soon after, and from then on requests fail at once.
func TestClientSilentServer(t *testing.T) {
	prepare()
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		var silent sync.Map
		stop := serveOn(t, &Server{Handler: echo}, ln)
		dial := func(ctx context.Context, addr string) (net.Conn, error) {
			if _, dead := silent.Load("dial"); dead {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			conn, err := ln.dial(ctx, addr)
			return &mute{Conn: conn, silent: &silent}, err
		}
		c := startClient(t, ClientConfig{Servers: []string{"one"}, Dial: dial, Timeout: 2 * time.Second, DialTimeout: 3 * time.Second})
		op := Operation{Opcode: OpEd25519Sign, SKI: SKI{1}, Payload: []byte("m")}
		if _, err := c.Do(t.Context(), &op); err != nil {
			t.Fatal(err)
		}
		silent.Store("dial", true)
		start := time.Now()
		_, err := c.Do(t.Context(), &op)
		wantErr(t, err, context.DeadlineExceeded)
		if got := time.Since(start); got != 2*time.Second {
			t.Errorf("first request ended after %v, want 2s", got)
		}
		// The second goes to the other connection and makes that suspect, too. Ping and redial take 3s each.
		c.Do(t.Context(), &op)
		time.Sleep(8 * time.Second)
		if c.Healthy() {
			t.Error("still healthy")
		}
		start = time.Now()
		_, err = c.Do(t.Context(), &op)
		wantErr(t, err, ErrUnavailable)
		if got := time.Since(start); got != 0 {
			t.Errorf("request took %v with all servers known to be down, want 0", got)
		}
		silent.Delete("dial")
		time.Sleep(10 * time.Second)
		if _, err := c.Do(t.Context(), &op); err != nil {
			t.Errorf("after the server is back: %v", err)
		}
		c.Close()
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// mute swallows writes while "dial" is in silent.
type mute struct {
	net.Conn
	silent *sync.Map
}

func (m *mute) Write(b []byte) (int, error) {
	if _, dead := m.silent.Load("dial"); dead {
		return len(b), nil
	}
	return m.Conn.Write(b)
}

// During the first attempt requests wait, but no longer than their own time.
func TestClientBoundedFirstTry(t *testing.T) {
	prepare()
	synctest.Test(t, func(t *testing.T) {
		black := func(ctx context.Context, _ string) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
		c := startClient(t, ClientConfig{Servers: []string{"one"}, Dial: black, DialTimeout: 3 * time.Second, Timeout: 2 * time.Second})
		for _, want := range []time.Duration{2 * time.Second, time.Second, 0, 0} {
			start := time.Now()
			_, err := c.Do(t.Context(), &Operation{Opcode: OpPing})
			wantErr(t, err, ErrUnavailable)
			if got := time.Since(start); got != want {
				t.Errorf("failed after %v, want %v", got, want)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		c2 := startClient(t, ClientConfig{Servers: []string{"one"}, Dial: black})
		_, err := c2.Do(ctx, &Operation{Opcode: OpPing})
		wantErr(t, err, context.Canceled)
		c.Close()
		c2.Close()
	})
}
