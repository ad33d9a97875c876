package keyless

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A gone connection is one whose server has said something and closed: after some writes the next fails, and what the
// server said since is read only after that.
type gone struct {
	net.Conn
	left   atomic.Int32 // writes that succeed
	once   sync.Once
	failed chan struct{} // closed when a write has failed, or with the connection
}

func (c *gone) Write(b []byte) (int, error) {
	if c.left.Add(-1) < 0 {
		c.once.Do(func() { close(c.failed) })
		return 0, &net.OpError{Op: "write", Net: "tcp", Err: syscall.EPIPE}
	}
	return c.Conn.Write(b)
}

func (c *gone) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.left.Load() <= 0 {
		<-c.failed
		time.Sleep(20 * time.Millisecond) // the reading goroutine is not the first to run
	}
	return n, err
}

func (c *gone) Close() error {
	c.once.Do(func() { close(c.failed) })
	return c.Conn.Close()
}

// dialGone makes connections on which so many writes succeed, and puts the latest into conn.
func dialGone(writes int32, conn *atomic.Pointer[gone]) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) {
		raw, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil, err
		}
		c := &gone{Conn: raw, failed: make(chan struct{})}
		c.left.Store(writes)
		conn.Store(c)
		return c, nil
	}
}

// handshakeWrites is how often a client writes for a TLS 1.3 handshake.
const handshakeWrites = 2

// TestRefusalIsTold: a client whose certificate is refused learns so, even if its first write fails before it has read that.
func TestRefusalIsTold(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: echo})
	stranger := clientTLSWith(newTestCA().issue("spiffe://test/edge/one", ""))
	c := startClient(t, ClientConfig{Servers: []string{addr}, TLS: func(string) *tls.Config { return stranger }, Dial: dialGone(handshakeWrites, new(atomic.Pointer[gone]))})
	_, err := c.Do(t.Context(), &Operation{Opcode: OpPing})
	wantErr(t, err, ErrUnavailable)
	if last := c.Stats().Servers[0].LastErr; last == nil || !strings.Contains(last.Error(), "remote error: tls: ") {
		t.Errorf("LastErr = %v, want the server's alert", last)
	}
}

// TestReplyBeforeTheEnd: a reply that came before the connection broke counts, even if a write fails before it is read.
func TestReplyBeforeTheEnd(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: echo})
	var conn atomic.Pointer[gone]
	c := startClient(t, ClientConfig{Servers: []string{addr}, ConnsPerServer: 1, Dial: dialGone(handshakeWrites+2, &conn)}) // a ping and one request
	eventually(t, "the client is connected", c.Healthy)
	first := make(chan error, 1)
	go func() {
		_, err := c.Do(t.Context(), &Operation{Opcode: OpCustom, CustomFunc: "once"})
		first <- err
	}()
	eventually(t, "the request is on its way", func() bool { return conn.Load().left.Load() == 0 })
	if _, err := c.Do(t.Context(), &Operation{Opcode: OpCustom, CustomFunc: "twice"}); !errors.Is(err, errBroken) {
		t.Errorf("the second request: got %v, want %v", err, errBroken)
	}
	if err := <-first; err != nil {
		t.Errorf("the first request: %v", err)
	}
}

// TestHangUp: a refused peer that wrote on reads to the end of what it was told, and no reset.
func TestHangUp(t *testing.T) {
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	defer ln.Close()
	near := must(net.Dial("tcp", ln.Addr().String()))
	defer near.Close()
	far := must(ln.Accept())
	must(near.Write(make([]byte, 4096)))
	must(far.Write([]byte("no")))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer far.Close()
		hangUp(t.Context(), far)
	}()
	if b, err := io.ReadAll(near); err != nil || string(b) != "no" {
		t.Errorf("got %q, %v", b, err)
	}
	near.Close()
	<-ended
}
