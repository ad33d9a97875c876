package tunnel

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// A gone conn is one whose peer has said something and closed: from a moment on a write fails, and what was said before
// is read only after that.
type gone struct {
	net.Conn

	once   sync.Once
	from   chan struct{} // closed when the peer has gone
	failed chan struct{} // closed when a write has
}

func (c *gone) Write(b []byte) (int, error) {
	select {
	case <-c.from:
		c.once.Do(func() { close(c.failed) })
		return 0, &net.OpError{Op: "write", Net: "tcp", Err: syscall.EPIPE}
	default:
		return c.Conn.Write(b)
	}
}

func (c *gone) Read(b []byte) (int, error) {
	select {
	case <-c.from:
		<-c.failed
		time.Sleep(50 * time.Millisecond) // the reading goroutine is not the first to run
	default:
	}
	return c.Conn.Read(b)
}

// TestLastWords: what a peer says before it closes is the reason of the end, even if a write fails before that is read.
func TestLastWords(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	edge := p.source(mtls.KindEdge, "e1", 0)
	for name, tt := range map[string]struct {
		client *mtls.Source
		say    func(*tls.Conn)
		want   error
	}{
		"alert": {p.source(mtls.KindEdge, "e2", 0), func(*tls.Conn) {}, ErrCertificate},
		"close": {p.source(mtls.KindConnector, "c1", 0), func(c *tls.Conn) { c.Write(muxFrame(muxClose, 0, byte(CloseRevoked))) },
			&SessionError{Reason: CloseRevoked, Remote: true}},
		"nothing": {p.source(mtls.KindConnector, "c1", 0), func(*tls.Conn) {}, ErrPeerLost},
	} {
		t.Run(name, func(t *testing.T) {
			near, far := tcpPair(t)
			raw := &gone{Conn: near, from: make(chan struct{}), failed: make(chan struct{})}
			cork := &corkConn{Conn: raw}
			conn := tls.Client(cork, tt.client.ClientConfig(mtls.ClientOptions{ALPN: []string{ALPN}, Expect: mtls.AcceptKinds(mtls.KindEdge)}))
			said := make(chan struct{})
			go func() {
				defer close(said)
				server := tls.Server(far, edge.ServerConfig(mtls.ServerOptions{ALPN: []string{ALPN}, Accept: mtls.AcceptKinds(mtls.KindConnector)}))
				if server.Handshake() == nil {
					tt.say(server)
				}
				far.CloseWrite()
			}()
			if err := conn.Handshake(); err != nil {
				t.Fatal(err)
			}
			<-said
			defer far.Close()
			close(raw.from)
			cork.corked = true
			m := newMux(conn, cork, true, Limits{}.withDefaults(1), 4)
			m.start()
			<-m.done()
			m.wg.Wait()
			if err := m.err(); !errors.Is(err, tt.want) && err.Error() != tt.want.Error() {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// TestHangUp: a refused peer that wrote on reads to the end of what it was told, and no reset.
func TestHangUp(t *testing.T) {
	t.Parallel()
	near, far := tcpPair(t)
	defer near.Close()
	if _, err := near.Write(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if _, err := far.Write([]byte("no")); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		hangUp(t.Context(), far)
	}()
	if b, err := io.ReadAll(near); err != nil || string(b) != "no" {
		t.Errorf("got %q, %v", b, err)
	}
	near.Close()
	<-ended
}
