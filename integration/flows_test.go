//go:build netns

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// The scenarios of flows share one installation. Both sites have the same prefix, in networks of their own.
//
//	visitor 203.0.113.2, .66 ─── edge 203.0.113.1 ─┬─ site a: connectors a, a2; 10.20.0.0/16 ─── router 10.20.1.2 ─── far 10.30.0.2
//	                                               │                           fd00:20::1 ───── fd00:20::2 ──────── fd00:30::2
//	                                               └─ site b: connector b, network "branch"; 10.20.0.0/16
const (
	visitorOther = "203.0.113.66"
	farHost      = "10.30.0.2"
	farHost6     = "fd00:30::2"
)

type obj = map[string]any

// flowSites are the networks of the drawing.
type flowSites struct {
	*world
	router, far *testnet.Namespace
	branch      string // id of site b's network
	def         string // id of site a's
}

// TestFlows has one installation for all scenarios of flows: what they do to it they take back.
func TestFlows(t *testing.T) {
	f := newFlowSites(t)
	t.Run("limits lowered live", f.limits)
	t.Run("ports", f.ports)
	t.Run("PROXY protocol", f.proxyProtocol)
	t.Run("port in use", f.portInUse)
	t.Run("packets", f.packets)
	t.Run("echo", f.echo)
	t.Run("names", f.names)
	t.Run("overlap", f.overlap)
	t.Run("origins", f.origins)
	t.Run("gRPC by ingress", f.grpcIngress)
	t.Run("migration", f.migration) // kills a connector
}

