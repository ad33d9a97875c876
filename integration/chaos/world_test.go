//go:build netns

package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// The installation. Double lines are links on which faults happen.
//
//	visitor 203.0.113.2 ────┐      ┌════ 198.18.1.2 edge1
//	etcd 198.18.9.2 ────────┤      ├════ 198.18.2.2 edge2
//	                     internet ─┤
//	                               ├════ 198.18.3.2 sitea: key servers 10.20.0.10 and .11, origins 10.20.0.20 and .21, connector a
//	                               │         └──── 192.168.20.2 sitea2: connector a2
//	                               ├════ 198.18.5.2 sitea2
//	                               └════ 198.18.4.2 siteb: origins 10.20.0.20 and .21, connector b, in the network "branch"
const (
	originAddr   = "10.20.0.20:8080"
	secondOrigin = "10.20.0.21"
	visitorAddr  = "203.0.113.2"
	branch       = "branch"

	hostA, hostB  = "a.keyhaven.test", "b.keyhaven.test"
	hostPool      = "pool.keyhaven.test"      // of the store, with a pool
	hostForbidden = "forbidden.keyhaven.test" // its zone and key are there, but no rule of the key servers
)

var hosts = []string{hostA, hostB, hostPool}

type obj = map[string]any

// A world is the installation with its hosts, and what happened in it.
type world struct {
	*lab.Lab
	net     *testnet.Net
	visitor *testnet.Namespace
	sites   map[string]*testnet.Namespace
	links   map[string]*cable
	edges   []string // visitors' addresses of the edges
	dir     string
	vnets   map[string]string // ids by site

	policies timeline

	mu         sync.Mutex // guards the rest
	began      time.Time
	events     []string
	violations []string
	wanted     map[*lab.Process]bool // processes that shall run
	started    map[*lab.Process]time.Time
}

// A cable is a link with faults.
type cable struct {
	*testnet.Link
	end   *testnet.Namespace // the host's
	addr  netip.Prefix       // the host's present one
	moves int
}

// note writes an event into the record of the run.
func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, fmt.Sprintf("%7.2f  ", time.Since(w.began).Seconds())+fmt.Sprintf(format, args...))
}

// violate notes that what must never be was seen.
func (w *world) violate(format string, args ...any) {
	w.note("VIOLATION "+format, args...)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violations = append(w.violations, fmt.Sprintf(format, args...))
}

func (w *world) violated() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.violations) > 0
}

// ground makes the hosts of the drawing.
func ground(t *testing.T) *world {
	t.Helper()
	n, err := testnet.New("khch")
	must(t, err)
	t.Cleanup(func() { check(t, n.Close()) })
	w := &world{net: n, sites: map[string]*testnet.Namespace{}, links: map[string]*cable{}, began: time.Now(), wanted: map[*lab.Process]bool{},
		started: map[*lab.Process]time.Time{}}
	internet, err := n.Namespace("internet")
	must(t, err)
	must(t, internet.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) }))
	host := func(name, net string, shaped bool) *testnet.Namespace {
		ns, err := n.Namespace(name)
		must(t, err)
		inner, outer := netip.MustParsePrefix(net+".2/24"), netip.MustParsePrefix(net+".1/24")
		if shaped {
			l, err := n.Shaped(ns, internet, inner, outer, *seed)
			must(t, err)
			t.Cleanup(func() { check(t, l.Close()) })
			w.links[name] = &cable{Link: l, end: ns, addr: inner}
		} else {
			_, _, err := n.Link(ns, internet, inner, outer)
			must(t, err)
		}
		must(t, ns.IP("route", "add", "default", "via", outer.Addr().String()))
		return ns
	}
	w.visitor = host("visitor", "203.0.113", false)
	for name, net := range map[string]string{"edge1": "198.18.1", "edge2": "198.18.2", "sitea": "198.18.3", "siteb": "198.18.4", "sitea2": "198.18.5"} {
		w.sites[name] = host(name, net, true)
	}
	w.sites["etcd"] = host("etcd", "198.18.9", false)
	for _, s := range []string{"sitea", "siteb"} {
		for _, a := range []string{"10.20.0.10/32", "10.20.0.11/32", "10.20.0.20/32", "10.20.0.21/32"} {
			must(t, w.sites[s].AddAddr("lo", netip.MustParsePrefix(a)))
		}
	}
	_, _, err = n.Link(w.sites["sitea"], w.sites["sitea2"], netip.MustParsePrefix("192.168.20.1/24"), netip.MustParsePrefix("192.168.20.2/24"))
	must(t, err)
	must(t, w.sites["sitea2"].Route(netip.MustParsePrefix("10.20.0.0/24"), netip.MustParseAddr("192.168.20.1")))
	w.edges = []string{"198.18.1.2", "198.18.2.2"}
	return w
}

