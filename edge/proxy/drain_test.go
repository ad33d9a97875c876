package proxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/zone"
)

// drainable is a TCP connection on something that can drain.
type drainable struct {
	*net.TCPConn
	draining, closed chan struct{}
	once             sync.Once
	announced        bool // or will not be
}

func (d *drainable) Draining() <-chan struct{} { return d.draining }

// Write keeps the line of the PROXY protocol from a server that does not know it.
func (d *drainable) Write(b []byte) (int, error) {
	if !d.announced {
		d.announced = true
		return len(b), nil
	}
	return d.TCPConn.Write(b)
}

func (d *drainable) Close() error {
	d.once.Do(func() { close(d.closed) })
	return d.TCPConn.Close()
}

// drainables dials them.
type drainables struct {
	to        net.Addr
	announced bool

	mu    sync.Mutex
	conns []*drainable
}

func (d *drainables) Dial(ctx context.Context, _ control.Query) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", d.to.String())
	if err != nil {
		return nil, err
	}
	conn := &drainable{TCPConn: c.(*net.TCPConn), draining: make(chan struct{}), closed: make(chan struct{}), announced: !d.announced}
	d.mu.Lock()
	d.conns = append(d.conns, conn)
	d.mu.Unlock()
	return conn, nil
}

func (d *drainables) dialled() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.conns)
}

// A connection on a draining session takes no new request, not even when requests come all the time, and is closed when its
// last one is over, not before.
func TestPooledConnectionsLeaveDrains(t *testing.T) {
	for name, up := range map[string]*zone.Upstream{"HTTP/1.1": {}, "HTTP/2": {H2C: true}, "PROXY protocol": {ProxyProtocol: "v1"}} {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{}, 1)
			srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.WriteString(w, r.RemoteAddr+" ")
				http.NewResponseController(w).Flush()
				if r.URL.Path == "/slow" {
					<-release
				}
				io.WriteString(w, "done")
			}))
			srv.Config.Protocols = new(http.Protocols)
			srv.Config.Protocols.SetHTTP1(true)
			srv.Config.Protocols.SetUnencryptedHTTP2(true)
			srv.Start()
			defer srv.Close()
			d := &drainables{to: srv.Listener.Addr(), announced: up.ProxyProtocol != ""}
			h := New(Config{Zones: new(zone.Table), Dialer: d, ConnectTimeout: 30 * time.Second})
			p := &place{h: h, up: up, addr: srv.Listener.Addr().String(), version: up.ProxyProtocol}
			defer p.closeIdle()
			v := &visit{conn: new(Visitor), remote: netip.MustParseAddrPort("192.0.2.7:1"), local: netip.MustParseAddrPort("192.0.2.8:443")}
			defer v.conn.Close()
			begin := func(path string) io.ReadCloser {
				t.Helper()
				req, _ := http.NewRequestWithContext(t.Context(), "GET", srv.URL+path, nil)
				resp, err := p.transportFor(v, laneInteractive).RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				return resp.Body
			}
			end := func(body io.ReadCloser) (from string) {
				t.Helper()
				defer body.Close()
				text, err := io.ReadAll(body)
				from, done := strings.CutSuffix(string(text), " done")
				if err != nil || !done {
					t.Errorf("got %q, %v", text, err)
				}
				return from
			}

			slow, before := begin("/slow"), p.transportFor(v, laneInteractive)
			close(d.conns[0].draining)
			for p.transportFor(v, laneInteractive) == before { // until the test's time is over
				time.Sleep(time.Millisecond)
			}
			next := end(begin("/")) // beside the slow one
			select {
			case <-d.conns[0].closed:
				t.Fatal("closed in the middle of a request")
			case <-time.After(3 * firstClearing): // time for a clearing that should spare it
			}
			release <- struct{}{}
			first := end(slow)
			if after := end(begin("/")); after != next || after == first {
				t.Errorf("the connections were %s, which drains, and then %s and %s; want one other", first, next, after)
			}
			select {
			case <-d.conns[0].closed:
			case <-time.After(30 * time.Second):
				t.Fatal("the connection stays in the pool")
			}
			if n := d.dialled(); n != 2 {
				t.Errorf("%d connections were dialled, want 2", n)
			}
		})
	}
}