func newFlowSites(t *testing.T) *flowSites {
	t.Helper()
	f := &flowSites{world: hosts(t)}
	f.wire(t)
	a, b := f.siteA(), f.siteB()
	a.Routes = prefixes("10.20.0.0/16", "10.30.0.0/24", "fd00:30::/64", "fd00:20::/64")
	b.Routes = prefixes("10.20.0.0/16")
	a.Replicas = []lab.ConnectorPlan{{Name: "a2", Ops: "127.0.0.1:9603"}}
	zones := []lab.ZonePlan{{Host: plain, KeyType: "p256"}, {Host: ingressHost, KeyType: "p256"}, {Host: brokenHost, KeyType: "p256"}}
	var err error
	f.Lab, err = lab.New(t.Context(), lab.Plan{Dir: t.TempDir(), Bin: bin, Tools: filepath.Join(bin, "keyhaven-demo"), Zones: zones, Sites: []lab.SitePlan{a, b},
		Edge: lab.EdgePlan{NS: f.edge, Tunnel: edgeTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"}})
	must(t, err)
	t.Cleanup(func() {
		check(t, f.Stop())
		f.searchLogs(t)
		if t.Failed() {
			t.Log(f.Logs())
		}
	})
	cfg := f.EdgeConfig()
	for _, z := range cfg["visitors"].(obj)["zones"].([]obj) {
		switch z["hosts"].([]string)[0] {
		case ingressHost:
			z["origins"] = []obj{{"tunnel": "a"}}
		case brokenHost:
			z["origins"] = []obj{{"url": "http://" + brokenOrigin}}
		}
	}
	cfg["dns"] = []obj{{"listen": "203.0.113.1:53", "allow": []string{"203.0.113.2"}}, {"listen": "203.0.113.1:5300", "vnet": "branch", "allow": []string{"203.0.113.2"}}}
	must(t, f.WriteYAML("edge.yaml", cfg))
	for _, c := range []string{"a", "a2", "b"} {
		f.configure(t, c, nil)
	}
	must(t, f.Start(t.Context()))
	f.def, f.branch = f.vnetID(t, "default"), f.vnetID(t, "branch")
	return f
}

func prefixes(list ...string) (all []netip.Prefix) {
	for _, p := range list {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}

// wire adds the router and the far host behind site a, and the visitor's second address.
func (f *flowSites) wire(t *testing.T) {
	t.Helper()
	var err error
	f.router, err = f.net.Namespace("router")
	must(t, err)
	f.far, err = f.net.Namespace("far")
	must(t, err)
	p := netip.MustParsePrefix
	siteDev, routerDev, err := f.net.Link(f.sites[0], f.router, p("10.20.1.1/30"), p("10.20.1.2/30"))
	must(t, err)
	routerFar, farDev, err := f.net.Link(f.router, f.far, p("10.30.0.1/24"), p("10.30.0.2/24"))
	must(t, err)
	must(t, f.sites[0].AddAddr(siteDev, p("fd00:20::1/64")))
	must(t, f.router.AddAddr(routerDev, p("fd00:20::2/64")))
	must(t, f.router.AddAddr(routerFar, p("fd00:30::1/64")))
	must(t, f.far.AddAddr(farDev, p("fd00:30::2/64")))
	f.sysctl(t, f.router, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	must(t, f.sites[0].Route(p("10.30.0.0/24"), netip.MustParseAddr("10.20.1.2")))
	must(t, f.sites[0].Route(p("fd00:30::/64"), netip.MustParseAddr("fd00:20::2")))
	must(t, f.far.Route(p("10.20.0.0/16"), netip.MustParseAddr("10.30.0.1")))
	must(t, f.far.Route(p("fd00:20::/64"), netip.MustParseAddr("fd00:30::1")))
	must(t, f.visitor.AddAddr("lo", p(visitorOther+"/32")))
	must(t, f.edge.Route(p(visitorOther+"/32"), netip.MustParseAddr("203.0.113.2")))
}

func (f *flowSites) sysctl(t *testing.T, ns *testnet.Namespace, settings ...string) {
	t.Helper()
	if out, err := ns.Command(t.Context(), "sysctl", append([]string{"-qw"}, settings...)...).CombinedOutput(); err != nil {
		t.Fatalf("sysctl %v: %v: %s", settings, err, out)
	}
}

// configure writes the configuration of a connector, with more keys than all of them have.
func (f *flowSites) configure(t *testing.T, name string, more obj) {
	t.Helper()
	ops := map[string]string{"a": "127.0.0.1:9601", "a2": "127.0.0.1:9603", "b": "127.0.0.1:9601"}[name]
	cfg := obj{"identity": obj{"dir": f.Path("connector-" + name)}, "edges": []string{edgeTunnel}, "ops": obj{"listen": ops}, "allow": []obj{
		{"to": "10.20.0.0/16", "ports": []any{"*"}}, {"to": "10.30.0.0/24", "ports": []any{"*"}}, {"to": "fd00::/16", "ports": []any{"*"}}}}
	for k, v := range more {
		cfg[k] = v
	}
	must(t, f.WriteYAML("connector-"+name+".yaml", cfg))
}

// reconfigure puts a configuration of site b's connector in force while it runs.
func (f *flowSites) reconfigure(t *testing.T, more obj) {
	t.Helper()
	f.configure(t, "b", more)
	p := f.Sites[1].Connector
	seen := len(p.Log())
	must(t, p.Signal(syscall.SIGHUP))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must(t, p.WaitLog(ctx, seen, "configuration reloaded"))
}

func (w *world) vnetID(t *testing.T, name string) string {
	t.Helper()
	var list []struct{ ID, Name string }
	must(t, json.Unmarshal([]byte(w.admin(t, "vnet", "list", "--output", "json")), &list))
	for _, v := range list {
		if v.Name == name {
			return v.ID
		}
	}
	t.Fatalf("no network %q in %v", name, list)
	return ""
}

// admin runs a command of the first edge that must succeed.
func (w *world) admin(t *testing.T, args ...string) string {
	t.Helper()
	out, err := w.Edge(t.Context(), args...)
	must(t, err)
	return out
}

// refused runs a command of the first edge that must fail and say each of the texts.
func (w *world) refused(t *testing.T, says []string, args ...string) {
	t.Helper()
	_, err := w.Edge(t.Context(), args...)
	if err == nil {
		t.Errorf("keyhaven-edge %s: succeeded, want a refusal", strings.Join(args, " "))
		return
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("got %q, want %q in it", err, s)
		}
	}
}

// port makes a public port that is there until the test ends.
func (w *world) port(t *testing.T, name string, args ...string) {
	t.Helper()
	w.admin(t, append([]string{"port", "add", name}, args...)...)
	t.Cleanup(func() {
		_, err := w.Edge(context.Background(), "port", "delete", name)
		check(t, err)
	})
}

// echoTCP serves connections in a namespace until the test ends: each line comes back with the greeting before it.
func echoTCP(t *testing.T, ns *testnet.Namespace, addr, greeting string) {
	t.Helper()
	var ln net.Listener
	must(t, ns.Do(func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}))
	serveTCP(t, ln, func(c net.Conn) {
		if _, err := io.WriteString(c, greeting); err == nil {
			io.Copy(c, c)
			c.(*net.TCPConn).CloseWrite()
		}
	})
}

// serveTCP hands each connection to serve, until the test ends.
func serveTCP(t *testing.T, ln net.Listener, serve func(net.Conn)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				stop := context.AfterFunc(ctx, func() { c.Close() })
				defer stop()
				serve(c)
			}()
		}
	}()
	t.Cleanup(func() {
		cancel()
		ln.Close()
		<-done
	})
}

// talk sends a word over a connection and wants it back.
func talk(c net.Conn, word string) error {
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, word); err != nil {
		return err
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != word {
		return fmt.Errorf("got %q, want %q", got, word)
	}
	return nil
}

