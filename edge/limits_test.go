package edge

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

func TestConnectionsPerAddress(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.cfg.Limits.ConnectionsPerAddress = 3
	w.start()
	var conns []net.Conn
	for range 3 {
		c, err := w.dialTLS(w.tlsConfig("a.test"))
		must(t, err)
		conns = append(conns, c)
	}
	c, err := net.Dial("tcp", w.addr())
	must(t, err)
	must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	if n, err := c.Read(make([]byte, 1)); n != 0 || (err != io.EOF && !isReset(err)) {
		t.Errorf("the fourth connection: %d, %v", n, err)
	}
	_ = c.Close()
	_ = conns[0].Close()
	eventually(t, "the place is free again", func() bool {
		c, err := w.dialTLS(w.tlsConfig("a.test"))
		if err != nil {
			return false
		}
		conns[0] = c
		return true
	})
	for _, c := range conns {
		_ = c.Close()
	}
	var quics []*quic.Conn
	for range 3 { // the second and third after proof of address
		q, err := w.dialQUIC(w.tlsConfig("a.test"))
		must(t, err)
		quics = append(quics, q)
	}
	if _, err := w.dialQUIC(w.tlsConfig("a.test")); err == nil {
		t.Error("a fourth QUIC connection is served")
	}
	_ = quics[0].CloseWithError(0, "")
	eventually(t, "the place is free again", func() bool {
		q, err := w.dialQUIC(w.tlsConfig("a.test"))
		if err == nil {
			quics[0] = q
		}
		return err == nil
	})
	for _, q := range quics {
		_ = q.CloseWithError(0, "")
	}
}

// Whoever holds every place of the redirect must not use up the descriptors of the edge.
func TestRedirectConnectionsPerAddress(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.cfg.Listen.Redirect = []string{"127.0.0.1:0"}
	w.cfg.Limits.ConnectionsPerAddress = 3
	w.start()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", w.server.RedirectAddrs()[0].String())
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		return c
	}
	var held []net.Conn
	for range 3 {
		held = append(held, dial())
	}
	c := dial()
	if n, err := c.Read(make([]byte, 1)); n != 0 || (err != io.EOF && !isReset(err)) {
		t.Errorf("the fourth connection: %d, %v", n, err)
	}
	_ = c.Close()
	for _, c := range held {
		_ = c.Close()
	}
	eventually(t, "the places are free again", func() bool {
		c := dial()
		defer c.Close()
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
		n, _ := c.Read(make([]byte, 12))
		return n == 12
	})
}

// Visitors behind a load balancer are many, but they are counted all the same.
func TestRedirectConnectionsBehindLoadBalancers(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.cfg.Listen.Redirect = []string{"127.0.0.1:0"}
	w.cfg.Listen.ProxyProtocolFrom = []string{"127.0.0.0/8"}
	w.cfg.Limits.Connections, w.cfg.Limits.ConnectionsPerAddress = 3, 1
	w.start()
	ask := func() (net.Conn, string) {
		c, err := net.Dial("tcp", w.server.RedirectAddrs()[0].String())
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		_, _ = io.WriteString(c, "PROXY TCP4 192.0.2.7 198.51.100.1 1234 80\r\nGET / HTTP/1.1\r\n")
		return c, "Host: a.test\r\n\r\n"
	}
	var held []net.Conn
	for range 3 {
		c, _ := ask()
		held = append(held, c)
	}
	served := func(c net.Conn, rest string) bool {
		defer c.Close()
		_, _ = io.WriteString(c, rest)
		n, _ := c.Read(make([]byte, 12))
		return n == 12
	}
	eventually(t, "a fourth connection is refused", func() bool { return !served(ask()) })
	for _, c := range held {
		_ = c.Close()
	}
	eventually(t, "the places are free again", func() bool { return served(ask()) })
}

func isReset(err error) bool {
	_, ok := err.(*net.OpError)
	return ok
}

// Connections that say nothing must not keep others from their handshake.
func TestSilentConnectionsStopNobody(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.start()
	for range 200 {
		c, err := net.Dial("tcp", w.addr())
		must(t, err)
		defer c.Close()
	}
	c, err := w.dialTLS(w.tlsConfig("a.test"))
	must(t, err)
	_ = c.Close()
}
