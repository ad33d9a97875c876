package control

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestPercentIsMonotone(t *testing.T) {
	const devices = 4000
	in := func(salt string, percent int) map[int]bool {
		r := RolloutConfig{Salt: salt, Percent: percent}
		got := map[int]bool{}
		for i := range devices {
			if r.has(Connector{ID: fmt.Sprintf("con_%d", i)}) {
				got[i] = true
			}
		}
		return got
	}
	before := map[int]bool{}
	for percent := 0; percent <= 100; percent++ {
		now := in("a", percent)
		for i := range before {
			if !now[i] {
				t.Fatalf("device %d is in at %d %% and not at %d %%", i, percent-1, percent)
			}
		}
		if want := devices * percent / 100; len(now) < want-devices/20 || len(now) > want+devices/20 {
			t.Errorf("%d of %d devices are in at %d %%", len(now), devices, percent)
		}
		before = now
	}
	if len(in("a", 0)) != 0 || len(in("a", 100)) != devices {
		t.Errorf("%d devices at 0 %%, %d of %d at 100 %%", len(in("a", 0)), len(in("a", 100)), devices)
	}
	both, other := 0, in("b", 10)
	for i := range in("a", 10) {
		if other[i] {
			both++
		}
	}
	if both > devices/50 {
		t.Errorf("%d devices are among the first tenth of two rollouts", both)
	}
}

func TestDirectives(t *testing.T) {
	m := newModel()
	rollout := func(age int, r RolloutConfig) {
		r.Salt = r.Name
		v := Rollout{Config: r, Created: time.Unix(int64(1000-age), 0)}
		m.mu.Lock()
		defer m.mu.Unlock()
		op := put(prefixRollout+r.Name, v)
		must(t, m.applyLocked(delta{op.Key, op.Value, 1}))
	}
	k := Connector{ID: "con_1", Tunnel: "tun_a"}
	check := func(what string, want fleet.Directive) {
		t.Helper()
		if got := m.directiveLocked(k); got != want {
			t.Errorf("%s: got %+v, want %+v", what, got, want)
		}
	}
	check("no rollout", fleet.Directive{Policy: fleet.Free})
	rollout(9, RolloutConfig{Name: "other", Version: "9", Percent: 100, Tunnels: []string{"tun_b"}})
	check("another tunnel's", fleet.Directive{Policy: fleet.Free})
	rollout(8, RolloutConfig{Name: "old", Version: "1", Channel: "stable", Percent: 100, Tunnels: []string{"tun_b", "tun_a"}})
	old := fleet.Directive{Policy: fleet.Update, Version: "1", Channel: "stable", Rollout: "old"}
	check("in", old)
	rollout(7, RolloutConfig{Name: "new", Version: "2", Percent: 0})
	check("not yet in the newer one", old)
	rollout(7, RolloutConfig{Name: "new", Version: "2", Percent: 100})
	check("in the newer one", fleet.Directive{Policy: fleet.Update, Version: "2", Rollout: "new"})
	rollout(7, RolloutConfig{Name: "new", Version: "2", Percent: 100, Paused: true})
	check("in the newer one, paused", fleet.Directive{Policy: fleet.Hold, Rollout: "new"})
	rollout(8, RolloutConfig{Name: "old", Version: "1", Percent: 0})
	rollout(7, RolloutConfig{Name: "new", Version: "2", Percent: 0})
	check("waiting", fleet.Directive{Policy: fleet.Hold, Rollout: "new"})
}

// gadget is a device behind a connector.
type gadget struct {
	mu     sync.Mutex
	report []byte
	told   []fleet.Directive
	slow   chan struct{} // if not nil, answers come when it is closed
}

func (g *gadget) exchange(b []byte) []byte {
	g.mu.Lock()
	slow := g.slow
	if d, err := fleet.ParseDirective(b); err == nil {
		g.told = append(g.told, d)
	}
	report := g.report
	g.mu.Unlock()
	if slow != nil {
		<-slow
	}
	return report
}

func (g *gadget) says(t *testing.T, r fleet.Report) {
	t.Helper()
	b, err := r.Encode()
	must(t, err)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.report = b
}

func (g *gadget) last() fleet.Directive {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.told) == 0 {
		return fleet.Directive{}
	}
	return g.told[len(g.told)-1]
}

