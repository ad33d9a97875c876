package connector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/keyhaven/keyhaven/tunnel"
)

// carried is a fake session over a carrier.
func carried(c tunnel.Carrier) *fakeSession {
	s := newFake()
	s.carrier = c
	return s
}

// idleTimeout is like QUIC's error when nothing comes any more.
type idleTimeout struct{}

func (idleTimeout) Error() string   { return "timeout: no recent network activity" }
func (idleTimeout) Timeout() bool   { return true }
func (idleTimeout) Temporary() bool { return false }

// reset is like QUIC's error when an edge that was started anew answers.
type statelessReset struct{ idleTimeout }

func (statelessReset) Timeout() bool { return false }

func lost(cause error) error {
	return &tunnel.SessionError{Reason: tunnel.CloseInternal, Err: fmt.Errorf("%w: %w", tunnel.ErrPeerLost, cause)}
}

// TestBackToQUIC begins where UDP is blocked: the sessions are over TCP, try QUIC ever more rarely, and move to it when it
// works, without a gap.
func TestBackToQUIC(t *testing.T) {
	var open atomic.Bool
	d := &dials{}
	d.answer = func(c tunnel.DialConfig) (session, error) {
		switch {
		case open.Load():
			return carried(tunnel.CarrierQUIC), nil
		case c.Carrier == tunnel.CarrierQUIC:
			return nil, errHang
		}
		return carried(tunnel.CarrierTCP), nil // the race
	}
	bubble(t, d, Config{}, func(c *Connector, _ func()) {
		time.Sleep(time.Second)
		first := d.of(0)[0].s
		if first.carrier != tunnel.CarrierTCP {
			t.Fatalf("the first session is over %s, want tcp", first.carrier)
		}
		time.Sleep(time.Hour)
		tries := d.of(firstTurn)
		if len(tries) < 10 || len(tries) > 16 {
			t.Errorf("QUIC was tried %d times in an hour, want about 14", len(tries))
		}
		if gap := tries[0].at.Sub(d.of(0)[0].at); gap != quicFirst {
			t.Errorf("QUIC was tried first after %v, want %v", gap, quicFirst)
		}
		for i := 1; i < len(tries); i++ {
			if gap := tries[i].at.Sub(tries[i-1].at); gap > quicMost+moveTimeout {
				t.Errorf("a pause of %v before QUIC was tried again", gap)
			}
		}
		open.Store(true)
		for range 3100 {
			time.Sleep(100 * time.Millisecond)
			if err := c.Ready(t.Context()); err != nil {
				t.Fatalf("not ready while moving: %v", err)
			}
		}
		for _, s := range c.Status().Sessions {
			if s.Carrier != CarrierQUIC || s.State != StateConnected {
				t.Errorf("%+v, want it over QUIC", s)
			}
		}
		if first.cut || !first.drained.Load() {
			t.Errorf("the session over TCP: cut %v, drained %v, want it drained", first.cut, first.drained.Load())
		}
		if got := testutil.ToFloat64(c.metrics.reconnects.WithLabelValues("192.0.2.1", becauseCarrier)); got != 4 {
			t.Errorf("moves: got %v, want 4", got)
		}
	})
}

// TestMoveProves gives a QUIC session that carries nothing of full size: the one over TCP stays.
func TestMoveProves(t *testing.T) {
	d := &dials{}
	d.answer = func(c tunnel.DialConfig) (session, error) {
		s := carried(tunnel.CarrierTCP)
		if c.Carrier == tunnel.CarrierQUIC {
			s.carrier = tunnel.CarrierQUIC
			s.deaf.Store(true)
		}
		return s, nil
	}
	bubble(t, d, Config{}, func(c *Connector, _ func()) {
		time.Sleep(time.Hour)
		for _, s := range c.Status().Sessions {
			if s.Carrier != CarrierTCP || s.State != StateConnected || time.Since(s.Since) < 59*time.Minute {
				t.Errorf("%+v, want the first session over TCP", s)
			}
		}
		if n := len(d.living()); n != 4 {
			t.Errorf("%d sessions live, want 4", n)
		}
	})
}

