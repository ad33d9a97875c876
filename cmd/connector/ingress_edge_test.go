package main

import (
	"bufio"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	edge "github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// realEdge is a control plane with a listener, on loopback.
type realEdge struct {
	*edge.Control
	addr string
}

func openEdge(t *testing.T) *realEdge {
	t.Helper()
	in := install(t) // for its authority and the edge's identity
	in.stop()
	e := &realEdge{}
	ready := make(chan struct{})
	ln, err := tunnel.Listen(tunnel.ListenConfig{Addr: "127.0.0.1:0", Identity: in.source, DrainTimeout: time.Millisecond, JoinRate: 1000,
		Admit: func(ctx context.Context, peer mtls.Identity, cert *x509.Certificate, reg tunnel.Registration) error {
			<-ready
			return e.Admit(ctx, peer, cert, reg)
		},
		Handle: func(ctx context.Context, s *tunnel.Session) { e.Handle(ctx, s) },
		Join: func(ctx context.Context, r tunnel.JoinRequest) (tunnel.JoinReply, error) {
			<-ready
			return e.Join(ctx, r)
		}})
	must(t, err)
	e.addr = ln.Addr().String()
	store, err := state.OpenBolt(filepath.Join(t.TempDir(), "state.db"))
	must(t, err)
	e.Control, err = edge.Open(t.Context(), edge.Config{Store: store, Authority: in.authority, Edges: []string{e.addr}})
	must(t, err)
	close(ready)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- ln.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-served)
		must(t, errors.Join(e.Close(), store.Close()))
	})
	return e
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// client makes requests through the ingress of the tunnel.
func (e *realEdge) client(t *testing.T) *http.Client {
	tr := &http.Transport{DisableKeepAlives: true, DisableCompression: true, DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
		host, _, _ := net.SplitHostPort(addr)
		return e.Dial(ctx, edge.Query{Tunnel: "shop", Service: "http", Host: host, Port: 443})
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

func (e *realEdge) get(t *testing.T, url string) string {
	t.Helper()
	res, err := e.client(t).Get(url)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint(res.StatusCode, " ", string(b))
}

func soon(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("%s: still not so after %v", what, patience)
}

// site is an origin that says its name, echoes WebSockets, sends events, and breaks off.
func site(t *testing.T, name string) (url string, port string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ws":
			c, err := websocket.Accept(w, r, nil)
			if err != nil {
				return
			}
			defer c.CloseNow() //nolint:errcheck // it may be closed
			for {
				kind, b, err := c.Read(r.Context())
				if err != nil || c.Write(r.Context(), kind, append([]byte(name+" "), b...)) != nil {
					return
				}
			}
		case "/events":
			for i := 0; r.Context().Err() == nil; i++ {
				fmt.Fprintf(w, "data: %d\n\n", i)
				http.NewResponseController(w).Flush() //nolint:errcheck // the test notices
				if i == 1 {
					<-r.Context().Done()
				}
			}
		case "/cut":
			fmt.Fprint(w, "part")
			http.NewResponseController(w).Flush() //nolint:errcheck // the test notices
			panic(http.ErrAbortHandler)
		}
		fmt.Fprint(w, name)
	}))
	t.Cleanup(s.Close)
	_, port, _ = net.SplitHostPort(s.Listener.Addr().String())
	return s.URL, port
}

