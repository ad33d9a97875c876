package proxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// drainable is a TCP connection on something that can drain.
type drainable struct {
	*net.TCPConn
	draining, closed chan struct{}
}

func (d *drainable) Draining() <-chan struct{} { return d.draining }

func (d *drainable) Close() error {
	close(d.closed)
	return d.TCPConn.Close()
}

// A connection on a draining session is closed when its request is over, not before, and not left in the pool.
func TestPooledConnectionsLeaveDrains(t *testing.T) {
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begun ")
		http.NewResponseController(w).Flush()
		<-release
		io.WriteString(w, "done")
	}))
	defer srv.Close()
	var conns []*drainable
	tr := new(http.Transport)
	tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", srv.Listener.Addr().String())
		if err != nil {
			return nil, err
		}
		d := &drainable{c.(*net.TCPConn), make(chan struct{}), make(chan struct{})}
		conns = append(conns, d)
		return pool(d, tr, func() {}), nil
	}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	close(conns[0].draining)
	select {
	case <-conns[0].closed:
		t.Fatal("closed in the middle of a request")
	case <-time.After(3 * firstClearing): // time for a clearing that should spare it
	}
	close(release)
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "begun done" {
		t.Errorf("got %q, %v", body, err)
	}
	resp.Body.Close()
	select {
	case <-conns[0].closed:
	case <-time.After(30 * time.Second):
		t.Fatal("the connection stays in the pool")
	}
	resp, err = (&http.Client{Transport: tr}).Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if len(conns) != 2 {
		t.Errorf("%d connections were dialled, want 2", len(conns))
	}
}