// TestSmallUDP begins where UDP passes in small packets alone: QUIC is used with such.
func TestSmallUDP(t *testing.T) {
	d := &dials{}
	d.answer = func(c tunnel.DialConfig) (session, error) {
		s := carried(tunnel.CarrierTCP)
		if c.Carrier == tunnel.CarrierQUIC {
			s.carrier = tunnel.CarrierQUIC
			s.deaf.Store(!c.SmallPackets)
		}
		return s, nil
	}
	bubble(t, d, Config{}, func(*Connector, func()) {
		time.Sleep(3*quicFirst + 3*moveTimeout)
		for _, a := range d.living() {
			if a.s.carrier != tunnel.CarrierQUIC || !a.cfg.SmallPackets {
				t.Errorf("session %d is over %s, small packets %v, want QUIC with small packets", a.reg.Index, a.s.carrier, a.cfg.SmallPackets)
			}
		}
	})
}

// TestCarriers holds each setting to what it dials.
func TestCarriers(t *testing.T) {
	for _, tt := range []struct {
		set  string
		want tunnel.Carrier
	}{{"", ""}, {CarrierAuto, ""}, {CarrierQUIC, tunnel.CarrierQUIC}, {CarrierTCP, tunnel.CarrierTCP}} {
		d := &dials{answer: func(tunnel.DialConfig) (session, error) { return carried(tunnel.CarrierTCP), nil }}
		bubble(t, d, Config{Carrier: tt.set}, func(*Connector, func()) {
			time.Sleep(time.Second)
			for _, a := range d.all() {
				if a.cfg.Carrier != tt.want {
					t.Errorf("%q dialled %q, want %q", tt.set, a.cfg.Carrier, tt.want)
				}
			}
			time.Sleep(time.Hour)
			if n := len(d.all()); (n > 4) != (tt.want == "") {
				t.Errorf("%q: %d attempts in an hour over TCP; only auto tries QUIC again", tt.set, n)
			}
		})
	}
}

// TestSilence has QUIC sessions fall silent soon after they began: small packets are tried, then TCP.
func TestSilence(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cause error
		small bool
	}{
		{"silence", lost(idleTimeout{}), true},
		{"no echo", lost(errors.New("no echo of a ping")), true},
		{"an edge that was started anew", lost(statelessReset{}), false},
		{"the edge's wish", &tunnel.SessionError{Reason: tunnel.CloseShutdown, Remote: true}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &dials{}
			d.answer = func(c tunnel.DialConfig) (session, error) {
				if c.Carrier == tunnel.CarrierTCP {
					return carried(tunnel.CarrierTCP), nil
				}
				return carried(tunnel.CarrierQUIC), nil
			}
			bubble(t, d, Config{}, func(c *Connector, _ func()) {
				var small []bool
				for range 2 * silentDeaths {
					time.Sleep(10 * time.Second)
					list := d.of(0)
					last := list[len(list)-1]
					small = append(small, last.cfg.SmallPackets)
					last.s.lose(tt.cause)
					time.Sleep(backoffCap)
				}
				if want := fmt.Sprint([]bool{false, false, tt.small, tt.small}); fmt.Sprint(small) != want {
					t.Errorf("small packets: got %v, want %s", small, want)
				}
				st := c.Status().Sessions[0]
				if (st.Carrier == CarrierTCP) != tt.small {
					t.Errorf("afterwards: %+v, want TCP only after silence", st)
				}
				time.Sleep(quicFirst + moveTimeout)
				if st := c.Status().Sessions[0]; st.Carrier != CarrierQUIC {
					t.Errorf("later: %+v, want it back over QUIC", st)
				}
			})
		})
	}
	// A session that lived long says nothing against the path.
	var p path
	for range 10 {
		p.ended(tunnel.CarrierQUIC, settled, true)
	}
	if p.small || p.avoid {
		t.Errorf("old sessions that fell silent: %+v, want nothing learnt", p)
	}
	// Nothing at all over TCP: QUIC deserves another chance.
	p = path{avoid: true}
	if p.failed(); p.carrier(CarrierAuto) != "" {
		t.Error("after TCP failed, QUIC is still avoided")
	}
}

// changing is a host whose addresses and clock tests change.
type changing struct {
	mu    sync.Mutex
	addrs string
	slept time.Duration
}

