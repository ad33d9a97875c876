package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/etcdtest"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/state/etcd"
	"github.com/keyhaven/keyhaven/tunnel"
)

// testBeat makes edges miss one another sooner.
const testBeat = 400 * time.Millisecond

// A cluster is several edges over one etcd.
type cluster struct {
	*bed
	members []*etcdtest.Member
	cache   string // file of the store's cache, if any
}

func newCluster(t *testing.T, members int) *cluster {
	t.Helper()
	return &cluster{bed: newBed(t), members: etcdtest.Start(t, members)}
}

func (f *cluster) store() state.Store {
	f.t.Helper()
	s, err := etcd.Open(etcd.Config{Endpoints: etcdtest.URLs(f.members), Timeout: time.Second, Cache: f.cache, Volatile: Volatile()})
	must(f.t, err)
	return s
}

// identity makes a certificate for an edge.
func (f *cluster) identity(name string) *mtls.Source {
	f.t.Helper()
	key, csr, err := mtls.NewKeyCSR()
	must(f.t, err)
	chain, err := f.authority.IssueCSR(csr, mtls.Identity{TrustDomain: trustDomain, Kind: mtls.KindEdge, Name: name}, 0)
	must(f.t, err)
	dir := filepath.Join(f.t.TempDir(), "own")
	must(f.t, mtls.WriteIdentity(dir, key, chain, f.authority.RootPEM()))
	src, err := mtls.OpenDir(dir, nil)
	must(f.t, err)
	return src
}

// A member is an edge of a cluster. kill ends it without a word; stop drains it.
type member struct {
	*edge
	name string
	kill func()
}

// edge starts an edge that others know by name.
func (f *cluster) edge(name string) *member {
	f.t.Helper()
	own, s := f.identity(name), f.store()
	m := &member{name: name}
	var c *Control
	ln, err := tunnel.Listen(tunnel.ListenConfig{Addr: "127.0.0.1:0", Identity: own, DrainTimeout: patience, JoinRate: 10_000,
		Admit: func(ctx context.Context, p mtls.Identity, cert *x509.Certificate, r tunnel.Registration) error {
			return c.Admit(ctx, p, cert, r)
		},
		Handle: func(ctx context.Context, s *tunnel.Session) { c.Handle(ctx, s) },
		Join:   func(ctx context.Context, r tunnel.JoinRequest) (tunnel.JoinReply, error) { return c.Join(ctx, r) },
		Renew:  func(ctx context.Context, p mtls.Identity, csr []byte) ([][]byte, error) { return c.Renew(ctx, p, csr) },
		Peer: func(ctx context.Context, p mtls.Identity, cert *x509.Certificate) error {
			return c.AdmitPeer(ctx, p, cert)
		},
		HandlePeer: func(ctx context.Context, in *tunnel.Incoming) { c.HandlePeer(ctx, in) }})
	must(f.t, err)
	c, err = Open(f.t.Context(), Config{Store: s, Authority: f.authority, Edges: []string{ln.Addr().String()}, Name: name, Identity: own, beat: testBeat})
	must(f.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- ln.Serve(ctx) }()
	m.edge = &edge{Control: c, b: f.bed, addr: ln.Addr().String()}
	end := sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			f.t.Errorf("Serve: %v", err)
		}
		if err := errors.Join(c.Close(), s.Close()); err != nil {
			f.t.Errorf("Close: %v", err)
		}
	})
	m.stop = func() {
		if err := c.Leave(context.Background()); err != nil {
			f.t.Errorf("Leave: %v", err)
		}
		end()
	}
	m.kill = func() { // what a killed process leaves behind: a store that still tells of it
		s.Close() //nolint:errcheck // as a kill does
		for _, l := range c.reg.all() {
			l.end(endShutdown)
		}
		end()
	}
	f.t.Cleanup(end)
	return m
}

// meet waits until each of the edges knows that the others live.
func meet(ms ...*member) {
	for _, m := range ms {
		eventually(m.b.t, m.name+" knows the others", func() bool { return m.peers.living() == len(ms) })
	}
}

// echoing answers each flow with what it gets, ends its direction when the other has ended, and says who it is first.
func echoing(who string) func(context.Context, *tunnel.Incoming) {
	return func(_ context.Context, in *tunnel.Incoming) {
		conn, err := in.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintf(conn, "%s\n", who)
		io.Copy(conn, conn) //nolint:errcheck // the edge sees it
		conn.CloseWrite()   //nolint:errcheck // the edge sees it
	}
}