func TestIngressThroughARealEdge(t *testing.T) {
	t.Parallel()
	e := openEdge(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	_, err := e.AddTunnel(ctx, "shop", "")
	must(t, err)
	grant, err := e.CreateToken(ctx, "shop", time.Hour)
	must(t, err)
	dir := filepath.Join(t.TempDir(), "id")
	if out, code := runProgram(t, grant.Token, "join", "--token-file", "-", "--dir", dir); code != 0 {
		t.Fatalf("join: %s", out)
	}
	one, _ := site(t, "one")
	two, _ := site(t, "two")
	three, port := site(t, "three")
	four, _ := site(t, "four")
	echo := origin(t)
	path := filepath.Join(t.TempDir(), "c.yaml")
	local := func(url string) {
		write(t, path, fmt.Sprintf("identity:\n  dir: %s\nallow:\n  - {to: 127.0.0.1, ports: [%s], vnet: other}\ningress:\n  - {hostname: bytes.test, service: 'tcp://127.0.0.1:%d'}\n  - service: %s\n", dir, port, echo, url))
	}
	local(one)
	p := start(t, "run", "--config", path)
	soon(t, "the local rules serve", func() bool { return e.get(t, "http://a.test/") == "200 one" })

	ws, _, err := websocket.Dial(ctx, "ws://a.test/ws", &websocket.DialOptions{HTTPClient: e.client(t)})
	must(t, err)
	defer ws.CloseNow() //nolint:errcheck // it may be closed
	alive := func() {
		t.Helper()
		must(t, ws.Write(ctx, websocket.MessageText, []byte("hello")))
		if _, b, err := ws.Read(ctx); err != nil || string(b) != "one hello" {
			t.Fatalf("the WebSocket: %q, %v", b, err)
		}
	}
	alive()
	local(two)
	p.signal(t, syscall.SIGHUP)
	soon(t, "the file is read again", func() bool { return e.get(t, "http://a.test/") == "200 two" })
	alive()

	t.Run("bytes", func(t *testing.T) {
		c, err := e.Dial(ctx, edge.Query{Tunnel: "shop", Service: "tcp", Host: "bytes.test", Port: 5432})
		must(t, err)
		defer c.Close()
		fmt.Fprint(c, "hello\n")
		if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line != "hello\n" {
			t.Errorf("got %q, %v", line, err)
		}
		if _, err := e.Dial(ctx, edge.Query{Tunnel: "shop", Service: "tcp", Host: "a.test", Port: 1}); !errors.Is(err, tunnel.ErrNoRoute) {
			t.Errorf("a rule for requests: got %v, want ErrNoRoute", err)
		}
	})
	t.Run("events", func(t *testing.T) {
		res, err := e.client(t).Get("http://a.test/events")
		must(t, err)
		defer res.Body.Close()
		r := bufio.NewReader(res.Body)
		for _, want := range []string{"data: 0\n", "\n", "data: 1\n"} {
			if line, err := r.ReadString('\n'); err != nil || line != want {
				t.Fatalf("got %q, %v, want %q", line, err, want)
			}
		}
	})
	t.Run("cut", func(t *testing.T) {
		c, err := e.Dial(ctx, edge.Query{Tunnel: "shop", Service: "http", Host: "a.test", Port: 443})
		must(t, err)
		defer c.Close()
		fmt.Fprint(c, "GET /cut HTTP/1.1\r\nHost: a.test\r\n\r\n")
		if b, err := io.ReadAll(c); !errors.Is(err, tunnel.ErrReset) {
			t.Errorf("got %q, %v, want it reset", b, err)
		}
	})

	config := func(url string) []byte {
		return fmt.Appendf(nil, "ingress:\n  - service: %s\n", url)
	}
	shown := func() edge.ConnectorConfig {
		v, err := e.TunnelConfig("shop")
		must(t, err)
		if len(v.Connectors) != 1 {
			return edge.ConnectorConfig{}
		}
		return v.Connectors[0].ConnectorConfig
	}
	// What the allow-list does not permit is refused whole, with the reason, and the old stays.
	v, err := e.SetTunnelConfig(ctx, "shop", config(four), nil)
	if err != nil || v.Version != 1 {
		t.Fatalf("got version %d, %v", v.Version, err)
	}
	soon(t, "the refusal is shown", func() bool { return shown().Refused == 1 })
	if s := shown(); s.Applied != 0 || !strings.Contains(s.Error, "ingress[0].service") || !strings.Contains(s.Error, "allow-list") {
		t.Errorf("got %+v", s)
	}
	if got := e.get(t, "http://a.test/"); got != "200 two" {
		t.Errorf("after a refusal: got %q", got)
	}
	_, err = e.SetTunnelConfig(ctx, "shop", config(three), nil)
	must(t, err)
	soon(t, "the edge's rules serve", func() bool { return e.get(t, "http://a.test/") == "200 three" })
	soon(t, "the version is shown", func() bool { return shown() == edge.ConnectorConfig{Applied: 2} })
	alive()

	// Stale and faulty ones change nothing.
	stale := uint64(1)
	if _, err := e.SetTunnelConfig(ctx, "shop", config("hello_world"), &stale); !errors.Is(err, edge.ErrStale) || !strings.Contains(err.Error(), "version 2, not 1") {
		t.Errorf("stale: got %v", err)
	}
	if _, err := e.SetTunnelConfig(ctx, "shop", config("unix:/x"), nil); !errors.Is(err, edge.ErrInvalid) {
		t.Errorf("faulty: got %v", err)
	}
	if v, err := e.SetTunnelConfig(ctx, "shop", config(three), nil); err != nil || v.Version != 2 {
		t.Errorf("the same again: got version %d, %v, want 2", v.Version, err)
	}
	// Of several who start from one version, one wins.
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 5 {
		wg.Go(func() {
			current := uint64(2)
			switch _, err := e.SetTunnelConfig(ctx, "shop", config(fmt.Sprintf("http_status:%d", 210+i)), &current); {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, edge.ErrStale):
				t.Errorf("got %v, want ErrStale", err)
			}
		})
	}
	wg.Wait()
	if n := won.Load(); n != 1 {
		t.Errorf("%d changes of one version won, want 1", n)
	}
	soon(t, "the winner serves", func() bool { return strings.HasPrefix(e.get(t, "http://a.test/"), "21") })
	alive()
	ws.Close(websocket.StatusNormalClosure, "") //nolint:errcheck // it has said all

	// A new process gets the configuration when it registers, even if it has kept none.
	p.signal(t, syscall.SIGTERM)
	if st := p.exit(t); st.ExitCode() != 0 {
		t.Errorf("exit: %v", st)
	}
	must(t, os.Remove(filepath.Join(dir, remoteFile)))
	p = start(t, "run", "--config", path)
	soon(t, "the new process has the configuration", func() bool { return strings.HasPrefix(e.get(t, "http://a.test/"), "21") && shown().Applied == 3 })
	v, err = e.SetTunnelConfig(ctx, "shop", nil, nil)
	if err != nil || v.Version != 4 {
		t.Errorf("taken back: got version %d, %v", v.Version, err)
	}
	soon(t, "the file's rules serve again", func() bool { return e.get(t, "http://a.test/") == "200 two" })
	p.signal(t, syscall.SIGTERM)
	if st := p.exit(t); st.ExitCode() != 0 {
		t.Errorf("exit: %v", st)
	}
}