// open dials a public port of the edge and talks over it. The error is of either.
func (w *world) open(ctx context.Context, addr string) (net.Conn, error) {
	c, err := w.visitor.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	if err := talk(c, "hello"); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// opens opens n connections, one after the other, and leaves them open.
func (w *world) opens(t *testing.T, addr string, n int) (all []net.Conn) {
	t.Helper()
	for i := range n {
		var c net.Conn
		eventually(t, fmt.Sprintf("connection %d of %d", i+1, n), func(ctx context.Context) (err error) {
			c, err = w.open(ctx, addr)
			return err
		})
		t.Cleanup(func() { c.Close() })
		all = append(all, c)
	}
	return all
}

// full checks that one connection more is cut before it carries anything, while those that are there go on.
func (w *world) full(t *testing.T, addr string, there []net.Conn) {
	t.Helper()
	eventually(t, "the limit is in force", func(ctx context.Context) error {
		c, err := w.open(ctx, addr)
		if err == nil {
			c.Close()
			return errors.New("a connection beyond the limit passes")
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a connection beyond the limit: got %v, want a reset", err)
		}
		return nil
	})
	for i, c := range there {
		if err := talk(c, "still there"); err != nil {
			t.Errorf("connection %d of those that were open: %v", i, err)
		}
	}
}

// limits lowers each limit of flows while flows are open: of a connector, of a network at it, of a network and a tunnel at
// the edge. What is open goes on; what is new is refused until enough has ended.
func (f *flowSites) limits(t *testing.T) {
	echoTCP(t, f.sites[1], "10.20.0.20:7", "")
	const addr = "203.0.113.1:7001"
	f.port(t, "limited", "--listen", addr, "--vnet", "branch", "--to", "10.20.0.20:7", "--allow", "203.0.113.0/24")
	for _, tt := range []struct {
		name string
		set  func(t *testing.T, n int) // 0: no limit
	}{
		{"connector", func(t *testing.T, n int) { f.reconfigure(t, obj{"limits": obj{"max_flows": max(n, 8192*ifZero(n))}}) }},
		{"network at the connector", func(t *testing.T, n int) {
			if n == 0 {
				f.reconfigure(t, nil)
			} else {
				f.reconfigure(t, obj{"limits": obj{"per_vnet": map[string]int{f.branch: n}}})
			}
		}},
		{"network at the edge", func(t *testing.T, n int) { f.admin(t, "vnet", "set", "branch", "--max-flows", fmt.Sprint(n)) }},
		{"tunnel at the edge", func(t *testing.T, n int) { f.admin(t, "tunnel", "set", "b", "--max-flows", fmt.Sprint(n)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer tt.set(t, 0)
			tt.set(t, 4)
			open := f.opens(t, addr, 4)
			f.full(t, addr, open)
			tt.set(t, 2)
			f.full(t, addr, open)
			for _, c := range open[1:] {
				c.Close()
			}
			open = append(open[:1], f.opens(t, addr, 1)...)
			f.full(t, addr, open)
			tt.set(t, 0)
			open = append(open, f.opens(t, addr, 4)...)
			for _, c := range open {
				check(t, talk(c, "all of us"))
				c.Close()
			}
		})
	}
}

func ifZero(n int) int {
	if n == 0 {
		return 1
	}
	return 0
}

// overlap runs connections, packets and pages of both networks at one time, to the same address: no byte of one is ever
// seen in the other.
func (f *flowSites) overlap(t *testing.T) {
	const rounds, size = 15, 256 << 10
	done := make(chan error, 6)
	for i, net := range []struct{ name, vnet string }{{"a", "default"}, {"b", "branch"}} {
		ns := f.sites[i]
		echoTCP(t, ns, "10.20.0.20:7100", net.name)
		echoUDP(t, ns, "10.20.0.20:7100", net.name)
		addr := fmt.Sprintf("203.0.113.1:%d", 7100+i)
		f.port(t, "tcp-"+net.name, "--listen", addr, "--vnet", net.vnet, "--to", "10.20.0.20:7100", "--allow", "203.0.113.0/24")
		f.port(t, "udp-"+net.name, "--protocol", "udp", "--listen", addr, "--vnet", net.vnet, "--to", "10.20.0.20:7100", "--allow", "203.0.113.0/24")
		mine := bytes.Repeat([]byte(net.name), size)
		go func() {
			done <- repeat(rounds, func() error { return f.exchange(t.Context(), addr, mine) })
		}()
		go func() {
			done <- repeat(rounds, func() error {
				for _, n := range []int{1, 900, 20_000} {
					if err := f.packetThere(t.Context(), addr, mine[:n], net.name); err != nil {
						return err
					}
				}
				return nil
			})
		}()
	}
	for range 4 {
		check(t, <-done)
	}
}

func repeat(n int, do func() error) error {
	for i := range n {
		if err := do(); err != nil {
			return fmt.Errorf("round %d: %w", i, err)
		}
	}
	return nil
}

// exchange sends bytes of one letter over TCP and wants nothing but that letter back, to the end.
func (f *flowSites) exchange(ctx context.Context, addr string, mine []byte) error {
	c, err := f.visitor.Dial(ctx, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(mine)
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if len(got) != len(mine)+1 || len(bytes.Trim(got, string(mine[:1]))) > 0 {
		return fmt.Errorf("%s: got %d bytes, want %d, all %q", addr, len(got), len(mine)+1, mine[:1])
	}
	return nil
}