func TestForwardedFlow(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	a.site("plant", "")
	src := a.enrol("plant", "p1") // through a, then to b at once
	b.link(src, "i1", 0, echoing("p1"))
	eventually(t, "a can reach the tunnel", func() bool {
		conn, err := a.open("", "10.1.2.3")
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
	conn, err := a.open("", "10.1.2.3")
	must(t, err)
	defer conn.Close()
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "b shows the flow", func() bool {
		vs := b.Flows()
		return len(vs) == 1 && vs[0].Connector == "p1" && vs[0].Edge == "" && vs[0].BytesIn == 8
	})
	must(t, conn.(tunnel.Conn).CloseWrite())
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != "p1\nhello" {
		t.Errorf("over the other edge: %q, %v; half-close must pass", got, err)
	}
	views := a.Flows()
	if len(views) != 1 || views[0].Edge != "b" || views[0].BytesIn != 8 || views[0].BytesOut != 5 || views[0].Tunnel != "plant" {
		t.Errorf("a shows %+v, want one flow over b with 8 bytes in and 5 out", views)
	}
	// Status and edges look the same from both.
	for _, m := range []*member{a, b} {
		d, err := m.Tunnel("plant")
		must(t, err)
		if d.Status != Degraded || d.Sessions != 1 || d.Since.IsZero() {
			t.Errorf("%s: %+v, want degraded with one session", m.name, d.TunnelView)
		}
		if es := m.Edges(); len(es) != 2 || !es[0].Alive || !es[1].Alive || es[0].Here != (m == a) || es[1].Sessions != 1 {
			t.Errorf("%s shows edges %+v", m.name, es)
		}
	}
	if es := func() []ElsewhereView { d, _ := a.Tunnel("plant"); return d.ConnectorList[0].Elsewhere }(); len(es) != 1 || es[0].Edge != "b" {
		t.Errorf("a shows the connector elsewhere as %+v", es)
	}
}

// A flow over another edge learns that the session there drains, so that who keeps it for later lets go of it, and the drain
// ends.
func TestForwardedFlowLearnsOfDrain(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	a.site("plant", "")
	l := b.link(a.enrol("plant", "p1"), "i1", 0, echoing("p1"))
	var conn net.Conn
	eventually(t, "a can reach the tunnel", func() (ok bool) {
		var err error
		conn, err = a.open("", "10.1.2.3")
		return err == nil
	})
	defer conn.Close()
	drained := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		drained <- l.Drain(ctx)
	}()
	select {
	case <-conn.(tunnel.Drainer).Draining():
	case <-time.After(patience):
		t.Error("the flow was not asked to leave")
	}
	conn.Close()
	if err := <-drained; err != nil {
		t.Errorf("the drain: %v", err)
	}
}

// Three edges of which two believe, wrongly, that the other has a session: nothing goes round in circles.
func TestOneHopAtMost(t *testing.T) {
	f := newCluster(t, 1)
	a, b, c := f.edge("a"), f.edge("b"), f.edge("c")
	meet(a, b, c)
	a.site("plant", "")
	d, err := a.Tunnel("plant")
	must(t, err)
	for _, name := range []string{"b", "c"} {
		v := presence{Since: time.Now(), Processes: []presentProcess{{Connector: "p1", Instance: "i", Sessions: 1, Want: 1}}}
		_, err := a.cfg.Store.Txn(t.Context(), nil, []state.Op{put(prefixPresent+d.ID+"/"+name, v)})
		must(t, err)
	}
	for _, m := range []*member{b, c} {
		eventually(t, "the lie is believed", func() bool { return len(m.peers.with(d.ID, "")) == 1 })
	}
	_, err = b.open("", "10.1.2.3")
	if err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want a refusal", err)
	}
	for _, m := range []*member{a, b, c} {
		if n := m.flows.count(); n != 0 {
			t.Errorf("%s has %d flows left", m.name, n)
		}
	}
}

