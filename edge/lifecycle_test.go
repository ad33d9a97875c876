package edge

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/zone"
)

func TestAltSvcOnlyWhereHTTP3Is(t *testing.T) {
	w := newWorld(t)
	o := origin(t, func(rw http.ResponseWriter, r *http.Request) { rw.Header().Set("Alt-Svc", `h3="evil:1"`) })
	w.addZone("a", "p256", o, "a.test")
	w.addZone("b", "p256", o, "b.test").HTTP = []string{"1.1", "2"}
	w.start()
	_, port, _ := net.SplitHostPort(w.addr())
	for host, want := range map[string]string{"a.test": `h3=":` + port + `"; ma=86400`, "b.test": ""} {
		res, err := w.client("2").Get("https://" + host + "/")
		must(t, err)
		_ = res.Body.Close()
		if got := res.Header.Get("Alt-Svc"); got != want {
			t.Errorf("%s: Alt-Svc %q, want %q", host, got, want)
		}
	}
}

func TestRedirect(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test", "*.w.test")
	w.cfg.Listen.Redirect = []string{"127.0.0.1:0"}
	w.cfg.Listen.PublicPort = 443
	w.start()
	addr := w.server.RedirectAddrs()[0].String()
	for _, tt := range []struct {
		request, location string
		status            int
	}{
		{"GET /a%2fb?c HTTP/1.1\r\nHost: A.test:80\r\n\r\n", "https://a.test/a%2fb?c", 308},
		{"GET / HTTP/1.1\r\nHost: x.w.test\r\n\r\n", "https://x.w.test/", 308},
		{"GET / HTTP/1.1\r\nHost: nobody.test\r\n\r\n", "", 404},
		{"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "", 400},
		{"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n", "", 400},
	} {
		c, err := net.Dial("tcp", addr)
		must(t, err)
		res, _ := roundTrip(t, c, tt.request)
		_ = c.Close()
		if res.StatusCode != tt.status || res.Header.Get("Location") != tt.location {
			t.Errorf("%q: %d %q, want %d %q", tt.request, res.StatusCode, res.Header.Get("Location"), tt.status, tt.location)
		}
	}
}

func TestReloadAndDrain(t *testing.T) {
	w := newWorld(t)
	release := make(chan struct{})
	slow := origin(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(200)
		rw.(http.Flusher).Flush()
		if r.URL.Path == "/slow" {
			<-release
		}
		fmt.Fprint(rw, "whole")
	})
	w.addZone("a", "p256", slow, "a.test")
	w.addZone("b", "p256", slow, "b.test")
	w.start()
	inFlight := func(v string) chan string {
		res, err := w.client(v).Get("https://a.test/slow")
		must(t, err)
		done := make(chan string, 1)
		go func() {
			body, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			done <- fmt.Sprint(string(body), err)
		}()
		return done
	}
	var before []chan string
	open := map[string]*http.Client{}
	for _, v := range versions {
		before = append(before, inFlight(v))
		open[v] = w.client(v)
		res, err := open[v].Get("https://b.test/")
		must(t, err)
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
	}
	// A bad configuration changes nothing.
	bad := w.cfg
	bad.Zones = append([]zone.Config{{Name: "x"}}, w.cfg.Zones...)
	if err := w.server.Reload(bad); err == nil {
		t.Fatal("a bad configuration was taken")
	}
	// b goes, c comes, on a key server group of another name.
	next := w.cfg
	next.KeyServers = []KeyServer{w.cfg.KeyServers[0]}
	next.KeyServers[0].Name = "hsm2"
	w.cfg = next
	w.cfg.Zones = w.cfg.Zones[:1:1]
	w.addZone("c", "p256", slow, "c.test")
	for i := range w.cfg.Zones {
		w.cfg.Zones[i].KeyServer = "hsm2"
	}
	must(t, w.server.Reload(w.cfg))
	eventually(t, "the new group is connected", func() bool { return w.server.Ready(t.Context()) == nil })
	for _, v := range versions {
		res, err := w.client(v).Get("https://c.test/")
		must(t, err)
		_ = res.Body.Close()
		if res, err = open[v].Get("https://b.test/"); err == nil {
			_ = res.Body.Close()
			if res.StatusCode != 421 {
				t.Errorf("HTTP/%s: a zone that is gone answers %d on an old connection", v, res.StatusCode)
			}
		}
		if _, err := w.client(v).Get("https://b.test/"); err == nil {
			t.Errorf("HTTP/%s: a zone that is gone answers", v)
		}
	}
	// The edge stops: what is in flight is finished first.
	stopped := w.beginStop()
	close(release)
	for i, done := range before {
		if got := <-done; got != "whole<nil>" {
			t.Errorf("HTTP/%s: the request in flight ended with %s", versions[i], got)
		}
	}
	<-stopped
}

