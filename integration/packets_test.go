//go:build netns

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// Protocols for ip rule, which knows their names only where there is /etc/protocols.
const (
	protoTCP = "6"
	protoUDP = "17"
)

// listenUDP opens a socket in a namespace that is closed when the test ends.
func listenUDP(t *testing.T, ns *testnet.Namespace, addr string) (pc net.PacketConn) {
	t.Helper()
	must(t, ns.Do(func() (err error) {
		pc, err = net.ListenPacket("udp", addr)
		return err
	}))
	t.Cleanup(func() { pc.Close() })
	return pc
}

// An arrival is a packet that a service has seen.
type arrival struct{ source, packet string }

// echoUDP sends each packet back behind a greeting, until the test ends. It returns those that it has seen.
func echoUDP(t *testing.T, ns *testnet.Namespace, addr, greeting string) (arrivals func() []arrival) {
	t.Helper()
	pc := listenUDP(t, ns, addr)
	var mu sync.Mutex
	var seen []arrival
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		n0 := copy(buf, greeting)
		for {
			n, from, err := pc.ReadFrom(buf[n0:])
			if err != nil {
				return
			}
			mu.Lock()
			seen = append(seen, arrival{from.String(), string(buf[n0 : n0+min(n, 64)])})
			mu.Unlock()
			pc.WriteTo(buf[:n0+n], from)
		}
	}()
	t.Cleanup(func() { pc.Close(); <-done })
	return func() []arrival {
		mu.Lock()
		defer mu.Unlock()
		return append([]arrival(nil), seen...)
	}
}

// dialUDP connects a socket of the visitor.
func (w *world) dialUDP(addr string) (c net.Conn, err error) {
	err = w.visitor.Do(func() (err error) {
		c, err = net.Dial("udp", addr)
		return err
	})
	return c, err
}

// answered sends a packet until it comes back behind the greeting: packets may be lost.
func answered(ctx context.Context, c net.Conn, p []byte, greeting string) error {
	buf := make([]byte, 64<<10)
	var last error
	for tries := 0; ctx.Err() == nil && tries < 100; tries++ {
		if _, err := c.Write(p); err != nil {
			last = err
			time.Sleep(50 * time.Millisecond)
			continue
		}
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		for {
			n, err := c.Read(buf)
			if err != nil {
				last = err
				break
			}
			if !strings.HasPrefix(string(buf[:n]), greeting) {
				return fmt.Errorf("a packet of another network: %.20q", buf[:n])
			}
			if bytes.Equal(buf[len(greeting):n], p) {
				return nil
			}
		}
	}
	return fmt.Errorf("%d bytes: no answer: %w", len(p), errors.Join(last, ctx.Err()))
}

// packetThere sends one packet from a socket of its own and wants it back.
func (w *world) packetThere(ctx context.Context, addr string, p []byte, greeting string) error {
	c, err := w.dialUDP(addr)
	if err != nil {
		return err
	}
	defer c.Close()
	return answered(ctx, c, p, greeting)
}

