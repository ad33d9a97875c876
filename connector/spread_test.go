package connector

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// perAddr counts the living main sessions by address, and fails if two of one address have the same index.
func (d *dials) perAddr(t *testing.T) map[string]int {
	t.Helper()
	n, seen := map[string]int{}, map[string]bool{}
	for _, a := range d.living() {
		if a.reg.Role != tunnel.RoleMain {
			continue
		}
		n[a.addr]++
		if id := fmt.Sprint(a.addr, " ", a.reg.Index); seen[id] {
			t.Errorf("two sessions to %s have index %d: the edge would end one", a.addr, a.reg.Index)
		} else {
			seen[id] = true
		}
	}
	return n
}

// announced fails if a living session announces another number of connections than there are to its edge.
func (d *dials) announced(t *testing.T) {
	t.Helper()
	n := d.perAddr(t)
	for _, a := range d.living() {
		if a.reg.Connections != n[a.addr] {
			t.Errorf("session %d to %s announces %d connections, there are %d", a.reg.Index, a.addr, a.reg.Connections, n[a.addr])
		}
	}
}

func (d *dials) wantPerAddr(t *testing.T, want map[string]int) {
	t.Helper()
	if got := d.perAddr(t); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("sessions by edge: got %v, want %v", got, want)
	}
}

// tell has the living sessions to an address tell which edges there are.
func (d *dials) tell(addr string, edges ...string) {
	for _, a := range d.living() {
		if a.addr == addr {
			a.cfg.OnEdges(edges)
		}
	}
}

func alwaysUp() *dials {
	return &dials{answer: func(tunnel.DialConfig) (session, error) { return newFake(), nil }}
}

// TestSpread has edges come and go, as they tell.
func TestSpread(t *testing.T) {
	const a, b, c = "192.0.2.1:7844", "192.0.2.2:7844", "192.0.2.3:7844"
	d := alwaysUp()
	bubble(t, d, Config{}, func(conn *Connector, _ func()) {
		step := func(wait time.Duration, want map[string]int) {
			t.Helper()
			for end := time.Now().Add(wait); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				synctest.Wait()
				if err := conn.Ready(t.Context()); err != nil {
					t.Errorf("not ready on the way: %v", err)
				}
			}
			d.wantPerAddr(t, want)
			d.announced(t)
		}
		step(time.Second, map[string]int{a: 4})
		d.tell(a, a, b)
		step(10*time.Second, map[string]int{a: 2, b: 2})
		d.tell(b, a, b, c)
		step(10*time.Second, map[string]int{a: 2, b: 2, c: 2})
		d.tell(b, b, "nonsense:port")
		d.tell(a, a, b)
		step(forgetEdge+10*time.Second, map[string]int{a: 2, b: 2})
		d.tell(a, b)
		d.tell(b, b)
		step(forgetEdge+10*time.Second, map[string]int{b: 4})
		d.tell(b) // nothing: not believed
		d.tell(b, a, b)
		step(10*time.Second, map[string]int{a: 2, b: 2})
		for _, s := range conn.Status().Sessions {
			if s.State != StateConnected {
				t.Errorf("%+v, want it connected", s)
			}
		}
		if n := testutilSum(conn); n != 4 {
			t.Errorf("the metric of sessions says %v, want 4", n)
		}
	})
	for _, a := range d.all() {
		if a.s.cut || !a.s.drained.Load() {
			t.Errorf("session %d to %s: cut %v, drained %v, want all of them drained", a.reg.Index, a.addr, a.s.cut, a.s.drained.Load())
		}
	}
}

// testutilSum sums the sessions over the edges that are dialled.
func testutilSum(c *Connector) (n float64) {
	for _, e := range c.Status().Edges {
		n += c.metrics.sessionsOf(e)
	}
	return n
}