func idleAt(version string) fleet.Report {
	return fleet.Report{Product: "keyhaven-appliance", Version: version, State: fleet.Idle}
}

// device connects a gadget; nil is a connector of before there were devices.
func (e *edge) device(src *mtls.Source, instance string, g *gadget) *link {
	e.b.t.Helper()
	cfg := tunnel.DialConfig{Identity: src, Handle: saying("device"), Registration: tunnel.Registration{Instance: instance}}
	if g != nil {
		cfg.OnDevice = g.exchange
	}
	l, err := e.dialWith(cfg)
	must(e.b.t, err)
	return l
}

// askDevices has the edge ask all devices now, as it does each minute.
func (e *edge) askDevices() {
	p := e.polls
	p.mu.Lock()
	for _, t := range p.procs {
		t.next = time.Time{}
	}
	p.mu.Unlock()
	p.wake()
}

func (e *edge) rollout(name string) RolloutView {
	e.b.t.Helper()
	v, err := e.Rollout(name)
	must(e.b.t, err)
	return v
}

// TestRollout runs a rollout over several devices, with one edge on a file and with two over etcd.
func TestRollout(t *testing.T) {
	t.Run("bbolt", func(t *testing.T) {
		e := newBed(t).edge()
		testRollout(t, e, e)
	})
	t.Run("etcd", func(t *testing.T) {
		f := newCluster(t, 1)
		a, b := f.edge("a"), f.edge("b")
		meet(a, b)
		testRollout(t, a.edge, b.edge)
	})
}

// testRollout administers at one edge devices that are half at one and half at the other.
func testRollout(t *testing.T, at, other *edge) {
	ctx := t.Context()
	for _, name := range []string{"site", "lab"} {
		_, err := at.AddTunnel(ctx, name, "")
		must(t, err)
	}
	const n = 12
	gadgets := map[string]*gadget{}
	for i := range n {
		name, tun, e := fmt.Sprintf("pi-%02d", i), "site", at
		if i%2 == 1 {
			e = other
		}
		if i == n-1 {
			tun = "lab"
		}
		g := &gadget{}
		g.says(t, idleAt("1.0.0"))
		gadgets[name] = g
		e.device(at.enrol(tun, name), "i-"+name, g)
	}
	at.device(at.enrol("site", "plain"), "i-plain", nil)
	for _, e := range []*edge{at, other} {
		eventually(t, "all devices are known", func() bool { l, err := e.Devices(""); return err == nil && len(l) == n })
	}
	eventually(t, "the old connector is found to be one", func() bool {
		return testutil.ToFloat64(at.polls.results.WithLabelValues("unsupported")) == 1
	})
	for name, g := range gadgets {
		eventually(t, name+" is free", func() bool { return g.last() == fleet.Directive{Policy: fleet.Free} })
	}

	v, err := at.CreateRollout(ctx, RolloutSpec{Name: "spring", Version: "1.1.0", Percent: 50, Tunnels: []string{"site", "site"}, MaxFailures: 1})
	must(t, err)
	if v.Status != RolloutRunning || len(v.TunnelNames) != 1 || v.Progress.Selected != n-1 || v.Progress.In != v.Progress.Waiting {
		t.Errorf("the new rollout: %+v", v)
	}
	in := map[string]bool{}
	for name, g := range gadgets {
		d, err := at.Device(name)
		must(t, err)
		in[name] = d.Directive.Policy == fleet.Update
		eventually(t, name+" is told", func() bool { return g.last() == d.Directive })
	}
	if d := gadgets["pi-11"].last(); d.Policy != fleet.Free {
		t.Errorf("the device of another tunnel: %+v", d)
	}
	set := func(c RolloutChange) {
		t.Helper()
		_, err := at.SetRollout(ctx, "spring", c, 0)
		must(t, err)
	}
	all, yes, no := 100, true, false
	set(RolloutChange{Percent: &all})
	for name, g := range gadgets {
		if name != "pi-11" {
			eventually(t, name+" is in", func() bool { return g.last().Policy == fleet.Update })
		}
	}
	set(RolloutChange{Paused: &yes})
	eventually(t, "pi-00 is held", func() bool {
		return gadgets["pi-00"].last() == fleet.Directive{Policy: fleet.Hold, Rollout: "spring"}
	})
	set(RolloutChange{Paused: &no})
	eventually(t, "pi-00 goes on", func() bool { return gadgets["pi-00"].last().Policy == fleet.Update })

	// One fails at each edge, which is one more than may.
	fail := func(name string, since int64) {
		gadgets[name].says(t, fleet.Report{Product: "p", Version: "1.0.0", State: fleet.RolledBack, Target: "1.1.0", Since: time.Unix(since, 0).UTC()})
	}
	asking := func(f func() bool) func() bool {
		return func() bool {
			at.askDevices()
			other.askDevices()
			return f()
		}
	}
	fail("pi-02", 1)
	eventually(t, "a failure counts", asking(func() bool { return at.rollout("spring").Progress.Failed == 1 }))
	if s := at.rollout("spring").Status; s != RolloutRunning {
		t.Errorf("after one failure of one that may be: %s", s)
	}
	fail("pi-03", 1)
	for _, e := range []*edge{at, other} {
		eventually(t, "it is stopped", asking(func() bool { return e.rollout("spring").Status == RolloutStopped }))
	}
	eventually(t, "pi-01 is held", func() bool { return gadgets["pi-01"].last().Policy == fleet.Hold })
	if r := at.rollout("spring").Config; !strings.Contains(r.Reason, "gave the update up: 2, where 1 may") || !strings.Contains(r.Events[len(r.Events)-1].What, "by itself") {
		t.Errorf("reason %q, events %v", r.Reason, r.Events)
	}
	// Resumed, what has failed before counts no more; what fails again does.
	set(RolloutChange{Paused: &no})
	gadgets["pi-03"].says(t, idleAt("1.1.0"))
	eventually(t, "one has it", asking(func() bool { return other.rollout("spring").Progress.Updated == 1 }))
	if v := at.rollout("spring"); v.Status != RolloutRunning || v.Progress.Failed != 0 {
		t.Errorf("after it was resumed: %s, %+v", v.Status, v.Progress)
	}
	fail("pi-02", 2)
	fail("pi-04", 2)
	eventually(t, "it is stopped again", asking(func() bool { return other.rollout("spring").Status == RolloutStopped }))
	must(t, at.DeleteRollout(ctx, "spring", 0))
	eventually(t, "pi-01 is free", func() bool { return gadgets["pi-01"].last().Policy == fleet.Free })
}