// packets are UDP through a public port: of each size, from several visitors at once, idle, refused, and to nobody.
func (f *flowSites) packets(t *testing.T) {
	arrivals := echoUDP(t, f.sites[0], "10.20.0.20:7200", "")
	const addr = "203.0.113.1:7200"
	f.port(t, "packets", "--protocol", "udp", "--listen", addr, "--to", "10.20.0.20:7200", "--allow", "203.0.113.2/32", "--idle-timeout", "2s")
	for _, size := range []int{0, 1, 1_200, 9_000, 60_000} {
		t.Run(fmt.Sprint(size, " bytes"), func(t *testing.T) {
			p := make([]byte, size)
			for i := range p {
				p[i] = byte(i * 7)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			check(t, f.packetThere(ctx, addr, p, ""))
		})
	}
	t.Run("idle", func(t *testing.T) {
		c, err := f.dialUDP(addr)
		must(t, err)
		defer c.Close()
		must(t, answered(t.Context(), c, []byte("one"), ""))
		must(t, answered(t.Context(), c, []byte("two"), ""))
		one, two := sourceOf(arrivals(), "one"), sourceOf(arrivals(), "two")
		if one != two {
			t.Errorf("the service sees %s after %s within one session", two, one)
		}
		eventually(t, "the session ends", func(context.Context) error {
			if out := f.admin(t, "flow", "list"); strings.Contains(out, "7200") {
				return fmt.Errorf("still there:\n%s", out)
			}
			return nil
		})
		// A packet of a session that is over begins a new one.
		must(t, answered(t.Context(), c, []byte("three"), ""))
		if sourceOf(arrivals(), "three") == one {
			t.Error("the service sees the socket of the session that has ended")
		}
	})
	t.Run("unreachable", func(t *testing.T) {
		const closed = "203.0.113.1:7201"
		f.port(t, "closed", "--protocol", "udp", "--listen", closed, "--to", "10.20.0.20:7201", "--allow", "203.0.113.0/24")
		c, err := f.dialUDP(closed)
		must(t, err)
		defer c.Close()
		must2(t)(c.Write([]byte("anybody?")))
		// The port of the edge is open, whoever is behind it: that nobody is ends the session.
		eventually(t, "the session ends", func(context.Context) error {
			if out := f.admin(t, "flow", "list"); strings.Contains(out, "7201") {
				return fmt.Errorf("still there:\n%s", out)
			}
			if m := f.metric(t, "keyhaven_edge_port"); !strings.Contains(m, "closed") {
				return fmt.Errorf("no word of it in the metrics:\n%s", m)
			}
			return nil
		})
		echoUDP(t, f.sites[0], "10.20.0.20:7201", "")
		check(t, answered(t.Context(), c, []byte("now?"), ""))
	})
	t.Run("not allowed", func(t *testing.T) {
		var c net.Conn
		must(t, f.visitor.Do(func() (err error) {
			c, err = net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(visitorOther)}, net.UDPAddrFromAddrPort(addrPort(addr)))
			return err
		}))
		defer c.Close()
		for range 5 {
			must2(t)(c.Write([]byte("let me in")))
		}
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if n, err := c.Read(make([]byte, 100)); err == nil {
			t.Errorf("got %d bytes, want none", n)
		}
		must(t, f.packetThere(t.Context(), addr, []byte("friend"), ""))
		if from := sourceOf(arrivals(), "let me in"); from != "" {
			t.Errorf("a packet of a visitor who is not allowed arrives, from %s", from)
		}
	})
}

// metric returns the lines of the edge's metrics that begin so.
func (w *world) metric(t *testing.T, prefix string) string {
	t.Helper()
	out, err := w.edge.Command(t.Context(), "curl", "-sS", "-m", "5", "http://127.0.0.1:9600/metrics").Output()
	must(t, err)
	var b strings.Builder
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, prefix) {
			b.WriteString(line)
		}
	}
	return b.String()
}

func must2(t *testing.T) func(int, error) {
	return func(_ int, err error) {
		t.Helper()
		must(t, err)
	}
}

// sourceOf is where the first such packet came from, "" if there was none.
func sourceOf(all []arrival, packet string) string {
	for _, a := range all {
		if a.packet == packet {
			return a.source
		}
	}
	return ""
}