func (h *changing) set(addrs string, slept time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.addrs = addrs
	h.slept += slept
}

func (h *changing) surroundings() *surroundings {
	return &surroundings{
		addrs: func() string {
			h.mu.Lock()
			defer h.mu.Unlock()
			return h.addrs
		},
		wall: func() time.Time {
			h.mu.Lock()
			defer h.mu.Unlock()
			return time.Now().Add(h.slept).Round(0)
		},
	}
}

// TestNetworkChanges has every session prove that it lives when the host's network may be another one.
func TestNetworkChanges(t *testing.T) {
	host := &changing{addrs: "192.0.2.100/24"}
	d := alwaysUp()
	d.host = host.surroundings()
	bubble(t, d, Config{Bulk: 1}, func(c *Connector, _ func()) {
		time.Sleep(time.Second)
		d.of(0)[0].cfg.OnBulk(1)
		time.Sleep(time.Second)
		for i, change := range []func(){
			func() { host.set("198.51.100.7/24", 0) },
			func() { host.set("198.51.100.7/24", time.Hour) },
			func() { host.set("198.51.100.7/24", -time.Minute) },
		} {
			before := d.living()
			if len(before) != 5 {
				t.Fatalf("%d sessions live, want 5", len(before))
			}
			for _, a := range before {
				a.s.deaf.Store(a.reg.Index != 1)
			}
			change()
			time.Sleep(lookEvery + probeTimeout + time.Second)
			if n := len(d.living()); n != 5 {
				t.Errorf("change %d: %d sessions live, want 5", i, n)
			}
			for _, a := range before {
				if a.s.alive() != (a.reg.Index == 1) {
					t.Errorf("change %d: session %d, alive %v, want only that alive which answers", i, a.reg.Index, a.s.alive())
				}
			}
			if got, want := testutil.ToFloat64(c.metrics.reconnects.WithLabelValues("192.0.2.1", becauseNetwork)), float64(3*(i+1)); got != want {
				t.Errorf("change %d: reconnects %v, want %v", i, got, want)
			}
		}
		host.set("", 0) // not known: no change
		host.set("198.51.100.7/24", time.Second)
		n := len(d.all())
		time.Sleep(time.Minute)
		if more := len(d.all()); more != n {
			t.Errorf("%d attempts though nothing changed", more-n)
		}
	})
}

// TestWakesWaits has a line that waits, and one whose attempt hangs, try again at once when the network changes.
func TestWakesWaits(t *testing.T) {
	host := &changing{addrs: "none"}
	var away atomic.Bool
	away.Store(true)
	d := &dials{host: host.surroundings()}
	d.answer = func(c tunnel.DialConfig) (session, error) {
		switch {
		case !away.Load():
			return newFake(), nil
		case c.Registration.Index == 0:
			return nil, errHang
		}
		return nil, tunnel.ErrNoAnswer
	}
	bubble(t, d, Config{}, func(c *Connector, _ func()) {
		time.Sleep(10 * time.Minute)
		for range 8 {
			away.Store(true)
			for _, a := range d.living() {
				a.s.lose(lost(idleTimeout{}))
			}
			time.Sleep(3 * time.Minute)
			away.Store(false)
			host.set(fmt.Sprint(time.Now()), 0)
			time.Sleep(lookEvery)
			synctest.Wait()
			for _, s := range c.Status().Sessions {
				if s.State != StateConnected {
					t.Fatalf("%+v, want it connected as soon as the change was seen", s)
				}
			}
		}
	})
}

// hangingResolver answers nothing while the network is away.
type hangingResolver struct{ away *atomic.Bool }

func (r hangingResolver) LookupNetIP(ctx context.Context, _, _ string) ([]netip.Addr, error) {
	if r.away.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("192.0.2.2")}, nil
}