// up makes and starts the installation. It ends with the test.
func up(t *testing.T) *world {
	t.Helper()
	w := ground(t)
	var err error
	w.dir, err = os.MkdirTemp("", "khch") // sockets take short paths alone
	must(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(w.dir)) })
	self, err := os.Executable()
	must(t, err)
	prefix := []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}
	edge := func(i int) lab.EdgePlan {
		return lab.EdgePlan{NS: w.sites[fmt.Sprintf("edge%d", i+1)], Tunnel: w.edges[i] + ":7844", Visitors: w.edges[i] + ":443", Ops: "127.0.0.1:9600"}
	}
	w.Lab, err = lab.New(t.Context(), lab.Plan{
		Dir: w.dir, Bin: bin, Tools: self, Adapt: w.adapt,
		Edge: edge(0), MoreEdges: []lab.EdgePlan{edge(1)},
		Etcd: lab.EtcdPlan{NS: w.sites["etcd"], Client: "198.18.9.2:2379", Peer: "127.0.0.1:2380"},
		Zones: []lab.ZonePlan{{Host: hostA, KeyType: "p256"}, {Host: hostB, KeyType: "p256", Site: 1},
			{Host: hostForbidden, KeyType: "p256"}},
		KeyServers: []lab.KeyServerPlan{{Name: "ks2", Listen: "10.20.0.11:2407", Ops: "127.0.0.1:9612"}},
		Sites: []lab.SitePlan{
			{Name: "a", NS: w.sites["sitea"], KeyServer: "10.20.0.10:2407", Origin: originAddr, Ops: "127.0.0.1:9601", KeyServerOps: "127.0.0.1:9602",
				Routes: prefix, Replicas: []lab.ConnectorPlan{{Name: "a2", NS: w.sites["sitea2"], Ops: "127.0.0.1:9603"}}},
			{Name: "b", NS: w.sites["siteb"], VNet: branch, Origin: originAddr, Ops: "127.0.0.1:9601", Routes: prefix},
		},
	})
	must(t, err)
	must(t, w.AddKey(t.Context(), lab.ZonePlan{Host: hostPool, KeyType: "p256"}))
	t.Cleanup(func() { w.down(t) })
	must(t, w.Start(t.Context()))
	w.store(t)
	return w
}

// down ends everything and looks for what must not be left or logged.
func (w *world) down(t *testing.T) {
	for _, p := range w.all() {
		p.Signal(sigCont) // one that is held could not end
	}
	check(t, w.Stop())
	if left := processesWith(w.dir); len(left) > 0 {
		t.Errorf("processes are left: %q", left)
	}
	for _, p := range w.all() {
		log := p.Log()
		for what, sign := range map[string]string{"a data race": "DATA RACE", "a panic": "panic:", "the token's PIN": w.Token.PIN,
			"a byte of another network": "FOREIGN", "a fatal error": "fatal error:"} {
			if i := strings.Index(log, sign); i >= 0 {
				t.Errorf("%s: %s in the log:\n%s", p.Name(), what, log[max(0, i-500):min(len(log), i+4000)])
			}
		}
		if t.Failed() {
			t.Logf("--- %s said at last:\n%s", p.Name(), log[max(0, len(log)-6000):])
		}
	}
	if t.Failed() {
		if keep := os.Getenv("KEYHAVEN_CHAOS_KEEP"); keep != "" {
			check(t, os.CopyFS(keep, os.DirFS(w.dir)))
		}
	}
}

// all are the processes of the installation.
func (w *world) all() []*lab.Process {
	all := []*lab.Process{w.EtcdProc}
	for _, e := range w.Edges {
		all = append(all, e.Proc)
	}
	for _, k := range w.KeyServers {
		all = append(all, k.Proc)
	}
	for _, s := range w.Sites {
		all = append(all, s.Origin)
		for _, c := range s.Connectors {
			all = append(all, c.Proc)
		}
	}
	return all
}

// adapt makes the programs' configurations ones of this test: public ports, short drains, and rules without the forbidden key.
func (w *world) adapt(file string, cfg map[string]any) {
	switch {
	case strings.HasPrefix(file, "keyserver"):
		cfg["clients"] = everything().rules()
	case strings.HasPrefix(file, "connector-"):
		cfg["allow"] = connectorAllow("", true)
		cfg["drain"] = obj{"grace": "3s"}
	case strings.HasPrefix(file, "edge"):
		cfg["tunnel"].(obj)["drain_timeout"] = "3s"
		etcd := cfg["state"].(obj)["etcd"].(obj)
		etcd["cache"], etcd["timeout"] = filepath.Join(w.dir, strings.TrimSuffix(file, ".yaml")+".cache"), "2s"
		visitors := cfg["visitors"].(obj)
		visitors["limits"] = obj{"drain_timeout": "3s"}
		visitors["ports"] = edgePorts(true)
	}
}