// TestEdgeDies has one of two edges fall away: soon its sessions are on the other.
func TestEdgeDies(t *testing.T) {
	const a, b = "192.0.2.1:7844", "192.0.2.2:7844"
	var dead atomic.Value
	d := &dials{}
	d.answer = func(c tunnel.DialConfig) (session, error) {
		if c.Addr == dead.Load() {
			return nil, errHang
		}
		return newFake(), nil
	}
	bubble(t, d, Config{Edges: []string{a, b}}, func(_ *Connector, _ func()) {
		time.Sleep(time.Second)
		d.tell(a, a, b)
		time.Sleep(time.Second)
		d.wantPerAddr(t, map[string]int{a: 2, b: 2})
		dead.Store(b)
		for _, at := range d.living() {
			if at.addr == b {
				at.s.lose(&tunnel.SessionError{Err: tunnel.ErrPeerLost})
			}
		}
		d.tell(a, a)
		time.Sleep(forgetEdge + 10*time.Second)
		d.wantPerAddr(t, map[string]int{a: 4})
		d.announced(t)
	})
}

// TestEdgesRemembered starts with edges that an earlier process was told: they are dialled, and the configured ones while
// none of them answers.
func TestEdgesRemembered(t *testing.T) {
	const seed, old, older = "192.0.2.1:7844", "192.0.2.8:7844", "192.0.2.9:7844"
	file := filepath.Join(t.TempDir(), "edges.json")
	d := alwaysUp()
	bubble(t, d, Config{Edges: []string{seed}, EdgesFile: file}, func(*Connector, func()) {
		time.Sleep(time.Second)
		d.tell(seed, old, older)
		time.Sleep(time.Minute)
		d.wantPerAddr(t, map[string]int{old: 2, older: 2}) // the configured one was not among them
	})
	if b, err := os.ReadFile(file); err != nil || !strings.Contains(string(b), old) {
		t.Fatalf("the file: %s, %v, want the edges that were told", b, err)
	}
	var away atomic.Bool
	away.Store(true)
	d = &dials{}
	d.answer = func(c tunnel.DialConfig) (session, error) {
		if away.Load() && c.Addr != seed {
			return nil, errHang
		}
		return newFake(), nil
	}
	bubble(t, d, Config{Edges: []string{seed}, EdgesFile: file}, func(c *Connector, _ func()) {
		synctest.Wait()
		if got := d.all(); slices.ContainsFunc(got, func(a attempt) bool { return a.addr == seed }) {
			t.Error("the configured edge was dialled at once")
		}
		time.Sleep(seedDelay + 2*arrangeEvery)
		if err := c.Ready(t.Context()); err != nil {
			t.Errorf("with the remembered edges away: %v", err)
		}
		away.Store(false)
		time.Sleep(time.Minute)
		d.wantPerAddr(t, map[string]int{old: 2, older: 2})
		d.announced(t)
	})
	for _, text := range []string{"{", `{"edges": ["a:b:c"]}`, strings.Repeat(" ", maxEdgesFile+1)} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		d = alwaysUp()
		bubble(t, d, Config{Edges: []string{seed}, EdgesFile: file}, func(*Connector, func()) {
			time.Sleep(time.Second)
			d.wantPerAddr(t, map[string]int{seed: 4})
		})
	}
}

// TestManyEdges has more edges than are dialled, and connectors that choose each for itself.
func TestManyEdges(t *testing.T) {
	var all []string
	for i := range 20 {
		all = append(all, fmt.Sprintf("192.0.2.%d:7844", i+1))
	}
	s := edgeSet{known: all}
	chosen := map[string]int{}
	for i := range 200 {
		names := s.wanted(fmt.Sprint("connector-", i))
		if len(names) != maxDialled || fmt.Sprint(names) != fmt.Sprint(s.wanted(fmt.Sprint("connector-", i))) {
			t.Fatalf("got %v, want %d edges, the same each time", names, maxDialled)
		}
		for _, n := range names {
			chosen[n]++
		}
	}
	for _, e := range all {
		if n := chosen[e]; n < 40 || n > 120 {
			t.Errorf("%s was chosen by %d connectors of 200, want about 80", e, n)
		}
	}
	d := alwaysUp()
	bubble(t, d, Config{Edges: all[:1]}, func(c *Connector, _ func()) {
		time.Sleep(time.Second)
		d.tell(all[0], all...)
		time.Sleep(time.Minute)
		if n := d.perAddr(t); len(n) != maxDialled || len(c.Status().Sessions) != maxDialled {
			t.Errorf("got %v, want one session to each of %d edges", n, maxDialled)
		}
		d.announced(t)
	})
}