func TestAdmitPeer(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	id := func(domain string, k mtls.Kind, name string) mtls.Identity {
		return mtls.Identity{TrustDomain: domain, Kind: k, Name: name}
	}
	for _, tt := range []struct {
		name string
		id   mtls.Identity
		want error
	}{
		{"known", id(trustDomain, mtls.KindEdge, "b"), nil},
		{"unknown", id(trustDomain, mtls.KindEdge, "z"), tunnel.ErrUnknown},
		{"another installation", id("other.test", mtls.KindEdge, "b"), tunnel.ErrNotAllowed},
		{"a connector", id(trustDomain, mtls.KindConnector, "b"), tunnel.ErrNotAllowed},
		{"an operator", id(trustDomain, mtls.KindOperator, "b"), tunnel.ErrNotAllowed},
		{"a key server", id(trustDomain, mtls.KindKeyServer, "b"), tunnel.ErrNotAllowed},
		{"itself", id(trustDomain, mtls.KindEdge, "a"), tunnel.ErrNotAllowed},
	} {
		if err := a.AdmitPeer(t.Context(), tt.id, nil); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	t.Run("alone", func(t *testing.T) {
		if err := only(t).AdmitPeer(t.Context(), id(trustDomain, mtls.KindEdge, "b"), nil); !errors.Is(err, tunnel.ErrNotAllowed) {
			t.Errorf("an edge that is alone: %v, want ErrNotAllowed", err)
		}
	})
}

// A change made through one edge is in force on the other; both may change at once.
func TestConcurrentChanges(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	a.site("plant", "")
	var wg sync.WaitGroup
	for i, m := range []*member{a, b} {
		for j := range 2 {
			wg.Go(func() {
				for k := range 10 {
					if _, err := m.AddRoute(t.Context(), RouteSpec{Prefix: fmt.Sprintf("10.%d.%d.0/24", 2*i+j, k), Tunnel: "plant"}); err != nil {
						t.Errorf("%s: %v", m.name, err)
					}
				}
			})
		}
	}
	wg.Wait()
	for _, m := range []*member{a, b} {
		eventually(t, "all routes are there", func() bool { rs, err := m.Routes(""); return err == nil && len(rs) == 41 })
	}
	src := b.enrol("plant", "p1")
	l := a.link(src, "i1", 0, saying("p1"))
	_, err := b.RevokeConnector(t.Context(), "p1")
	must(t, err)
	select {
	case <-l.Done():
	case <-time.After(patience):
		t.Error("revoked at b, the session at a lives on")
	}
}

// An edge that is killed is taken for gone, and one that stops leaves at once; connectors are told either way of those
// that come.
func TestEdgesComeAndGo(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	a.site("plant", "")
	src := a.enrol("plant", "p1")
	told := make(chan []string, 64)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := tunnel.Dial(ctx, tunnel.DialConfig{Addr: a.addr, Identity: src, Handle: saying("p1"), OnEdges: func(addrs []string) { told <- addrs },
		Registration: tunnel.Registration{Instance: "i1"}})
	must(t, err)
	run, stop := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() { defer close(ran); s.Run(run) }() //nolint:errcheck // however it ends
	defer func() { stop(); <-ran }()
	hears := func(what string, ok func([]string) bool) {
		t.Helper()
		for {
			select {
			case addrs := <-told:
				if ok(addrs) {
					return
				}
			case <-time.After(patience):
				t.Fatalf("the connector is not told of %s", what)
			}
		}
	}
	hears("both edges", func(addrs []string) bool { return slices.Contains(addrs, a.addr) && slices.Contains(addrs, b.addr) })
	c := f.edge("c")
	hears("the third edge", func(addrs []string) bool { return slices.Contains(addrs, c.addr) })

	b.link(src, "i1", 4, saying("p1 at b"))
	id, _ := a.Tunnel("plant")
	eventually(t, "a knows of b's session", func() bool { return len(a.peers.with(id.ID, "")) == 1 })
	b.kill()
	eventually(t, "b is gone", func() bool { return a.peers.living() == 2 && len(a.peers.with(id.ID, "")) == 0 })
	c.stop()
	if eventually(t, "c has left", func() bool { return a.peers.living() == 1 }); len(a.Edges()) < 1 {
		t.Error("no edge is shown")
	}
	again := f.edge("b")
	meet(a, again)
	eventually(t, "what b had in its earlier life is forgotten", func() bool {
		a.peers.mu.RLock()
		defer a.peers.mu.RUnlock()
		_, ok := a.peers.present[id.ID]["b"]
		return !ok
	})
}

// An edge with the tunnel's sessions stops while flows are opened through another without a pause: none fails.
func TestStopLosesNothing(t *testing.T) {
	f := newCluster(t, 1)
	a, b, c := f.edge("a"), f.edge("b"), f.edge("c")
	meet(a, b, c)
	a.site("plant", "")
	src := a.enrol("plant", "p1")
	b.link(src, "i1", 0, saying("p1"))
	c.link(src, "i1", 4, saying("p1"))
	id, _ := a.Tunnel("plant")
	eventually(t, "a knows two ways", func() bool { return len(a.peers.with(id.ID, "")) == 2 })
	done, asked := make(chan struct{}), 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if got, err := a.ask("", "10.1.2.3"); err != nil || !strings.HasPrefix(got, "p1 ") {
				t.Errorf("after %d: %q, %v", asked, got, err)
				return
			}
			asked++
		}
	})
	time.Sleep(100 * time.Millisecond)
	b.stop()
	time.Sleep(100 * time.Millisecond)
	close(done)
	wg.Wait()
	if asked == 0 {
		t.Error("nothing was asked")
	}
}