// TestBackInTime ends outages of many lengths, in which attempts and resolvers hang: every session must be back within 30 s.
func TestBackInTime(t *testing.T) {
	var away atomic.Bool
	d := &dials{}
	d.answer = func(tunnel.DialConfig) (session, error) {
		if away.Load() {
			return nil, errHang
		}
		return newFake(), nil
	}
	cfg := Config{Edges: []string{"edge.example"}, Resolver: hangingResolver{&away}}
	bubble(t, d, cfg, func(c *Connector, _ func()) {
		time.Sleep(time.Second)
		for i := range 30 {
			away.Store(true)
			for _, a := range d.living() {
				a.s.lose(lost(idleTimeout{}))
			}
			time.Sleep(time.Duration(i*i) * 777 * time.Millisecond)
			away.Store(false)
			time.Sleep(30 * time.Second)
			synctest.Wait()
			for _, s := range c.Status().Sessions {
				if s.State != StateConnected {
					t.Errorf("outage %d: %+v, want it connected 30s after the end", i, s)
				}
			}
		}
	})
}

// TestUp resets the uptime only when no session is left.
func TestUp(t *testing.T) {
	var away atomic.Bool
	d := &dials{}
	d.answer = func(tunnel.DialConfig) (session, error) {
		if away.Load() {
			return nil, &net.OpError{Op: "dial", Err: errors.New("away")}
		}
		return newFake(), nil
	}
	bubble(t, d, Config{}, func(c *Connector, _ func()) {
		time.Sleep(time.Second)
		up := c.Status().Up
		if up.IsZero() {
			t.Fatal("no uptime with four sessions up")
		}
		for i := range 4 { // one after another
			list := d.of(i)
			list[len(list)-1].s.lose(lost(idleTimeout{}))
			time.Sleep(time.Minute)
		}
		if got := c.Status().Up; !got.Equal(up) {
			t.Errorf("uptime since %v, want %v: a session was up all the time", got, up)
		}
		if got := c.Degraded(); len(got) != 0 {
			t.Errorf("degraded: %q, want nothing", got)
		}
		away.Store(true)
		d.living()[0].s.lose(lost(idleTimeout{}))
		time.Sleep(time.Minute)
		if got := c.Degraded(); len(got) != 1 || !strings.Contains(got[0], "192.0.2.1 is not up: ") || !strings.Contains(got[0], "away") {
			t.Errorf("degraded: %q, want the session that is away, and why", got)
		}
		for _, a := range d.living() {
			a.s.lose(lost(idleTimeout{}))
		}
		time.Sleep(time.Minute)
		if got := c.Status(); !got.Up.IsZero() || got.Sessions[0].Error == "" {
			t.Errorf("%+v, want it down and the reason told", got)
		}
		away.Store(false)
		time.Sleep(time.Minute)
		if got := c.Status().Up; !got.After(up) {
			t.Errorf("uptime since %v after an outage, want a later time than %v", got, up)
		}
	})
}

// A path that loses large packets lets TCP connect and then nothing pass: the next attempts are with small segments, also
// those of other sessions. On another network all begins anew.
func TestStalledTCP(t *testing.T) {
	host := &changing{addrs: "192.0.2.8"}
	d := &dials{host: host.surroundings()}
	var good atomic.Bool
	d.answer = func(c tunnel.DialConfig) (session, error) {
		if c.SmallSegments || good.Load() {
			return carried(tunnel.CarrierTCP), nil
		}
		return nil, fmt.Errorf("both failed: %w", tunnel.ErrStalled)
	}
	bubble(t, d, Config{Carrier: CarrierTCP}, func(c *Connector, _ func()) {
		time.Sleep(2 * backoffCap)
		if n := len(d.living()); n != SessionsPerEdge {
			t.Errorf("%d sessions, want %d", n, SessionsPerEdge)
		}
		for _, a := range d.living() {
			if tries := len(d.of(a.reg.Index)); tries > 2 || !a.cfg.SmallSegments {
				t.Errorf("session %d: %d attempts, small segments is %v, want at most 2 and true", a.reg.Index, tries, a.cfg.SmallSegments)
			}
		}
		good.Store(true)
		host.set("192.0.2.9", 0)
		time.Sleep(time.Minute)
		for _, a := range d.living() {
			a.s.lose(errors.New("gone"))
		}
		time.Sleep(time.Minute)
		for _, a := range d.living() {
			if a.cfg.SmallSegments {
				t.Errorf("session %d: small segments on a network that needs none", a.reg.Index)
			}
		}
	})
}