// migration kills the connections under UDP sessions, and then their connector: packets flow again, for every visitor. While
// their connector lives, the service sees no difference.
func (f *flowSites) migration(t *testing.T) {
	arrivals := echoUDP(t, f.sites[0], "10.20.0.20:7300", "")
	const addr, visitors = "203.0.113.1:7300", 16
	f.port(t, "moving", "--protocol", "udp", "--listen", addr, "--to", "10.20.0.20:7300", "--allow", "203.0.113.0/24")
	var all []net.Conn
	for range visitors {
		c, err := f.dialUDP(addr)
		must(t, err)
		t.Cleanup(func() { c.Close() })
		all = append(all, c)
	}
	// round has every visitor answered, and returns where the service saw each of them.
	round := func(word string) (places [visitors]string) {
		began := time.Now()
		var wg sync.WaitGroup
		for i, c := range all {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if err := answered(ctx, c, fmt.Appendf(nil, "%s %d", word, i), ""); err != nil {
					t.Errorf("%s: visitor %d: %v", word, i, err)
				}
			})
		}
		wg.Wait()
		t.Logf("%s: all %d visitors answered after %.2f s", word, visitors, time.Since(began).Seconds())
		seen := arrivals()
		for i := range places {
			places[i] = sourceOf(seen, fmt.Sprintf("%s %d", word, i))
		}
		return places
	}
	before := round("at the beginning")
	moves := f.metric(t, "keyhaven_edge_udp_moves_total{")
	cut := f.silence(t)
	after := round("some connections silent")
	f.restore(t, cut)
	if now := f.metric(t, "keyhaven_edge_udp_moves_total{"); now == moves {
		t.Error("no session went over a connection that fell silent: the test proves nothing")
	}
	for i := range before {
		if before[i] != after[i] {
			t.Errorf("visitor %d: the service saw %s, then %s", i, before[i], after[i])
		}
	}
	var list struct {
		Flows []struct{ Kind, Connector string }
	}
	must(t, json.Unmarshal([]byte(f.admin(t, "flow", "list", "--tunnel", "a", "--output", "json")), &list))
	carries := map[string]int{}
	for _, fl := range list.Flows {
		if fl.Kind == "udp" {
			carries[fl.Connector]++
		}
	}
	t.Logf("UDP sessions by connector: %v", carries)
	killed := f.Sites[0].Connectors[0]
	if carries["a2"] > carries["a"] {
		killed = f.Sites[0].Connectors[1]
	}
	must(t, killed.Proc.Kill())
	round("a connector killed")
	must(t, f.Restart(t.Context(), killed, true))
}

// silence drops what every second UDP port of site a sends to the edge, and returns the ports.
func (f *flowSites) silence(t *testing.T) (ports []string) {
	t.Helper()
	out, err := f.sites[0].Command(t.Context(), "ss", "-Hunap").Output()
	must(t, err)
	n := 0
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, "keyhaven-connec") || strings.Contains(line, "10.20.0.20") {
			continue
		}
		local := strings.Fields(line)[3]
		if _, port, ok := cutLast(local, ":"); ok {
			if n++; n%2 == 0 {
				ports = append(ports, port)
			}
		}
	}
	if len(ports) < 2 {
		t.Fatalf("the connectors' sockets are not to be seen:\n%s", out)
	}
	for _, p := range ports {
		must(t, f.edge.IP("rule", "add", "pref", "20", "iif", f.edgeDev, "ipproto", protoUDP, "sport", p, "blackhole"))
	}
	f.moveLocal(t)
	return ports
}

// moveLocal puts the edge's local table behind the rules of silence.
func (f *flowSites) moveLocal(t *testing.T) {
	t.Helper()
	must(t, f.edge.IP("rule", "add", "pref", "100", "lookup", "local"))
	must(t, f.edge.IP("rule", "del", "pref", "0", "lookup", "local"))
}

