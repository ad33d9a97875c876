package edge

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
)

// published makes a zone for the control plane: its certificate is inline.
func (w *world) published(name, origin string, hosts ...string) zone.Config {
	w.t.Helper()
	file, _ := w.addKey(name, "p256", 90*24*time.Hour, hosts...)
	pem, err := os.ReadFile(file)
	must(w.t, err)
	return zone.Config{Name: name, Hosts: hosts, CertificatePEM: string(pem), KeyServer: "hsm", Origins: []zone.Origin{{URL: origin}}}
}

func (w *world) faults() map[string]string {
	all := map[string]string{}
	for _, f := range w.server.Faults() {
		all[f.Kind+" "+f.Name] += f.Text
	}
	return all
}

// What is bad takes itself down and nothing else, and the file wins.
func TestPublishTakesWhatIsGood(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.addZone("a", "p256", named(t, "file"), "a.test")
	w.cfg.Pools = []spec.PoolConfig{{Name: "mine", Endpoints: []spec.Endpoint{endpointAt(t, "x", named(t, "x"))}}}
	w.start()
	good := w.published("good", named(t, "good"), "good.test")
	thief := w.published("thief", named(t, "thief"), "a.test", "thief.test")
	twin := w.published("twin", named(t, "other a"), "other.test")
	twin.Name = "a"
	file := w.published("file", named(t, "f"), "f.test")
	file.CertificatePEM, file.Certificate = "", "/etc/shadow"
	noGroup := w.published("nogroup", named(t, "n"), "n.test")
	noGroup.KeyServer = "nobody"
	err := w.server.Publish(
		[]spec.PoolConfig{
			{Name: "mine", Endpoints: []spec.Endpoint{{Host: "10.0.0.1", Port: 1}}},
			{Name: "bad", Endpoints: []spec.Endpoint{{Host: "", Port: 1}}},
			{Name: "leans", Next: "bad", Endpoints: []spec.Endpoint{{Host: "10.0.0.1", Port: 1}}},
			{Name: "sound", Endpoints: []spec.Endpoint{endpointAt(t, "s", named(t, "sound"))}},
		},
		[]spec.PortConfig{{Name: "noPool", Protocol: "tcp", Listen: "127.0.0.1:0", Pool: "bad"}},
		[]zone.Config{thief, good, twin, file, noGroup},
	)
	faults := w.faults()
	for what, text := range map[string]string{
		"zone thief": "belongs to zone \"a\"", "zone a": "is called \"a\" already", "zone file": "certificate_pem", "zone nogroup": "key_server",
		"pool mine": "configuration file", "pool bad": "host", "pool leans": "no pool \"bad\"", "port noPool": "no sound pool",
	} {
		if !strings.Contains(faults[what], text) {
			t.Errorf("%s: %q, want %q", what, faults[what], text)
		}
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("the error does not say %q", text)
		}
	}
	if len(faults) != 8 {
		t.Errorf("faults %v", faults)
	}
	get := func(host string) string {
		res, err := w.client("2").Get("https://" + host + "/")
		if err != nil {
			return "none"
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return string(b)
	}
	for host, want := range map[string]string{"a.test": "file", "good.test": "good", "thief.test": "none", "f.test": "none", "n.test": "none"} {
		if got := get(host); got != want {
			t.Errorf("%s: %q, want %q", host, got, want)
		}
	}
	// A reload of the file keeps what is published, and a new publication mends what was wrong.
	must(t, w.server.Reload(w.cfg))
	if got := get("good.test"); got != "good" {
		t.Errorf("after a reload: %q", got)
	}
	must(t, w.server.Publish(nil, nil, []zone.Config{w.published("good", named(t, "better"), "good.test")}))
	if got := get("good.test"); got != "better" || len(w.server.Faults()) != 0 {
		t.Errorf("after the second publication: %q, %v", got, w.server.Faults())
	}
	must(t, w.server.Publish(nil, nil, nil))
	lost := w.published("lost", "", "lost.test")
	lost.Origins = []zone.Origin{{Pool: "nowhere"}, {Path: "/x", Pool: "mine"}}
	if err := w.server.Publish(nil, nil, []zone.Config{lost}); err == nil || !strings.Contains(w.faults()["pool nowhere"], `zone "lost"`) {
		t.Errorf("a pool that does not exist: %v, %v", err, w.faults())
	}
	if got := get("lost.test/x"); got != "x" {
		t.Errorf("the zone's other origin: %q", got)
	}
	must(t, w.server.Publish(nil, nil, nil))
	if got := get("good.test"); got != "none" {
		t.Errorf("a zone that was taken away answers %q", got)
	}
}

