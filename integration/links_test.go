//go:build netns

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// Faults of networks are tried over this installation. Each site has a link of its own, which delays, drops and rewrites
// packets as its test tells it to; all have the same private address, each in a virtual network of its own.
//
//	                                      ┌── cable ─── keys: 10.20.0.10 key server
//	visitor 203.0.113.2 ─── 203.0.113.1 edge 192.0.2.1
//	                                      ├══ link 1 ══ 198.18.1.2 first site: 10.20.0.20 origin
//	                                      ├══ link 2 ══ 198.18.2.2 second site: 10.20.0.20 origin
//	                                      ┆
const linkedTunnel = "192.0.2.1:7844"

// A linked site is a private network behind a link that a test controls.
type linkedSite struct {
	*lab.Site
	w    *linked
	link *testnet.Link
	net  int    // the link's third octet
	dev  string // the edge's interface to it
}

// A linked installation is that of the drawing.
type linked struct {
	*world
	sites map[string]*linkedSite
}

// linkedSites names the sites and says how many connectors each has beside the first.
type linkedSites map[string]int

// makeLinked makes an installation, which has not been started. The tests that use it share it.
func makeLinked(t *testing.T, names linkedSites) *linked {
	t.Helper()
	n, err := testnet.New("khit")
	must(t, err)
	t.Cleanup(func() { check(t, n.Close()) })
	w := &linked{world: &world{}, sites: map[string]*linkedSite{}}
	space := func(name string) *testnet.Namespace {
		ns, err := n.Namespace("l" + name)
		must(t, err)
		return ns
	}
	w.edge, w.visitor = space("edge"), space("visitor")
	_, _, err = n.Link(w.visitor, w.edge, netip.MustParsePrefix("203.0.113.2/30"), netip.MustParsePrefix("203.0.113.1/30"))
	must(t, err)
	must(t, w.edge.AddAddr("lo", netip.MustParsePrefix("192.0.2.1/32")))
	// Rules that drop what comes from a site must precede the local table.
	must(t, w.edge.IP("rule", "add", "pref", "100", "lookup", "local"))
	must(t, w.edge.IP("rule", "del", "pref", "0", "lookup", "local"))

	keys := space("keys")
	_, _, err = n.Link(keys, w.edge, netip.MustParsePrefix("198.18.0.2/29"), netip.MustParsePrefix("198.18.0.1/29"))
	must(t, err)
	must(t, keys.IP("route", "add", "default", "via", "198.18.0.1"))
	for _, a := range []string{"10.20.0.10/32", "10.20.0.20/32"} {
		must(t, keys.AddAddr("lo", netip.MustParsePrefix(a)))
	}
	private := []netip.Prefix{netip.MustParsePrefix("10.20.0.0/24")}
	plan := lab.Plan{Dir: t.TempDir(), Bin: bin, Tools: filepath.Join(bin, "keyhaven-demo"), Quiet: true,
		Edge:  lab.EdgePlan{NS: w.edge, Tunnel: linkedTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"},
		Sites: []lab.SitePlan{{Name: "keys", NS: keys, KeyServer: keyServer, Origin: origin, Ops: "127.0.0.1:9601", KeyServerOps: "127.0.0.1:9602", Routes: private}}}
	order := slices.Sorted(func(yield func(string) bool) {
		for name := range names {
			if !yield(name) {
				return
			}
		}
	})
	for i, name := range order {
		s := &linkedSite{w: w, net: i + 1}
		ns := space(name)
		s.link, err = n.Shaped(ns, w.edge, netip.MustParsePrefix(fmt.Sprintf("198.18.%d.2/29", s.net)), netip.MustParsePrefix(fmt.Sprintf("198.18.%d.1/29", s.net)), uint64(s.net))
		must(t, err)
		t.Cleanup(func() { check(t, s.link.Close()) })
		_, s.dev = s.link.Devices()
		must(t, ns.IP("route", "add", "default", "via", fmt.Sprintf("198.18.%d.1", s.net)))
		must(t, ns.AddAddr("lo", netip.MustParsePrefix("10.20.0.20/32")))
		site := lab.SitePlan{Name: name, NS: ns, VNet: name, Origin: origin, Ops: "127.0.0.1:9601", Routes: private}
		for r := range names[name] {
			site.Replicas = append(site.Replicas, lab.ConnectorPlan{Name: fmt.Sprintf("%s-%d", name, r+2), Ops: fmt.Sprintf("127.0.0.1:%d", 9602+r)})
		}
		plan.Sites = append(plan.Sites, site)
		plan.Zones = append(plan.Zones, lab.ZonePlan{Host: name + ".keyhaven.test", KeyType: "p256", Site: i + 1})
		w.sites[name] = s
	}
	w.Lab, err = lab.New(t.Context(), plan)
	must(t, err)
	t.Cleanup(func() {
		check(t, w.Stop())
		w.searchLogs(t)
		if t.Failed() {
			t.Log(w.Logs())
		}
	})
	for i, name := range order {
		w.sites[name].Site = w.Sites[i+1]
	}
	return w
}

// together runs tests at the same time: they mostly wait.
func together(t *testing.T, tests map[string]func(*testing.T)) {
	var wg sync.WaitGroup
	for name, f := range tests {
		wg.Go(func() { t.Run(name, f) })
	}
	wg.Wait()
}

// host is the zone whose origin is the site's.
func (s *linkedSite) host() string { return s.Name + ".keyhaven.test" }

// transport gives a connector of the site a configuration with this section, which counts from its next start.
func (s *linkedSite) transport(t *testing.T, connector string, section map[string]any) {
	t.Helper()
	ops := ""
	for _, c := range s.Connectors {
		if c.Name == connector {
			ops = c.Ops
		}
	}
	// The grace is longer than any test waits: nothing may sit it out.
	must(t, s.w.WriteYAML("connector-"+connector+".yaml", map[string]any{
		"identity": map[string]any{"dir": s.w.Path("connector-" + connector)}, "edges": []string{linkedTunnel}, "ops": map[string]any{"listen": ops},
		"allow": []map[string]any{{"to": "10.20.0.20/32", "ports": []int{8080}}}, "transport": section, "drain": map[string]any{"grace": "5m"}}))
}

// block has the edge drop what comes from the site and matches, without a word, until unblock.
func (s *linkedSite) block(t *testing.T, match ...string) (unblock func()) {
	t.Helper()
	rule := append(append([]string{"pref", "10", "iif", s.dev}, match...), "blackhole")
	must(t, s.w.edge.IP(append([]string{"rule", "add"}, rule...)...))
	return func() { must(t, s.w.edge.IP(append([]string{"rule", "del"}, rule...)...)) }
}

// tunnelInfo is what the edge shows of a tunnel.
type tunnelInfo struct {
	Status         string    `json:"status"`
	Since          time.Time `json:"since"`
	Sessions       int       `json:"sessions"`
	ConnectorInfos []struct {
		Name      string        `json:"name"`
		Status    string        `json:"status"`
		Sessions  []sessionInfo `json:"sessions"`
		Elsewhere []struct {
			Edge     string `json:"edge"`
			Sessions int    `json:"sessions"`
			Complete bool   `json:"complete"`
		} `json:"elsewhere"`
	} `json:"connector_list"`
}

type sessionInfo struct {
	Instance string    `json:"instance"`
	Remote   string    `json:"remote"`
	Since    time.Time `json:"since"`
	Flows    int       `json:"flows"`
	Draining bool      `json:"draining"`
	Carrier  string    `json:"carrier"`
	Role     string    `json:"role"`
}

// info is what the i-th edge shows of a tunnel.
func (w *world) info(ctx context.Context, i int, name string) (v tunnelInfo, err error) {
	out, err := w.EdgeAt(ctx, i, "tunnel", "info", name, "--output", "json")
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal([]byte(out), &v)
}

// main returns the sessions of a connector that take flows of all kinds.
func (v *tunnelInfo) main(connector string) (list []sessionInfo) {
	for _, k := range v.ConnectorInfos {
		for _, s := range k.Sessions {
			if k.Name == connector && s.Role == "main" && !s.Draining {
				list = append(list, s)
			}
		}
	}
	return list
}

// is reports nil if the tunnel has this status and each connector named has four sessions over its carrier; "" is any.
func (v *tunnelInfo) is(status string, carriers map[string]string) error {
	for connector, carrier := range carriers {
		sessions := v.main(connector)
		right := 0
		for _, s := range sessions {
			if carrier == "" || s.Carrier == carrier {
				right++
			}
		}
		if right != 4 || len(sessions) != 4 {
			return fmt.Errorf("connector %s has %d sessions, %d over %s; the tunnel is %s", connector, len(sessions), right, carrier, v.Status)
		}
	}
	if v.Status != status {
		return fmt.Errorf("the tunnel is %s, want %s", v.Status, status)
	}
	return nil
}

// await waits until the site's tunnel is healthy and each of its connectors has four sessions over its carrier, by name;
// the site's own name is its first connector. It returns how long that took.
func (s *linkedSite) await(t *testing.T, what string, carriers map[string]string) time.Duration {
	t.Helper()
	began := time.Now()
	eventually(t, what, func(ctx context.Context) error {
		v, err := s.w.info(ctx, 0, s.Name)
		if err == nil {
			err = v.is("healthy", carriers)
		}
		return err
	})
	took := time.Since(began)
	t.Logf("%s: %.1f s", what, took.Seconds())
	return took
}

// down waits until the site's tunnel is down.
func (s *linkedSite) down(t *testing.T) {
	t.Helper()
	eventually(t, "the tunnel is down", func(ctx context.Context) error {
		v, err := s.w.info(ctx, 0, s.Name)
		if err == nil && (v.Status != "down" || !v.Since.IsZero() || v.Sessions != 0) {
			err = fmt.Errorf("it is %s since %v with %d sessions", v.Status, v.Since, v.Sessions)
		}
		return err
	})
}

// page is nil when a new visitor gets the page of the site.
func (s *linkedSite) page(ctx context.Context) error {
	out, err := s.w.curl(ctx, s.host(), "/", "-f")
	if err == nil && !strings.Contains(out, fmt.Sprintf("private origin %q", s.Name)) {
		err = fmt.Errorf("got %q", out)
	}
	return err
}

// A loop asks for pages one after the other, without a second try.
type loop struct {
	stop    context.CancelFunc
	done    chan struct{}
	pages   int
	longest time.Duration
	errs    []error
}

func startLoop(ctx context.Context, visit func(context.Context) error) *loop {
	ctx, stop := context.WithCancel(ctx)
	l := &loop{stop: stop, done: make(chan struct{})}
	visits := context.WithoutCancel(ctx)
	go func() {
		defer close(l.done)
		for ctx.Err() == nil {
			began := time.Now()
			if err := visit(visits); err != nil {
				l.errs = append(l.errs, fmt.Errorf("at %s, after %d pages and %.1f s: %w", began.Format(time.TimeOnly), l.pages, time.Since(began).Seconds(), err))
			}
			l.pages++
			l.longest = max(l.longest, time.Since(began))
		}
	}()
	return l
}

// end stops the loop and fails the test if a page was missing.
func (l *loop) end(t *testing.T, what string) {
	t.Helper()
	l.stop()
	<-l.done
	t.Logf("%s: %d pages, the slowest took %.1f s, %d failed", what, l.pages, l.longest.Seconds(), len(l.errs))
	if l.pages == 0 {
		t.Errorf("%s: nobody asked", what)
	}
	check(t, errors.Join(l.errs...))
}

// A stream is a visitor's stream of server-sent events, one every 100 ms.
type stream struct {
	out  lockedBuffer
	last string
	done chan error
}

// watchEvents begins a stream of n events and returns when the first has come.
func (s *linkedSite) watchEvents(t *testing.T, n int) *stream {
	t.Helper()
	st := &stream{last: fmt.Sprintf("data: %d\n", n-1), done: make(chan error, 1)}
	cmd := s.w.visitor.Command(t.Context(), "curl", "-sSN", "-m", "120", "--cacert", s.w.Roots(), "--resolve", s.host()+":443:203.0.113.1",
		fmt.Sprintf("https://%s/events?n=%d", s.host(), n))
	cmd.Stdout, cmd.Stderr = &st.out, &st.out
	must(t, cmd.Start())
	go func() { st.done <- cmd.Wait() }()
	eventually(t, "the first event", func(context.Context) error {
		if !strings.Contains(st.out.String(), "data: 0\n") {
			return errors.New("nothing has come")
		}
		return nil
	})
	return st
}

// whole waits for the stream's end and fails the test if something of it is missing.
func (st *stream) whole(t *testing.T) {
	t.Helper()
	if err := <-st.done; err != nil || !strings.Contains(st.out.String(), st.last) {
		t.Errorf("the stream was cut: %v\n%s", err, st.out.String())
	}
}

// A lockedBuffer takes the output of a process that goes on while it is read.
type lockedBuffer struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
