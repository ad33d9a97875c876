package edge

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// overControl reaches the vault as a loopback, and everything else as a real edge does.
type overControl struct {
	*control.Control
	loop *loopback
}

func (o overControl) Dial(ctx context.Context, q control.Query) (net.Conn, error) {
	if q.VNet == "vault" {
		return o.loop.Dial(ctx, q)
	}
	return o.Control.Dial(ctx, q)
}

// controlled gives w a control with one tunnel, that has the loopback's addresses, and returns what starts a connector of it,
// reached through a path to the edge that can be silenced.
func (w *world) controlled() (connector func(name string) (silence func())) {
	w.t.Helper()
	own, err := mtls.InitAuthority(filepath.Join(w.dir, "edge-ca"), "edge.test")
	must(w.t, err)
	store, err := state.OpenBolt(filepath.Join(w.dir, "control.db"))
	must(w.t, err)
	c, err := control.Open(w.t.Context(), control.Config{Store: store, Authority: own, Edges: []string{"edge.test:7844"}})
	must(w.t, err)
	ln, err := tunnel.Listen(tunnel.ListenConfig{Addr: "127.0.0.1:0", Identity: enrol(w.t, own, filepath.Join(w.dir, "id-e1"), mtls.KindEdge, "e1"),
		Admit: c.Admit, Handle: c.Handle, Join: c.Join, DrainTimeout: 10 * time.Millisecond})
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = ln.Serve(ctx) })
	w.t.Cleanup(func() {
		cancel()
		running.Wait()
		if err := errors.Join(c.Close(), store.Close()); err != nil {
			w.t.Errorf("close: %v", err)
		}
	})
	_, err = c.AddTunnel(ctx, "site", "")
	must(w.t, err)
	_, err = c.AddRoute(ctx, control.RouteSpec{Prefix: "127.0.0.0/8", Tunnel: "site"})
	must(w.t, err)
	w.dialer = overControl{c, w.loop}
	return func(name string) (silence func()) {
		grant, err := c.CreateToken(ctx, "site", 0)
		must(w.t, err)
		token, err := mtls.ParseJoinToken(grant.Token)
		must(w.t, err)
		key, csr, err := mtls.NewKeyCSR()
		must(w.t, err)
		r, err := tunnel.Join(ctx, ln.Addr().String(), token, csr, name)
		must(w.t, err)
		dir := filepath.Join(w.dir, "id-"+name)
		must(w.t, mtls.WriteIdentity(dir, key, r.Chain, r.Roots))
		id, err := mtls.OpenDir(dir, nil)
		must(w.t, err)
		way := newPath(w.t, ln.Addr().String())
		for i := range 4 {
			s, err := tunnel.Dial(ctx, tunnel.DialConfig{Addr: way.addr(), Identity: id, Handle: dialThrough, Carrier: tunnel.CarrierQUIC,
				Registration: tunnel.Registration{Instance: name, Index: i, Connections: 4}})
			must(w.t, err)
			running.Go(func() { _ = s.Run(ctx) })
		}
		return func() { way.silent.Store(true) }
	}
}

// A path carries UDP packets to a server, for many clients, until it is silenced.
type path struct {
	front  *net.UDPConn
	silent atomic.Bool
}

func newPath(t testing.TB, server string) *path {
	t.Helper()
	front, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	p := &path{front: front}
	backs := map[string]net.Conn{}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := front.ReadFromUDP(buf)
			if err != nil {
				for _, b := range backs {
					_ = b.Close()
				}
				return
			}
			back := backs[from.String()]
			if back == nil {
				if back, err = net.Dial("udp4", server); err != nil {
					continue
				}
				backs[from.String()] = back
				wg.Go(func() { p.answers(back, from) })
			}
			if !p.silent.Load() {
				_, _ = back.Write(buf[:n])
			}
		}
	})
	t.Cleanup(func() { _ = front.Close(); wg.Wait() })
	return p
}

func (p *path) answers(back net.Conn, to *net.UDPAddr) {
	buf := make([]byte, 65536)
	for {
		n, err := back.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil && !p.silent.Load() {
			_, _ = p.front.WriteToUDP(buf[:n], to)
		}
	}
}

func (p *path) addr() string { return p.front.LocalAddr().String() }

// sessionTimeout is how long a silent session is believed to live.
const sessionTimeout = 12 * time.Second

// A connector falls silent, as when its host loses power. Requests that may be repeated lose about a second, and none fails.
func TestSilentConnectorCostsNoRequest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	connector := w.controlled()
	silence := connector("c1")
	connector("c2")
	w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, "whole") }), "a.test")
	w.start()
	var served, longest atomic.Int64
	var wg sync.WaitGroup
	over := make(chan struct{})
	for i := range 12 {
		c := w.client(versions[i%3])
		wg.Go(func() {
			for {
				began := time.Now()
				status, body, err := ask(c, "GET", "/", "")
				took := time.Since(began)
				if err != nil || status != 200 || body != "whole" {
					t.Errorf("after %v: %d %q %v", took, status, body, err)
					return
				}
				served.Add(1)
				for old := longest.Load(); int64(took) > old && !longest.CompareAndSwap(old, int64(took)); old = longest.Load() {
				}
				select {
				case <-over:
					return
				case <-time.After(5 * time.Millisecond):
				}
			}
		})
	}
	eventually(t, "requests are under way", func() bool { return served.Load() > 100 })
	silence()
	at := served.Load()
	began := time.Now()
	eventually(t, "requests go on", func() bool { return served.Load() > at+500 && time.Since(began) > 4*time.Second })
	close(over)
	wg.Wait()
	t.Logf("the longest request took %v", time.Duration(longest.Load()))
	if time.Duration(longest.Load()) > sessionTimeout/2 {
		t.Errorf("a request took %v: it waited for the session's end", time.Duration(longest.Load()))
	}
}

// The site of an endpoint is away, and nobody has noticed yet: requests go to the other.
func TestHangingDialsMoveOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.pooled(spec.PoolConfig{Endpoints: []spec.Endpoint{endpointAt(t, "away", deadAddr(t)), endpointAt(t, "here", named(t, "here"))}, Steering: spec.SteerRoundRobin})
	w.loop.hang = w.cfg.Pools[0].Endpoints[0].Addr()
	w.cfg.Limits.OriginConnectTimeout = time.Hour
	w.start()
	for range 2 {
		if status, body, err := ask(w.client("2"), "GET", "/", ""); err != nil || status != 200 || body != "here" {
			t.Errorf("%d %q %v", status, body, err)
		}
	}
}