func FuzzEdges(f *testing.F) {
	f.Add([]byte(`{"edges": ["edge.example:7844", "192.0.2.1:1"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := parseEdges(b)
		if err != nil {
			return
		}
		if len(keys) > maxEdges {
			t.Errorf("%d edges", len(keys))
		}
		for _, k := range keys {
			if again, err := edgeKey(k); err != nil || again != k {
				t.Errorf("%q reads as %q, %v", k, again, err)
			}
		}
	})
}

// TestBulk has an edge ask for bulk sessions: they come, bounded, and go when they are idle.
func TestBulk(t *testing.T) {
	var fail atomic.Bool
	d := &dials{}
	d.answer = func(c tunnel.DialConfig) (session, error) {
		s := newFake()
		if c.Registration.Role == tunnel.RoleBulk {
			if fail.Load() {
				return nil, tunnel.ErrNoAnswer
			}
			s.carrier = c.Carrier
		}
		return s, nil
	}
	bulk := func() (list []attempt) {
		synctest.Wait()
		for _, a := range d.living() {
			if a.reg.Role == tunnel.RoleBulk {
				list = append(list, a)
			}
		}
		return list
	}
	bubble(t, d, Config{Bulk: 3}, func(c *Connector, _ func()) {
		time.Sleep(time.Second)
		ask := d.living()[0].cfg.OnBulk
		ask(2)
		time.Sleep(time.Second)
		list := bulk()
		if len(list) != 2 || list[0].s.carrier != tunnel.CarrierTCP || list[0].reg.Index == list[1].reg.Index || list[0].reg.Index < firstBulk {
			t.Fatalf("got %+v, want two bulk sessions over TCP", list)
		}
		if st := c.Status().Sessions; len(st) != 6 || st[4].Role != RoleBulk || st[4].State != StateConnected {
			t.Errorf("status: %+v, want the bulk sessions last", st)
		}
		ask(100)
		time.Sleep(time.Second)
		if n := len(bulk()); n != 3 {
			t.Errorf("%d bulk sessions, want 3 at most", n)
		}
		time.Sleep(10 * time.Minute)
		if n := len(bulk()); n != 3 {
			t.Errorf("%d bulk sessions after a while without flows, want 3: the edge wants them", n)
		}
		busy := bulk()[1].s
		busy.flows.Store(1)
		ask(1)
		time.Sleep(2 * bulkLook)
		if list := bulk(); len(list) != 1 || list[0].s != busy {
			t.Errorf("of one that is wanted: %+v, want the busy one alone", list)
		}
		time.Sleep(10 * time.Minute)
		if list := bulk(); len(list) != 1 || list[0].s != busy {
			t.Errorf("later: %+v, want the busy one alone", list)
		}
		busy.lose(errors.New("lost"))
		time.Sleep(time.Second)
		if n := len(bulk()); n != 1 {
			t.Errorf("%d bulk sessions after the wanted one was lost, want another", n)
		}
		fail.Store(true)
		ask(3)
		time.Sleep(time.Minute)
		fail.Store(false)
		time.Sleep(backoffCap)
		if n := len(bulk()); n < 2 {
			t.Errorf("%d bulk sessions after attempts failed, want two at least", n)
		}
		ask(0)
		time.Sleep(2 * bulkLook)
		if n := len(bulk()); n != 0 {
			t.Errorf("%d bulk sessions, want none", n)
		}
	})
	for _, cfg := range []Config{{}, {Bulk: 3, Carrier: CarrierQUIC}} {
		d := alwaysUp()
		bubble(t, d, cfg, func(*Connector, func()) {
			time.Sleep(time.Second)
			d.living()[0].cfg.OnBulk(4)
			time.Sleep(time.Second)
			if n := len(d.living()); n != 4 {
				t.Errorf("%+v: %d sessions, want no bulk ones", cfg, n)
			}
		})
	}
}