// Zones come and go while others serve, and no request fails.
func TestPublishCostsNoRequest(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", named(t, "a"), "a.test")
	w.start()
	extra := w.published("extra", named(t, "extra"), "extra.test")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for _, v := range versions {
		c := w.client(v)
		wg.Go(func() {
			for {
				if status, body, err := ask(c, "GET", "/?wait=2ms", ""); err != nil || status != 200 || body != "a" {
					t.Errorf("HTTP/%s: %d %q %v", v, status, body, err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for i := range 20 {
		zones := []zone.Config{extra}
		if i%2 == 1 {
			zones = nil
		}
		must(t, w.server.Publish(nil, nil, zones))
		time.Sleep(5 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
}

// A tcpService answers with its name and what a parser of the PROXY protocol finds, after it has read to the end.
func tcpService(t *testing.T, name string, header bool) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var in net.Listener = ln
	if header {
		in = &proxyproto.Listener{Listener: ln, ReadHeaderTimeout: 10 * time.Second,
			ConnPolicy: func(proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) { return proxyproto.REQUIRE, nil }}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := in.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				b, err := io.ReadAll(c)
				if err == nil {
					fmt.Fprintf(c, "%s got %q from %s", name, b, c.RemoteAddr())
				}
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

func portTo(t testing.TB, name, protocol, at string) spec.PortConfig {
	e := endpointAt(t, name, at)
	return spec.PortConfig{Name: name, Protocol: protocol, Listen: "127.0.0.1:0", VNet: e.VNet, Host: e.Host, Port: e.Port, Allow: []string{"127.0.0.0/8"}}
}

// talk sends a text, ends its direction, and returns the answer.
func talk(addr net.Addr, text string) (answer, local string, err error) {
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		return "", "", err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return "", "", err
	}
	b, err := io.ReadAll(c)
	return string(b), c.LocalAddr().String(), err
}

func (w *world) port(name string) net.Addr {
	w.t.Helper()
	var a net.Addr
	eventually(w.t, "port "+name+" is open", func() bool { a = w.server.forward.Addr(name); return a != nil })
	return a
}

func TestPublicTCPPorts(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", named(t, "a"), "a.test")
	plain, header := portTo(t, "plain", "tcp", tcpService(t, "one", false)), portTo(t, "header", "tcp", tcpService(t, "two", true))
	header.ProxyProtocol = "v2"
	w.cfg.Ports = []spec.PortConfig{plain}
	w.start()
	if got, _, err := talk(w.port("plain"), "hello"); err != nil || !strings.HasPrefix(got, `one got "hello" from `) {
		t.Errorf("a port of the file: %q, %v", got, err)
	}
	shut := portTo(t, "shut", "tcp", deadAddr(t))
	shut.Allow = nil
	dead := portTo(t, "dead", "tcp", deadAddr(t))
	pool := spec.PortConfig{Name: "pool", Protocol: "tcp", Listen: "127.0.0.1:0", Pool: "p", Allow: []string{"127.0.0.0/8"}}
	ingress := spec.PortConfig{Name: "ingress", Protocol: "tcp", Listen: "127.0.0.1:0", Tunnel: "site1", Service: "db.internal", Allow: []string{"127.0.0.0/8"}}
	w.loop.ingress["site1"] = tcpService(t, "ingress", false)
	pools := []spec.PoolConfig{{Name: "p", Steering: spec.SteerRoundRobin, Endpoints: []spec.Endpoint{endpointAt(t, "bad", deadAddr(t)), endpointAt(t, "good", tcpService(t, "good", false))}}}
	must(t, w.server.Publish(pools, []spec.PortConfig{header, shut, dead, pool, ingress}, nil))
	if got, local, err := talk(w.port("header"), "hi"); err != nil || got != fmt.Sprintf("two got \"hi\" from %s", local) {
		t.Errorf("PROXY protocol: %q from %s, %v", got, local, err)
	}
	for _, name := range []string{"shut", "dead"} {
		if got, _, err := talk(w.port(name), "x"); err == nil {
			t.Errorf("port %s: %q and a clean end", name, got)
		}
	}
	for range 4 {
		if got, _, err := talk(w.port("pool"), "x"); err != nil || !strings.HasPrefix(got, "good got") {
			t.Errorf("a pool with a dead endpoint: %q, %v", got, err)
		}
	}
	if got, _, err := talk(w.port("ingress"), "x"); err != nil || !strings.HasPrefix(got, "ingress got") {
		t.Errorf("an ingress: %q, %v", got, err)
	}
	if q := w.loop.asked[0]; q.Tunnel != "site1" || q.Service != "tcp" || q.Host != "db.internal" {
		t.Errorf("asked %+v", q)
	}
}

// A port that is in use is that port's fault alone, and is opened when it becomes free. One that is taken away, or no longer
// for a visitor, is cut.
func TestPortsComeAndGo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.addZone("a", "p256", named(t, "a"), "a.test")
	w.start()
	taken, err := net.Listen("tcp", deadAddr(t))
	must(t, err)
	one, two := portTo(t, "one", "tcp", tcpService(t, "one", false)), portTo(t, "two", "tcp", tcpService(t, "two", false))
	two.Listen = taken.Addr().String()
	must(t, w.server.Publish(nil, []spec.PortConfig{one, two}, nil))
	eventually(t, "the port in use is reported", func() bool { return strings.Contains(w.faults()["port two"], "in use") })
	if got, _, err := talk(w.port("one"), "x"); err != nil || !strings.HasPrefix(got, "one") {
		t.Errorf("the other port: %q, %v", got, err)
	}
	must(t, taken.Close())
	if got, _, err := talk(w.port("two"), "x"); err != nil || !strings.HasPrefix(got, "two") || len(w.server.Faults()) != 0 {
		t.Errorf("after it became free: %q, %v, %v", got, err, w.server.Faults())
	}
	hold := func(name string) net.Conn {
		c, err := net.Dial("tcp", w.port(name).String())
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		return c
	}
	stay, go1 := hold("one"), hold("two")
	one.Host, one.Port = endpointAt(t, "x", tcpService(t, "elsewhere", false)).Host, endpointAt(t, "x", tcpService(t, "elsewhere", false)).Port
	eventually(t, "both are through", func() bool { return w.loop.opened() >= 4 })
	must(t, w.server.Publish(nil, []spec.PortConfig{one}, nil))
	if _, err := go1.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("a connection of a port that was taken away: %v", err)
	}
	if _, err := net.Dial("tcp", two.Listen); err == nil {
		t.Error("the port that was taken away still listens")
	}
	_, err = io.WriteString(stay, "kept")
	must(t, err)
	must(t, stay.(*net.TCPConn).CloseWrite())
	if b, err := io.ReadAll(stay); err != nil || !strings.HasPrefix(string(b), `one got "kept"`) {
		t.Errorf("a connection of a port that leads elsewhere now: %q, %v", b, err)
	}
	if got, _, err := talk(w.port("one"), "x"); err != nil || !strings.HasPrefix(got, "elsewhere") {
		t.Errorf("the next connection: %q, %v", got, err)
	}
	stay = hold("one")
	one.Allow = []string{"192.0.2.0/24"}
	eventually(t, "it is through", func() bool { return w.loop.opened() >= 6 })
	must(t, w.server.Publish(nil, []spec.PortConfig{one}, nil))
	if _, err := stay.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("a visitor who is no longer allowed: %v", err)
	}
}

func isTimeout(err error) bool {
	t, ok := err.(net.Error) //nolint:errorlint // a connection's own error
	return ok && t.Timeout()
}

func (l *loopback) opened() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for where, k := range l.dials {
		if !strings.HasPrefix(where, "vault/") {
			n += k
		}
	}
	return n
}

// A key server group follows its pool: servers come, go and fail, and every handshake gets its signature.
func TestKeyServersFromAPool(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.addZone("a", "p256", named(t, "a"), "a.test")
	second := serveKeys(t, w.hsm(), w.vault)
	one, two := endpointAt(t, "one", w.keyAddr), endpointAt(t, "two", second)
	w.cfg.KeyServers[0].Servers, w.cfg.KeyServers[0].VNet, w.cfg.KeyServers[0].Pool = nil, "", "keys"
	monitor := &spec.Monitor{Type: "tcp", Interval: spec.Duration(time.Second), Timeout: spec.Duration(time.Second)}
	w.cfg.Pools = []spec.PoolConfig{{Name: "keys", Endpoints: []spec.Endpoint{one}, Monitor: monitor}}
	w.start()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				c, err := w.dialTLS(&tls.Config{RootCAs: w.ca.pool(), ServerName: "a.test"}) // no session: each needs a signature
				if err != nil {
					t.Errorf("handshake: %v", err)
					return
				}
				_ = c.Close()
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	servers := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("servers are %v", want), func() bool {
			st := w.server.now.Load().groups["hsm"].client.Stats().Servers
			if len(st) != len(want) {
				return false
			}
			for i, s := range st {
				if !strings.HasSuffix(s.Addr, want[i]) || s.Conns == 0 {
					return false
				}
			}
			return true
		})
	}
	set := func(ends ...spec.Endpoint) {
		t.Helper()
		w.cfg.Pools = []spec.PoolConfig{{Name: "keys", Endpoints: ends, Monitor: monitor}}
		must(t, w.server.Reload(w.cfg))
	}
	servers(one.Addr())
	set(one, two)
	servers(one.Addr(), two.Addr())
	set(two)
	servers(two.Addr())
	set(one, two)
	servers(one.Addr(), two.Addr())
	w.loop.cut(two.Addr(), errAway) // its host is gone
	eventually(t, "its monitor notices", func() bool { return w.server.Pools()[0].Endpoints[1].State == "down" })
	close(stop)
	wg.Wait()
	if st := w.server.now.Load().groups["hsm"].client.Stats().Servers; len(st) != 2 || !strings.HasSuffix(st[1].Addr, two.Addr()) {
		t.Errorf("the server that is down does not come last: %+v", st)
	}
}

// A list of servers can have a monitor too.
func TestMonitoredKeyServers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.addZone("a", "p256", named(t, "a"), "a.test")
	dead := deadAddr(t)
	w.cfg.KeyServers[0].Servers = []string{dead, w.keyAddr}
	w.cfg.KeyServers[0].Monitor = &spec.Monitor{Type: "tcp", Interval: spec.Duration(time.Second), Timeout: spec.Duration(time.Second)}
	w.start()
	eventually(t, "the dead server comes last", func() bool {
		st := w.server.now.Load().groups["hsm"].client.Stats().Servers
		return len(st) == 2 && st[1].Addr == dead && st[0].Conns > 0
	})
	if status, _, err := ask(w.client("2"), "GET", "/", ""); err != nil || status != http.StatusOK {
		t.Errorf("%d, %v", status, err)
	}
	if p := w.server.Pools(); len(p) != 1 || p[0].Name != "key_server/hsm" {
		t.Errorf("pools %+v", p)
	}
}
