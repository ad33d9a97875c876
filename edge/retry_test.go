package edge

import (
	"bufio"
	"context"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// overTunnel reaches the default network through the newest session of a real tunnel, and everything else as a loopback.
type overTunnel struct {
	*loopback
	sessions chan *tunnel.Session // the newest
}

func (o *overTunnel) Dial(ctx context.Context, q control.Query) (net.Conn, error) {
	if q.VNet != "" {
		return o.loopback.Dial(ctx, q)
	}
	s := <-o.sessions
	o.sessions <- s
	c, err := s.Open(ctx, tunnel.Flow{Kind: tunnel.KindTCP, VNet: "default", Host: q.Host, Port: q.Port})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// tunnelled gives w a tunnel, and returns what connects its connector anew.
func (w *world) tunnelled() (reconnect func()) {
	w.t.Helper()
	own, err := mtls.InitAuthority(filepath.Join(w.dir, "edge-ca"), "edge.test")
	must(w.t, err)
	o := &overTunnel{w.loop, make(chan *tunnel.Session, 1)}
	registered := make(chan struct{}, 1)
	ln, err := tunnel.Listen(tunnel.ListenConfig{
		Addr: "127.0.0.1:0", Identity: enrol(w.t, own, filepath.Join(w.dir, "id-tunnel"), mtls.KindEdge, "e1"), DrainTimeout: 10 * time.Millisecond,
		Admit: func(context.Context, mtls.Identity, *x509.Certificate, tunnel.Registration) error { return nil },
		Handle: func(_ context.Context, s *tunnel.Session) {
			select {
			case <-o.sessions:
			default:
			}
			o.sessions <- s
			registered <- struct{}{}
			<-s.Done()
		},
	})
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = ln.Serve(ctx) })
	w.t.Cleanup(func() { cancel(); running.Wait() })
	id := enrol(w.t, own, filepath.Join(w.dir, "id-connector"), mtls.KindConnector, "c1")
	cut := func() {}
	w.dialer = o
	return func() {
		cut()
		c, err := tunnel.Dial(ctx, tunnel.DialConfig{Addr: ln.Addr().String(), Identity: id, Handle: dialThrough, Registration: tunnel.Registration{Instance: "i1"}})
		must(w.t, err)
		run, stop := context.WithCancel(ctx)
		done := make(chan struct{})
		running.Go(func() { defer close(done); _ = c.Run(run) })
		cut = func() { stop(); <-done }
		<-registered
	}
}

// dialThrough connects a flow with its destination.
func dialThrough(ctx context.Context, in *tunnel.Incoming) {
	f := in.Flow()
	out, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(f.Host), f.Port)))
	if err != nil {
		_ = in.Reject(tunnel.ResultRefused)
		return
	}
	conn, err := in.Accept()
	if err != nil {
		_ = out.Close()
		return
	}
	_, _, _ = tunnel.Splice(ctx, conn, out)
}

// A fickle origin answers one request on each connection and closes it at the next, as one does whose idle time ends just
// then.
func fickleOrigin(t *testing.T) (url string, posts func() int) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var mu sync.Mutex
	n := 0
	var serving sync.WaitGroup
	t.Cleanup(func() { _ = ln.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for first := true; ; first = false {
					r, err := http.ReadRequest(br)
					if err != nil {
						return
					}
					if r.Method == "POST" {
						mu.Lock()
						n++
						mu.Unlock()
					}
					_, _ = io.Copy(io.Discard, r.Body)
					if !first {
						return
					}
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				}
			})
		}
	})
	return "http://" + ln.Addr().String(), func() int { mu.Lock(); defer mu.Unlock(); return n }
}

// A pooled connection may turn out dead. What may be repeated is, on a new one; what may not is answered with an error.
func TestDeadPooledConnections(t *testing.T) {
	w := newWorld(t)
	url, posts := fickleOrigin(t)
	w.addZone("a", "p256", url, "a.test")
	reconnect := w.tunnelled()
	reconnect()
	w.start()
	get := func(c *http.Client, v, when string) {
		t.Helper()
		res, err := c.Get("https://a.test/")
		must(t, err)
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if res.StatusCode != http.StatusOK || err != nil || string(body) != "ok" {
			t.Errorf("HTTP/%s, %s: %d %q, %v", v, when, res.StatusCode, body, err)
		}
	}
	for _, v := range versions {
		c := w.client(v)
		for range 4 {
			get(c, v, "on a connection that ends at its second request")
		}
		before := posts()
		res, err := c.Post("https://a.test/", "text/plain", strings.NewReader("once"))
		must(t, err)
		_ = res.Body.Close()
		if n := posts() - before; res.StatusCode != http.StatusBadGateway || n != 1 {
			t.Errorf("HTTP/%s: POST was answered with %d and sent %d times; want 502, once", v, res.StatusCode, n)
		}
		get(c, v, "on a new connection")
		reconnect()
		get(c, v, "after the connector came back")
	}
}