// A device that goes away stays in the list, also for an edge that starts later.
func TestDeviceAway(t *testing.T) {
	b := newBed(t)
	e := b.edge()
	_, err := e.AddTunnel(t.Context(), "site", "")
	must(t, err)
	g := &gadget{}
	g.says(t, idleAt("1.0.0"))
	l := e.device(e.enrol("site", "pi"), "i", g)
	device := func(e *edge) DeviceView {
		v, err := e.Device("pi")
		if err != nil {
			return DeviceView{}
		}
		return v
	}
	eventually(t, "it is online", func() bool { return device(e).Contact == DeviceOnline })
	l.cut()
	eventually(t, "it is away", func() bool { return device(e).Contact == DeviceAway })
	e.stop()
	e = b.edge()
	if v := device(e); v.Contact != DeviceAway || v.Report.Version != "1.0.0" {
		t.Errorf("after a restart: %+v", v)
	}
	_, err = e.RevokeConnector(t.Context(), "pi")
	must(t, err)
	if list, err := e.Devices("site"); err != nil || len(list) != 0 {
		t.Errorf("after it was revoked: %+v, %v", list, err)
	}
	must(t, e.DeleteTunnel(t.Context(), "site", true))
	if n := len(e.model.devices); n != 0 {
		t.Errorf("%d records of devices are left", n)
	}
}

