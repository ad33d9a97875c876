package edge

import (
	"context"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"
)

// A busyListener is one whose server has no time to accept until it stops.
type busyListener struct {
	*net.TCPListener
	stopped chan struct{}
	stop    func()
}

func (l *busyListener) Accept() (net.Conn, error) {
	<-l.stopped
	return l.TCPListener.Accept()
}

func (l *busyListener) SetDeadline(t time.Time) error {
	defer l.stop()
	return l.TCPListener.SetDeadline(t)
}

// Visitors whom the system has connected, and whom the edge has not accepted when it stops, are served.
func TestQueueIsServedAtTheEnd(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) { rw.WriteHeader(http.StatusNoContent) }), "a.test")
	w.cfg.Listen.HTTP3 = false
	w.listen = func(network, addr string) (net.Listener, error) {
		ln, err := net.Listen(network, addr)
		if err != nil {
			return nil, err
		}
		l := &busyListener{TCPListener: ln.(*net.TCPListener), stopped: make(chan struct{})}
		l.stop = sync.OnceFunc(func() { close(l.stopped) })
		return l, nil
	}
	w.start()
	const visitors = 5
	var done sync.WaitGroup
	for range visitors {
		conn, err := net.Dial("tcp", w.addr())
		must(t, err)
		tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }, TLSClientConfig: w.tlsConfig("a.test")}
		done.Go(func() {
			defer tr.CloseIdleConnections()
			req, _ := http.NewRequestWithContext(t.Context(), "GET", "https://a.test/", nil)
			res, err := tr.RoundTrip(req)
			if err != nil {
				t.Error(err)
				return
			}
			res.Body.Close()
			if res.StatusCode != http.StatusNoContent {
				t.Errorf("got %s", res.Status)
			}
		})
	}
	w.stop()
	done.Wait()
	if c, err := net.Dial("tcp", w.addr()); err == nil {
		c.Close()
		t.Error("the address still takes connections")
	}
}