// edgePorts are the public ports: those of the echo services, and one that admits nobody who comes.
func edgePorts(open bool) (ports []obj) {
	admit := []string{visitorAddr + "/32"}
	if !open {
		admit = []string{"192.0.2.1/32"}
	}
	for _, p := range []struct{ name, vnet string }{{"a", "default"}, {"b", branch}} {
		for _, proto := range []string{"tcp", "udp"} {
			port := obj{"name": proto + "-" + p.name, "protocol": proto, "listen": ":" + echoPorts[p.name], "vnet": p.vnet, "host": "10.20.0.20", "port": 7007,
				"allow": admit}
			if proto == "udp" {
				port["idle_timeout"] = "5s"
			}
			ports = append(ports, port)
		}
	}
	return append(ports, obj{"name": "shut", "protocol": "tcp", "listen": ":7009", "host": "10.20.0.20", "port": 7007, "allow": []string{"192.0.2.1/32"}})
}

var echoPorts = map[string]string{"a": "7001", "b": "7002"}

// connectorAllow permits the site's services to flows of one network; "" is all, as is needed before it has an id.
func connectorAllow(vnet string, echo bool) []obj {
	ports := []any{8080, 2407}
	if echo {
		ports = append(ports, 7007)
	}
	rule := obj{"to": "10.20.0.0/24", "ports": ports}
	if vnet != "" {
		rule["vnet"] = vnet
	}
	return []obj{rule}
}

// store makes the records of the store, and has each connector permit flows of its own network alone.
func (w *world) store(t *testing.T) {
	t.Helper()
	_, err := w.Edge(t.Context(), "pool", "create", "web", "--endpoint", "default/"+originAddr+",name=one", "--endpoint",
		"default/"+secondOrigin+":8080,name=two", "--monitor", "tcp", "--monitor-interval", "5s")
	must(t, err)
	_, err = w.Edge(t.Context(), "zone", "add", "pool", "--hostname", hostPool, "--certificate", w.Chain(hostPool), "--key-server", "hsm", "--pool", "web")
	must(t, err)
	out, err := w.Edge(t.Context(), "vnet", "list", "--output", "json")
	must(t, err)
	var list []struct{ ID, Name string }
	must(t, json.Unmarshal([]byte(out), &list))
	w.vnets = map[string]string{}
	for _, v := range list {
		w.vnets[map[string]string{"default": "a", branch: "b"}[v.Name]] = v.ID
	}
	for _, s := range w.Sites {
		if w.vnets[s.Name] == "" {
			t.Fatalf("no network of site %s in %s", s.Name, out)
		}
		for _, c := range s.Connectors {
			must(t, w.permit(s, c, true))
		}
	}
	w.policies.init(len(w.KeyServers))
	for _, p := range w.all() {
		w.want(p, true)
	}
}

// permit rewrites a connector's allow-list and has it read again.
func (w *world) permit(s *lab.Site, c *lab.Connector, echo bool) error {
	err := w.rewrite(c.Proc.Name()+".yaml", func(cfg obj) { cfg["allow"] = connectorAllow(w.vnets[s.Name], echo) })
	if err != nil {
		return err
	}
	return c.Proc.Signal(sigHup)
}

// rewrite changes a configuration file, as an operator does: another file takes its place.
func (w *world) rewrite(file string, change func(cfg obj)) error {
	b, err := os.ReadFile(w.Path(file))
	if err != nil {
		return err
	}
	var cfg obj
	if err := yaml.Unmarshal(b, &cfg); err != nil {
		return err
	}
	change(cfg)
	if err := w.WriteYAML(file+".new", cfg); err != nil {
		return err
	}
	return os.Rename(w.Path(file+".new"), w.Path(file))
}

// want says whether a process shall run.
func (w *world) want(p *lab.Process, run bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wanted[p] = run
	w.started[p] = time.Now()
}

// supervise starts what has ended though it shall run, as a supervisor on each host would. Only an edge that cannot reach its
// store may end by itself, and only at its start.
func (w *world) supervise(ctx context.Context) {
	for ctx.Err() == nil {
		for _, p := range w.all() {
			if p.Running() {
				continue
			}
			w.mu.Lock()
			run, since := w.wanted[p], time.Since(w.started[p])
			w.mu.Unlock()
			if !run {
				continue
			}
			err, log := p.Wait(ctx), p.Log()
			last := log[max(0, len(log)-300):]
			if strings.HasPrefix(p.Name(), "edge") && since < 30*time.Second && strings.Contains(last, "state") {
				w.note("%s could not start: %s", p.Name(), last[strings.LastIndex(strings.TrimSpace(last), "\n")+1:])
			} else {
				w.violate("%s ended by itself %.1f s after its start: %v: %s", p.Name(), since.Seconds(), err, last)
			}
			w.want(p, true)
			if err := p.Start(); err != nil {
				w.violate("%v", err)
			}
		}
		sleep(ctx, 500*time.Millisecond)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// processesWith lists the command lines that hold text.
func processesWith(text string) (found []string) {
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if line := strings.ReplaceAll(string(b), "\x00", " "); err == nil && strings.Contains(line, text) {
			found = append(found, path+" "+line)
		}
	}
	return found
}