func TestDeviceRecord(t *testing.T) {
	now := time.Unix(1000, 0).UTC()
	failed := fleet.Report{Version: "1", State: fleet.Failed, Target: "2", Since: now}
	d := deviceRecord{Connector: "c"}.next(failed, now, "e")
	if d.Failed != (FailedUpdate{"2", now, now}) {
		t.Fatalf("got %+v", d.Failed)
	}
	if again := d.next(failed, now.Add(time.Minute), "e"); again.Failed != d.Failed || again.says(d) {
		t.Errorf("the same report is news: %+v", again)
	}
	looking := failed
	looking.State = fleet.Checking
	if again := d.next(looking, now.Add(time.Minute), "e").next(failed, now.Add(2*time.Minute), "e"); again.Failed != d.Failed {
		t.Errorf("after a look for updates the same failure counts again: %+v", again.Failed)
	}
	checked := failed
	checked.Checked = now
	if again := d.next(checked, now.Add(time.Minute), "e"); again.says(d) {
		t.Error("another check is news")
	}
	if again := d.next(failed, now.Add(deviceRefresh), "e"); !again.says(d) {
		t.Error("a report is not written again in time")
	}
	twice := failed
	twice.Since = now.Add(time.Hour)
	if again := d.next(twice, now.Add(time.Hour), "e"); again.Failed.At != now.Add(time.Hour) {
		t.Errorf("a second failure: %+v", again.Failed)
	}
	if trying := d.next(fleet.Report{Version: "2", State: fleet.Trial, Trial: true, Target: "2"}, now, "e"); trying.Failed.Version != "2" {
		t.Error("a trial has forgotten the failure")
	}
	if kept := d.next(fleet.Report{Version: "2", State: fleet.Confirmed, Target: "2"}, now, "e"); kept.Failed != (FailedUpdate{}) {
		t.Errorf("a version that was kept: %+v", kept.Failed)
	}
}