// While etcd is away traffic goes on, changes and joins are refused and renewals are not, and nobody is taken for gone.
func TestEtcdAway(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	a.site("plant", "")
	src := a.enrol("plant", "p1")
	tok := a.token("plant", 0)
	link := b.link(src, "i1", 0, saying("p1"))
	id, _ := a.Tunnel("plant")
	eventually(t, "a knows of b's session", func() bool { return len(a.peers.with(id.ID, "")) == 1 })
	f.members[0].Kill()
	for end := time.Now().Add((beatsMissed + 2) * testBeat); time.Now().Before(end); time.Sleep(250 * time.Millisecond) {
		if got, err := a.ask("", "10.1.2.3"); err != nil || !strings.HasPrefix(got, "p1 ") {
			t.Fatalf("without etcd: %q, %v", got, err)
		}
	}
	_, err := a.AddTunnel(t.Context(), "office", "")
	wantErr(t, err, ErrUnavailable, "does not answer")
	if _, _, err := a.join(tok, "p2"); !errors.Is(err, tunnel.ErrBusy) {
		t.Errorf("a join: %v, want ErrBusy", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must(t, src.Renew(ctx, link.Renew))
	f.members[0].Restart()
	eventually(t, "changes are possible again", func() bool { _, err := a.AddTunnel(t.Context(), "office", ""); return err == nil })
	eventually(t, "and reach the other edge", func() bool { _, err := b.Tunnel("office"); return err == nil })
	if n := a.peers.living(); n != 2 {
		t.Errorf("%d edges live after the pause, want 2", n)
	}
	if _, _, err := a.join(tok, "p2"); err != nil {
		t.Errorf("the join that was refused: %v", err)
	}
}

var _ net.Conn = (*flow)(nil)

// An edge that starts while etcd is away serves what it knew, and finds the others and the changes when etcd is back.
func TestStartWithoutEtcd(t *testing.T) {
	f := newCluster(t, 1)
	f.cache = filepath.Join(t.TempDir(), "cache")
	a := f.edge("a")
	a.site("plant", "")
	src := a.enrol("plant", "p1")
	a.stop()
	f.members[0].Kill()
	a = f.edge("a")
	a.link(src, "i1", 0, saying("p1"))
	if got, err := a.ask("", "10.1.2.3"); err != nil || !strings.HasPrefix(got, "p1 ") {
		t.Errorf("without etcd: %q, %v", got, err)
	}
	_, err := a.AddTunnel(t.Context(), "office", "")
	wantErr(t, err, ErrUnavailable)
	f.members[0].Restart()
	f.cache = ""
	b := f.edge("b")
	meet(a, b)
	eventually(t, "changes are possible again", func() bool { _, err := a.AddTunnel(t.Context(), "office", ""); return err == nil })
	eventually(t, "b reaches the tunnel over a", func() bool {
		got, err := b.ask("", "10.1.2.3")
		return err == nil && strings.HasPrefix(got, "p1 ")
	})
}

// A connector's flow of packets is forwarded too, with its reports.
func TestForwardedPackets(t *testing.T) {
	f := newCluster(t, 1)
	a, b := f.edge("a"), f.edge("b")
	meet(a, b)
	a.site("plant", "")
	b.link(a.enrol("plant", "p1"), "i1", 0, func(_ context.Context, in *tunnel.Incoming) {
		conn, err := in.AcceptPacket()
		if err != nil {
			return
		}
		defer conn.Close()
		buf := make([]byte, tunnel.MaxPacket)
		for {
			n, err := conn.ReadPacket(buf)
			if err != nil {
				return
			}
			if n == 0 {
				conn.Unreachable(tunnel.UnreachablePort)
				continue
			}
			if conn.WritePacket(buf[:n]) != nil {
				return
			}
		}
	})
	id, _ := a.Tunnel("plant")
	eventually(t, "a knows of b's session", func() bool { return len(a.peers.with(id.ID, "")) == 1 })
	conn, r, err := a.openPacket(t.Context(), Query{Host: "10.1.2.3", Port: 53}, tunnel.KindUDP, [16]byte{1}, "")
	must(t, err)
	defer r.forget()
	defer conn.Close()
	buf := make([]byte, tunnel.MaxPacket)
	for _, size := range []int{1, 1200, 9000, 60000} {
		want := strings.Repeat("p", size)
		eventually(t, fmt.Sprintf("a packet of %d bytes comes back", size), func() bool {
			must(t, conn.WritePacket([]byte(want)))
			must(t, conn.SetReadDeadline(time.Now().Add(time.Second)))
			n, err := conn.ReadPacket(buf)
			return err == nil && string(buf[:n]) == want
		})
	}
	eventually(t, "a report of a refused packet comes back", func() bool {
		must(t, conn.WritePacket(nil))
		must(t, conn.SetReadDeadline(time.Now().Add(time.Second)))
		_, err := conn.ReadPacket(buf)
		u, ok := errors.AsType[*tunnel.UnreachableError](err)
		return ok && u.Code == tunnel.UnreachablePort
	})
}