// beginStop stops the edge and returns once its listener is closed; the channel is closed when it has ended.
func (w *world) beginStop() <-chan struct{} {
	w.t.Helper()
	stopped := make(chan struct{})
	go func() { defer close(stopped); w.stop() }()
	eventually(w.t, "the listener is closed", func() bool {
		c, err := net.Dial("tcp", w.addr())
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	return stopped
}

// A visitor whose connection was accepted before the edge stops is let in and served, once.
func TestStopLetsHandshakesFinish(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.start()
	raw, err := net.Dial("tcp", w.addr())
	must(t, err)
	c := tls.Client(raw, w.tlsConfig("a.test"))
	defer c.Close()
	// Connections are accepted in their order, so one that is served shows that raw was accepted.
	res, err := w.client("1.1").Get("https://a.test/")
	must(t, err)
	_ = res.Body.Close()
	stopped := w.beginStop()
	must(t, c.HandshakeContext(t.Context()))
	if res, _ := roundTrip(t, c, "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"); res.StatusCode != 200 || !res.Close {
		t.Errorf("got %d, close %v; want 200 and the connection's end", res.StatusCode, res.Close)
	}
	_ = c.Close()
	<-stopped
}

// A connection of HTTP/2 that was let in and has not asked yet has its first request served when the edge stops.
func TestStopServesFirstRequests(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.start()
	transport := &http.Transport{TLSClientConfig: w.tlsConfig("a.test"), Protocols: new(http.Protocols),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", w.addr())
		}}
	transport.Protocols.SetHTTP2(true)
	h2, err := transport.NewClientConn(t.Context(), "https", "a.test:443")
	must(t, err)
	defer h2.Close()
	stopped := w.beginStop()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://a.test/", nil)
	must(t, err)
	res, err := h2.RoundTrip(req)
	must(t, err)
	_ = res.Body.Close()
	if res.StatusCode != 200 {
		t.Errorf("got %d", res.StatusCode)
	}
	<-stopped
}

func TestDrainTimeoutCutsWhatRemains(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.WriteHeader(200)
		rw.(http.Flusher).Flush()
		<-r.Context().Done()
	}), "a.test")
	w.cfg.Limits.DrainTimeout = 300 * time.Millisecond
	w.start()
	var bodies []io.ReadCloser
	for _, v := range versions {
		res, err := w.client(v).Get("https://a.test/")
		must(t, err)
		bodies = append(bodies, res.Body)
	}
	w.stop()
	for i, b := range bodies {
		if _, err := io.ReadAll(b); err == nil {
			t.Errorf("HTTP/%s: a cut response ended cleanly", versions[i])
		}
		_ = b.Close()
	}
}

func TestPoolsAreNotSharedBetweenZones(t *testing.T) {
	w := newWorld(t)
	o := echoOrigin(t)
	w.addZone("a", "p256", o, "a.test").Origins[0].VNet = "one"
	w.addZone("b", "p256", o, "b.test").Origins[0].VNet = "two"
	w.start()
	for range 3 {
		for _, host := range []string{"a.test", "b.test"} {
			res, err := w.client("2").Get("https://" + host + "/")
			must(t, err)
			_, _ = io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
		}
	}
	addr := strings.TrimPrefix(o, "http://")
	w.loop.mu.Lock()
	defer w.loop.mu.Unlock()
	if one, two := w.loop.dials["one/"+addr], w.loop.dials["two/"+addr]; one != 1 || two != 1 {
		t.Errorf("%d and %d connections, want one in each network: pooled, and never shared", one, two)
	}
}