// What is garbage, huge or slow costs its own line and no other's, and its words reach nobody.
func TestHostileDevices(t *testing.T) {
	const canary = "CANARY-7f3a"
	var log bytes.Buffer
	var mu sync.Mutex
	b := newBed(t)
	s := b.openStore()
	registry := prometheus.NewRegistry()
	c, err := Open(t.Context(), Config{Store: s, Authority: b.authority, Edges: []string{"edge.test:7844"}, Registry: registry,
		Logger: slog.New(slog.NewTextHandler(lockedWriter{&mu, &log}, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	must(t, err)
	e := b.serve(c, s)
	ctx := t.Context()
	_, err = e.AddTunnel(ctx, "site", "")
	must(t, err)
	stuck := make(chan struct{})
	defer close(stuck)
	bad := map[string]*gadget{
		"garbage": {report: []byte(canary + "\x1b[2J")},
		"unknown": {report: []byte(`{"product":"p","version":"1","state":"idle","` + canary + `":"x"}`)},
		"huge":    {report: bytes.Repeat([]byte(canary), fleet.MaxSize)},
		"long":    {report: bytes.Repeat([]byte("x"), fleet.MaxSize)},
	}
	for name, g := range bad {
		e.device(e.enrol("site", name), "i-"+name, g)
	}
	for i := range 2 * maxSlowPolls {
		name := fmt.Sprintf("slow-%d", i)
		e.device(e.enrol("site", name), "i-"+name, &gadget{slow: stuck})
	}
	good := &gadget{}
	good.says(t, idleAt("1.0.0"))
	e.device(e.enrol("site", "good"), "i-good", good)
	eventually(t, "the good one is online", func() bool { v, err := e.Device("good"); return err == nil && v.Contact == DeviceOnline })
	for _, name := range []string{"garbage", "unknown", "long"} {
		eventually(t, name+" has a line of its own", func() bool { v, err := e.Device(name); return err == nil && v.Problem != "" })
	}
	_, err = e.CreateRollout(ctx, RolloutSpec{Name: "r", Version: "2", Percent: 100})
	must(t, err)
	eventually(t, "the good one is told", func() bool { return good.last().Version == "2" })
	list, err := e.Devices("")
	must(t, err)
	families, err := registry.Gather()
	must(t, err)
	mu.Lock()
	defer mu.Unlock()
	for what, text := range map[string]string{"the log": log.String(), "the list": fmt.Sprintf("%+v", list), "the metrics": fmt.Sprint(families)} {
		if strings.Contains(text, canary) {
			t.Errorf("%s shows what a device sent:\n%.2000s", what, text)
		}
	}
}

// Workers that wait for slow devices keep no other from being asked, and there are never more than may be.
func TestLanes(t *testing.T) {
	p := newPoller()
	for _, tt := range []struct{ workers, queued, want int }{{0, 0, 0}, {0, 3, 3}, {16, 1, 1}, {0, 1000, maxPolls}, {60, 1000, maxPolls - 60}, {maxPolls, 5, 0}} {
		p.lanes[0].workers, p.lanes[0].queue = tt.workers, make([]processKey, tt.queued)
		started := 0
		p.start(func(*lane) { started++ })
		if started != tt.want || p.lanes[0].workers != tt.workers+tt.want {
			t.Errorf("%d busy, %d queued: %d started, want %d", tt.workers, tt.queued, started, tt.want)
		}
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func TestRolloutRefusals(t *testing.T) {
	c := only(t)
	ctx := t.Context()
	ok := RolloutSpec{Name: "r", Version: "1.0", Percent: 5}
	for name, change := range map[string]func(*RolloutSpec){
		"name":     func(r *RolloutSpec) { r.Name = "a/b" },
		"version":  func(r *RolloutSpec) { r.Version = "https://example.com/1" },
		"none":     func(r *RolloutSpec) { r.Version = "" },
		"channel":  func(r *RolloutSpec) { r.Channel = "../x" },
		"percent":  func(r *RolloutSpec) { r.Percent = 101 },
		"failures": func(r *RolloutSpec) { r.MaxFailures = -1 },
		"tunnels":  func(r *RolloutSpec) { r.Tunnels = make([]string, maxRolloutTunnels+1) },
	} {
		r := ok
		change(&r)
		_, err := c.CreateRollout(ctx, r)
		if wantErr(t, err, ErrInvalid); t.Failed() {
			t.Fatal(name)
		}
	}
	_, err := c.CreateRollout(ctx, RolloutSpec{Name: "r", Version: "1", Tunnels: []string{"nowhere"}})
	wantErr(t, err, ErrNotFound, "nowhere")
	v, err := c.CreateRollout(ctx, ok)
	must(t, err)
	_, err = c.CreateRollout(ctx, ok)
	wantErr(t, err, ErrExists)
	percent := 7
	_, err = c.SetRollout(ctx, "r", RolloutChange{Percent: &percent}, v.Revision+1)
	wantErr(t, err, ErrStale)
	wantErr(t, c.DeleteRollout(ctx, "r", v.Revision+1), ErrStale)
	_, err = c.SetRollout(ctx, "none", RolloutChange{}, 0)
	wantErr(t, err, ErrNotFound, "fleet rollout list")
	_, err = c.Device("none")
	wantErr(t, err, ErrNotFound)
	for i := range 3 * maxRolloutEvents {
		p := i % 100
		_, err := c.SetRollout(ctx, "r", RolloutChange{Percent: &p}, 0)
		must(t, err)
	}
	if v, err = c.Rollout("r"); err != nil || len(v.Config.Events) != maxRolloutEvents {
		t.Errorf("%d events are kept, %v; want %d", len(v.Config.Events), err, maxRolloutEvents)
	}
	percent = -1
	_, err = c.SetRollout(ctx, "r", RolloutChange{Percent: &percent}, 0)
	wantErr(t, err, ErrInvalid)
}

// The labels of metrics are bounded, whatever devices say.
func TestFleetMetricsAreBounded(t *testing.T) {
	c := only(t)
	c.model.mu.Lock()
	for i := range 3000 {
		name := fmt.Sprintf("d%d", i)
		c.model.connectors[name] = Connector{ID: name, Name: name}
		r := fleet.Report{Version: fmt.Sprintf("1.0.%d", i%500), State: fmt.Sprintf("s%d", i)}
		if i%500 == 0 {
			r.State = fleet.Idle
		}
		c.model.devices[name] = deviceRecord{Connector: name, Report: r, At: time.Now()}
	}
	c.model.mu.Unlock()
	if n := testutil.CollectAndCount(fleetCollector{c}, "keyhaven_edge_fleet_devices"); n > (maxVersionLabels+1)*(len(fleet.States())+3) || n == 0 {
		t.Errorf("%d series", n)
	}
	if err := testutil.CollectAndCompare(fleetCollector{c}, strings.NewReader(`# HELP keyhaven_edge_fleet_rollouts Rollouts by status; stopped are those that were paused by themselves, for their failures.
# TYPE keyhaven_edge_fleet_rollouts gauge
keyhaven_edge_fleet_rollouts{status="paused"} 0
keyhaven_edge_fleet_rollouts{status="running"} 0
keyhaven_edge_fleet_rollouts{status="stopped"} 0
`), "keyhaven_edge_fleet_rollouts"); err != nil {
		t.Error(err)
	}
}