func (f *flowSites) restore(t *testing.T, ports []string) {
	t.Helper()
	must(t, f.edge.IP("rule", "add", "pref", "0", "lookup", "local"))
	must(t, f.edge.IP("rule", "del", "pref", "100", "lookup", "local"))
	for range ports {
		must(t, f.edge.IP("rule", "del", "pref", "20"))
	}
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// echo is ping and traceroute as the edge's operators run them.
func (f *flowSites) echo(t *testing.T) {
	ping := func(ctx context.Context, args ...string) (string, error) {
		return f.Edge(ctx, append([]string{"ping", "-c", "2", "-i", "100ms"}, args...)...)
	}
	f.sysctl(t, f.sites[0], "net.ipv4.ping_group_range=1 0")
	out, err := ping(t.Context(), farHost)
	if err == nil || !strings.Contains(out+err.Error(), "forbid") {
		t.Errorf("ping where the host forbids it: got %v, %q", err, out)
	}
	if log := f.Sites[0].Connector.Log(); !strings.Contains(log, "ping_group_range") {
		t.Error("the connector's log does not name ping_group_range")
	}
	f.sysctl(t, f.sites[0], "net.ipv4.ping_group_range=0 0")
	t.Run("the same id from two sources", func(t *testing.T) {
		var wg sync.WaitGroup
		for _, size := range []string{"100", "200"} {
			wg.Go(func() {
				out, err := ping(t.Context(), farHost, "-s", size)
				if err != nil || strings.Count(out, size[:1]+"08 bytes from "+farHost) != 2 || !strings.Contains(out, "2 packets transmitted, 2 received, 0% packet loss") {
					t.Errorf("size %s: got %v\n%s", size, err, out)
				}
			})
		}
		wg.Wait()
	})
	t.Run("IPv6", func(t *testing.T) {
		if out, err := ping(t.Context(), farHost6); err != nil || !strings.Contains(out, "2 received") {
			t.Errorf("got %v\n%s", err, out)
		}
	})
	t.Run("TTL 1", func(t *testing.T) {
		for host, router := range map[string]string{farHost: "10.20.1.2", farHost6: "fd00:20::2"} {
			out, err := ping(t.Context(), host, "-t", "1")
			if err == nil || !strings.Contains(out, "from "+router+": icmp_seq=0 time to live exceeded") {
				t.Errorf("%s: got %v\n%s", host, err, out)
			}
		}
	})
	t.Run("no such host", func(t *testing.T) {
		out, err := ping(t.Context(), "10.30.0.77", "-c", "1", "-W", "5s")
		if err == nil || !strings.Contains(out, "from 10.20.1.2: icmp_seq=0 ") {
			t.Errorf("got %v\n%s", err, out)
		}
	})
	t.Run("not permitted", func(t *testing.T) {
		f.admin(t, "route", "add", "10.99.0.0/16", "--tunnel", "a")
		out, err := ping(t.Context(), "10.99.0.1")
		if err == nil || !strings.Contains(out, "not permitted by the connector") {
			t.Errorf("got %v\n%s", err, out)
		}
		f.refused(t, []string{"route"}, "ping", "-c", "1", "192.168.77.1")
	})
	t.Run("traceroute", func(t *testing.T) {
		for host, router := range map[string]string{farHost: "10.20.1.2", farHost6: "fd00:20::2"} {
			out, err := f.Edge(t.Context(), "traceroute", host)
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if err != nil || len(lines) != 3 || !strings.Contains(lines[1], router) || !strings.Contains(lines[2], host) {
				t.Errorf("%s: got %v\n%s", host, err, out)
			}
		}
	})
}

// names asks the edge's name servers, one for each network, for a name that both have.
func (f *flowSites) names(t *testing.T) {
	for i, answer := range []string{"10.20.0.20", "10.20.0.10"} {
		serveNames(t, f.sites[i], "10.20.0.10:53", answer)
	}
	f.admin(t, "route", "add", "--hostname", "*.corp.test", "--tunnel", "a")
	f.admin(t, "route", "add", "--hostname", "*.corp.test", "--tunnel", "b", "--vnet", "branch")
	dns := func(id string) obj {
		return obj{"dns": obj{"serve": true, "resolvers": obj{id: []string{"10.20.0.10"}}}}
	}
	f.configure(t, "a", dns(f.def))
	f.configure(t, "a2", dns(f.def))
	f.configure(t, "b", dns(f.branch))
	// Until they permit it, the connectors deny the edge their sites' name servers.
	if out, err := f.dig(t.Context(), "53", "db.corp.test", "A"); err != nil || !strings.Contains(out, "SERVFAIL") {
		t.Errorf("before dns.serve: got %v\n%s", err, out)
	}
	for _, s := range f.Sites {
		for _, c := range s.Connectors {
			must(t, f.Restart(t.Context(), c, false))
		}
	}
	for _, tt := range []struct{ port, name, kind, flag, want string }{
		{"53", "db.corp.test", "A", "+notcp", "10.20.0.20"},
		{"5300", "db.corp.test", "A", "+notcp", "10.20.0.10"},
		{"53", "db.corp.test", "A", "+tcp", "10.20.0.20"},
		{"5300", "db.corp.test", "A", "+tcp", "10.20.0.10"},
		{"53", "db.corp.test", "A", "+notcp", "10.20.0.20"}, // from what is kept
		{"53", "big.corp.test", "TXT", "+notcp", "0123456789"},
		{"53", "none.corp.test", "A", "+notcp", "NXDOMAIN"},
		{"53", "www.elsewhere.test", "A", "+notcp", "REFUSED"},
	} {
		t.Run(tt.port+" "+tt.name+" "+tt.kind+" "+tt.flag, func(t *testing.T) {
			eventually(t, "an answer", func(ctx context.Context) error {
				out, err := f.dig(ctx, tt.port, tt.name, tt.kind, tt.flag)
				if err == nil && !strings.Contains(out, tt.want) {
					err = fmt.Errorf("want %s in\n%s", tt.want, out)
				}
				return err
			})
		})
	}
	// A flow to the name goes where the name of its own network leads.
	for i, where := range []struct{ vnet, port string }{{"default", "7401"}, {"branch", "7402"}} {
		echoTCP(t, f.sites[i], []string{"10.20.0.20:7400", "10.20.0.10:7400"}[i], where.vnet)
		f.port(t, "named-"+where.vnet, "--listen", "203.0.113.1:"+where.port, "--vnet", where.vnet, "--to", "db.corp.test:7400", "--allow", "203.0.113.0/24")
		eventually(t, where.vnet, func(ctx context.Context) error {
			c, err := f.visitor.Dial(ctx, "203.0.113.1:"+where.port)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			got := make([]byte, len(where.vnet))
			n, err := c.Read(got)
			if string(got[:n]) != where.vnet {
				return fmt.Errorf("got %q, %v; want %q", got[:n], err, where.vnet)
			}
			return nil
		})
	}
	// Who is not in the list gets no answer.
	if out, err := f.visitor.Command(t.Context(), "dig", "-b", visitorOther, "+tries=1", "+time=1", "@203.0.113.1", "db.corp.test").CombinedOutput(); err == nil {
		t.Errorf("a visitor who may not ask got\n%s", out)
	}
}

func (f *flowSites) dig(ctx context.Context, port, name, kind string, flags ...string) (string, error) {
	out, err := f.visitor.Command(ctx, "dig", append([]string{"+tries=1", "+time=8", "@203.0.113.1", "-p", port, name, kind}, flags...)...).CombinedOutput()
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return string(out), err
}

// serveNames is a site's name server, over UDP and TCP, until the test ends.
func serveNames(t *testing.T, ns *testnet.Namespace, addr, answer string) {
	t.Helper()
	handler := mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		m := new(mdns.Msg)
		m.SetReply(q)
		name, kind := q.Question[0].Name, q.Question[0].Qtype
		head := mdns.RR_Header{Name: name, Rrtype: kind, Class: mdns.ClassINET, Ttl: 30}
		switch {
		case !strings.HasSuffix(name, ".corp.test.") || strings.HasPrefix(name, "none."):
			m.Rcode = mdns.RcodeNameError
		case kind == mdns.TypeA:
			m.Answer = append(m.Answer, &mdns.A{Hdr: head, A: net.ParseIP(answer)})
		case kind == mdns.TypeTXT:
			for range 40 {
				m.Answer = append(m.Answer, &mdns.TXT{Hdr: head, Txt: []string{strings.Repeat("0123456789", 10)}})
			}
		}
		if size := mdns.MinMsgSize; w.RemoteAddr().Network() == "udp" {
			if o := q.IsEdns0(); o != nil {
				size = int(o.UDPSize())
			}
			m.Truncate(size)
		}
		w.WriteMsg(m)
	})
	pc := listenUDP(t, ns, addr)
	var ln net.Listener
	must(t, ns.Do(func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}))
	for _, s := range []*mdns.Server{{PacketConn: pc, Handler: handler}, {Listener: ln, Handler: handler}} {
		done := make(chan error, 1)
		ready := make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		go func() { done <- s.ActivateAndServe() }()
		<-ready
		t.Cleanup(func() {
			if err := s.Shutdown(); err != nil && !errors.Is(err, syscall.EINVAL) {
				t.Errorf("name server: %v", err)
			}
			<-done
		})
	}
}
